//! The connection: one owner task, any number of clients.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Serialize;
use serde_json::Value;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::codec::{CodecError, CommandFailure, Greeting, LineDecoder, Message};
use crate::command::Command;
use crate::event::Event;

/// Commands that wait for the owner task.
const INBOX_MAX: usize = 16;
/// Commands whose reply is awaited. QEMU answers one after the other, so only a stuck one lets them pile up.
const PENDING_MAX: usize = 64;
/// Events that wait to be taken; of more the oldest are dropped, see [`Event::Lost`].
const EVENTS_MAX: usize = 256;
/// Read at once.
const READ_BYTES: usize = 16 * 1024;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket can't be connected to, or failed.
    #[error("cannot talk to QEMU's monitor")]
    Io(#[from] io::Error),
    /// The peer is no QMP server.
    #[error("the monitor does not speak QMP")]
    Codec(#[from] CodecError),
    /// The connection was closed before the greeting was over.
    #[error("QEMU closed its monitor")]
    Closed,
    /// QEMU refused to begin.
    #[error("QEMU refused to negotiate: {}", .0.desc)]
    Refused(CommandFailure),
    /// No greeting in time: QEMU is stuck, or its monitor is taken by somebody else.
    #[error("QEMU's monitor said nothing for {0:?}")]
    Deadline(Duration),
}

/// Why a command gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// The connection is over.
    #[error("{command}: {closed}")]
    Closed {
        /// The command.
        command: &'static str,
        /// What ended the connection.
        closed: Closed,
    },
    /// No reply in time. The command may still be carried out.
    #[error("{command}: no reply within {within:?}")]
    Deadline {
        /// The command.
        command: &'static str,
        /// How long was waited.
        within: Duration,
    },
    /// Too many commands are waiting for replies.
    #[error("{command}: {PENDING_MAX} commands are waiting already")]
    Busy {
        /// The command.
        command: &'static str,
    },
    /// QEMU refused.
    #[error("{command}: {}", failure.desc)]
    Refused {
        /// The command.
        command: &'static str,
        /// What QEMU said.
        failure: CommandFailure,
    },
    /// The reply isn't what this command is answered with.
    #[error("{command}: unexpected reply")]
    Answer {
        /// The command.
        command: &'static str,
        /// What doesn't fit.
        source: serde_json::Error,
    },
}

/// What ended a connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    /// QEMU closed it, which it does when it exits.
    #[error("QEMU closed its monitor")]
    Eof,
    /// QEMU said something that is no QMP.
    #[error("the monitor does not speak QMP: {0}")]
    Codec(#[from] CodecError),
    /// The socket failed.
    #[error("the monitor's socket failed: {0}")]
    Io(String),
    /// Every [`Client`] and the [`Events`] were dropped.
    #[error("the connection was let go")]
    Released,
}

/// What [`Events`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// Something happened.
    Event(Event),
    /// The connection is over. The last item, and repeated for who asks again.
    Closed(Closed),
}

type Outcome = Result<Value, ExecuteFailure>;

#[derive(Debug)]
enum ExecuteFailure {
    Closed(Closed),
    Busy,
    Refused(CommandFailure),
}

#[derive(Debug)]
struct Request {
    command: &'static str,
    arguments: Value,
    fd: Option<OwnedFd>,
    reply: oneshot::Sender<Outcome>,
}

/// Gives commands. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    inbox: mpsc::Sender<Request>,
    greeting: Greeting,
}

/// What happens in QEMU, in order.
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::Receiver<Incoming>,
    closed: Option<Closed>,
}

impl Events {
    /// The next event. Cancel-safe.
    pub async fn next(&mut self) -> Incoming {
        if let Some(closed) = &self.closed {
            return Incoming::Closed(closed.clone());
        }
        let incoming = self.receiver.recv().await.unwrap_or(Incoming::Closed(Closed::Released));
        if let Incoming::Closed(closed) = &incoming {
            self.closed = Some(closed.clone());
        }
        incoming
    }
}

impl Client {
    /// Connects to a monitor's socket and negotiates.
    ///
    /// # Errors
    /// See [`ConnectError`]; never takes longer than `within`.
    pub async fn connect(path: &Path, within: Duration) -> Result<(Self, Events), ConnectError> {
        let connect = async { Self::negotiate(UnixStream::connect(path).await?).await };
        timeout(within, connect).await.map_err(|_| ConnectError::Deadline(within))?
    }

    /// Negotiates on a connected socket.
    ///
    /// # Errors
    /// See [`ConnectError`]; never takes longer than `within`.
    pub async fn over(stream: UnixStream, within: Duration) -> Result<(Self, Events), ConnectError> {
        timeout(within, Self::negotiate(stream)).await.map_err(|_| ConnectError::Deadline(within))?
    }

    async fn negotiate(stream: UnixStream) -> Result<(Self, Events), ConnectError> {
        let mut decoder = LineDecoder::default();
        let greeting = loop {
            match next_message(&stream, &mut decoder).await? {
                Message::Greeting(greeting) => break greeting,
                other => tracing::debug!(?other, "before the greeting"),
            }
        };
        let mut hello = Unsent::new("qmp_capabilities", &Value::Object(serde_json::Map::new()), 0, None);
        while !hello.is_sent() {
            stream.writable().await?;
            hello.send(&stream)?;
        }
        loop {
            match next_message(&stream, &mut decoder).await? {
                Message::Reply { outcome: Ok(_), .. } => break,
                Message::Reply { outcome: Err(failure), .. } => return Err(ConnectError::Refused(failure)),
                other => tracing::debug!(?other, "before negotiation ended"),
            }
        }
        let (inbox, requests) = mpsc::channel(INBOX_MAX);
        // One slot: the queue with the overflow rule is the owner's own.
        let (deliver, receiver) = mpsc::channel(1);
        let owner = Owner {
            stream,
            decoder,
            inbox: requests,
            unsent: VecDeque::new(),
            pending: BTreeMap::new(),
            next_id: 1,
            events: EventQueue::default(),
            deliver,
        };
        tokio::spawn(owner.run());
        Ok((Self { inbox, greeting }, Events { receiver, closed: None }))
    }

    /// Which QEMU answered.
    #[must_use]
    pub const fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Runs a command. The future may be dropped at any point: a command that was not sent yet is not sent then, the
    /// reply to one that was is thrown away.
    ///
    /// # Errors
    /// See [`ExecuteError`]; never takes longer than `within`.
    pub async fn execute<C: Command>(&self, command: C, within: Duration) -> Result<C::Answer, ExecuteError> {
        self.call(command, None, within).await
    }

    /// Runs a command that takes a file descriptor along, such as [`crate::GetFd`].
    ///
    /// # Errors
    /// See [`ExecuteError`]; never takes longer than `within`.
    pub async fn execute_with_fd<C: Command>(
        &self,
        command: C,
        fd: OwnedFd,
        within: Duration,
    ) -> Result<C::Answer, ExecuteError> {
        self.call(command, Some(fd), within).await
    }

    async fn call<C: Command>(
        &self,
        command: C,
        fd: Option<OwnedFd>,
        within: Duration,
    ) -> Result<C::Answer, ExecuteError> {
        let name = C::NAME;
        let arguments =
            serde_json::to_value(command).map_err(|source| ExecuteError::Answer { command: name, source })?;
        let (reply, outcome) = oneshot::channel();
        let exchange = async {
            let request = Request { command: name, arguments, fd, reply };
            if self.inbox.send(request).await.is_err() {
                return Err(ExecuteFailure::Closed(Closed::Eof));
            }
            outcome.await.unwrap_or(Err(ExecuteFailure::Closed(Closed::Eof)))
        };
        let value = match timeout(within, exchange).await {
            Err(_) => return Err(ExecuteError::Deadline { command: name, within }),
            Ok(Ok(value)) => value,
            Ok(Err(ExecuteFailure::Closed(closed))) => {
                return Err(ExecuteError::Closed { command: name, closed });
            }
            Ok(Err(ExecuteFailure::Busy)) => return Err(ExecuteError::Busy { command: name }),
            Ok(Err(ExecuteFailure::Refused(failure))) => {
                return Err(ExecuteError::Refused { command: name, failure });
            }
        };
        serde_json::from_value(value).map_err(|source| ExecuteError::Answer { command: name, source })
    }
}

async fn next_message(stream: &UnixStream, decoder: &mut LineDecoder) -> Result<Message, ConnectError> {
    loop {
        if let Some(line) = decoder.next_line()? {
            return Ok(Message::parse(line)?);
        }
        stream.readable().await?;
        if read_into(stream, decoder)? == Read::Eof {
            return Err(ConnectError::Closed);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Read {
    Eof,
    /// Something, or nothing yet.
    Open,
}

fn read_into(stream: &UnixStream, decoder: &mut LineDecoder) -> io::Result<Read> {
    let mut chunk = [0; READ_BYTES];
    match stream.try_read(&mut chunk) {
        Ok(0) => Ok(Read::Eof),
        Ok(length) => {
            decoder.extend(&chunk[..length]);
            Ok(Read::Open)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Read::Open),
        // How a socket reports a peer that was killed with unread bytes in its buffer.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Read::Eof),
        Err(error) => Err(error),
    }
}

/// A command on its way out.
#[derive(Debug)]
struct Unsent {
    bytes: Vec<u8>,
    sent: usize,
    /// Goes along with the first byte.
    fd: Option<OwnedFd>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    execute: &'a str,
    arguments: &'a Value,
    id: u64,
}

impl Unsent {
    fn new(command: &str, arguments: &Value, id: u64, fd: Option<OwnedFd>) -> Self {
        let envelope = Envelope { execute: command, arguments, id };
        let mut bytes = serde_json::to_vec(&envelope).expect("a Value always serialises");
        bytes.push(b'\n');
        Self { bytes, sent: 0, fd }
    }

    const fn is_sent(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Sends as much as the socket takes.
    fn send(&mut self, stream: &UnixStream) -> io::Result<()> {
        let sent = stream.try_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = self.fd.as_ref().map(|fd| [fd.as_fd()]);
            if let Some(fds) = &fds {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let bytes = [io::IoSlice::new(&self.bytes[self.sent..])];
            Ok(rustix::net::sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL)?)
        });
        match sent {
            Ok(length) => {
                self.sent += length;
                self.fd = None;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Events that wait to be taken. What is new matters more than what is old: QEMU's last word is why it exits.
#[derive(Debug, Default)]
struct EventQueue {
    events: VecDeque<Event>,
    lost: u64,
}

impl EventQueue {
    fn push(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
            self.lost += 1;
        }
        self.events.push_back(event);
    }

    fn pop(&mut self) -> Option<Event> {
        if self.lost > 0 {
            return Some(Event::Lost(std::mem::take(&mut self.lost)));
        }
        self.events.pop_front()
    }

    fn is_empty(&self) -> bool {
        self.events.is_empty()
    }
}

/// The task that owns the socket. It waits for nothing but its inbox, the socket and the taker of events.
#[derive(Debug)]
struct Owner {
    stream: UnixStream,
    decoder: LineDecoder,
    inbox: mpsc::Receiver<Request>,
    unsent: VecDeque<Unsent>,
    pending: BTreeMap<u64, oneshot::Sender<Outcome>>,
    next_id: u64,
    events: EventQueue,
    deliver: mpsc::Sender<Incoming>,
}

impl Owner {
    async fn run(mut self) {
        let closed = self.serve().await;
        tracing::debug!(%closed, "monitor connection over");
        self.inbox.close();
        for reply in std::mem::take(&mut self.pending).into_values() {
            let _ = reply.send(Err(ExecuteFailure::Closed(closed.clone())));
        }
        while let Ok(request) = self.inbox.try_recv() {
            let _ = request.reply.send(Err(ExecuteFailure::Closed(closed.clone())));
        }
        while let Some(event) = self.events.pop() {
            if self.deliver.send(Incoming::Event(event)).await.is_err() {
                return;
            }
        }
        let _ = self.deliver.send(Incoming::Closed(closed)).await;
    }

    async fn serve(&mut self) -> Closed {
        let deliver = self.deliver.clone();
        loop {
            if self.inbox.is_closed() && deliver.is_closed() {
                return Closed::Released;
            }
            let interest = match self.unsent.front() {
                Some(_) => Interest::READABLE | Interest::WRITABLE,
                None => Interest::READABLE,
            };
            tokio::select! {
                request = self.inbox.recv(), if !self.inbox.is_closed() => {
                    if let Some(request) = request {
                        self.accept(request);
                    }
                }
                permit = deliver.reserve(), if !self.events.is_empty() && !deliver.is_closed() => {
                    if let (Ok(permit), Some(event)) = (permit, self.events.pop()) {
                        permit.send(Incoming::Event(event));
                    }
                }
                () = deliver.closed(), if !deliver.is_closed() => {}
                ready = self.stream.ready(interest) => {
                    if let Err(closed) = self.advance(ready) {
                        return closed;
                    }
                }
            }
        }
    }

    fn accept(&mut self, request: Request) {
        if request.reply.is_closed() {
            return;
        }
        if self.pending.len() >= PENDING_MAX {
            // Replies that nobody waits for any more are only kept out of order to be recognised, which the id does.
            self.pending.retain(|_, reply| !reply.is_closed());
        }
        if self.pending.len() >= PENDING_MAX || self.unsent.len() >= PENDING_MAX {
            let _ = request.reply.send(Err(ExecuteFailure::Busy));
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        tracing::trace!(id, command = request.command, "command");
        self.unsent.push_back(Unsent::new(request.command, &request.arguments, id, request.fd));
        self.pending.insert(id, request.reply);
    }

    fn advance(&mut self, ready: io::Result<tokio::io::Ready>) -> Result<(), Closed> {
        let ready = ready.map_err(|error| Closed::Io(error.to_string()))?;
        // Read first: what QEMU said before it went away must be heard even if writing fails now.
        if ready.is_readable() {
            self.read()?;
        }
        if ready.is_writable() {
            self.write().map_err(|error| Closed::Io(error.to_string()))?;
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        let Some(unsent) = self.unsent.front_mut() else { return Ok(()) };
        match unsent.send(&self.stream) {
            // The end of file that follows says more than the broken pipe.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.unsent.clear(),
            Err(error) => return Err(error),
            Ok(()) if unsent.is_sent() => {
                self.unsent.pop_front();
            }
            Ok(()) => {}
        }
        Ok(())
    }

    fn read(&mut self) -> Result<(), Closed> {
        let read = read_into(&self.stream, &mut self.decoder);
        while let Some(line) = self.decoder.next_line()? {
            match Message::parse(line)? {
                Message::Event(event) => self.events.push(event),
                Message::Reply { id, outcome } => self.answer(id, outcome),
                Message::Greeting(_) => tracing::debug!("greeted again"),
            }
        }
        match read {
            Ok(Read::Open) => Ok(()),
            Ok(Read::Eof) => Err(Closed::Eof),
            Err(error) => Err(Closed::Io(error.to_string())),
        }
    }

    fn answer(&mut self, id: Option<u64>, outcome: Result<Value, CommandFailure>) {
        match id.and_then(|id| self.pending.remove(&id)) {
            Some(reply) => {
                let _ = reply.send(outcome.map_err(ExecuteFailure::Refused));
            }
            None => tracing::debug!(?id, "late or unasked reply"),
        }
    }
}
