//! The real side of the core's actions: QEMU and the guest, one generation at a time.
//!
//! ```text
//! start ─► factory makes ─► connect ─► cont ─► agent answers ─► engine lists ─► Ready
//!                                        └─ pump: exits, pauses ─► events, until the VM is gone
//! ```
//!
//! Every step runs in a task of its own and ends in a message to the owner. A start that is cancelled, or whose VM
//! ends, is over at once, wherever it is.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dormouse_agent_proto::{Answer, EngineState, GuestEvent, Nonce, Target};
use dormouse_lifecycle::{Ask, Census, ContainerState, Event, Exit, Generation, SnapshotFate, StartHow};
use dormouse_mux::{Agent, Limits, Mux, Watch};
use dormouse_vm::{Console, ExitCause, Vm, VmEvent, VmEvents, VmExit, VmRecord};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::owner::{Inbox, Message};

/// A bring-up that makes no progress for so long has failed.
const PROGRESS_WITHIN: Duration = Duration::from_secs(60);

/// A VM whose channel has ended is gone within this time, or lives on without one.
const EXIT_WITHIN: Duration = Duration::from_secs(3);

/// How much of an answer of the engine is read: a list of very many containers.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// How many of the console's lines go into an error.
const LAST_LINES: usize = 12;

/// Makes VMs. The request names the session and the generation, and nothing else.
pub trait Factory: Send + Sync + 'static {
    /// Makes one more VM; its record lies in the session's runtime directory afterwards.
    fn make(&self, generation: u64) -> impl Future<Output = Result<(), String>> + Send;
}

/// What the owner has done for it. Nothing here waits: results come back through the inbox.
pub trait Machines: Send + 'static {
    /// Makes a VM and brings it up. Ends in `Ready`, `StartFailed` or `VmExited`.
    fn start(&mut self, generation: Generation, bound: Duration);
    /// Looks for the VM that an earlier host left up. Ends in `Ready` or `VmExited`.
    fn adopt(&mut self, generation: Generation, bound: Duration);
    /// Gives a bring-up up.
    fn cancel(&mut self, generation: Generation);
    /// Shuts the guest down in order. Ends in `VmExited`.
    fn shut_down(&mut self, ask: Ask);
    /// Ends the VM. Ends in `VmExited`.
    fn kill(&mut self, generation: Generation);
    /// Lets a VM run on that its disk had paused.
    fn resume(&mut self, generation: Generation);
    /// Asks the engine what runs.
    fn count(&mut self, ask: Ask, bound: Duration);
    /// The console of the present VM, or the last.
    fn console(&self) -> watch::Receiver<Option<Arc<Console>>>;
}

/// QEMU.
#[derive(Debug)]
pub struct Qemus<F> {
    shared: Arc<Shared<F>>,
    present: Option<Present>,
}

#[derive(Debug)]
struct Shared<F> {
    factory: F,
    runtime_dir: PathBuf,
    inbox: Inbox,
    console: watch::Sender<Option<Arc<Console>>>,
}

/// The generation that was started or adopted last.
#[derive(Debug)]
struct Present {
    generation: Generation,
    cancel: CancellationToken,
    vm: watch::Receiver<Option<Arc<Vm>>>,
    agent: watch::Receiver<Option<Agent>>,
}

impl<F: Factory> Qemus<F> {
    /// VMs of this session.
    #[must_use]
    pub fn new(factory: F, runtime_dir: PathBuf, inbox: Inbox) -> Self {
        let console = watch::channel(None).0;
        Self { shared: Arc::new(Shared { factory, runtime_dir, inbox, console }), present: None }
    }

    fn begin(&mut self, generation: Generation, bound: Duration, origin: Origin) {
        let cancel = CancellationToken::new();
        let (vm, vm_seen) = watch::channel(None);
        let (agent, agent_seen) = watch::channel(None);
        self.present = Some(Present { generation, cancel: cancel.clone(), vm: vm_seen, agent: agent_seen });
        let bring_up = BringUp { shared: Arc::clone(&self.shared), generation, cancel, vm, agent };
        tokio::spawn(bring_up.run(origin, Instant::now() + bound));
    }

    fn present(&self, generation: Generation) -> Option<&Present> {
        self.present.as_ref().filter(|present| present.generation == generation)
    }
}

impl<F: Factory> Machines for Qemus<F> {
    fn start(&mut self, generation: Generation, bound: Duration) {
        self.begin(generation, bound, Origin::Made);
    }

    fn adopt(&mut self, generation: Generation, bound: Duration) {
        self.begin(generation, bound, Origin::Left);
    }

    fn cancel(&mut self, generation: Generation) {
        if let Some(present) = self.present(generation) {
            present.cancel.cancel();
        }
    }

    fn shut_down(&mut self, ask: Ask) {
        let agent = self.present(ask.generation).and_then(|present| present.agent.borrow().clone());
        let Some(agent) = agent else {
            self.kill(ask.generation);
            return;
        };
        tokio::spawn(async move {
            // What doesn't answer is killed by the core when the bound has passed.
            if let Err(error) = agent.power_off().await {
                tracing::warn!(generation = ask.generation.0, %error, "the guest did not take the power-off");
            }
        });
    }

    fn kill(&mut self, generation: Generation) {
        match self.present(generation) {
            Some(present) => {
                present.cancel.cancel();
                if let Some(vm) = &*present.vm.borrow() {
                    vm.kill();
                }
            }
            // One that an earlier host left: found by its record, killed by the cancelled bring-up.
            None => {
                self.begin(generation, PROGRESS_WITHIN, Origin::Left);
                self.cancel(generation);
            }
        }
    }

    fn resume(&mut self, generation: Generation) {
        let vm = self.present(generation).and_then(|present| present.vm.borrow().clone());
        if let Some(vm) = vm {
            tokio::spawn(async move {
                if let Err(error) = vm.cont().await {
                    tracing::warn!(generation = generation.0, %error, "the VM can't run on");
                }
            });
        }
    }

    fn count(&mut self, ask: Ask, bound: Duration) {
        let agent = self.present(ask.generation).and_then(|present| present.agent.borrow().clone());
        let inbox = self.shared.inbox.clone();
        tokio::spawn(async move {
            let census = match agent {
                Some(agent) => timeout(bound, census(&agent))
                    .await
                    .unwrap_or_else(|_| Err("no answer in time".to_owned())),
                None => Err("there is no agent".to_owned()),
            };
            if let Err(error) = &census {
                tracing::warn!(generation = ask.generation.0, error, "the engine did not say what runs");
            }
            inbox.send(Message::Event(Event::ContainersCounted { ask, census: census.ok() }));
        });
    }

    fn console(&self) -> watch::Receiver<Option<Arc<Console>>> {
        self.shared.console.subscribe()
    }
}

/// Where a VM comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// The factory makes it.
    Made,
    /// An earlier host left it.
    Left,
}

struct BringUp<F> {
    shared: Arc<Shared<F>>,
    generation: Generation,
    cancel: CancellationToken,
    vm: watch::Sender<Option<Arc<Vm>>>,
    agent: watch::Sender<Option<Agent>>,
}

impl<F: Factory> BringUp<F> {
    async fn run(self, origin: Origin, deadline: Instant) {
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
                let reason = self.follow_engine(watch, &agent).await;
                changes.abort();
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

/// Asks the engine for all containers and counts them.
pub(crate) async fn census(agent: &Agent) -> Result<Census, String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Container {
        state: String,
    }
    let mut stream = agent.dial(Target::Engine).await.map_err(|error| error.to_string())?;
    let request = "GET /containers/json?all=1 HTTP/1.0\r\nHost: docker\r\n\r\n";
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await.map_err(|error| error.to_string())?;
    let head =
        answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or("the engine's answer broke off")?;
    if !answer.starts_with(b"HTTP/1.0 200") {
        return Err("the engine refused to list its containers".to_owned());
    }
    let containers: Vec<Container> = serde_json::from_slice(&answer[head + 4..])
        .map_err(|error| format!("the engine's answer makes no sense: {error}"))?;
    // A state that isn't known here may be one that works.
    Ok(Census::of(containers.iter().map(|container| match container.state.as_str() {
        "created" => ContainerState::Created,
        "paused" => ContainerState::Paused,
        "restarting" => ContainerState::Restarting,
        "removing" => ContainerState::Removing,
        "exited" => ContainerState::Exited,
        "dead" => ContainerState::Dead,
        _ => ContainerState::Running,
    })))
}

/// Recounts whenever the engine says that something happened to a container. Ends with the engine's stream: the count
/// before a sleep is asked for anew in any case.
async fn follow_containers(agent: Agent, inbox: Inbox, generation: Generation) {
    let request =
        "GET /events?filters=%7B%22type%22%3A%5B%22container%22%5D%7D HTTP/1.0\r\nHost: docker\r\n\r\n";
    loop {
        let Ok(mut stream) = agent.dial(Target::Engine).await else { return };
        if stream.write_all(request.as_bytes()).await.is_err() {
            return;
        }
        let mut buffer = [0; 16 * 1024];
        // The first bytes are the answer's head: a count then makes up for what happened before the subscription.
        while let Ok(1..) = stream.read(&mut buffer).await {
            if let Ok(census) = census(&agent).await {
                inbox.send(Message::Event(Event::ContainersChanged { generation, census }));
            }
        }
        // dockerd was restarted; its socket comes back, or the channel ends.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// How a VM that became ready was started, as long as there is one way only.
pub(crate) const HOW: StartHow = StartHow::Cold;
