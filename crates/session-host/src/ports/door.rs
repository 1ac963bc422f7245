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
use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::Ports;
use super::published::{Behind, Door, Protocol};
use crate::owner::{Claimant, HeldLease};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

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
    loop {
        let Some(mut pass) = ports.shared.entrance.pass().await else { return };
        match pass.unless_closed(listener.accept()).await {
            None => {}
            Some(Ok((client, source))) => {
                let Ok(permit) = Arc::clone(&ports.shared.forwards).try_acquire_owned() else {
                    tracing::warn!(%door, "too many connections to published ports");
                    continue;
                };
                let (ports, behind) = (ports.clone(), behind.clone());
                tokio::spawn(async move {
                    if let Err(reason) = forward(client, source, &ports, door, behind).await {
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
) -> Result<(), String> {
    let (lease, mut stream) = enter(ports, source, door, &behind, Target::Tcp).await?;
    let _ = client.set_nodelay(true);
    let mut client = Counted { inner: client, bytes: Arc::new(AtomicU64::new(0)) };
    let bytes = Arc::clone(&client.bytes);
    let ended = lease.ended();
    tokio::select! {
        () = both_ways(&mut client, &mut stream) => Ok(()),
        reason = ended => Err(reason),
        () = hold_while_busy(lease, ports, bytes) => Ok(()),
    }
}

/// A lease, and a stream to who is behind the door.
pub(super) async fn enter(
    ports: &Ports,
    source: SocketAddr,
    door: Door,
    behind: &watch::Receiver<Behind>,
    target: impl Fn(String) -> Target,
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
    let claimant = claimant(HoldKind::Request, source, door, &behind.borrow());
    let lease = owner.lease(claimant).await.map_err(|refused| refused.to_string())?;
    // A container that comes with its VM may need a moment, and may get another address.
    let deadline = ports.up_since(lease.generation()) + LISTENS_WITHIN;
    loop {
        let address = behind.borrow().target.map(|target| target.to_string());
        let reached = match address {
            Some(address) => lease.forward(target(address)).await.map_err(|error| error.to_string()),
            None => Err("its container does not run".to_owned()),
        };
        match reached {
            Ok(stream) => return Ok((lease, stream)),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => sleep(KNOCK_EVERY).await,
        }
    }
}

fn claimant(kind: HoldKind, source: SocketAddr, door: Door, behind: &Behind) -> Claimant {
    Claimant {
        kind,
        policy: Policy::Acquire,
        owner: source.to_string(),
        reason: format!("{door} of {}", behind.name),
    }
}

/// Keeps the lease as long as bytes flow. Never ends: without a lease the connection lives as long as its VM.
async fn hold_while_busy(lease: HeldLease, ports: &Ports, bytes: Arc<AtomicU64>) {
    let mut seen = 0;
    loop {
        sleep(QUIET_AFTER).await;
        let now = bytes.load(Ordering::Relaxed);
        if now == seen {
            break;
        }
        seen = now;
    }
    let weak = match ports.owner().await {
        Ok(owner) => {
            let reason = "a connection on which nothing is said".to_owned();
            let policy = Policy::ExistingOnly;
            let claimant =
                Claimant { kind: HoldKind::Connection, policy, owner: "a published port".to_owned(), reason };
            owner.lease(claimant).await.ok()
        }
        Err(_) => None,
    };
    drop(lease);
    std::future::pending::<()>().await;
    drop(weak);
}

/// Counts what passes.
#[derive(Debug)]
struct Counted<T> {
    inner: T,
    bytes: Arc<AtomicU64>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        self.bytes.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
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
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
