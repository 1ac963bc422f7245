//! The client's side of a connection: its requests, and whether it is still there.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use bytes::BytesMut;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::time::timeout;

use crate::engine::Refusal;
use crate::framing::{BodyFraming, BodyScanner};
use crate::head::{HeadError, HeadScanner, RequestHead, parse_request, skip_empty_lines};
use crate::mounts::BODY_BYTES_MAX;

/// From a head's first byte to its last.
const HEAD_WITHIN: Duration = Duration::from_secs(30);

/// Between two parts of a body that must be known whole.
const PART_WITHIN: Duration = Duration::from_secs(30);

/// Bytes that are read at a time, and that a client may send ahead.
pub(crate) const BUFFER_BYTES: usize = 64 * 1024;

/// How often a client that has closed its sending side is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How long what a client still sends is read after its last answer, so that it can finish sending and see the answer.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);

/// Why a connection ends early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the client is gone")]
    ClientGone,
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// The engine, or the way to it, went; why may be known to whoever holds the VM.
    #[error("{0}")]
    EngineLost(String),
}

impl Broken {
    pub(crate) fn refused(status: u16, message: impl ToString) -> Self {
        Self::Refused(Refusal { status, message: message.to_string() })
    }
}

impl From<HeadError> for Broken {
    fn from(error: HeadError) -> Self {
        Self::refused(400, error)
    }
}

/// The next request's head; `None` when the client is done.
pub(crate) async fn request_head(
    reader: &mut ReadHalf<'_>,
    pending: &mut BytesMut,
) -> Result<Option<RequestHead>, Broken> {
    let mut scanner = HeadScanner::default();
    skip_empty_lines(pending);
    // Half of an empty line may still become one.
    while pending.is_empty() || pending.as_ref() == b"\r" {
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

/// A whole body, of a request that is not passed on before it is known.
pub(crate) async fn whole_body(
    request: &RequestHead,
    reader: &mut ReadHalf<'_>,
    writer: &mut WriteHalf<'_>,
    pending: &mut BytesMut,
) -> Result<Vec<u8>, Broken> {
    let too_long = || Broken::refused(413, format!("the body is over the limit of {BODY_BYTES_MAX} bytes"));
    if let BodyFraming::Length(length) = request.framing
        && length > BODY_BYTES_MAX as u64
    {
        return Err(too_long());
    }
    if request.expects_continue && pending.is_empty() {
        writer.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    let (mut scanner, mut body) = (BodyScanner::new(request.framing), Vec::new());
    loop {
        let used = scanner
            .advance(pending, |part| body.extend_from_slice(part))
            .map_err(|error| Broken::refused(400, error))?;
        let _ = pending.split_to(used);
        if body.len() > BODY_BYTES_MAX {
            return Err(too_long());
        }
        if scanner.is_done() {
            return Ok(body);
        }
        pending.reserve(BUFFER_BYTES);
        let part = timeout(PART_WITHIN, reader.read_buf(pending)).await;
        if part.map_err(|_| Broken::refused(408, "the request's body did not come in time"))?? == 0 {
            return Err(Broken::ClientGone);
        }
    }
}

/// Waits until the client has closed its connection. What it sends meanwhile is kept for later, up to a limit.
pub(crate) async fn until_gone(reader: &mut ReadHalf<'_>, pending: &mut BytesMut) -> Broken {
    loop {
        if pending.len() >= BUFFER_BYTES {
            return until_hung_up(reader.as_ref()).await;
        }
        let Ok(ready) = reader.ready(Interest::READABLE).await else { return Broken::ClientGone };
        if ready.is_error() {
            return Broken::ClientGone;
        }
        pending.reserve(BUFFER_BYTES - pending.len());
        match reader.try_read_buf(pending) {
            // Only its sending side is closed, as far as we know.
            Ok(0) => return until_hung_up(reader.as_ref()).await,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return error.into(),
        }
    }
}

/// A client that closed its sending side may still read. tokio tells of a socket that is closed both ways only together
/// with its being writable, which it always is: so it is looked at now and then.
pub(crate) async fn until_hung_up(client: &impl AsFd) -> Broken {
    loop {
        let mut state = [PollFd::new(client, PollFlags::empty())];
        let polled = poll(&mut state, Some(&Timespec::default()));
        if polled.is_err() || state[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
            return Broken::ClientGone;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Answers a client that isn't served, whatever it is sending. Takes ten seconds at most.
pub async fn refuse(mut client: UnixStream, refusal: &Refusal) {
    let response = refusal.to_response();
    if matches!(timeout(DRAIN_WITHIN, client.write_all(&response)).await, Ok(Ok(()))) {
        finish(client).await;
    }
}

/// Ends a connection so that its last answer arrives: a client that is still sending would else meet a reset first.
pub(crate) async fn finish(mut client: UnixStream) {
    if client.shutdown().await.is_err() {
        return;
    }
    let mut buffer = vec![0; BUFFER_BYTES];
    let drained = async { while let Ok(1..) = client.read(&mut buffer).await {} };
    let _ = timeout(DRAIN_WITHIN, drained).await;
}
