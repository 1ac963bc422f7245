//! A guest that answers: how it is greeted, and what is told of it while it serves.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dormouse_agent_proto::{Answer, EngineState, GuestEvent, Identity, Nonce, RunningProcess, Target};
use dormouse_lifecycle::{Event, Generation};
use dormouse_mux::{Agent, Limits, Mux, Watch};
use dormouse_vm::Vm;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::census::follow_containers;
use super::{PROGRESS_WITHIN, quiet};
use crate::docker::Face;
use crate::events::Events;
use crate::owner::{Inbox, Message};

/// A VM whose channel has ended is gone within this time, or lives on without one.
const EXIT_WITHIN: Duration = Duration::from_secs(3);

/// An engine that was restarted is listened to again after so long.
const HEAR_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// A guest whose channel is up.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) agent: Agent,
    /// The guest kernel's boot id.
    pub(crate) boot: String,
    /// Cancelled when its channel is closed on purpose.
    pub(crate) quiet: CancellationToken,
}

/// What a guest tells while it serves.
#[derive(Debug)]
pub(crate) struct Tidings {
    watch: Watch,
    /// The root processes that ran when it was ready: those of an earlier host.
    pub(super) processes: Vec<RunningProcess>,
}

impl Guest {
    /// Connects to a guest, asks who it is, and tells it what time it is; a clone also who it is from now on. A file
    /// system that a suspend left frozen is thawed by that.
    pub(crate) async fn greet(
        vm: &Vm,
        deadline: Instant,
        identity: Option<Identity>,
    ) -> Result<Self, String> {
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let greet_by = deadline.min(Instant::now() + PROGRESS_WITHIN);
        let (agent, ports) =
            tokio::try_join!(async { channel(vm.agent().await, Limits::AGENT, greet_by).await }, async {
                channel(vm.ports().await, Limits::PORTS, greet_by).await
            },)?;
        let ((agent, nonce), (ports, _)) = (agent, ports);
        let agent = Agent::new(agent, ports);
        let hello = agent.hello(&nonce.to_string()).await.map_err(|error| words(&error))?;
        let Answer::Hello { boot, .. } = hello else {
            return Err("the guest's hello makes no sense".to_owned());
        };
        agent.wake(unix_nanos(), identity).await.map_err(|error| words(&error))?;
        Ok(Self { agent, boot, quiet: CancellationToken::new() })
    }

    /// Waits for an engine that lists its containers, and tells the steps on the way and what the guest warns of.
    pub(crate) async fn until_ready(
        &self,
        deadline: Instant,
        step: impl Fn(&str),
        warn: impl Fn(String),
    ) -> Result<Tidings, String> {
        let mut watch = self.agent.watch().await.map_err(|error| error.to_string())?;
        let mut processes = Vec::new();
        loop {
            let until = deadline.min(Instant::now() + PROGRESS_WITHIN);
            let event = timeout_at(until, watch.next()).await;
            let event = event
                .map_err(|_| "the guest made no progress".to_owned())?
                .map_err(|error| error.to_string())?;
            match event {
                GuestEvent::Step { name, .. } => step(&name),
                GuestEvent::Engine(EngineState::Ready) => return Ok(Tidings { watch, processes }),
                GuestEvent::Engine(EngineState::Dead { details }) => {
                    return Err(format!("the engine did not start: {details}"));
                }
                GuestEvent::Engine(_) => {}
                GuestEvent::Running(running) => processes = running,
                GuestEvent::Warning(warning) => warn(warning),
            }
        }
    }

    /// Tells what happens in the guest until its channel ends, from `counted` on: whoever woke the VM waits for the first
    /// count, and comes before all that listens. One that ends though nobody closed it, in a VM that
    /// lives on, is the loss of the engine.
    pub(super) async fn follow(
        self,
        tidings: Tidings,
        generation: Generation,
        ears: Ears,
        counted: CancellationToken,
        gone: impl Future<Output = ()>,
    ) {
        let Ears { inbox, face: Face { events, ports, folders, .. }, heard_before } = ears;
        let agent = || self.agent.clone();
        let listening = async {
            counted.cancelled().await;
            let _end_with_this = [
                tokio::spawn(follow_containers(agent(), inbox.clone(), generation)),
                tokio::spawn(ports.clone().follow(agent(), generation.0, events.container_changes())),
                tokio::spawn(folders.follow(agent(), events.container_changes())),
                tokio::spawn(quiet::watch(agent(), ports, events.container_changes())),
                tokio::spawn(hear_events(agent(), events, generation, heard_before)),
            ]
            .map(AbortOnDrop);
            std::future::pending::<()>().await;
        };
        // What it tells before that would be of a VM that nobody knows yet, and lost: the end of a root process would leave its
        // hold for ever. It waits in the channel.
        let told = async {
            counted.cancelled().await;
            follow(tidings, &self.agent, generation, &inbox).await
        };
        let reason = tokio::select! {
            biased;
            () = self.quiet.cancelled() => return,
            reason = told => reason,
            () = listening => unreachable!("this future never ends"),
        };
        // A VM that ends takes its channel along, and its exit says more.
        if timeout(EXIT_WITHIN, gone).await.is_err() {
            inbox.send(Message::Event(Event::EngineDied { generation, reason: reason.into() }));
        }
    }
}

/// What time it is, in nanoseconds since 1970.
pub(super) fn unix_nanos() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// A channel to the guest, over one of its ports.
async fn channel(
    port: std::io::Result<UnixStream>,
    limits: Limits,
    deadline: Instant,
) -> Result<(Mux, Nonce), String> {
    let mut port = port.map_err(|error| format!("can't connect to the agent: {error}"))?;
    let nonce = Nonce(u128::from_ne_bytes(random()?));
    dormouse_mux::connect(&mut port, nonce, deadline).await.map_err(|error| error.to_string())?;
    Ok((Mux::client(port, limits), nonce))
}

/// Who hears of what happens in a guest.
pub(super) struct Ears {
    pub(super) inbox: Inbox,
    pub(super) face: Face,
    /// Whether the engine, as it is, was listened to up to the sleep that it comes from.
    pub(super) heard_before: bool,
}

/// Hears the engine's events until it is aborted, over restarts of the engine.
async fn hear_events(agent: Agent, events: Events, generation: Generation, mut heard_before: bool) {
    loop {
        if let Ok(stream) = agent.dial(Target::Engine).await {
            if let Err(error) = events.hear(stream, generation.0, heard_before).await {
                tracing::debug!(%error, "the engine's events broke off");
            }
            heard_before = true;
        }
        sleep(HEAR_AGAIN_AFTER).await;
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells when an earlier host's root process ends, and when the engine dies for good; ends with the channel, and says why
/// that ended.
async fn follow(tidings: Tidings, agent: &Agent, generation: Generation, inbox: &Inbox) -> String {
    let Tidings { mut watch, mut processes } = tidings;
    loop {
        let event = tokio::select! {
            event = watch.next() => event,
            reason = agent.closed() => return reason,
        };
        match event {
            Ok(GuestEvent::Engine(EngineState::Dead { details })) => {
                inbox.send(Message::Event(Event::EngineDied { generation, reason: details.into() }));
            }
            Ok(GuestEvent::Engine(EngineState::Restarting { details })) => {
                tracing::warn!(generation = generation.0, details, "the engine is being restarted");
            }
            Ok(GuestEvent::Running(running)) => processes.retain(|process| {
                let runs = running.contains(process);
                if !runs {
                    inbox.send(Message::ProcessEnded { generation, pid: process.pid });
                }
                runs
            }),
            Ok(_) => {}
            // One that tells no more though its channel is up would never tell of an engine's death either.
            Err(_) => {
                let closed = timeout(EXIT_WITHIN, agent.closed()).await;
                return closed
                    .unwrap_or_else(|_| "the guest tells nothing of its engine any more".to_owned());
            }
        }
    }
}

pub(super) fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| error.to_string())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use dormouse_agent_proto::{Reply, Request};
    use dormouse_mux::{Stream, read_json, write_json};
    use tokio::io::{AsyncWriteExt, duplex};
    use tokio::sync::mpsc;

    use super::*;

    /// A guest whose channel is up and that is watched.
    struct Watched {
        agent: Agent,
        watch: Watch,
        _guest: Mux,
        ports: Mux,
        /// Over which it tells.
        stream: Stream,
    }

    /// One that tells of this first.
    async fn watched(event: GuestEvent) -> Watched {
        let (host, guest) = duplex(64 * 1024);
        let guest = Mux::server(guest, Limits::AGENT);
        let mux = Mux::client(host, Limits::AGENT);
        let (host_ports, ports) = duplex(64 * 1024);
        let ports = Mux::server(ports, Limits::PORTS);
        let agent = Agent::new(mux, Mux::client(host_ports, Limits::PORTS));
        let serving = async {
            let mut stream = guest.accept().await.unwrap();
            let asked: Request = read_json(&mut stream).await.unwrap();
            assert_eq!(asked, Request::Watch);
            write_json(&mut stream, &Reply::Ok(Answer::Done)).await.unwrap();
            write_json(&mut stream, &event).await.unwrap();
            stream
        };
        let (watch, stream) = tokio::join!(agent.watch(), serving);
        Watched { agent, watch: watch.unwrap(), _guest: guest, ports, stream }
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_tells_no_more_is_lost_though_its_channel_is_up() {
        let event = GuestEvent::Engine(EngineState::Dead { details: "killed".to_owned() });
        let Watched { agent, watch, _guest, ports: _ports, mut stream } = watched(event).await;
        stream.shutdown().await.unwrap();
        let (sender, mut told) = mpsc::unbounded_channel();
        let inbox = Inbox(sender);
        let tidings = Tidings { watch, processes: Vec::new() };
        let following = follow(tidings, &agent, Generation(1), &inbox);
        let reason =
            timeout(Duration::from_secs(60), following).await.expect("it is waited for without bound");
        assert_eq!(reason, "the guest tells nothing of its engine any more");
        let told = told.recv().await;
        assert!(matches!(told, Some(Message::Event(Event::EngineDied { .. }))), "{told:?}");
    }

    /// A guest that is followed, and the ends of it that a test may pull.
    struct Followed {
        told: mpsc::UnboundedReceiver<Message>,
        guest: Guest,
        ports: Mux,
        following: JoinHandle<()>,
        _ends: (Mux, Stream, tempfile::TempDir),
    }

    async fn followed() -> Followed {
        let Watched { agent, watch, _guest: guest_mux, ports, stream } =
            watched(GuestEvent::Running(Vec::new())).await;
        let folder = tempfile::tempdir().unwrap();
        let (sender, told) = mpsc::unbounded_channel();
        let face = crate::owner::tests::stage::facts(folder.path()).face;
        let ears = Ears { inbox: Inbox(sender), face, heard_before: false };
        let guest = Guest { agent, boot: String::new(), quiet: CancellationToken::new() };
        let counted = CancellationToken::new();
        counted.cancel();
        let tidings = Tidings { watch, processes: Vec::new() };
        let gone = std::future::pending();
        let following = tokio::spawn(guest.clone().follow(tidings, Generation(1), ears, counted, gone));
        Followed { told, guest, ports, following, _ends: (guest_mux, stream, folder) }
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_can_be_forwarded_to_no_more_is_lost() {
        let Followed { mut told, ports, following, guest: _guest, _ends } = followed().await;
        ports.close().await;
        timeout(Duration::from_secs(60), following).await.expect("nobody noticed").unwrap();
        let mut reasons = Vec::new();
        while let Ok(message) = told.try_recv() {
            if let Message::Event(Event::EngineDied { reason, .. }) = message {
                reasons.push(reason.to_string());
            }
        }
        assert!(matches!(&reasons[..], [reason] if reason.contains("published ports")), "{reasons:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_is_hung_up_on_in_order_is_not_lost() {
        let Followed { mut told, guest, ports: _ports, following, _ends } = followed().await;
        guest.quiet.cancel();
        guest.agent.close().await;
        timeout(Duration::from_secs(60), following).await.expect("it is followed on").unwrap();
        while let Ok(message) = told.try_recv() {
            assert!(!matches!(message, Message::Event(Event::EngineDied { .. })), "{message:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_root_process_is_told_when_the_vm_that_it_held_is_known() {
        let Watched { agent, watch, _guest, ports: _ports, stream: _stream } =
            watched(GuestEvent::Running(Vec::new())).await;
        let processes = vec![RunningProcess { pid: 7, command: "sh".to_owned() }];
        let tidings = Tidings { watch, processes };
        let folder = tempfile::tempdir().unwrap();
        let (sender, mut told) = mpsc::unbounded_channel();
        let face = crate::owner::tests::stage::facts(folder.path()).face;
        let ears = Ears { inbox: Inbox(sender), face, heard_before: false };
        let guest = Guest { agent, boot: String::new(), quiet: CancellationToken::new() };
        let counted = CancellationToken::new();
        let gone = std::future::pending();
        let following = tokio::spawn(guest.follow(tidings, Generation(1), ears, counted.clone(), gone));
        let early = timeout(Duration::from_secs(10), told.recv()).await;
        assert!(early.is_err(), "nobody knows the VM yet: {early:?}");
        counted.cancel();
        let ended = timeout(Duration::from_secs(10), told.recv()).await;
        assert!(matches!(ended, Ok(Some(Message::ProcessEnded { pid: 7, .. }))), "{ended:?}");
        following.abort();
    }
}
