//! From an order for a VM to a guest whose engine lists its containers, and what is told of that VM until it is gone.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dormouse_agent_proto::{Answer, EngineState, GuestEvent, Nonce, Target};
use dormouse_lifecycle::{Event, Exit, Generation, SnapshotFate};
use dormouse_mux::{Agent, Limits, Mux, Watch};
use dormouse_vm::{ExitCause, Vm, VmEvent, VmEvents, VmExit, VmRecord};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::census::follow_containers;
use super::{Factory, PROGRESS_WITHIN, Shared};
use crate::events::Events;
use crate::owner::{Inbox, Message};

/// A VM whose channel has ended is gone within this time, or lives on without one.
const EXIT_WITHIN: Duration = Duration::from_secs(3);

/// An engine that was restarted is listened to again after so long.
const HEAR_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// How many of the console's lines go into an error.
const LAST_LINES: usize = 12;

/// Where a VM comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The factory makes it.
    Made,
    /// An earlier host left it.
    Left,
}

pub(super) struct BringUp<F> {
    pub(super) shared: Arc<Shared<F>>,
    pub(super) generation: Generation,
    pub(super) cancel: CancellationToken,
    pub(super) vm: watch::Sender<Option<Arc<Vm>>>,
    pub(super) agent: watch::Sender<Option<Agent>>,
}

impl<F: Factory> BringUp<F> {
    pub(super) async fn run(self, origin: Origin, deadline: Instant) {
        let generation = self.generation;
        if origin == Origin::Made
            && let Err(reason) = self.shared.factory.make(generation.0).await
        {
            return self.failed(reason);
        }
        let (vm, events) = match self.find().await {
            Ok(Some(found)) => found,
            Ok(None) if origin == Origin::Left => {
                let details = "it was gone when its new host looked for it".into();
                return self.tell(Event::VmExited { generation, exit: Exit::Unknown(details) });
            }
            Ok(None) => return self.failed("QEMU ended at once".to_owned()),
            Err(reason) => return self.failed(reason),
        };
        self.vm.send_replace(Some(Arc::clone(&vm)));
        if self.cancel.is_cancelled() {
            vm.kill();
        }
        let greeted = CancellationToken::new();
        let pump = tokio::spawn(pump(
            events,
            Arc::clone(&vm),
            self.shared.inbox.clone(),
            generation,
            greeted.clone(),
        ));
        let outcome = tokio::select! {
            outcome = self.greet(&vm, origin, deadline) => outcome,
            () = self.cancel.cancelled() => Err("it was called off".to_owned()),
        };
        match outcome {
            Ok((agent, watch)) => {
                greeted.cancel();
                self.agent.send_replace(Some(agent.clone()));
                self.shared.inbox.send(Message::Ready { generation, agent: agent.clone() });
                let changes =
                    tokio::spawn(follow_containers(agent.clone(), self.shared.inbox.clone(), generation));
                let hearing =
                    tokio::spawn(hear_events(agent.clone(), self.shared.events.clone(), generation));
                let reason = self.follow_engine(watch, &agent).await;
                changes.abort();
                hearing.abort();
                // A VM that ends takes its channel along, and its exit says more. One that lives on has lost its engine.
                if timeout(EXIT_WITHIN, pump).await.is_err() {
                    self.tell(Event::EngineDied { generation, reason: reason.into() });
                }
            }
            Err(reason) => {
                let last = self
                    .shared
                    .console
                    .borrow()
                    .as_ref()
                    .map(|console| console.last_lines(LAST_LINES).join("\n"));
                vm.kill();
                // Whoever is told of the failure may at once make another VM: so this one is gone before.
                let exit = pump.await.ok().flatten();
                let reason = exit.map_or(reason.clone(), |exit| match exit.cause {
                    ExitCause::Unknown => reason,
                    _ => exit.details,
                });
                let reason = match last {
                    Some(last) if !last.is_empty() => format!("{reason}; the console's last lines:\n{last}"),
                    _ => reason,
                };
                self.failed(reason);
            }
        }
    }

    fn failed(&self, reason: String) {
        tracing::warn!(generation = self.generation.0, reason, "no VM");
        let generation = self.generation;
        self.tell(Event::StartFailed { generation, reason: reason.into(), snapshot: SnapshotFate::Void });
    }

    fn tell(&self, event: Event) {
        self.shared.inbox.send(Message::Event(event));
    }

    fn step(&self, step: &str) {
        self.tell(Event::VmProgress { generation: self.generation, step: step.into() });
    }

    async fn find(&self) -> Result<Option<(Arc<Vm>, VmEvents)>, String> {
        let folder = &self.shared.runtime_dir;
        let record = VmRecord::read(folder).map_err(|error| error.to_string())?;
        let Some(record) = record.filter(|record| record.generation == self.generation.0) else {
            return Ok(None);
        };
        let found =
            Vm::connect(record, folder).await.map_err(|error| format!("can't connect to QEMU: {error}"))?;
        Ok(found.map(|(vm, events)| (Arc::new(vm), events)))
    }

    /// From a VM that QMP answers for to an engine that lists its containers.
    async fn greet(&self, vm: &Vm, origin: Origin, deadline: Instant) -> Result<(Agent, Watch), String> {
        let lost = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
        let console = vm.console().await.map_err(|error| lost("can't connect to the console", &error))?;
        self.shared.console.send_replace(Some(Arc::new(console)));
        if origin == Origin::Made {
            vm.cont().await.map_err(|error| lost("the VM doesn't run", &error))?;
        }
        self.step("kernel");
        let mut port = vm.agent().await.map_err(|error| lost("can't connect to the agent", &error))?;
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| error.to_string())?;
        let nonce = Nonce(u128::from_ne_bytes(random));
        let greet_by = deadline.min(Instant::now() + PROGRESS_WITHIN);
        dormouse_mux::connect(&mut port, nonce, greet_by).await.map_err(|error| error.to_string())?;
        let agent = Agent::new(Mux::client(port, Limits::AGENT));
        let hello = agent.hello(&nonce.to_string()).await.map_err(|error| error.to_string())?;
        let Answer::Hello { .. } = hello else { return Err("the guest's hello makes no sense".to_owned()) };
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        agent.set_clock(nanos).await.map_err(|error| error.to_string())?;
        let mut watch = agent.watch().await.map_err(|error| error.to_string())?;
        loop {
            let until = deadline.min(Instant::now() + PROGRESS_WITHIN);
            let event = tokio::time::timeout_at(until, watch.next()).await;
            let event = event
                .map_err(|_| "the guest made no progress".to_owned())?
                .map_err(|error| error.to_string())?;
            match event {
                GuestEvent::Step { name, .. } => self.step(&name),
                GuestEvent::Engine(EngineState::Ready) => return Ok((agent, watch)),
                GuestEvent::Engine(EngineState::Dead { details }) => {
                    return Err(format!("the engine did not start: {details}"));
                }
                GuestEvent::Engine(_) => {}
                GuestEvent::Warning(warning) => tracing::warn!(warning, "from the guest"),
            }
        }
    }

    /// Tells when the engine dies for good; ends with the channel, and says why that ended.
    async fn follow_engine(&self, mut watch: Watch, agent: &Agent) -> String {
        let generation = self.generation;
        loop {
            match watch.next().await {
                Ok(GuestEvent::Engine(EngineState::Dead { details })) => {
                    self.tell(Event::EngineDied { generation, reason: details.into() });
                }
                Ok(GuestEvent::Engine(EngineState::Restarting { details })) => {
                    tracing::warn!(generation = generation.0, details, "the engine is being restarted");
                }
                Ok(_) => {}
                Err(_) => return agent.closed().await,
            }
        }
    }
}

/// Hears the engine's events until it is aborted, over restarts of the engine.
async fn hear_events(agent: Agent, events: Events, generation: Generation) {
    // What an engine has told that an earlier host listened to is only known as far as that host left it.
    let mut is_same_boot = false;
    loop {
        if let Ok(stream) = agent.dial(Target::Engine).await {
            if let Err(error) = events.hear(stream, generation.0, is_same_boot).await {
                tracing::debug!(%error, "the engine's events broke off");
            }
            is_same_boot = true;
        }
        sleep(HEAR_AGAIN_AFTER).await;
    }
}

/// Passes a VM's events on until it is gone, and then removes what it leaves. An exit before the guest was greeted is a
/// failed start, which its bring-up tells: the exit is returned instead.
async fn pump(
    mut events: VmEvents,
    vm: Arc<Vm>,
    inbox: Inbox,
    generation: Generation,
    greeted: CancellationToken,
) -> Option<VmExit> {
    loop {
        let event = match events.next().await {
            VmEvent::Exited(exit) => {
                // Only now is the record nobody's: the same order as in `Vm::remove`, which wants the VM for itself.
                vm.discard().await;
                if !greeted.is_cancelled() {
                    return Some(exit);
                }
                inbox.send(Message::Event(Event::VmExited { generation, exit: classify(&exit) }));
                return None;
            }
            VmEvent::PausedByDisk { reason, .. } => Event::VmPaused { generation, reason: reason.into() },
            VmEvent::Resumed => Event::VmResumed { generation },
            VmEvent::Stopped | VmEvent::AgentPort { .. } | VmEvent::PortsPort { .. } => continue,
        };
        inbox.send(Message::Event(event));
    }
}

fn classify(exit: &VmExit) -> Exit {
    match exit.cause {
        ExitCause::GuestShutdown => Exit::GuestShutdown,
        ExitCause::HostQuit
        | ExitCause::HostSignal
        | ExitCause::GuestPanic
        | ExitCause::GuestReset
        | ExitCause::Unknown => Exit::Crashed(exit.details.as_str().into()),
    }
}
