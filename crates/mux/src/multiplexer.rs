//! Many streams over one.
//!
//! yamux moves only while somebody polls it, so one task owns the connection. It ends, and with it every stream, when
//! the connection breaks or when every [`Mux`] of it is gone and its streams are closed.

use std::future::poll_fn;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

/// A stream: tokio's traits, half-close kept.
pub type Stream = Compat<yamux::Stream>;

/// Requests for streams, and accepted streams, that may wait for their turn.
const QUEUE_LENGTH: usize = 64;

/// yamux's smallest window for one stream, in bytes.
const WINDOW_BYTES: usize = 256 * 1024;

/// What a peer may cost. The guest is hostile: it could fill every window of every stream.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Streams at a time.
    pub streams: usize,
}

impl Limits {
    /// For the port `agent`.
    pub const AGENT: Self = Self { streams: 256 };
    /// For the port `ports`.
    pub const PORTS: Self = Self { streams: 512 };

    fn config(self) -> Config {
        let mut config = Config::default();
        // In this order: yamux checks the window against the number of streams at each call.
        config.set_max_num_streams(self.streams);
        config.set_max_connection_receive_window(Some(self.streams * WINDOW_BYTES));
        config.set_read_after_close(false);
        config
    }
}

/// Why there is no stream.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum MuxError {
    /// The connection is over.
    #[error("the channel to the guest is closed: {0}")]
    Closed(String),
    /// A limit was met.
    #[error("too many streams to the guest: {0}")]
    Busy(String),
}

/// One side of a connection. Clones are the same connection.
#[derive(Debug, Clone)]
pub struct Mux {
    opens: mpsc::Sender<oneshot::Sender<Result<Stream, MuxError>>>,
    accepts: std::sync::Arc<Mutex<mpsc::Receiver<Stream>>>,
    closed: watch::Receiver<Option<String>>,
    hang_up: std::sync::Arc<tokio::sync::Notify>,
}

impl Mux {
    /// The side that was told to begin: the host.
    pub fn client<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(io: T, limits: Limits) -> Self {
        Self::new(io, limits, Mode::Client)
    }

    /// The other side: the guest.
    pub fn server<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(io: T, limits: Limits) -> Self {
        Self::new(io, limits, Mode::Server)
    }

    fn new<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(io: T, limits: Limits, mode: Mode) -> Self {
        let (opens, wanted) = mpsc::channel(QUEUE_LENGTH);
        let (accepted, accepts) = mpsc::channel(QUEUE_LENGTH);
        let (end, closed) = watch::channel(None);
        let connection = Connection::new(io.compat(), limits.config(), mode);
        let hang_up = std::sync::Arc::new(tokio::sync::Notify::new());
        let told = std::sync::Arc::clone(&hang_up);
        let mut owner = Owner { connection, wanted: Some(wanted), pending: None, accepted };
        tokio::spawn(async move {
            let reason = tokio::select! {
                reason = poll_fn(|context| owner.poll(context)) => reason,
                () = told.notified() => "this side closed it".to_owned(),
            };
            owner.close().await;
            tracing::debug!(reason, "channel closed");
            end.send_replace(Some(reason));
        });
        Self { opens, accepts: std::sync::Arc::new(Mutex::new(accepts)), closed, hang_up }
    }

    /// Closes the connection, and waits until it is over.
    pub async fn close(&self) {
        self.hang_up.notify_one();
        self.closed().await;
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// When the connection is over, or has as many streams as it may.
    pub async fn open(&self) -> Result<Stream, MuxError> {
        let (reply, opened) = oneshot::channel();
        if self.opens.send(reply).await.is_ok()
            && let Ok(stream) = opened.await
        {
            return stream;
        }
        Err(MuxError::Closed(self.closed().await))
    }

    /// The next stream that the other side opened; `None` once the connection is over.
    pub async fn accept(&self) -> Option<Stream> {
        self.accepts.lock().await.recv().await
    }

    /// Waits for the end of the connection, and says why it ended.
    pub async fn closed(&self) -> String {
        let mut closed = self.closed.clone();
        match closed.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "its owner is gone".to_owned(),
        }
    }
}

type Reply = oneshot::Sender<Result<Stream, MuxError>>;

struct Owner<T> {
    connection: Connection<Compat<T>>,
    /// `None` once every [`Mux`] is gone.
    wanted: Option<mpsc::Receiver<Reply>>,
    pending: Option<Reply>,
    accepted: mpsc::Sender<Stream>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Owner<T> {
    async fn close(mut self) {
        // A peer that doesn't read can't keep us here: the connection is dropped when this future is.
        let closing = poll_fn(|context| self.connection.poll_close(context));
        let _ = tokio::time::timeout(std::time::Duration::from_secs(1), closing).await;
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<String> {
        self.poll_opens(context);
        loop {
            match self.connection.poll_next_inbound(context) {
                Poll::Ready(Some(Ok(stream))) => {
                    // A full queue resets the stream, so that a flood of streams can't pile up here.
                    let _ = self.accepted.try_send(stream.compat());
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(error.to_string()),
                Poll::Ready(None) => return Poll::Ready("the other side closed it".to_owned()),
                Poll::Pending => break,
            }
        }
        if self.wanted.is_none() && self.accepted.is_closed() {
            Poll::Ready("nobody uses it".to_owned())
        } else {
            Poll::Pending
        }
    }

    fn poll_opens(&mut self, context: &mut Context<'_>) {
        loop {
            if self.pending.is_none() {
                let Some(wanted) = &mut self.wanted else { return };
                match wanted.poll_recv(context) {
                    Poll::Ready(Some(reply)) => self.pending = Some(reply),
                    Poll::Ready(None) => self.wanted = None,
                    Poll::Pending => return,
                }
                continue;
            }
            let opened = match self.connection.poll_new_outbound(context) {
                Poll::Ready(Ok(stream)) => Ok(stream.compat()),
                Poll::Ready(Err(error)) => Err(MuxError::Busy(error.to_string())),
                Poll::Pending => return,
            };
            if let Some(reply) = self.pending.take() {
                let _ = reply.send(opened);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    fn pair() -> (Mux, Mux) {
        let (host, guest) = duplex(4096);
        (Mux::client(host, Limits::AGENT), Mux::server(guest, Limits::AGENT))
    }

    #[tokio::test]
    async fn a_half_closed_stream_still_carries_the_answer() {
        let (host, guest) = pair();
        let server = tokio::spawn(async move {
            let mut stream = guest.accept().await.unwrap();
            let mut question = String::new();
            stream.read_to_string(&mut question).await.unwrap();
            stream.write_all(question.to_uppercase().as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
            guest
        });
        let mut stream = host.open().await.unwrap();
        stream.write_all(b"knock").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "KNOCK");
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_stream_that_nobody_reads_does_not_stall_the_others() {
        let (host, guest) = pair();
        let mut stalled = host.open().await.unwrap();
        stalled.write_all(b"x").await.unwrap();
        let never_read = guest.accept().await.unwrap();
        let flood = tokio::spawn(async move {
            let block = vec![0; 64 * 1024];
            while stalled.write_all(&block).await.is_ok() {}
        });
        let echo = tokio::spawn(async move {
            let stream = guest.accept().await.unwrap();
            let (mut reader, mut writer) = tokio::io::split(stream);
            tokio::io::copy(&mut reader, &mut writer).await.unwrap();
            writer.shutdown().await.unwrap();
            guest
        });
        let (mut reader, mut writer) = tokio::io::split(host.open().await.unwrap());
        let sent = vec![7; 4 * 1024 * 1024];
        let expected = sent.clone();
        tokio::spawn(async move {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        assert!(received == expected);
        assert!(!flood.is_finished(), "the flood met back-pressure");
        drop(never_read);
        drop(echo.await.unwrap());
    }

    #[tokio::test]
    async fn the_end_of_the_connection_ends_everything_on_it() {
        let (host_io, guest_io) = duplex(4096);
        let (host, guest) = (Mux::client(host_io, Limits::AGENT), Mux::server(guest_io, Limits::AGENT));
        let mut stream = host.open().await.unwrap();
        stream.write_all(b"x").await.unwrap();
        drop(guest.accept().await.unwrap());
        drop(guest);
        assert!(!host.closed().await.is_empty());
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
        assert!(matches!(host.open().await, Err(MuxError::Closed(_))));
        assert!(host.accept().await.is_none());
    }
}
