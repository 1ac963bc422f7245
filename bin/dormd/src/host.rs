//! One session's host, seen from the service: started on a knock, linked, let go.
//!
//! ```text
//! asleep ── knock, or a VM that was left up ──► hosted ── Leave, nobody knocked ──► asleep
//!    ▲                                            │
//!    └──────────────── the host's end ────────────┘
//! ```

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use dormouse_api::link::{DOORS_FILE, DOORS_MAX, DOORS_VARIABLE, LINE_BYTES_MAX, ToHost, ToService};
use dormouse_api::{ChangeSettings, How, Phase, SessionInfo};
use dormouse_client::{Home, program_beside_this_one};
use dormouse_vm::VmRecord;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use crate::factory::{Factory, Shape};
use crate::settings::{STORAGE_BYTES, Settings};

/// After a host that ended at once, the next is started after so long, so that a broken one can't spin.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// What the service wants of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    /// Put the VM to sleep, and let the host go: the service is going down.
    Shutdown,
    /// End the session's incarnation.
    Terminate,
    /// End a temporary session: the connection that made it is closed.
    CreatorGone,
    /// Settings were changed, and are written down.
    Change(ChangeSettings),
}

/// What the service wants of a session, in order. What a host that is gone could not be told is for the next one.
pub(crate) struct Orders {
    inbox: mpsc::Receiver<Order>,
    untold: Option<Order>,
}

impl Orders {
    /// A queue, and where orders are put into it.
    pub(crate) fn new() -> (mpsc::Sender<Order>, Self) {
        let (sender, inbox) = mpsc::channel(4);
        (sender, Self { inbox, untold: None })
    }

    /// The next one; `None` when no more will come.
    async fn next(&mut self) -> Option<Order> {
        match self.untold.take() {
            Some(order) => Some(order),
            None => self.inbox.recv().await,
        }
    }
}

/// Where a host stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Terms {
    /// It is told what is ordered.
    Serves,
    /// It was let go, and orders wait for its end: it would not hear them.
    LetGo,
    /// It was told to shut down. It is still given the VM that it has asked for, to end it.
    Ends,
}

/// Keeps one session's listeners while it has no host.
pub(crate) struct Keeper {
    pub(crate) settings: Settings,
    pub(crate) home: Home,
    pub(crate) factory: Arc<Factory>,
    pub(crate) info: watch::Sender<SessionInfo>,
    pub(crate) orders: Orders,
    pub(crate) listens: watch::Sender<bool>,
}

struct Sockets {
    docker: OwnedFd,
    control: OwnedFd,
    /// Of published ports, while there is no host to listen on them.
    doors: Vec<OwnedFd>,
}

impl Keeper {
    /// Runs until the session is removed or the service goes down.
    pub(crate) async fn run(mut self) {
        if let Err(error) = self.keep().await {
            tracing::error!(session = %self.settings.name, %error, "the session can't be served");
        }
    }

    async fn keep(&mut self) -> io::Result<()> {
        let runtime = self.home.session_runtime(&self.settings.id);
        // A host that outlived the last service has the listeners; else they are made anew.
        let (mut sockets, mut link) = match Link::attach(&runtime, true).await {
            Ok((link, Some(sockets))) => (sockets, Some(link)),
            _ => (bind(&runtime)?, None),
        };
        self.listens.send_replace(true);
        loop {
            let found = match link.take() {
                Some(link) => link,
                None => {
                    // A host that died has left a VM, or published ports on which nobody listens.
                    let has_work = VmRecord::read(&runtime).ok().flatten().is_some()
                        || sockets.doors.is_empty()
                            && self.home.session(&self.settings.id).join(DOORS_FILE).exists();
                    if !has_work {
                        tokio::select! {
                            knock = knock(&sockets) => knock?,
                            received = self.orders.next() => match received {
                                Some(Order::Change(change)) => {
                                    self.change(&change);
                                    continue;
                                }
                                Some(Order::Shutdown) | None => return Ok(()),
                                // For the host that is started now.
                                Some(order) => self.orders.untold = Some(order),
                            },
                        }
                    }
                    match self.start_host(&sockets).await {
                        Ok(link) => {
                            sockets.doors.clear();
                            link
                        }
                        Err(error) => {
                            tracing::error!(session = %self.settings.name, %error, "can't start the session's host");
                            sleep(RESTART_AFTER).await;
                            continue;
                        }
                    }
                }
            };
            let mut terms = Terms::Serves;
            let served = self.serve(found, &mut sockets, &mut terms).await;
            match (served, terms) {
                (_, Terms::Ends) => return Ok(()),
                // It may leave without having read all that it was sent.
                (_, Terms::LetGo) | (Ok(()), Terms::Serves) => {}
                (Err(error), Terms::Serves) => {
                    tracing::warn!(session = %self.settings.name, %error, "the link to the host broke");
                    sleep(RESTART_AFTER).await;
                }
            }
        }
    }

    async fn start_host(&self, sockets: &Sockets) -> io::Result<Link> {
        let runtime = self.home.session_runtime(&self.settings.id);
        let path = runtime.join("service.sock");
        let _ = std::fs::remove_file(&path);
        let service = OwnedFd::from(UnixListener::bind(&path)?);
        let log = std::fs::File::create(runtime.join("host.log"))?;
        let settings = self.settings.for_host(&self.home, self.factory.engine());
        let mut command = Command::new(program_beside_this_one("dorm-session")?);
        command
            .args(["serve", "--session-dir"])
            .arg(self.home.session(&self.settings.id))
            .arg("--runtime-dir")
            .arg(&runtime)
            .env("DORM_SETTINGS", serde_json::to_string(&settings)?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut parents = vec![sockets.docker.try_clone()?, sockets.control.try_clone()?, service];
        for door in &sockets.doors {
            parents.push(door.try_clone()?);
        }
        command.env(DOORS_VARIABLE, sockets.doors.len().to_string());
        let mappings =
            parents.into_iter().zip(3..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        command.fd_mappings(mappings.collect()).map_err(io::Error::other)?;
        let mut command = tokio::process::Command::from(command);
        let mut child = command.spawn()?;
        // The command holds the listeners until it is dropped, and a host that dies must take its own along.
        drop(command);
        // Reaped by a task, which the service may end without; a thread would have to be waited for.
        tokio::spawn(async move { child.wait().await });
        Ok(Link::attach(&runtime, false).await?.0)
    }

    /// Until the host is gone.
    async fn serve(&mut self, link: Link, sockets: &mut Sockets, terms: &mut Terms) -> io::Result<()> {
        let Link { mut lines, mut writer } = link;
        let (made, mut results) = mpsc::channel(1);
        loop {
            let reply = tokio::select! {
                message = lines.next::<ToService>() => match message? {
                    None => return Ok(()),
                    Some(ToService::Attached { info, .. } | ToService::Changed(info)) => {
                        let before = self.info.send_replace(*info);
                        self.fell_asleep(&before);
                        None
                    }
                    Some(asked) => {
                        if *terms == Terms::LetGo {
                            *terms = Terms::Serves;
                        }
                        self.answer(asked, &mut lines, sockets, &made)?
                    }
                },
                Some(result) = results.recv() => Some(result),
                order = self.orders.next(), if *terms == Terms::Serves => {
                    let order = order.unwrap_or(Order::Shutdown);
                    if let Err(error) = send(&mut writer, &self.told(&order)).await {
                        tracing::warn!(session = %self.settings.name, %error, "the host can't be told: the next will be");
                        self.orders.untold = Some(order);
                        return Ok(());
                    }
                    if order == Order::Shutdown {
                        *terms = Terms::Ends;
                    }
                    None
                }
            };
            if let Some(reply) = reply {
                if reply == ToHost::Go && *terms == Terms::Serves {
                    *terms = Terms::LetGo;
                }
                send(&mut writer, &reply).await?;
            }
        }
    }

    /// What a host is told at once that asked for something.
    fn answer(
        &self,
        asked: ToService,
        lines: &mut Lines,
        sockets: &mut Sockets,
        made: &mpsc::Sender<ToHost>,
    ) -> io::Result<Option<ToHost>> {
        Ok(match asked {
            ToService::MakeVm { session, generation } if session == self.settings.id => {
                self.make(generation, made.clone());
                None
            }
            // The link says which session it is; a request for another one is a host gone mad.
            ToService::MakeVm { generation, .. } => {
                let reason = "a host may ask for VMs of its own session only".to_owned();
                Some(ToHost::NotMade { generation, reason })
            }
            ToService::Doors { count } => {
                sockets.doors = lines.descriptors.drain(..count.min(lines.descriptors.len())).collect();
                None
            }
            ToService::Leave if is_knocked(sockets)? => {
                sockets.doors.clear();
                Some(ToHost::Stay)
            }
            ToService::Leave => Some(ToHost::Go),
            // It listens on its doors itself.
            ToService::Stays => {
                sockets.doors.clear();
                None
            }
            ToService::Attached { .. } | ToService::Changed(_) => None,
        })
    }

    /// An order as a host is told it. Changes are for the hosts to come as well.
    fn told(&mut self, order: &Order) -> ToHost {
        match order {
            Order::Shutdown => ToHost::Shutdown,
            Order::Terminate => ToHost::Terminate,
            Order::CreatorGone => ToHost::CreatorGone,
            Order::Change(change) => {
                self.change(change);
                ToHost::Change(change.clone())
            }
        }
    }

    /// What there is to do once a session has just fallen asleep. Nobody waits for it.
    fn fell_asleep(&self, before: &SessionInfo) {
        let now = self.info.borrow();
        if before.vm.phase == Phase::Absent || now.vm.phase != Phase::Absent {
            return;
        }
        // It had to boot from the kernel up: the next is to find a template.
        if now.vm.how == Some(How::Cold) && self.settings.storage_bytes >= STORAGE_BYTES {
            self.factory.template_in_background(Shape::of(&self.settings));
        }
        let factory = Arc::clone(&self.factory);
        tokio::spawn(async move { factory.limit_snapshots().await });
    }

    /// For the hosts to come, and for whoever looks while there is none.
    fn change(&mut self, change: &ChangeSettings) {
        self.settings.change(change);
        let (timeout, crash) = (self.settings.idle_timeout, self.settings.crash);
        let doze = self.settings.doze_seconds;
        self.info.send_modify(|info| {
            info.idle.timeout_seconds = timeout;
            info.idle.doze_seconds = doze;
            info.crash = crash;
        });
    }

    fn make(&self, generation: u64, made: mpsc::Sender<ToHost>) {
        let (factory, settings) = (Arc::clone(&self.factory), self.settings.clone());
        tokio::spawn(async move {
            // Never waited for: the next says more.
            let tell = |step| drop(made.try_send(ToHost::Making { generation, step }));
            let result = match factory.make(&settings, generation, tell).await {
                Ok(notes) => ToHost::Made { generation, notes },
                Err(error) => ToHost::NotMade { generation, reason: format!("{error:#}") },
            };
            let _ = made.send(result).await;
        });
    }
}

fn bind(runtime: &std::path::Path) -> io::Result<Sockets> {
    let bind = |name: &str| -> io::Result<OwnedFd> {
        let path = runtime.join(name);
        let _ = std::fs::remove_file(&path);
        Ok(UnixListener::bind(path)?.into())
    };
    Ok(Sockets { docker: bind("docker.sock")?, control: bind("control.sock")?, doors: Vec::new() })
}

impl Sockets {
    fn all(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.docker, &self.control].into_iter().chain(&self.doors)
    }
}

/// Has anybody connected who wasn't accepted yet?
fn is_knocked(sockets: &Sockets) -> io::Result<bool> {
    let mut states: Vec<_> = sockets.all().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
    Ok(poll(&mut states, Some(&Timespec::default()))? > 0)
}

/// Waits until somebody connects, or sends a datagram. Nobody is accepted here.
async fn knock(sockets: &Sockets) -> io::Result<()> {
    let watched: Vec<_> = sockets.all().map(|socket| watched(socket.as_fd())).collect::<io::Result<_>>()?;
    let knocks = watched.iter().map(|socket| Box::pin(socket.readable()));
    futures_util::future::select_all(knocks).await.0.map(drop)
}

fn watched(descriptor: std::os::fd::BorrowedFd<'_>) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(unsafe_code, reason = "registering is only sound for a descriptor that stays the same")]
    // SAFETY: an `OwnedFd` is one descriptor from its making to its drop, and `AsyncFd` owns this one.
    unsafe { AsyncFd::register_with_interest(descriptor.try_clone_to_owned()?, Interest::READABLE) }
        .map_err(io::Error::from)
}

/// A link to a host.
struct Link {
    lines: Lines,
    writer: OwnedWriteHalf,
}

impl Link {
    /// Connects to the host behind `service.sock`, and gets its listeners if they are wanted.
    async fn attach(runtime: &std::path::Path, listeners: bool) -> io::Result<(Self, Option<Sockets>)> {
        let stream = UnixStream::connect(runtime.join("service.sock")).await?;
        let (reader, mut writer) = stream.into_split();
        send(&mut writer, &ToHost::Attach { version: env!("CARGO_PKG_VERSION").to_owned(), listeners })
            .await?;
        let mut link =
            Self { lines: Lines { reader, buffer: Vec::new(), descriptors: VecDeque::new() }, writer };
        if !listeners {
            return Ok((link, None));
        }
        link.lines.fill().await?;
        let (docker, control) = (link.lines.descriptors.pop_front(), link.lines.descriptors.pop_front());
        let (Some(docker), Some(control)) = (docker, control) else {
            return Err(io::Error::other("the host sent no listeners"));
        };
        Ok((link, Some(Sockets { docker, control, doors: Vec::new() })))
    }
}

async fn send(writer: &mut OwnedWriteHalf, message: &ToHost) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    writer.write_all(&line).await
}

/// Lines, and the descriptors that came beside them.
struct Lines {
    reader: tokio::net::unix::OwnedReadHalf,
    buffer: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Lines {
    /// The next message; `None` at the end. Cancel-safe: what was read stays here.
    async fn next<T: serde::de::DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(io::Error::other("a line is too long"));
            }
            if self.fill().await? == 0 {
                return Ok(None);
            }
        }
    }

    async fn fill(&mut self) -> io::Result<usize> {
        let stream: &UnixStream = self.reader.as_ref();
        let mut bytes = vec![0; 16 * 1024];
        loop {
            stream.readable().await?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DOORS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = stream.try_io(Interest::READABLE, || {
                Ok(recvmsg(
                    stream,
                    &mut [IoSliceMut::new(&mut bytes)],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                )?)
            });
            match received {
                Ok(received) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                            self.descriptors.extend(descriptors);
                        }
                    }
                    self.buffer.extend_from_slice(&bytes[..received.bytes]);
                    return Ok(received.bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}
