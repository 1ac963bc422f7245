//! One client connection.
//!
//! ```text
//! head ─► lease ─► dial ─► request ──► body ─┐
//!  ▲                       answer ◄── head ◄─┴─► 101, or 200 on an endpoint that hijacks: bytes both ways, the end
//!  └──── keep-alive ◄───── body
//! ```
//!
//! Bounds: a head has 64 KiB and must be complete 30 s after its first byte; what a client pipelines while its request
//! is served waits in 64 KiB here and else in the socket. A client that closes its connection gives its lease back at
//! once, also while the VM is still starting. (One that closed only its sending side is served to the end.)

use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::BytesMut;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::time::timeout;

use crate::class::Class;
use crate::framing::BodyScanner;
use crate::head::{
    HeadError, HeadScanner, RequestHead, ResponseHead, parse_request, parse_response, skip_empty_lines,
};

/// From a head's first byte to its last.
const HEAD_WITHIN: Duration = Duration::from_secs(30);

/// Bytes that are read at a time, and that a client may send ahead.
const BUFFER_BYTES: usize = 64 * 1024;

/// How often a client that has closed its sending side is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Where leases come from.
pub trait Engine: Clone + Send + Sync + 'static {
    /// What it gives.
    type Lease: Lease;

    /// Waits until the engine serves. Dropping the future takes the wish back.
    fn lease(
        &self,
        request: &RequestHead,
        class: Class,
    ) -> impl Future<Output = Result<Self::Lease, Refusal>> + Send;
}

/// The engine, for one request; gone when dropped.
pub trait Lease: Send + Sync + 'static {
    /// A connection to the engine.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin;

    /// Connects to the engine.
    fn dial(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;

    /// Waits until the engine is lost although this is held, and says why.
    fn ended(&self) -> impl Future<Output = String> + Send;
}

/// An answer instead of the engine's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP's.
    pub status: u16,
    /// What Docker clients print.
    pub message: String,
}

/// How a request ended.
enum Next {
    /// The connection may carry another.
    KeepAlive,
    /// It may not.
    Close,
}

/// Why a connection ends early.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the client is gone")]
    ClientGone,
    #[error("{}", .0.message)]
    Refused(Refusal),
}

impl Broken {
    fn refused(status: u16, message: impl ToString) -> Self {
        Self::Refused(Refusal { status, message: message.to_string() })
    }
}

impl From<HeadError> for Broken {
    fn from(error: HeadError) -> Self {
        Self::refused(400, error)
    }
}

/// Serves a client until it or we are done with the connection.
pub async fn serve<E: Engine>(mut client: UnixStream, engine: E) {
    let mut pending = BytesMut::new();
    loop {
        let (mut reader, mut writer) = client.split();
        let mut answered = false;
        let outcome = exchange(&mut reader, &mut writer, &mut pending, &engine, &mut answered).await;
        match outcome {
            Ok(Next::KeepAlive) => {}
            Ok(Next::Close) => break,
            Err(Broken::Refused(refusal)) if !answered => {
                let _ = writer.write_all(&refuse(&refusal)).await;
                break;
            }
            Err(error) => {
                tracing::debug!(%error, "connection ended");
                return;
            }
        }
    }
    let _ = client.shutdown().await;
}

fn refuse(refusal: &Refusal) -> Vec<u8> {
    let body = serde_json::json!({ "message": refusal.message }).to_string();
    let reason = match refusal.status {
        400 => "Bad Request",
        409 => "Conflict",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        _ => "Error",
    };
    let (status, length) = (refusal.status, body.len());
    format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

async fn exchange<E: Engine>(
    reader: &mut ReadHalf<'_>,
    writer: &mut WriteHalf<'_>,
    pending: &mut BytesMut,
    engine: &E,
    answered: &mut bool,
) -> Result<Next, Broken> {
    let Some(request) = request_head(reader, pending).await? else { return Ok(Next::Close) };
    let class = Class::of(&request.method, &request.target);
    let lease = tokio::select! {
        lease = engine.lease(&request, class) => lease.map_err(Broken::Refused)?,
        gone = until_gone(reader, pending) => return Err(gone),
    };
    let mut engine = lease
        .dial()
        .await
        .map_err(|error| Broken::refused(502, format!("the engine can't be reached: {error}")))?;
    let mut lease = Some(lease);
    let (mut from_engine, mut to_engine) = tokio::io::split(&mut engine);

    to_engine.write_all(&request.bytes).await?;
    let mut upload =
        Upload { body: BodyScanner::new(request.framing), reader, pending, engine: &mut to_engine };
    let mut answer = Answer { bytes: BytesMut::new(), scanner: HeadScanner::default() };
    let after = {
        // One future from the head to the end, so that no byte of a body is lost half-way.
        let sending = upload.run();
        tokio::pin!(sending);
        let response = loop {
            let head = tokio::select! {
                head = answer.head(&mut from_engine, &request.method) => head?,
                gone = &mut sending => return Err(gone),
                reason = ended(lease.as_ref()) => return Err(Broken::refused(502, reason)),
            };
            *answered = true;
            writer.write_all(&head.bytes).await?;
            if !head.is_interim() {
                break head;
            }
        };
        if response.status == 101
            || (class == Class::Hijacks && response.status == 200 && hijacked(&response))
        {
            After::Hijacked
        } else {
            if class == Class::Weak {
                // The stream ends with the VM, and the VM doesn't wait for the stream.
                lease = None;
            }
            let mut rest = BodyScanner::new(response.framing);
            tokio::select! {
                biased;
                done = pass_body(&mut rest, &mut answer.bytes, &mut from_engine, writer) => done?,
                gone = &mut sending => return Err(gone),
                reason = ended(lease.as_ref()) => return Err(Broken::refused(502, reason)),
            }
            After::Answered(response)
        }
    };
    let sent = upload.body.is_done();
    match after {
        // A body that the engine didn't want stands between this request and the next.
        After::Answered(response) if request.keep_alive && response.keep_alive && sent => Ok(Next::KeepAlive),
        After::Answered(_) => Ok(Next::Close),
        After::Hijacked => {
            to_engine.write_all(pending).await?;
            pending.clear();
            writer.write_all(&answer.bytes).await?;
            tokio::select! {
                done = splice(reader, writer, &mut from_engine, &mut to_engine) => done.map(|()| Next::Close),
                reason = ended(lease.as_ref()) => Err(Broken::refused(502, reason)),
            }
        }
    }
}

/// What follows an answer's head.
enum After {
    /// Its body, which has passed.
    Answered(ResponseHead),
    /// Another protocol.
    Hijacked,
}

/// The way of a request's body to the engine.
struct Upload<'a, 'client, W> {
    body: BodyScanner,
    reader: &'a mut ReadHalf<'client>,
    pending: &'a mut BytesMut,
    engine: &'a mut W,
}

impl<W: AsyncWrite + Unpin> Upload<'_, '_, W> {
    /// Sends the body on to its end, then waits until the client is gone.
    async fn run(&mut self) -> Broken {
        while !self.body.is_done() {
            match self.part().await {
                Ok(true) => {}
                // An engine that has answered early reads no more; its answer counts.
                Ok(false) => break,
                Err(error) => return error,
            }
        }
        until_gone(self.reader, self.pending).await
    }

    /// Sends on what there is, or waits for more of it. `false`: the engine doesn't read any more.
    async fn part(&mut self) -> Result<bool, Broken> {
        if self.pending.is_empty() {
            self.pending.reserve(BUFFER_BYTES);
            if self.reader.read_buf(self.pending).await? == 0 {
                return Err(Broken::ClientGone);
            }
        }
        let used = self.body.advance(self.pending, |_| {}).map_err(|error| Broken::refused(400, error))?;
        let part = self.pending.split_to(used);
        Ok(self.engine.write_all(&part).await.is_ok() && self.engine.flush().await.is_ok())
    }
}

/// dockerd answers 200 to clients that send no `Upgrade`, and turns the connection into a stream all the same.
fn hijacked(response: &ResponseHead) -> bool {
    matches!(response.framing, crate::framing::BodyFraming::UntilClose)
}

async fn ended<L: Lease>(lease: Option<&L>) -> String {
    match lease {
        Some(lease) => lease.ended().await,
        None => std::future::pending().await,
    }
}

/// The next request's head; `None` when the client is done.
async fn request_head(
    reader: &mut ReadHalf<'_>,
    pending: &mut BytesMut,
) -> Result<Option<RequestHead>, Broken> {
    let mut scanner = HeadScanner::default();
    skip_empty_lines(pending);
    while pending.is_empty() {
        if reader.read_buf(pending).await? == 0 {
            return Ok(None);
        }
        skip_empty_lines(pending);
    }
    let complete = async {
        loop {
            if let Some(head) = scanner.take(pending)? {
                return Ok(parse_request(head)?);
            }
            if reader.read_buf(pending).await? == 0 {
                return Err(Broken::ClientGone);
            }
        }
    };
    let late = |_| Broken::refused(400, "the request's head did not come in time");
    timeout(HEAD_WITHIN, complete).await.map_err(late)?.map(Some)
}

/// What came of the answer beyond what was parsed.
struct Answer {
    bytes: BytesMut,
    scanner: HeadScanner,
}

impl Answer {
    /// The next head. Cancel-safe: what was read stays here.
    async fn head(
        &mut self,
        engine: &mut (impl AsyncRead + Unpin),
        method: &str,
    ) -> Result<ResponseHead, Broken> {
        loop {
            if let Some(head) = self.scanner.take(&mut self.bytes).map_err(nonsense)? {
                return parse_response(head, method).map_err(nonsense);
            }
            if engine.read_buf(&mut self.bytes).await? == 0 {
                return Err(Broken::refused(502, "the engine closed the connection without an answer"));
            }
        }
    }
}

fn nonsense(error: HeadError) -> Broken {
    Broken::refused(502, format!("the engine's answer makes no sense: {error}"))
}

/// Passes the answer's body on to its end.
async fn pass_body(
    body: &mut BodyScanner,
    bytes: &mut BytesMut,
    engine: &mut (impl AsyncRead + Unpin),
    client: &mut WriteHalf<'_>,
) -> Result<(), Broken> {
    while !body.is_done() {
        if bytes.is_empty() {
            bytes.reserve(BUFFER_BYTES);
            if engine.read_buf(bytes).await? == 0 {
                let whole = body.is_until_close();
                return if whole {
                    Ok(())
                } else {
                    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
                };
            }
        }
        let used = body.advance(bytes, |_| {}).map_err(|error| Broken::refused(502, error))?;
        client.write_all(&bytes.split_to(used)).await?;
    }
    Ok(())
}

/// Waits until the client has closed its connection. What it sends meanwhile is kept for later, up to a limit.
async fn until_gone(reader: &mut ReadHalf<'_>, pending: &mut BytesMut) -> Broken {
    loop {
        let Ok(ready) = reader.ready(Interest::READABLE).await else { return Broken::ClientGone };
        if ready.is_error() {
            return Broken::ClientGone;
        }
        if pending.len() >= BUFFER_BYTES {
            return std::future::pending().await;
        }
        pending.reserve(BUFFER_BYTES - pending.len());
        match reader.try_read_buf(pending) {
            // Only its sending side is closed, as far as we know.
            Ok(0) => return until_hung_up(reader).await,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return error.into(),
        }
    }
}

/// A client that closed its sending side may still read. tokio tells of a socket that is closed both ways only together
/// with its being writable, which it always is: so it is looked at now and then.
async fn until_hung_up(reader: &ReadHalf<'_>) -> Broken {
    let socket: &UnixStream = reader.as_ref();
    loop {
        let mut state = [PollFd::new(socket, PollFlags::empty())];
        let polled = poll(&mut state, Some(&Timespec::default()));
        if polled.is_err() || state[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
            return Broken::ClientGone;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Bytes both ways, each direction to its own end.
async fn splice(
    reader: &mut ReadHalf<'_>,
    writer: &mut WriteHalf<'_>,
    from_engine: &mut (impl AsyncRead + Unpin),
    to_engine: &mut (impl AsyncWrite + Unpin),
) -> Result<(), Broken> {
    let up = async {
        tokio::io::copy(reader, to_engine).await?;
        to_engine.shutdown().await
    };
    let down = async {
        tokio::io::copy(from_engine, writer).await?;
        writer.shutdown().await
    };
    tokio::pin!(up, down);
    // The engine decides when it is over: once it has ended its side, nobody reads what the client still sends.
    tokio::select! {
        done = &mut down => Ok(done?),
        done = &mut up => { done?; Ok(down.await?) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{DuplexStream, duplex};

    use super::*;

    /// An engine whose connections are handed to a script.
    #[derive(Clone)]
    struct Script {
        dials: tokio::sync::mpsc::Sender<DuplexStream>,
        held: Arc<AtomicUsize>,
        refusal: Option<Refusal>,
    }

    struct Held(Script);

    impl Drop for Held {
        fn drop(&mut self) {
            self.0.held.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Engine for Script {
        type Lease = Held;

        async fn lease(&self, request: &RequestHead, _: Class) -> Result<Held, Refusal> {
            if request.target == "/never" {
                std::future::pending::<()>().await;
            }
            match &self.refusal {
                Some(refusal) => Err(refusal.clone()),
                None => {
                    self.held.fetch_add(1, Ordering::SeqCst);
                    Ok(Held(self.clone()))
                }
            }
        }
    }

    impl Lease for Held {
        type Stream = DuplexStream;

        async fn dial(&self) -> io::Result<DuplexStream> {
            let (ours, theirs) = duplex(1024);
            self.0.dials.send(theirs).await.map_err(io::Error::other)?;
            Ok(ours)
        }

        async fn ended(&self) -> String {
            std::future::pending().await
        }
    }

    struct Stage {
        client: UnixStream,
        dials: tokio::sync::mpsc::Receiver<DuplexStream>,
        held: Arc<AtomicUsize>,
        relay: tokio::task::JoinHandle<()>,
    }

    fn stage(refusal: Option<Refusal>) -> Stage {
        let (client, ours) = UnixStream::pair().unwrap();
        let (sender, dials) = tokio::sync::mpsc::channel(8);
        let held = Arc::new(AtomicUsize::new(0));
        let script = Script { dials: sender, held: Arc::clone(&held), refusal };
        Stage { client, dials, held, relay: tokio::spawn(serve(ours, script)) }
    }

    async fn expect(stream: &mut (impl AsyncRead + Unpin), text: &str) {
        let mut bytes = vec![0; text.len()];
        stream.read_exact(&mut bytes).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes), text);
    }

    #[tokio::test]
    async fn pipelined_requests_are_served_in_order_and_hold_nothing_between() {
        let mut stage = stage(None);
        let (first, second) = ("POST /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "GET /b HTTP/1.1\r\n\r\n");
        stage.client.write_all(format!("{first}{second}").as_bytes()).await.unwrap();
        for (request, answer) in [
            (first, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
            (second, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"),
        ] {
            let mut engine = stage.dials.recv().await.unwrap();
            expect(&mut engine, request).await;
            engine.write_all(answer.as_bytes()).await.unwrap();
            expect(&mut stage.client, answer).await;
        }
        stage.client.shutdown().await.unwrap();
        stage.relay.await.unwrap();
        assert_eq!(stage.held.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_hijacked_stream_keeps_its_half_close() {
        for answer in [
            "HTTP/1.1 101 UPGRADED\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n",
        ] {
            let mut stage = stage(None);
            let request = "POST /v1.45/exec/x/start HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";
            stage.client.write_all(request.as_bytes()).await.unwrap();
            let mut engine = stage.dials.recv().await.unwrap();
            expect(&mut engine, request).await;
            engine.write_all(answer.as_bytes()).await.unwrap();
            expect(&mut stage.client, answer).await;
            stage.client.write_all(b"stdin").await.unwrap();
            stage.client.shutdown().await.unwrap();
            let mut input = String::new();
            engine.read_to_string(&mut input).await.unwrap();
            assert_eq!(input, "stdin");
            engine.write_all(b"stdout").await.unwrap();
            drop(engine);
            let mut output = String::new();
            stage.client.read_to_string(&mut output).await.unwrap();
            assert_eq!(output, "stdout");
            stage.relay.await.unwrap();
            assert_eq!(stage.held.load(Ordering::SeqCst), 0);
        }
    }

    #[tokio::test]
    async fn a_client_that_goes_gives_its_lease_back_at_once() {
        let mut stage = stage(None);
        stage.client.write_all(b"GET /containers/x/logs?follow=1 HTTP/1.1\r\n\r\n").await.unwrap();
        let mut engine = stage.dials.recv().await.unwrap();
        let mut head = [0; 16];
        engine.read_exact(&mut head).await.unwrap();
        assert_eq!(stage.held.load(Ordering::SeqCst), 1);
        drop(stage.client);
        stage.relay.await.unwrap();
        assert_eq!(stage.held.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_client_that_goes_while_the_vm_starts_is_not_waited_for() {
        let mut stage = stage(None);
        stage.client.write_all(b"GET /never HTTP/1.1\r\n\r\n").await.unwrap();
        drop(stage.client);
        stage.relay.await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_is_an_answer_in_dockers_own_form() {
        let mut stage = stage(Some(Refusal { status: 503, message: "no \"VM\"".into() }));
        stage.client.write_all(b"GET /info HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stage.client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{answer}");
        assert!(answer.ends_with(r#"{"message":"no \"VM\""}"#), "{answer}");
    }

    #[tokio::test]
    async fn what_could_smuggle_a_request_is_refused() {
        let mut stage = stage(None);
        let request = b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n";
        stage.client.write_all(request).await.unwrap();
        let mut answer = String::new();
        stage.client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(stage.dials.try_recv().is_err());
    }
}
