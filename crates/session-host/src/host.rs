//! A session's host, from its start to its end.
//!
//! ```text
//! serving ── nobody connected, no VM, for a while ──► leaving ── go ──► gone
//!    ▲                                                  │
//!    └─────────────────────── stay ─────────────────────┘
//! serving ── told to go (service, SIGTERM) ──► VM put to sleep ──► gone
//! ```
//!
//! While it is leaving a host accepts nothing: what knocks waits in the listeners' queues, of which the service has
//! duplicates, and is served by this host or the next.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dormouse_api::link::{DOORS_MAX, HostSettings, ToService};
use dormouse_api::{Phase, SessionInfo};
use dormouse_lifecycle::{Config, Event, Lifetime, Limits, Policy, RunningContainers, Storage};
use dormouse_vm::Console;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::docker::{Face, SessionEngine};
use crate::hooks::Runner;
use crate::link::{Link, Listeners, Order};
use crate::machine::{Machines, Qemus, REPORT_WITHIN, Sums, Traits};
use crate::owner::{Facts, Owner, Started};
use crate::ports::Ports;
use crate::state::StateError;
use crate::{clock, control, view};

/// How long the service may take to say whether a host may go.
const LEAVE_WITHIN: Duration = Duration::from_secs(10);

/// How long a VM may take to be put to sleep when the host has to go.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(60);

/// How long the checksum of a snapshot may take when the host has to go: the machine may be about to be started again, and
/// without it the VM would be booted then.
const SUMMED_WITHIN: Duration = Duration::from_secs(20);

/// How long hooks may take that are still to be told of the end.
const HOOKS_WITHIN: Duration = Duration::from_secs(20);

/// How long a host that has to go stays for clients that are being told of it.
const LAST_WORD_WITHIN: Duration = Duration::from_secs(1);

/// How often it is counted who is there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Connections at a time.
const CONNECTIONS_MAX: usize = 1024;

/// Connections beyond these that are told so at a time. Who comes beyond them too is hung up on.
const REFUSALS_MAX: usize = 64;

/// What a host is started with.
#[derive(Debug)]
pub struct Start {
    /// The session.
    pub settings: HostSettings,
    /// Where its state lies.
    pub session_dir: PathBuf,
    /// Where its sockets lie.
    pub runtime_dir: PathBuf,
    /// The listening `docker.sock`.
    pub docker: OwnedFd,
    /// The listening `control.sock`.
    pub control: OwnedFd,
    /// The listening `service.sock`.
    pub service: OwnedFd,
    /// The sockets of published ports that the last host left behind.
    pub doors: Vec<OwnedFd>,
    /// How long the host stays with neither a client nor a VM.
    pub linger: Duration,
}

/// Why a host couldn't serve.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The state of an earlier host can't be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The system refused something.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The owner's task ended: a fault in Dormouse.
    #[error("the session's lifecycle ended; its last events are in {0:?}", crate::trace::CRASH_FILE)]
    Owner,
}

/// What every connection is served with.
#[derive(Debug, Clone)]
pub(crate) struct Served {
    pub(crate) owner: Owner,
    pub(crate) face: Face,
    pub(crate) console: watch::Receiver<Option<Arc<Console>>>,
    /// Who is connected, in words.
    pub(crate) client: Arc<str>,
    /// May it start a VM? A hook may not.
    pub(crate) policy: Policy,
    /// Ends whatever the connection has become.
    pub(crate) end: CancellationToken,
}

impl Served {
    /// Serves one connection.
    pub(crate) async fn serve(self, stream: UnixStream, door: Door) {
        match door {
            Door::Docker => {
                let Self { owner, face, client, policy, .. } = self;
                let engine = SessionEngine { owner, face, client, policy };
                dormouse_docker_proxy::serve(stream, engine).await;
            }
            Door::Control => {
                let service = TowerToHyperService::new(control::router(self));
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades();
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "control connection ended");
                }
            }
        }
    }
}

/// Serves a session until its host may go.
///
/// # Errors
/// See [`HostError`].
pub async fn serve(start: Start) -> Result<(), HostError> {
    let Start { settings, session_dir, runtime_dir, docker, control, service, doors, linger } = start;
    let listeners = Listeners { docker: docker.try_clone()?, control: control.try_clone()? };
    let (docker, control, service) = (listener(docker)?, listener(control)?, listener(service)?);
    let config = config(&settings);
    let (orders, inbox) = mpsc::channel(16);
    let (link_sender, link) = Link::new(settings.id.clone());
    let face = Face::load(&session_dir, &settings, doors);
    let facts = Facts {
        settings: settings.clone(),
        session_dir: session_dir.clone(),
        runtime_dir: runtime_dir.clone(),
        face: face.clone(),
    };
    let (console_sender, console) = watch::channel(None);
    let factory = link.clone();
    let sums = Sums::default();
    let summing = sums.clone();
    let traits = Traits {
        runtime_dir,
        store: settings.storage.clone(),
        disk_bytes: settings.storage_bytes,
        hostname: settings.hostname.clone(),
        registries: settings.registries.clone(),
    };
    let Started { owner, jobs, task } = Owner::start(facts.clone(), config, |inbox| {
        let machines = Qemus::new(factory, traits, inbox, face.clone(), summing);
        let console = machines.console();
        tokio::spawn(forward_console(console, console_sender));
        machines
    })?;
    Link::serve(service, settings.id, listeners, owner.info(), orders, (link_sender, link.clone()));
    owner.write_trace_on_panic();
    face.ports.set_owner(owner.clone());
    face.folders.set_owner(owner.clone());
    let end = CancellationToken::new();
    let served = Served { owner, face, console, client: "".into(), policy: Policy::Acquire, end };
    tokio::spawn(Runner::new(&facts, served.clone()).run(jobs));
    tokio::spawn(keep_info(served.owner.info(), session_dir));

    let clients = Clients::default();
    let doors = Doors { clients: clients.clone(), served: served.clone(), uid: settings.owner };
    tokio::spawn(doors.clone().accept(docker, Door::Docker));
    tokio::spawn(doors.accept(control, Door::Control));
    Host { served, link, inbox, clients, task, sums, linger }.run().await
}

fn listener(descriptor: OwnedFd) -> io::Result<UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(descriptor);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// The core's settings of a session.
fn config(settings: &HostSettings) -> Config {
    Config {
        grace: view::grace(settings.idle_timeout),
        doze: view::doze(settings.doze_seconds),
        idle_action: view::sleep_how(settings.idle_action),
        running: match settings.running {
            dormouse_api::RunningContainers::Hold => RunningContainers::Hold,
            dormouse_api::RunningContainers::Suspend => RunningContainers::Suspend,
        },
        storage: if settings.ephemeral { Storage::Ephemeral } else { Storage::Persistent },
        lifetime: if settings.temporary { Lifetime::Temporary } else { Lifetime::Lasting },
        crash: view::crash(settings.crash),
        limits: Limits {
            boot: Duration::from_secs(settings.boot_timeout_seconds) + REPORT_WITHIN,
            ..Limits::default()
        },
    }
}

async fn forward_console(
    mut from: watch::Receiver<Option<Arc<Console>>>,
    to: watch::Sender<Option<Arc<Console>>>,
) {
    while from.changed().await.is_ok() {
        to.send_replace(from.borrow_and_update().clone());
    }
}

/// Leaves the latest of what is known of the session, for when there is no host to be asked.
async fn keep_info(mut info: watch::Receiver<SessionInfo>, session_dir: PathBuf) {
    let (path, beside) = (session_dir.join("info.json"), session_dir.join("info.json.new"));
    loop {
        let bytes = serde_json::to_vec_pretty(&*info.borrow_and_update()).unwrap_or_default();
        if let Err(error) = fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, &path)) {
            tracing::warn!(%error, "the session's info can't be written");
        }
        if info.changed().await.is_err() {
            return;
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    Docker,
    Control,
}

#[derive(Debug, Clone)]
struct Doors {
    clients: Clients,
    served: Served,
    uid: u32,
}

/// Who is connected. Clones are the same.
#[derive(Debug, Clone)]
struct Clients {
    permits: Arc<Semaphore>,
    /// For those who are refused.
    refusals: Arc<Semaphore>,
    /// One of them has gone.
    left: Arc<Notify>,
}

impl Default for Clients {
    fn default() -> Self {
        let [permits, refusals] =
            [CONNECTIONS_MAX, REFUSALS_MAX].map(|count| Arc::new(Semaphore::new(count)));
        Self { permits, refusals, left: Arc::default() }
    }
}

impl Clients {
    fn enter(&self) -> Option<Client> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        Some(Client { permit: Some(permit), left: Arc::clone(&self.left) })
    }

    /// Tells a client that there are too many.
    fn refuse(&self, stream: UnixStream) {
        tracing::warn!(limit = CONNECTIONS_MAX, "too many connections");
        let Ok(permit) = Arc::clone(&self.refusals).try_acquire_owned() else { return };
        tokio::spawn(async move {
            let message = format!("more than {CONNECTIONS_MAX} connections at once");
            let refusal = dormouse_docker_proxy::Refusal { status: 503, message };
            dormouse_docker_proxy::refuse(stream, &refusal).await;
            drop(permit);
        });
    }

    fn is_nobody(&self) -> bool {
        self.permits.available_permits() == CONNECTIONS_MAX
    }
}

/// One connection.
#[derive(Debug)]
struct Client {
    permit: Option<OwnedSemaphorePermit>,
    left: Arc<Notify>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.permit = None;
        self.left.notify_one();
    }
}

impl Doors {
    async fn accept(self, listener: UnixListener, door: Door) {
        let entrance = self.served.face.ports.entrance();
        while let Some(mut pass) = entrance.pass().await {
            let Some(accepted) = pass.unless_closed(listener.accept()).await else { continue };
            match accepted {
                Ok((stream, _)) => match self.clients.enter() {
                    Some(client) => self.open(stream, door, client),
                    None => self.clients.refuse(stream),
                },
                Err(error) => {
                    tracing::warn!(%error, "can't accept");
                    drop(pass);
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn open(&self, stream: UnixStream, door: Door, client: Client) {
        // The session's folder is its owner's alone; this holds even if somebody opened it up.
        let Ok(credentials) = stream.peer_cred() else { return };
        if credentials.uid() != self.uid && credentials.uid() != 0 {
            tracing::warn!(uid = credentials.uid(), "not the session's owner");
            return;
        }
        let mut served = self.served.clone();
        served.client = name(credentials.pid()).into();
        tokio::spawn(async move {
            served.serve(stream, door).await;
            drop(client);
        });
    }
}

/// A process as people know it.
fn name(pid: Option<i32>) -> String {
    let Some(pid) = pid else { return "somebody".to_owned() };
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(program) => format!("pid {pid} ({})", program.trim()),
        Err(_) => format!("pid {pid}"),
    }
}

/// Has the host asked to leave?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Not,
    /// It was told to stay, or nothing.
    InVain,
}

struct Host {
    served: Served,
    link: Link,
    inbox: mpsc::Receiver<Order>,
    clients: Clients,
    /// The owner's task.
    task: JoinHandle<()>,
    /// Checksums being made.
    sums: Sums,
    linger: Duration,
}

impl Host {
    async fn run(mut self) -> Result<(), HostError> {
        let mut terminated = signal(SignalKind::terminate())?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut asked = Asked::Not;
        loop {
            let unneeded = self.unneeded(asked);
            let order = tokio::select! {
                order = self.inbox.recv() => order.unwrap_or(Order::Shutdown),
                // A fault in it. The VM lives on, and the next host adopts it.
                _ = &mut self.task => return Err(HostError::Owner),
                _ = terminated.recv() => Order::Shutdown,
                _ = interrupted.recv() => Order::Shutdown,
                () = unneeded => match self.leave().await {
                    Order::Go => return Ok(()),
                    order => {
                        asked = Asked::InVain;
                        order
                    }
                },
            };
            match order {
                // It is too late: clients have been let in again.
                Order::Go => drop(self.link.send(ToService::Stays).await),
                Order::Stay => {}
                Order::Change(change) => self.served.owner.change(change),
                Order::Terminate => {
                    self.served.owner.tell(Event::Terminate { reason: "the service asked".into() })
                }
                Order::CreatorGone => self.served.owner.tell(Event::CreatorGone),
                Order::Shutdown => {
                    self.shut_down().await;
                    return Ok(());
                }
            }
        }
    }

    /// Ends when for a while nobody was connected and there was no VM.
    fn unneeded(&self, asked: Asked) -> impl Future<Output = ()> + use<> {
        let (mut info, clients, linger) = (self.served.owner.info(), self.clients.clone(), self.linger);
        let ports = self.served.face.ports.clone();
        async move {
            // For who was told to stay somebody knocked: they come in first, or give up.
            if asked == Asked::InVain {
                tokio::select! {
                    _ = timeout(LOOK_EVERY, info.changed()) => {}
                    () = clients.left.notified() => {}
                }
            }
            let mut quiet_since = clock::now();
            loop {
                let is_idle = is_idle(&info.borrow_and_update(), &clients, &ports);
                if !is_idle {
                    quiet_since = clock::now();
                }
                let left = linger.saturating_sub(clock::now().since(quiet_since));
                if is_idle && left.is_zero() {
                    return;
                }
                // What is forwarded comes and goes without a word to here, so it is counted now and then.
                let wait = if is_idle { left.min(LOOK_EVERY) } else { LOOK_EVERY };
                tokio::select! {
                    _ = timeout(wait, info.changed()) => {}
                    () = clients.left.notified() => {}
                }
            }
        }
    }

    /// Whether it may go is for the service to say, so this asks. What comes instead of an answer counts; silence means stay.
    async fn leave(&mut self) -> Order {
        let entrance = self.served.face.ports.entrance().clone();
        entrance.close().await;
        // Somebody may have come in before it was closed.
        if !self.is_unneeded() {
            entrance.open();
            return Order::Stay;
        }
        let doors = self.served.face.ports.duplicates();
        let told = match doors.len() {
            0..=DOORS_MAX => {
                let count = ToService::Doors { count: doors.len() };
                self.link.send_with(count, doors).await && self.link.send(ToService::Leave).await
            }
            // Nobody could take them all.
            _ => false,
        };
        let order = if told {
            timeout(LEAVE_WITHIN, self.inbox.recv()).await.ok().flatten().unwrap_or(Order::Stay)
        } else {
            // Nobody would take the listeners over.
            Order::Stay
        };
        if order != Order::Go {
            entrance.open();
        }
        order
    }

    fn is_unneeded(&self) -> bool {
        is_idle(&self.served.owner.info().borrow(), &self.clients, &self.served.face.ports)
    }

    async fn shut_down(&self) {
        self.served.face.ports.entrance().close().await;
        self.served.owner.tell(Event::HostLeaving);
        let mut info = self.served.owner.info();
        let asleep = info.wait_for(|info| info.vm.phase == Phase::Absent);
        if timeout(SHUTDOWN_WITHIN, asleep).await.is_err() {
            tracing::warn!("the VM could not be put to sleep in time");
        }
        if !self.sums.finish(SUMMED_WITHIN).await {
            tracing::warn!("the checksum of the snapshot was not made in time");
        }
        if timeout(HOOKS_WITHIN, self.served.owner.hooks_done()).await.is_err() {
            tracing::warn!("not every hook was done in time");
        }
        // Whoever waits for the end hears of it before this process is gone.
        let everybody = u32::try_from(CONNECTIONS_MAX).unwrap_or(u32::MAX);
        let _ = timeout(LAST_WORD_WITHIN, self.clients.permits.acquire_many(everybody)).await;
    }
}

fn is_idle(info: &SessionInfo, clients: &Clients, ports: &Ports) -> bool {
    info.vm.phase == Phase::Absent && clients.is_nobody() && ports.is_quiet()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn one_connection_too_many_is_told_so_although_its_client_is_still_sending() {
        let clients = Clients::default();
        let served: Vec<_> = std::iter::from_fn(|| clients.enter()).collect();
        assert_eq!(served.len(), CONNECTIONS_MAX);
        let (mut client, ours) = UnixStream::pair().unwrap();
        clients.refuse(ours);
        client.write_all(&vec![b'x'; 1 << 20]).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.ends_with(r#"{"message":"more than 1024 connections at once"}"#), "{answer}");
    }
}
