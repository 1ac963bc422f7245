//! Published ports: the host's doors to containers.
//!
//! ```text
//! POST .../start ─► bound here ─► passed on to the engine ─► it runs ─┐
//! the engine says that something started or died ────────────────────┴─► the list is compared with the doors
//! ```
//!
//! A door is bound before the engine may start who is behind it, so that a number which is taken is the client's error
//! and not a container that nobody reaches. It stays while its container runs, over a suspend as well; over a boot if
//! the engine is going to start the container again. Whoever knocks while the VM sleeps wakes it, also while there is no
//! host: the service then has the doors' sockets, and polls them.

mod door;
mod free;
mod left;
mod numbers;
mod published;
mod udp;
mod wakes;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use dormouse_agent_proto::Target;
use dormouse_docker_proxy::{AnyPort, Refusal};
use dormouse_mux::Agent;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use self::free::FreePorts;
use self::left::Left;
use self::numbers::Numbers;
use self::published::{Behind, Container, Door, Protocol};
use self::wakes::Wakes;
use crate::entrance::Entrance;
use crate::fetch;
use crate::owner::{Message, Owner};

/// Connections, and sources of datagrams, that are forwarded at a time.
const FORWARDS_MAX: usize = 1024;

/// Doors of one session.
const DOORS_MAX: usize = 1024;

/// Longest answer of the engine that is read here, in bytes.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How long a host may take to begin.
const OWNER_WITHIN: Duration = Duration::from_secs(10);

/// How long one comparison of the doors may take.
const COMPARED_WITHIN: Duration = Duration::from_secs(30);

/// The ports of one session. Clones are the same ports.
#[derive(Debug, Clone)]
pub struct Ports {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Where a port is published whose client named no address.
    address: IpAddr,
    table: Mutex<Table>,
    owner: watch::Sender<Option<Owner>>,
    forwards: Arc<Semaphore>,
    entrance: Entrance,
    /// A start is over, however it ended.
    start_over: Notify,
    /// One comparison at a time: an older list must not overrule a newer one.
    comparing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Table {
    doors: BTreeMap<Door, Open>,
    /// Containers that are being started.
    starting: BTreeMap<String, Awaited>,
    wakes: Wakes,
    /// The latest VM, and since when it is up.
    up: (u64, Instant),
    free: FreePorts,
    /// Numbers that containers have which were created, whether they run or not.
    numbers: Numbers,
    /// Doors that are wanted and can't be bound, which was told.
    shut: BTreeSet<Door>,
    left: Left,
}

impl Table {
    /// Leaves the doors that are open to the next host.
    fn leave(&mut self) {
        self.left.write(&self.doors);
    }
}

/// A container that is being started.
#[derive(Debug, Default)]
struct Awaited {
    /// By how many.
    requests: u32,
    /// Those that it is going to have; one may still be another's, which has just ended.
    doors: BTreeSet<Door>,
}

/// A door that is open; closed when dropped.
#[derive(Debug)]
struct Open {
    /// A duplicate, to be left behind.
    socket: OwnedFd,
    behind: watch::Sender<Behind>,
    serving: JoinHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Whose doors stay when a VM is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stays {
    /// It was suspended, and comes back as it was.
    Everybody,
    /// The next one is booted, and its engine starts some again.
    WhoeverRestarts,
    /// The session is over.
    Nobody,
}

/// A container that is being started: until this is dropped its doors stay, whatever the engine lists.
#[derive(Debug)]
pub(crate) struct Starting {
    ports: Ports,
    id: String,
}

impl Drop for Starting {
    fn drop(&mut self) {
        let mut table = self.ports.table();
        if let Some(awaited) = table.starting.get_mut(&self.id) {
            awaited.requests -= 1;
            if awaited.requests == 0 {
                table.starting.remove(&self.id);
            }
        }
        drop(table);
        self.ports.shared.start_over.notify_one();
    }
}

impl Ports {
    /// Who gives leases. Doors that an earlier host left are open a moment before there is one.
    pub(crate) async fn owner(&self) -> Result<Owner, String> {
        let mut owner = self.shared.owner.subscribe();
        let owner = timeout(OWNER_WITHIN, owner.wait_for(Option::is_some)).await;
        let owner = owner.ok().and_then(|owner| owner.ok()?.clone());
        owner.ok_or_else(|| "the session has no owner".to_owned())
    }

    /// The doors that an earlier host left open, with the sockets of those that somebody kept. `seed` decides where the
    /// numbers begin that are given to who names none; who names no address gets `address`.
    #[must_use]
    pub fn load(folder: &Path, seed: u64, address: IpAddr, sockets: Vec<OwnedFd>) -> Self {
        let left = Left::new(folder);
        let doors = left.read();
        let table = Table {
            doors: BTreeMap::new(),
            starting: BTreeMap::new(),
            wakes: Wakes::default(),
            up: (0, Instant::now()),
            free: FreePorts::new(seed),
            numbers: Numbers::load(folder),
            shut: BTreeSet::new(),
            left,
        };
        let shared = Shared {
            address,
            table: Mutex::new(table),
            owner: watch::channel(None).0,
            forwards: Arc::new(Semaphore::new(FORWARDS_MAX)),
            entrance: Entrance::default(),
            start_over: Notify::new(),
            comparing: tokio::sync::Mutex::new(()),
        };
        let ports = Self { shared: Arc::new(shared) };
        if !doors.is_empty() {
            ports.reopen(doors, sockets);
        }
        ports
    }

    fn reopen(&self, left: Vec<(Door, Behind)>, sockets: Vec<OwnedFd>) {
        let mut kept: BTreeMap<_, _> =
            sockets.into_iter().filter_map(|socket| Some((door::of(&socket)?, socket))).collect();
        let mut table = self.table();
        for (door, behind) in left {
            let socket = kept.remove(&door).map_or_else(|| door::open(door), Ok);
            let opened = socket.and_then(|socket| self.open(&mut table, door, behind, socket));
            if let Err(error) = opened {
                tracing::warn!(%door, %error, "a published port can't be bound again");
            }
        }
        table.leave();
    }

    /// Who gives leases to whoever knocks.
    pub(crate) fn set_owner(&self, owner: Owner) {
        self.shared.owner.send_replace(Some(owner));
    }

    /// Where those come in who knock.
    pub(crate) fn entrance(&self) -> &Entrance {
        &self.shared.entrance
    }

    /// Is nothing forwarded?
    pub(crate) fn is_quiet(&self) -> bool {
        self.shared.forwards.available_permits() == FORWARDS_MAX
    }

    /// Duplicates of all doors' sockets, for whoever listens while there is no host.
    pub(crate) fn duplicates(&self) -> Vec<OwnedFd> {
        self.table().doors.values().filter_map(|open| open.socket.try_clone().ok()).collect()
    }

    /// Where a port is published whose client names no address.
    pub(crate) fn address(&self) -> IpAddr {
        self.shared.address
    }

    /// A number for a port that a client wants published: of the session's own, or of those that it would take. Nobody else gets
    /// it until it is taken back, or its container is gone.
    pub(crate) fn free(&self, wanted: AnyPort) -> Option<u16> {
        let mut table = self.table();
        let Table { doors, free, numbers, .. } = &mut *table;
        let taken: BTreeSet<u16> =
            numbers.all().chain(doors.keys().map(|door| door.address.port())).collect();
        let unused = |port| !taken.contains(&port);
        let number = match wanted.among {
            None => free.next(unused)?,
            Some(among) => free.among(among, wanted.address.unwrap_or(self.shared.address), unused),
        };
        numbers.promise(number);
        Some(number)
    }

    /// A container was created with these numbers.
    pub(crate) fn created(&self, container: &str, numbers: Vec<u16>) {
        self.table().numbers.give(container, numbers);
    }

    /// The container was not created for which these numbers were meant.
    pub(crate) fn take_back(&self, numbers: &[u16]) {
        self.table().numbers.take_back(numbers);
    }

    /// Binds the doors that a container is going to have, before it is started.
    ///
    /// # Errors
    /// Docker's own, if one of them can't be had.
    pub(crate) async fn start<S>(&self, engine: &mut S, container: &str) -> Result<Option<Starting>, Refusal>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let target = format!("/containers/{container}/json");
        let Ok((head, body)) = fetch::ask(engine, "GET", &target, ANSWER_BYTES_MAX).await else {
            return Ok(None);
        };
        // What isn't there is the engine's to say.
        let Some(container) = (head.status == 200).then(|| Container::parse(&body).ok()).flatten() else {
            return Ok(None);
        };
        let mut table = self.table();
        let before: Vec<Door> = table.doors.keys().copied().collect();
        let mut doors = BTreeSet::new();
        for (door, behind) in container.doors(self.shared.address) {
            doors.insert(door);
            // A door of another container is for the engine to refuse, in its own words.
            if table.doors.contains_key(&door) {
                continue;
            }
            let name = behind.name.clone();
            let opened = door::open(door).and_then(|socket| self.open(&mut table, door, behind, socket));
            if let Err(error) = opened {
                table.doors.retain(|door, _| before.contains(door));
                return Err(refusal(&name, door, &error));
            }
        }
        let awaited = table.starting.entry(container.id.clone()).or_default();
        awaited.requests += 1;
        awaited.doors.extend(doors);
        Ok(Some(Starting { ports: self.clone(), id: container.id }))
    }

    /// Keeps the doors what the containers of a VM want, until it is aborted.
    pub(crate) async fn follow(self, agent: Agent, generation: u64, mut changes: watch::Receiver<u64>) {
        self.up_since(generation);
        loop {
            changes.mark_unchanged();
            self.compare(|| async { agent.dial(Target::Engine).await.map_err(io::Error::other) }).await;
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = self.shared.start_over.notified() => {}
            }
        }
    }

    /// Makes the doors what the engine's containers want.
    pub(crate) async fn compare<D, F, S>(&self, dial: D)
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<S>>,
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let _turn = self.shared.comparing.lock().await;
        let comparing = async {
            self.settle(&running(&dial).await?);
            self.forget(&dial).await
        };
        match timeout(COMPARED_WITHIN, comparing).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the engine did not say what is published"),
            Err(_late) => tracing::warn!("the engine did not say in time what is published"),
        }
    }

    /// Frees the numbers of containers that are no more.
    async fn forget<D, F, S>(&self, dial: &D) -> io::Result<()>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<S>>,
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // Whoever is created while the engine is asked may not be in its list.
        let known = self.table().numbers.ids();
        if known.is_empty() {
            return Ok(());
        }
        let all: BTreeSet<_> =
            list(dial, "/containers/json?all=1").await?.into_iter().map(|one| one.id).collect();
        self.table().numbers.forget(&known.difference(&all).cloned().collect());
        Ok(())
    }

    fn settle(&self, containers: &[Container]) {
        let wanted: BTreeMap<_, _> =
            containers.iter().flat_map(|one| one.doors(self.shared.address)).collect();
        let mut table = self.table();
        let Table { doors, starting, shut, .. } = &mut *table;
        let is_awaited = |door: &Door| starting.values().any(|awaited| awaited.doors.contains(door));
        doors.retain(|door, _| wanted.contains_key(door) || is_awaited(door));
        shut.retain(|door| wanted.contains_key(door));
        for (door, behind) in wanted {
            if let Some(open) = table.doors.get(&door) {
                open.behind.send_if_modified(|before| {
                    let changed = *before != behind;
                    *before = behind;
                    changed
                });
                continue;
            }
            let name = behind.name.clone();
            let opened = door::open(door).and_then(|socket| self.open(&mut table, door, behind, socket));
            match opened {
                Ok(()) => _ = table.shut.remove(&door),
                Err(error) if table.shut.insert(door) => {
                    self.note(format!("{door} of {name} isn't published: {}", in_words(&error)));
                }
                Err(_told) => {}
            }
        }
        table.leave();
    }

    /// Tells whoever woke the VM, and the history.
    fn note(&self, what: String) {
        if let Some(owner) = &*self.shared.owner.borrow() {
            let generation = dormouse_lifecycle::Generation(owner.info().borrow().vm.generation);
            owner.inbox.send(Message::Note { generation, what });
        }
    }

    /// The VM is gone.
    pub(crate) fn vm_gone(&self, stays: Stays) {
        let mut table = self.table();
        table.doors.retain(|_, open| match stays {
            Stays::Everybody => true,
            Stays::WhoeverRestarts => open.behind.borrow().restarts,
            Stays::Nobody => false,
        });
        table.leave();
    }

    fn open(&self, table: &mut Table, door: Door, behind: Behind, socket: OwnedFd) -> io::Result<()> {
        if table.doors.len() >= DOORS_MAX {
            return Err(io::Error::other("too many published ports"));
        }
        let duplicate = socket.try_clone()?;
        let (sender, behind) = watch::channel(behind);
        let serving = match door.protocol {
            Protocol::Tcp => {
                let listener = TcpListener::from_std(socket.into())?;
                tokio::spawn(door::serve(listener, self.clone(), door, behind))
            }
            Protocol::Udp => {
                let socket = UdpSocket::from_std(socket.into())?;
                tokio::spawn(udp::serve(socket, self.clone(), door, behind))
            }
        };
        table.doors.insert(door, Open { socket: duplicate, behind: sender, serving });
        Ok(())
    }

    /// May somebody at this address wake the VM that follows this one?
    fn may_wake(&self, source: IpAddr, generation: u64) -> bool {
        self.table().wakes.allow(source, generation, Instant::now())
    }

    /// When this VM came up, or was first heard of here.
    fn up_since(&self, generation: u64) -> Instant {
        let mut table = self.table();
        if table.up.0 != generation {
            table.up = (generation, Instant::now());
        }
        table.up.1
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A container as the engine lists it.
#[derive(Debug, serde::Deserialize)]
struct Listed {
    #[serde(rename = "Id")]
    id: String,
    #[serde(rename = "Ports", default)]
    ports: Vec<Listing>,
}

#[derive(Debug, serde::Deserialize)]
struct Listing {
    #[serde(rename = "PublicPort")]
    public: Option<u16>,
}

async fn list<D, F, S>(dial: &D, target: &str) -> io::Result<Vec<Listed>>
where
    D: Fn() -> F,
    F: Future<Output = io::Result<S>>,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (head, body) = fetch::ask(&mut dial().await?, "GET", target, ANSWER_BYTES_MAX).await?;
    if head.status != 200 {
        return Err(io::Error::other(format!("status {}", head.status)));
    }
    Ok(serde_json::from_slice(&body)?)
}

/// The containers that run and publish something.
async fn running<D, F, S>(dial: &D) -> io::Result<Vec<Container>>
where
    D: Fn() -> F,
    F: Future<Output = io::Result<S>>,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let listed = list(dial, "/containers/json").await?;
    let mut containers = Vec::new();
    for one in listed.into_iter().filter(|one| one.ports.iter().any(|port| port.public.is_some())) {
        let mut engine = dial().await?;
        let target = format!("/containers/{}/json", one.id);
        let (head, body) = fetch::ask(&mut engine, "GET", &target, ANSWER_BYTES_MAX).await?;
        // One that is gone meanwhile publishes nothing.
        if head.status == 200 {
            containers.push(Container::parse(&body)?);
        }
    }
    Ok(containers)
}

/// As dockerd words it.
fn refusal(container: &str, door: Door, error: &io::Error) -> Refusal {
    let why = in_words(error);
    let message = format!(
        "driver failed programming external connectivity on endpoint {container}: Error starting userland proxy: \
         listen {door}: {why}"
    );
    Refusal { status: 500, message }
}

/// Why a door can't be bound.
fn in_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "bind: address already in use".to_owned(),
        io::ErrorKind::AddrNotAvailable => "bind: cannot assign requested address".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "bind: permission denied (numbers below 1024 are root's: publish a higher one, or lower the host's \
             net.ipv4.ip_unprivileged_port_start)"
                .to_owned()
        }
        _ => format!("bind: {error}"),
    }
}

#[cfg(test)]
pub(crate) mod tests;
