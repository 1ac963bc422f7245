//! The guest's side of the agent channel.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use dormouse_agent_proto::{
    Answer, Boot, Failure, FailureCode, GuestEvent, Identity, Reply, Request, Target, VERSION,
};
use dormouse_mux::{JsonError, Limits, Mux, Stream, both_ways, read_json, write_json};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::connections::Connections;
use crate::freeze::Freezer;
use crate::port::Port;
use crate::process::Processes;
use crate::{activity, console, datagrams, disk, engine, identity, process};
use dormouse_agent_proto::EngineState;

/// How often a port without a host is looked at: the kernel can't be waited on for a host that comes.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Longest wait for the request on a new stream, and for a dialled socket.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);

/// What the streams of both ports share.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) boot: Boot,
    pub(crate) engine: watch::Receiver<EngineState>,
    pub(crate) steps: watch::Receiver<Vec<(String, u64)>>,
    pub(crate) power_off: mpsc::Sender<()>,
    pub(crate) freezer: Freezer,
    pub(crate) connections: Connections,
    pub(crate) processes: Processes,
    /// When a host was last connected, in nanoseconds of uptime.
    pub(crate) host_seen: watch::Sender<u64>,
}

/// Which port a stream came on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    Agent,
    Ports,
}

/// Nanoseconds since the kernel started, without the time in which the VM was stopped.
pub(crate) fn uptime_nanos() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Serves one port, one host after the other, for ever.
pub(crate) async fn serve_port(path: PathBuf, channel: Channel, guest: Arc<Guest>) {
    loop {
        match Port::open(&path) {
            Ok(Some(port)) => serve_host(port, channel, &guest).await,
            Ok(None) => sleep(LOOK_EVERY).await,
            Err(error) => {
                console::say(&format!("can't open {}: {error:#}", path.display()));
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Serves a host until it goes.
async fn serve_host(
    mut port: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    channel: Channel,
    guest: &Arc<Guest>,
) {
    if dormouse_mux::answer(&mut port, guest.boot).await.is_err() {
        return;
    }
    let limits = match channel {
        Channel::Agent => Limits::AGENT,
        Channel::Ports => Limits::PORTS,
    };
    let mux = Mux::server(port, limits);
    let mut seen = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            stream = mux.accept() => {
                let Some(stream) = stream else { break };
                tokio::spawn(serve_stream(stream, channel, Arc::clone(guest)));
            }
            _ = seen.tick() => { guest.host_seen.send_replace(uptime_nanos()); }
        }
    }
    console::say(&format!("the host's channel over the port {channel:?} ended: {}", mux.closed().await));
}

async fn serve_stream(mut stream: Stream, channel: Channel, guest: Arc<Guest>) {
    let Ok(Ok(request)) = timeout(REQUEST_WITHIN, read_json::<Request>(&mut stream)).await else { return };
    // Errors here are a host that went: nobody is left to be told.
    let _ = match request {
        Request::Dial(target) => dial(stream, target).await,
        _ if channel == Channel::Ports => refuse(stream, FailureCode::Invalid, "this port only dials").await,
        Request::Run(wish) => process::run(stream, wish, &guest.processes).await,
        Request::Watch => watch_guest(stream, &guest).await,
        Request::Hello { version, .. } if version != VERSION => {
            let message = format!("the guest speaks version {VERSION}, the host version {version}");
            refuse(stream, FailureCode::Version, &message).await
        }
        Request::Hello { nonce, .. } => {
            let engine = guest.engine.borrow().clone();
            let boot = guest.boot.to_string();
            accept(
                stream,
                Answer::Hello { version: VERSION, nonce, boot, uptime_nanos: uptime_nanos(), engine },
            )
            .await
        }
        Request::Activity => {
            let looked = tokio::task::spawn_blocking(activity::look).await;
            accept(stream, Answer::Activity(looked.unwrap_or_default())).await
        }
        Request::Sync => {
            let _ = tokio::task::spawn_blocking(rustix::fs::sync).await;
            accept(stream, Answer::Done).await
        }
        Request::SetClock { unix_nanos } => match set_clock(unix_nanos) {
            Ok(()) => accept(stream, Answer::Done).await,
            Err(error) => refuse(stream, FailureCode::Io, &format!("can't set the clock: {error}")).await,
        },
        Request::Freeze => match guest.freezer.freeze().await {
            Ok(()) => {
                let connections = guest.connections.clone();
                let _ = tokio::task::spawn_blocking(move || connections.note()).await;
                accept(stream, Answer::Done).await
            }
            Err(error) => refuse(stream, FailureCode::Io, &format!("can't freeze the disk: {error}")).await,
        },
        Request::Wake { unix_nanos, identity } => match wake(&guest, unix_nanos, identity.as_ref()) {
            Ok(()) => accept(stream, Answer::Done).await,
            Err(error) => refuse(stream, FailureCode::Io, &format!("{error:#}")).await,
        },
        Request::EndConnections => {
            guest.connections.end();
            accept(stream, Answer::Done).await
        }
        Request::GrowDisk { bytes } => match disk::grow_to(bytes).await {
            Ok(()) => accept(stream, Answer::Done).await,
            Err(error) => refuse(stream, FailureCode::Io, &format!("{error:#}")).await,
        },
        Request::PowerOff => {
            let done = accept(stream, Answer::Done).await;
            let _ = guest.power_off.try_send(());
            done
        }
    };
}

async fn accept(mut stream: Stream, answer: Answer) -> Result<(), JsonError> {
    write_json(&mut stream, &Reply::Ok(answer)).await?;
    close(stream).await
}

async fn refuse(mut stream: Stream, code: FailureCode, message: &str) -> Result<(), JsonError> {
    write_json(&mut stream, &Reply::Err(Failure { code, message: message.to_owned() })).await?;
    close(stream).await
}

/// Ends our side and waits for the host to end its own, so that the reply isn't lost with the stream.
async fn close(mut stream: Stream) -> Result<(), JsonError> {
    tokio::io::AsyncWriteExt::shutdown(&mut stream).await?;
    let _ = timeout(REQUEST_WITHIN, stream.read(&mut [0])).await;
    Ok(())
}

async fn dial(mut stream: Stream, target: Target) -> Result<(), JsonError> {
    match &target {
        Target::Engine => splice(stream, UnixStream::connect(engine::SOCKET)).await,
        Target::Unix(path) => splice(stream, UnixStream::connect(path)).await,
        Target::Tcp(address) => splice(stream, TcpStream::connect(address)).await,
        Target::Udp(address) => match datagrams::connect(address).await {
            Ok(socket) => {
                write_json(&mut stream, &Reply::Ok(Answer::Done)).await?;
                datagrams::relay(stream, socket).await;
                Ok(())
            }
            Err(error) => refuse_dial(stream, &error).await,
        },
    }
}

async fn refuse_dial(stream: Stream, error: &std::io::Error) -> Result<(), JsonError> {
    use std::io::ErrorKind;
    let code = match error.kind() {
        ErrorKind::NotFound => FailureCode::NotFound,
        ErrorKind::ConnectionRefused => FailureCode::Refused,
        ErrorKind::InvalidInput => FailureCode::Invalid,
        _ => FailureCode::Io,
    };
    refuse(stream, code, &format!("can't connect in the guest: {error}")).await
}

async fn splice<T>(
    mut stream: Stream,
    connect: impl Future<Output = std::io::Result<T>>,
) -> Result<(), JsonError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let connected = timeout(REQUEST_WITHIN, connect).await.unwrap_or_else(|late| Err(late.into()));
    let mut socket = match connected {
        Ok(socket) => socket,
        Err(error) => return refuse_dial(stream, &error).await,
    };
    write_json(&mut stream, &Reply::Ok(Answer::Done)).await?;
    both_ways(&mut socket, &mut stream).await;
    Ok(())
}

fn set_clock(unix_nanos: u64) -> rustix::io::Result<()> {
    let time = Duration::from_nanos(unix_nanos);
    let behind = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().abs_diff(time);
    // A step backwards disturbs programs; what is right to the millisecond stays.
    if behind < Duration::from_millis(1) {
        return Ok(());
    }
    let tv_sec = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec: time.subsec_nanos().into() })
}

/// Each step is tried, whatever became of the ones before: a guest that was thawed can still be shut down in order.
fn wake(guest: &Guest, unix_nanos: u64, identity: Option<&Identity>) -> Result<()> {
    let clock = set_clock(unix_nanos).context("can't set the clock");
    let renewed = identity.map_or(Ok(()), identity::become_another);
    guest.freezer.thaw().context("can't thaw the disk")?;
    clock.and(renewed)
}

/// Tells the steps so far, what runs, the engine's state, and then every change.
async fn watch_guest(mut stream: Stream, guest: &Guest) -> Result<(), JsonError> {
    write_json(&mut stream, &Reply::Ok(Answer::Done)).await?;
    let (mut engine, mut steps) = (guest.engine.clone(), guest.steps.clone());
    let mut processes = guest.processes.watch();
    let mut told = 0;
    engine.mark_changed();
    steps.mark_changed();
    processes.mark_changed();
    loop {
        tokio::select! {
            biased;
            // Who told the steps may end before the last of what there is to tell of the engine is told.
            Ok(()) = steps.changed() => {
                let new: Vec<_> = steps.borrow_and_update()[told..].to_vec();
                told += new.len();
                for (name, uptime_nanos) in new {
                    write_json(&mut stream, &GuestEvent::Step { name, uptime_nanos }).await?;
                }
            }
            Ok(()) = processes.changed() => {
                let running = Processes::list(&processes.borrow_and_update());
                write_json(&mut stream, &GuestEvent::Running(running)).await?;
            }
            Ok(()) = engine.changed() => {
                let state = engine.borrow_and_update().clone();
                write_json(&mut stream, &GuestEvent::Engine(state)).await?;
            }
            // The host sends nothing on this stream: whatever comes, it is over.
            _ = stream.read_u8() => return Ok(()),
        }
    }
}
