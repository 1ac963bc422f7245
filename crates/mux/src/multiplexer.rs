//! Many streams over one.
//!
//! yamux moves only while somebody polls it, so one task owns the connection. It ends, and with it every stream, when
//! the connection breaks or when every [`Mux`] of it is gone and its streams are closed.

use std::future::poll_fn;
use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

use crate::stream::{Left, Stream};
use crate::wire::{Sending, Wire};

/// Requests for streams that may wait for their turn.
const QUEUE_LENGTH: usize = 64;

/// yamux's smallest window for one stream, in bytes.
const WINDOW_BYTES: usize = 256 * 1024;

/// How long a stream is waited for where there are as many as there may be. Most requests are over in a moment, so a burst
/// passes; streams that stay are not worth waiting for.
const ROOM_WITHIN: Duration = Duration::from_secs(2);

/// How many streams one side may have. To yamux one too many is the end of the connection, so it must never come to that:
/// the host counts before it opens, and the guest allows more than the host ever opens.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// At a time, for clients.
    pub streams: usize,
    /// Beyond these, for what the host itself asks: a VM whose clients use all that there are must still be counted, put to
    /// sleep and shut down.
    pub reserved: usize,
}

impl Limits {
    /// For the port `agent`: of `docker run` that stay, each of which takes two or three, some 200.
    pub const AGENT: Self = Self { streams: 512, reserved: 32 };
    /// For the port `ports`.
    pub const PORTS: Self = Self { streams: 512, reserved: 0 };

    /// What a hostile guest may open by itself, and nobody accepts.
    const SPARE: usize = 64;

    /// A stream that the host has dropped lives on in the guest until that has heard of it and is done with it.
    const GUEST_TIMES: usize = 4;

    /// All that this side may have.
    fn of(self, mode: Mode) -> usize {
        let host = self.streams + self.reserved + Self::SPARE;
        match mode {
            Mode::Client => host,
            Mode::Server => host * Self::GUEST_TIMES,
        }
    }

    /// Those of them that may wait to be accepted. The host may open all that it may before the guest comes to accept any.
    fn unaccepted(self, mode: Mode) -> usize {
        match mode {
            Mode::Client => Self::SPARE,
            Mode::Server => self.of(mode),
        }
    }

    fn config(self, mode: Mode) -> Config {
        let streams = self.of(mode);
        let mut config = Config::default();
        // So windows don't grow: the guest is hostile, and could fill each of them. In this order: yamux checks the window
        // against the number of streams at each call.
        config.set_max_num_streams(streams);
        config.set_max_connection_receive_window(Some(streams * WINDOW_BYTES));
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
    /// There are as many as there may be; they go on.
    #[error(
        "the {0} connections to the guest that there may be are all in use; try again when one has ended"
    )]
    Busy(usize),
}

/// One side of a connection. Clones are the same connection.
#[derive(Debug, Clone)]
pub struct Mux {
    opens: mpsc::Sender<Wish>,
    accepts: Arc<Mutex<mpsc::Receiver<Stream>>>,
    closed: watch::Receiver<Option<String>>,
    hang_up: Arc<Notify>,
    streams: Share,
    reserved: Share,
}

/// Streams that may still be opened.
#[derive(Debug, Clone)]
struct Share {
    permits: Arc<Semaphore>,
    limit: usize,
}

impl Share {
    fn new(limit: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(limit)), limit }
    }

    async fn permit(&self) -> Result<OwnedSemaphorePermit, MuxError> {
        let permit = timeout(ROOM_WITHIN, Arc::clone(&self.permits).acquire_owned()).await;
        permit.ok().and_then(Result::ok).ok_or(MuxError::Busy(self.limit))
    }
}

impl Mux {
    /// The side that was told to begin, and that opens streams: the host.
    pub fn client<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(io: T, limits: Limits) -> Self {
        Self::new(io, limits, Mode::Client)
    }

    /// The other side: the guest.
    pub fn server<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(io: T, limits: Limits) -> Self {
        Self::new(io, limits, Mode::Server)
    }

    fn new<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(io: T, limits: Limits, mode: Mode) -> Self {
        let (opens, wanted) = mpsc::channel(QUEUE_LENGTH);
        let (accepted, accepts) = mpsc::channel(limits.unaccepted(mode));
        let (end, closed) = watch::channel(None);
        // As many wait here as there are streams.
        let (leave, left) = mpsc::unbounded_channel();
        let sending = Sending::default();
        let wire = Wire::new(io, sending.clone());
        let connection = Connection::new(wire.compat(), limits.config(mode), mode);
        let hang_up = Arc::new(Notify::new());
        let told = Arc::clone(&hang_up);
        let mut owner = Owner {
            connection,
            sending,
            wanted: Some(wanted),
            pending: None,
            accepted,
            leave,
            left,
            leaving: Vec::new(),
            settled: Vec::new(),
        };
        tokio::spawn(async move {
            let reason = tokio::select! {
                reason = poll_fn(|context| owner.poll(context)) => reason,
                () = told.notified() => "this side closed it".to_owned(),
            };
            owner.close().await;
            tracing::debug!(reason, "channel closed");
            end.send_replace(Some(reason));
        });
        let (streams, reserved) = (Share::new(limits.streams), Share::new(limits.reserved));
        Self { opens, accepts: Arc::new(Mutex::new(accepts)), closed, hang_up, streams, reserved }
    }

    /// Closes the connection, and waits until it is over.
    pub async fn close(&self) {
        self.hang_up.notify_one();
        self.closed().await;
    }

    /// Opens a stream for a client. Where there is none to be had, one is waited for, for a moment.
    ///
    /// # Errors
    /// When the connection is over, or has as many streams as it may.
    pub async fn open(&self) -> Result<Stream, MuxError> {
        self.open_of(&self.streams).await
    }

    /// Opens a stream of those that are kept for the host itself.
    ///
    /// # Errors
    /// See [`Self::open`].
    pub async fn open_reserved(&self) -> Result<Stream, MuxError> {
        self.open_of(&self.reserved).await
    }

    async fn open_of(&self, share: &Share) -> Result<Stream, MuxError> {
        let permit = tokio::select! {
            biased;
            permit = share.permit() => permit?,
            reason = self.closed() => return Err(MuxError::Closed(reason)),
        };
        let (reply, opened) = oneshot::channel();
        if self.opens.send(Wish { permit, reply }).await.is_ok()
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

/// Somebody wants a stream.
#[derive(Debug)]
struct Wish {
    permit: OwnedSemaphorePermit,
    reply: oneshot::Sender<Result<Stream, MuxError>>,
}

struct Owner<T> {
    connection: Connection<Compat<Wire<T>>>,
    sending: Sending,
    /// `None` once every [`Mux`] is gone.
    wanted: Option<mpsc::Receiver<Wish>>,
    pending: Option<Wish>,
    accepted: mpsc::Sender<Stream>,
    /// For streams, to tell that they are dropped.
    leave: mpsc::UnboundedSender<Left>,
    left: mpsc::UnboundedReceiver<Left>,
    /// Dropped, and perhaps still counted by yamux.
    leaving: Vec<Left>,
    /// The same, and all was sent since.
    settled: Vec<Left>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Owner<T> {
    async fn close(mut self) {
        // A peer that doesn't read can't keep us here: the connection is dropped when this future is.
        let closing = poll_fn(|context| self.connection.poll_close(context));
        let _ = timeout(Duration::from_secs(1), closing).await;
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<String> {
        while let Poll::Ready(Some(left)) = self.left.poll_recv(context) {
            self.leaving.push(left);
        }
        self.poll_opens(context);
        loop {
            match self.connection.poll_next_inbound(context) {
                Poll::Ready(Some(Ok(stream))) => {
                    // A full queue resets the stream, so that a flood of streams can't pile up here.
                    let _ = self.accepted.try_send(Stream::new(stream, None, self.leave.clone()));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(error.to_string()),
                Poll::Ready(None) => return Poll::Ready("the other side closed it".to_owned()),
                Poll::Pending => break,
            }
        }
        let all_have_left = self.leaving.is_empty() && self.settled.is_empty();
        if !all_have_left && self.sending.is_done() {
            // yamux forgets a stream that was dropped when it has sent all that it had to say. It may pause with something left;
            // the next time it has sent that as well.
            for reset in self.settled.drain(..).filter_map(|left| left.reset) {
                self.sending.reset(reset);
            }
            self.settled = mem::take(&mut self.leaving);
            // For what is to be sent now, and for who waits for a stream.
            context.waker().wake_by_ref();
        }
        if self.wanted.is_none() && self.accepted.is_closed() {
            Poll::Ready("nobody uses it".to_owned())
        } else {
            Poll::Pending
        }
    }

    fn poll_opens(&mut self, context: &mut Context<'_>) {
        loop {
            let Some(wish) = self.pending.take() else {
                let Some(wanted) = &mut self.wanted else { return };
                match wanted.poll_recv(context) {
                    Poll::Ready(Some(wish)) => self.pending = Some(wish),
                    Poll::Ready(None) => self.wanted = None,
                    Poll::Pending => return,
                }
                continue;
            };
            if wish.reply.is_closed() {
                continue;
            }
            let Wish { permit, reply } = wish;
            let opened = match self.connection.poll_new_outbound(context) {
                Poll::Ready(Ok(stream)) => Ok(Stream::new(stream, Some(permit), self.leave.clone())),
                Poll::Ready(Err(error)) => Err(MuxError::Closed(error.to_string())),
                Poll::Pending => {
                    self.pending = Some(Wish { permit, reply });
                    return;
                }
            };
            let _ = reply.send(opened);
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

    /// Two streams at a time for clients, and one for the host.
    const FEW: Limits = Limits { streams: 2, reserved: 1 };

    /// A guest that sends back what comes on each stream, until the host ends it.
    fn echoing() -> Mux {
        let (host, guest) = duplex(4096);
        let guest = Mux::server(guest, FEW);
        tokio::spawn(async move {
            while let Some(stream) = guest.accept().await {
                tokio::spawn(async move {
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
        Mux::client(host, FEW)
    }

    async fn echoes(stream: &mut Stream) {
        let mut back = [0; 5];
        stream.write_all(b"hello").await.unwrap();
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"hello");
    }

    #[tokio::test(start_paused = true)]
    async fn one_stream_too_many_is_refused_and_the_others_go_on() {
        let host = echoing();
        let (mut one, mut other) = (host.open().await.unwrap(), host.open().await.unwrap());
        echoes(&mut one).await;
        assert_eq!(host.open().await.unwrap_err(), MuxError::Busy(2));
        echoes(&mut one).await;
        echoes(&mut other).await;
        let mut reserved = host.open_reserved().await.expect("the host's own requests have theirs");
        echoes(&mut reserved).await;
        drop(one);
        echoes(&mut host.open().await.expect("there is room again")).await;
    }

    #[tokio::test]
    async fn a_stream_is_waited_for_as_most_are_over_soon() {
        let host = echoing();
        let (mut one, _other) = (host.open().await.unwrap(), host.open().await.unwrap());
        let waiting = tokio::spawn({
            let host = host.clone();
            async move { host.open().await }
        });
        echoes(&mut one).await;
        drop(one);
        echoes(&mut waiting.await.unwrap().unwrap()).await;
    }

    #[tokio::test]
    async fn streams_that_come_and_go_never_are_too_many() {
        let host = echoing();
        for _ in 0..3 * (FEW.streams + FEW.reserved + Limits::SPARE) * Limits::GUEST_TIMES {
            let mut stream = host.open().await.unwrap();
            stream.write_all(b"x").await.unwrap();
            stream.shutdown().await.unwrap();
        }
        echoes(&mut host.open().await.unwrap()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn streams_that_a_guest_that_reads_nothing_has_not_heard_the_end_of_count() {
        let (host, guest) = duplex(64);
        let host = Mux::client(host, FEW);
        let mut refused = 0;
        for _ in 0..2 * (FEW.streams + Limits::SPARE) {
            match host.open().await {
                Ok(mut stream) => drop(timeout(ROOM_WITHIN, stream.write_all(&[0; 4096])).await),
                Err(error) => {
                    assert_eq!(error, MuxError::Busy(2));
                    refused += 1;
                }
            }
        }
        assert!(refused > 0);
        let guest = Mux::server(guest, FEW);
        drop(guest.accept().await.unwrap());
        host.open().await.expect("there is room again");
    }

    #[tokio::test]
    async fn very_many_streams_can_be_opened_before_one_is_accepted() {
        let (host, guest) = pair();
        let mut streams = Vec::new();
        // yamux itself opens no more than 256 that nobody has answered.
        for number in 0..200_u8 {
            let mut stream = host.open().await.unwrap();
            stream.write_all(&[number]).await.unwrap();
            streams.push(stream);
        }
        for number in 0..200 {
            assert_eq!(guest.accept().await.unwrap().read_u8().await.unwrap(), number);
        }
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
