//! The host's side of the link to `dormd` (`dormouse_api::link`).
//!
//! dormd connects, again after it was restarted; the newest link is the one that counts. Without one the host goes on;
//! only a new VM has to wait for it.

use std::io;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use dormouse_api::link::{DOORS_MAX, LINE_BYTES_MAX, ToHost, ToService};
use dormouse_api::{ChangeSettings, SessionId};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, broadcast, mpsc, watch};
use tokio::time::timeout;

use crate::machine::Factory;
use dormouse_api::SessionInfo;

/// How long a host waits for a service before it gives a VM up.
const SERVICE_WITHIN: Duration = Duration::from_secs(20);

/// How long the service may say nothing of a VM that it makes: the probe of a new QEMU is part of it. What takes longer is
/// bounded by the time that a start may take.
const HEARD_WITHIN: Duration = Duration::from_secs(60);

/// Messages to the service that may wait.
const QUEUE: usize = 64;

/// What the service says that isn't the answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    Go,
    Stay,
    Shutdown,
    Terminate,
    CreatorGone,
    Change(ChangeSettings),
}

/// The link, whether or not a service is at its other end. Clones are the same link.
#[derive(Debug, Clone)]
pub struct Link {
    session: SessionId,
    sender: watch::Receiver<Option<mpsc::Sender<Outgoing>>>,
    answers: broadcast::Sender<ToHost>,
    making: Arc<Mutex<()>>,
}

/// A message to the service, and descriptors beside it.
#[derive(Debug)]
pub(crate) struct Outgoing {
    message: ToService,
    descriptors: Vec<OwnedFd>,
}

impl From<ToService> for Outgoing {
    fn from(message: ToService) -> Self {
        Self { message, descriptors: Vec::new() }
    }
}

/// What the host gives a service that attaches.
pub(crate) struct Listeners {
    pub(crate) docker: OwnedFd,
    pub(crate) control: OwnedFd,
}

impl Link {
    /// Serves `service.sock`.
    pub(crate) fn serve(
        listener: UnixListener,
        session: SessionId,
        listeners: Listeners,
        info: watch::Receiver<SessionInfo>,
        orders: mpsc::Sender<Order>,
        pre_made: (watch::Sender<Option<mpsc::Sender<Outgoing>>>, Self),
    ) {
        let (sender, link) = pre_made;
        debug_assert_eq!(link.session, session);
        let listeners = Arc::new(listeners);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (queue, outgoing) = mpsc::channel(QUEUE);
                let connection = Connection {
                    listeners: Arc::clone(&listeners),
                    info: info.clone(),
                    orders: orders.clone(),
                    answers: link.answers.clone(),
                };
                sender.send_replace(Some(queue.clone()));
                tokio::spawn(async move {
                    if let Err(error) = connection.run(stream, queue, outgoing).await {
                        tracing::warn!(%error, "the link to the service broke");
                    }
                });
            }
        });
    }

    /// A link that nobody has attached to yet.
    pub(crate) fn new(session: SessionId) -> (watch::Sender<Option<mpsc::Sender<Outgoing>>>, Self) {
        let (sender, receiver) = watch::channel(None);
        let answers = broadcast::channel(QUEUE).0;
        (sender, Self { session, sender: receiver, answers, making: Arc::new(Mutex::new(())) })
    }

    /// Sends a message if a service is there.
    pub(crate) async fn send(&self, message: ToService) -> bool {
        self.send_with(message, Vec::new()).await
    }

    /// The same, with descriptors beside it.
    pub(crate) async fn send_with(&self, message: ToService, descriptors: Vec<OwnedFd>) -> bool {
        let sender = self.sender.borrow().clone();
        match sender {
            Some(sender) => sender.send(Outgoing { message, descriptors }).await.is_ok(),
            None => false,
        }
    }

    async fn connected(&self) -> Option<mpsc::Sender<Outgoing>> {
        let mut senders = self.sender.clone();
        let sender = timeout(
            SERVICE_WITHIN,
            senders.wait_for(|sender| sender.as_ref().is_some_and(|sender| !sender.is_closed())),
        );
        sender.await.ok()?.ok()?.clone()
    }
}

impl Factory for Link {
    async fn make(&self, generation: u64, tell: impl Fn(&str) + Send + Sync) -> Result<Vec<String>, String> {
        // One at a time, so that an answer has one question.
        let _turn = self.making.lock().await;
        let gone = || "the service `dormd` isn't running; any `dorm` command starts it".to_owned();
        let sender = self.connected().await.ok_or_else(gone)?;
        let mut answers = self.answers.subscribe();
        sender
            .send(ToService::MakeVm { session: self.session.clone(), generation }.into())
            .await
            .map_err(|_| gone())?;
        let answer = async {
            loop {
                let late = |_| "the service did not make a VM in time".to_owned();
                match timeout(HEARD_WITHIN, answers.recv()).await.map_err(late)? {
                    Ok(ToHost::Making { generation: made, step }) if made == generation => tell(&step),
                    Ok(ToHost::Made { generation: made, notes }) if made == generation => return Ok(notes),
                    Ok(ToHost::NotMade { generation: made, reason }) if made == generation => {
                        return Err(reason);
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Err(gone()),
                }
            }
        };
        tokio::select! {
            answer = answer => answer,
            () = sender.closed() => Err("the service `dormd` ended while it made the VM".to_owned()),
        }
    }
}

struct Connection {
    listeners: Arc<Listeners>,
    info: watch::Receiver<SessionInfo>,
    orders: mpsc::Sender<Order>,
    answers: broadcast::Sender<ToHost>,
}

impl Connection {
    async fn run(
        mut self,
        stream: UnixStream,
        queue: mpsc::Sender<Outgoing>,
        outgoing: mpsc::Receiver<Outgoing>,
    ) -> io::Result<()> {
        let (reader, mut writer) = stream.into_split();
        let mut lines = BufReader::new(reader);
        let Some(ToHost::Attach { listeners, .. }) = next(&mut lines).await? else {
            return Err(io::Error::other("the service did not begin with Attach"));
        };
        let info = Box::new(self.info.borrow_and_update().clone());
        let attached = line(&ToService::Attached { version: env!("CARGO_PKG_VERSION").to_owned(), info })?;
        if listeners {
            let descriptors = [self.listeners.docker.as_fd(), self.listeners.control.as_fd()];
            send_with(&writer, &attached, &descriptors).await?;
        } else {
            writer.write_all(&attached).await?;
        }
        let (info, changes) = (self.info.clone(), queue);
        let telling = tokio::spawn(tell_changes(info, changes));
        let outcome = tokio::select! {
            sent = write(outgoing, &mut writer) => sent,
            read = self.read(&mut lines) => read,
        };
        telling.abort();
        outcome
    }

    async fn read(&self, lines: &mut BufReader<OwnedReadHalf>) -> io::Result<()> {
        while let Some(message) = next(lines).await? {
            let order = match message {
                ToHost::Attach { .. } => continue,
                ToHost::Making { .. } | ToHost::Made { .. } | ToHost::NotMade { .. } => {
                    let _ = self.answers.send(message);
                    continue;
                }
                ToHost::Go => Order::Go,
                ToHost::Stay => Order::Stay,
                ToHost::Shutdown => Order::Shutdown,
                ToHost::Terminate => Order::Terminate,
                ToHost::CreatorGone => Order::CreatorGone,
                ToHost::Change(change) => Order::Change(change),
            };
            if self.orders.send(order).await.is_err() {
                break;
            }
        }
        Ok(())
    }
}

async fn tell_changes(mut info: watch::Receiver<SessionInfo>, queue: mpsc::Sender<Outgoing>) {
    while info.changed().await.is_ok() {
        let message = ToService::Changed(Box::new(info.borrow_and_update().clone()));
        if queue.send(message.into()).await.is_err() {
            return;
        }
    }
}

async fn write(mut outgoing: mpsc::Receiver<Outgoing>, writer: &mut OwnedWriteHalf) -> io::Result<()> {
    while let Some(Outgoing { message, descriptors }) = outgoing.recv().await {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        send_with(writer, &line(&message)?, &descriptors).await?;
    }
    Ok(())
}

fn line(message: &ToService) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

async fn next(lines: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<ToHost>> {
    let mut line = Vec::new();
    let count = lines.take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line).await?;
    if count == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

/// Sends bytes with descriptors beside the first of them.
async fn send_with(writer: &OwnedWriteHalf, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let stream: &UnixStream = writer.as_ref();
    let mut sent = 0;
    while sent < bytes.len() {
        stream.writable().await?;
        let attempt = stream.try_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DOORS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !descriptors.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(descriptors));
            }
            Ok(sendmsg(stream, &[IoSlice::new(&bytes[sent..])], &mut control, SendFlags::NOSIGNAL)?)
        });
        match attempt {
            Ok(count) => sent += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
