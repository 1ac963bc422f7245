//! A TCP door: connections in, a stream each to the guest.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use dormouse_agent_proto::Target;
use dormouse_api::Phase;
use dormouse_lifecycle::{HoldKind, Policy};
use dormouse_mux::{Stream, both_ways};
use futures_util::FutureExt;
use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, sleep};

use super::Ports;
use super::published::{Behind, Door, Protocol};
use crate::owner::{Claimant, HeldLease, Owner};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Connections to one door that may be on their way to its container at a time. One that is paused takes none, and its guest
/// answers none of them: yamux opens no more than 256 such streams, for all doors together.
const UNDER_WAY_MAX: usize = 64;

/// How long a container may take to listen after its VM has come up.
const LISTENS_WITHIN: Duration = Duration::from_secs(20);
const KNOCK_EVERY: Duration = Duration::from_millis(200);

/// A connection that carried nothing for so long keeps nothing awake any more.
const QUIET_AFTER: Duration = Duration::from_secs(60);

/// A socket of exactly this address; a listening one where there are connections.
pub(super) fn open(door: Door) -> io::Result<OwnedFd> {
    let kind = if door.protocol == Protocol::Tcp { SocketType::STREAM } else { SocketType::DGRAM };
    let socket = socket(door.address, kind)?;
    if door.protocol == Protocol::Tcp {
        set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &door.address)?;
    if door.protocol == Protocol::Tcp {
        rustix::net::listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

/// The door that a socket is; `None` if it is none.
pub(super) fn of(socket: &OwnedFd) -> Option<Door> {
    let address = SocketAddr::try_from(rustix::net::getsockname(socket).ok()?).ok()?;
    let protocol = match rustix::net::sockopt::socket_type(socket).ok()? {
        SocketType::STREAM => Protocol::Tcp,
        SocketType::DGRAM => Protocol::Udp,
        _ => return None,
    };
    Some(Door { protocol, address })
}

fn socket(address: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let protocol = if kind == SocketType::STREAM { ipproto::TCP } else { ipproto::UDP };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, Some(protocol))?;
    if address.is_ipv6() {
        // Who asked for `::` and `0.0.0.0` gets both, and who asked for one gets one.
        set_ipv6_v6only(&socket, true)?;
    }
    Ok(socket)
}

/// Accepts until the door is closed.
pub(super) async fn serve(listener: TcpListener, ports: Ports, door: Door, behind: watch::Receiver<Behind>) {
    let under_way = Arc::new(Semaphore::new(UNDER_WAY_MAX));
    loop {
        let Some(mut pass) = ports.shared.entrance.pass().await else { return };
        match pass.unless_closed(listener.accept()).await {
            None => {}
            Some(Ok((client, source))) => {
                let Ok(permit) = Arc::clone(&ports.shared.forwards).try_acquire_owned() else {
                    tracing::warn!(%door, "too many connections to published ports");
                    continue;
                };
                let (ports, behind, under_way) = (ports.clone(), behind.clone(), Arc::clone(&under_way));
                tokio::spawn(async move {
                    if let Err(reason) = forward(client, source, &ports, door, behind, &under_way).await {
                        tracing::debug!(%door, %source, reason, "a connection was not forwarded");
                    }
                    drop(permit);
                });
            }
            Some(Err(error)) => {
                tracing::warn!(%door, %error, "can't accept");
                drop(pass);
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn forward(
    client: TcpStream,
    source: SocketAddr,
    ports: &Ports,
    door: Door,
    behind: watch::Receiver<Behind>,
    under_way: &Semaphore,
) -> Result<(), String> {
    let (lease, mut stream) = enter(ports, source, door, &behind, Target::Tcp, under_way).await?;
    let _ = client.set_nodelay(true);
    let traffic = Arc::new(Traffic::default());
    let mut client = Counted { inner: client, traffic: Arc::clone(&traffic) };
    let owner = ports.owner().await?;
    let again = claimant(HoldKind::Request, Policy::ExistingOnly, source, door, &behind.borrow());
    let ended = lease.ended();
    tokio::select! {
        () = both_ways(&mut client, &mut stream) => Ok(()),
        reason = ended => Err(reason),
        () = hold_while_busy(lease, &owner, again, &traffic) => Err("its VM is another now".to_owned()),
    }
}

/// A lease, and a stream to who is behind the door.
pub(super) async fn enter(
    ports: &Ports,
    source: SocketAddr,
    door: Door,
    behind: &watch::Receiver<Behind>,
    target: impl Fn(String) -> Target,
    under_way: &Semaphore,
) -> Result<(HeldLease, Stream), String> {
    let owner = ports.owner().await?;
    let (phase, generation) = {
        let info = owner.info();
        let info = info.borrow();
        (info.vm.phase, info.vm.generation)
    };
    if phase == Phase::Absent && !ports.may_wake(source.ip(), generation) {
        return Err("its source woke the VM too often".to_owned());
    }
    let claimant = claimant(HoldKind::Request, Policy::Acquire, source, door, &behind.borrow());
    let lease = owner.lease(claimant).await.map_err(|refused| refused.to_string())?;
    // A container that comes with its VM may need a moment, and may get another address.
    let deadline = ports.up_since(lease.generation()) + LISTENS_WITHIN;
    loop {
        let address = behind.borrow().target.map(|target| target.to_string());
        let reached = match address {
            Some(address) => {
                let _turn = under_way.acquire().await;
                lease.forward(target(address)).await.map_err(|error| error.to_string())
            }
            None => Err("its container does not run".to_owned()),
        };
        match reached {
            Ok(stream) => return Ok((lease, stream)),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => sleep(KNOCK_EVERY).await,
        }
    }
}

fn claimant(kind: HoldKind, policy: Policy, source: SocketAddr, door: Door, behind: &Behind) -> Claimant {
    Claimant { kind, policy, owner: source.to_string(), reason: format!("{door} of {}", behind.name) }
}

/// Holds the VM as long as bytes flow, and again when they flow again. Ends when the VM that the connection is to is gone.
async fn hold_while_busy(mut strong: HeldLease, owner: &Owner, claimant: Claimant, traffic: &Traffic) {
    let generation = strong.generation();
    let listed = Claimant {
        kind: HoldKind::Connection,
        policy: Policy::ExistingOnly,
        owner: "a published port".to_owned(),
        reason: "a connection on which nothing is said".to_owned(),
    };
    loop {
        traffic.is_quiet().await;
        // The strong one goes only now, so that the weak one is of the same VM.
        let weak = owner.lease(listed.clone()).await.ok();
        drop(strong);
        strong = loop {
            traffic.moved.notified().await;
            match owner.lease(claimant.clone()).await {
                Ok(lease) if lease.generation() == generation => break lease,
                Ok(_another) => return,
                // If its VM is going, the connection ends with it; if there are too many requests, bytes will come again.
                Err(refused) => tracing::debug!(%refused, "a connection can't hold its VM again"),
            }
        };
        drop(weak);
    }
}

/// What passed on a connection.
#[derive(Debug, Default)]
struct Traffic {
    bytes: AtomicU64,
    /// Some more have passed.
    moved: Notify,
}

impl Traffic {
    fn pass(&self, bytes: usize) {
        if bytes > 0 {
            self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            self.moved.notify_one();
        }
    }

    /// Waits until nothing has passed for a while; what passes from then on notifies.
    async fn is_quiet(&self) {
        let mut seen = self.bytes.load(Ordering::Relaxed);
        loop {
            sleep(QUIET_AFTER).await;
            // What had passed before the count that follows notifies no more.
            let _ = self.moved.notified().now_or_never();
            let now = self.bytes.load(Ordering::Relaxed);
            if now == seen {
                return;
            }
            seen = now;
        }
    }
}

/// Counts what passes.
#[derive(Debug)]
struct Counted<T> {
    inner: T,
    traffic: Arc<Traffic>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        self.traffic.pass(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.inner).poll_write(context, bytes))?;
        self.traffic.pass(count);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
