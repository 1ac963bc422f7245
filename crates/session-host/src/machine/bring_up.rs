//! From an order for a VM to a guest whose engine lists its containers.
//!
//! ```text
//! Make:        factory ─► load, break the seal ─► greet ─► engine lists ─► Ready
//!                 ▲          │ whatever fails
//!                 └──────────┘ once, and then from the kernel up on the same disk
//! Adopt:       find by the record ─► run on if stopped ─► greet ─► engine lists ─► Ready
//! PutToSleep:  the same, but for Ready: the sleep begins, or has been completed
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use dormouse_agent_proto::Identity;
use dormouse_lifecycle::{Ask, Event, Exit, Generation, SleepHow, SnapshotFate, StartFrom, StartHow};
use dormouse_mux::Agent;
use dormouse_snapshot::{Origin, STATE, Seal};
use dormouse_vm::{ExitCause, RunState, Vm, VmEvents, VmExit, VmRecord};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::authorities::Introduced;
use super::guest::{Guest, Tidings, random};
use super::pump::{Pump, discard_memory, last_words};
use super::sleep::Sleep;
use super::{Factory, PROGRESS_WITHIN, Purpose, Shared, Up, authorities, registries};
use crate::fault::point;
use crate::owner::{Message, Ready};

/// What is wanted of a VM that is to be brought up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Have the factory make it.
    Make(StartFrom),
    /// Find the one that an earlier host left.
    Adopt,
    /// Find the one that an earlier host was putting to sleep, and go on with that.
    PutToSleep(Ask, SleepHow),
}

pub(super) struct BringUp<F> {
    pub(super) shared: Arc<Shared<F>>,
    pub(super) generation: Generation,
    pub(super) cancel: CancellationToken,
    pub(super) vm: watch::Sender<Option<Arc<Vm>>>,
    pub(super) up: watch::Sender<Option<Up>>,
}

/// A VM whose engine lists, and how it came up.
struct Risen {
    up: Up,
    how: StartHow,
    tidings: Tidings,
    pump: JoinHandle<Option<VmExit>>,
}

/// A VM that was found by its record.
struct Found {
    vm: Arc<Vm>,
    purpose: watch::Sender<Purpose>,
    pump: JoinHandle<Option<VmExit>>,
}

impl<F: Factory> BringUp<F> {
    pub(super) async fn run(self, order: Order, deadline: Instant) {
        let risen = match order {
            Order::Make(from) => self.make(from, deadline).await,
            Order::Adopt | Order::PutToSleep(..) => match self.find().await {
                Ok(Some(found)) => self.rise(found, deadline).await,
                Ok(None) => return self.gone(order).await,
                Err(reason) => Err(reason),
            },
        };
        match risen {
            Ok(risen) => self.serve(risen, order).await,
            Err(reason) => self.failed(reason).await,
        }
    }

    /// The guest is up.
    async fn serve(self, risen: Risen, order: Order) {
        let Risen { up, how, tidings, pump } = risen;
        let generation = self.generation;
        up.purpose.send_replace(Purpose::Serve);
        self.up.send_replace(Some(up.clone()));
        self.shared.face.folders.set_vm(Arc::clone(&up.vm));
        if let Order::PutToSleep(ask, by) = order {
            return Sleep { shared: self.shared, ask, up, present: self.up }.run(by).await;
        }
        let (agent, processes) = (up.guest.agent.clone(), tidings.processes.clone());
        let counted = CancellationToken::new();
        let ready = Ready { generation, how, agent, processes, _counted: counted.clone().drop_guard() };
        self.shared.inbox.send(Message::Ready(ready));
        let gone = async {
            let _ = pump.await;
        };
        up.guest.follow(tidings, generation, self.shared.ears(how == StartHow::Resume), counted, gone).await;
    }

    /// What an earlier host left is gone.
    async fn gone(self, order: Order) {
        let generation = self.generation;
        let sealed = matches!(Seal::read(&self.shared.store), Ok(Some(seal))
            if seal.origin == Origin::Session { generation: generation.0 });
        match order {
            Order::PutToSleep(ask, SleepHow::Suspend) if sealed => self.shared.tell(Event::SleepDone { ask }),
            Order::Make(_) | Order::Adopt | Order::PutToSleep(..) => {
                discard_memory(self.shared.store.clone()).await;
                let details = "it was gone when its new host looked for it".into();
                self.shared.tell(Event::VmExited { generation, exit: Exit::Unknown(details) });
            }
        }
    }

    /// Nothing is left of the VM.
    async fn failed(self, reason: String) {
        tracing::warn!(generation = self.generation.0, reason, "no VM");
        // A seal that was broken is gone; one that is there wasn't touched.
        let snapshot = match Seal::read(&self.shared.store) {
            Ok(Some(_)) => SnapshotFate::Intact,
            Ok(None) | Err(_) => SnapshotFate::Void,
        };
        discard_memory(self.shared.store.clone()).await;
        let generation = self.generation;
        self.shared.tell(Event::StartFailed { generation, reason: reason.into(), snapshot });
    }

    /// Has VMs made until one rises, from the best that there is: a snapshot or template is tried once.
    async fn make(&self, from: StartFrom, deadline: Instant) -> Result<Risen, String> {
        if from == StartFrom::Fresh {
            self.discard_snapshot().await?;
        }
        loop {
            for note in self.shared.factory.make(self.generation.0, |step| self.step(step)).await? {
                self.shared.note(self.generation, note);
            }
            let seal = match Seal::read(&self.shared.store) {
                Ok(seal) => seal,
                Err(unfit) => return Err(unfit.to_string()),
            };
            let found = self.find().await?.ok_or("QEMU ended at once")?;
            let Some(seal) = seal else { return self.rise(found, deadline).await };
            let what = match seal.origin {
                Origin::Session { .. } => "snapshot",
                Origin::Template => "template",
            };
            match self.wake(found, seal, deadline).await {
                Ok(risen) => return Ok(risen),
                Err(reason) if self.cancel.is_cancelled() => return Err(reason),
                Err(reason) => {
                    self.shared.note(self.generation, format!("the {what} could not be woken: {reason}"));
                    self.discard_snapshot().await?;
                }
            }
        }
    }

    /// The core knows of no snapshot, or the one there is was tried: whatever lies about is void.
    async fn discard_snapshot(&self) -> Result<(), String> {
        let store = self.shared.store.clone();
        let discarded = tokio::task::spawn_blocking(move || dormouse_snapshot::discard(&store)).await;
        discarded
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("can't remove a snapshot that is void: {error}"))
    }

    /// Connects to the VM that the record tells of, if it is ours and alive.
    async fn find(&self) -> Result<Option<Found>, String> {
        let folder = &self.shared.runtime_dir;
        let record = VmRecord::read(folder).map_err(|error| error.to_string())?;
        let Some(record) = record.filter(|record| record.generation == self.generation.0) else {
            return Ok(None);
        };
        let connected =
            Vm::connect(record, folder).await.map_err(|error| format!("can't connect to QEMU: {error}"))?;
        Ok(connected.map(|(vm, events)| self.found(vm, events)))
    }

    fn found(&self, vm: Vm, events: VmEvents) -> Found {
        let vm = Arc::new(vm);
        self.vm.send_replace(Some(Arc::clone(&vm)));
        let purpose = watch::channel(Purpose::BringUp).0;
        let pump = Pump {
            generation: self.generation,
            vm: Arc::clone(&vm),
            events,
            store: self.shared.store.clone(),
            inbox: self.shared.inbox.clone(),
            purpose: purpose.subscribe(),
            console: self.shared.console.subscribe(),
        };
        Found { vm, purpose, pump: tokio::spawn(pump.run()) }
    }

    /// From a VM that QMP answers for, to an engine that lists its containers.
    async fn rise(&self, found: Found, deadline: Instant) -> Result<Risen, String> {
        let rising = async {
            self.connect_console(&found.vm).await?;
            run(&found.vm).await?;
            self.step("kernel");
            let guest = Guest::greet(&found.vm, deadline, None).await?;
            let tidings = self.introduce(&guest, deadline, None, |step| self.step(step)).await?;
            Ok((guest, tidings))
        };
        let risen = self.unless_cancelled(rising).await;
        self.settle(found, StartHow::Cold, risen).await
    }

    /// The same, for one that comes from a snapshot or a template.
    async fn wake(&self, found: Found, seal: Seal, deadline: Instant) -> Result<Risen, String> {
        let how = match seal.origin {
            Origin::Session { .. } => StartHow::Resume,
            Origin::Template => StartHow::Clone,
        };
        let waking = async {
            self.connect_console(&found.vm).await?;
            self.step(how.as_str());
            let faults = &self.shared.runtime_dir;
            point(faults, "resume.made").await;
            let state = self.shared.store.join(STATE);
            found.vm.load_state(&state).await.map_err(|error| error.to_string())?;
            point(faults, "resume.loaded").await;
            let (boot, told, store) = (seal.boot.clone(), seal.told.clone(), self.shared.store.clone());
            blocking(move || seal.break_it(&store)).await?;
            point(faults, "resume.broken").await;
            found.vm.cont().await.map_err(|error| format!("the VM doesn't run: {error}"))?;
            self.step("running");
            point(faults, "resume.running").await;
            let identity = match how {
                StartHow::Clone => Some(self.identity()?),
                StartHow::Resume | StartHow::Cold => None,
            };
            let greet_by = deadline.min(Instant::now() + PROGRESS_WITHIN);
            let guest = Guest::greet(&found.vm, greet_by, identity).await?;
            if guest.boot != boot {
                return Err("another guest answered".to_owned());
            }
            point(faults, "resume.greeted").await;
            self.fit_disk(&found.vm, &guest).await?;
            let tidings = match how {
                StartHow::Clone | StartHow::Cold => {
                    self.introduce(&guest, deadline, told.as_deref(), |_| {}).await?
                }
                // Its engine knows all that it was told before it was suspended.
                StartHow::Resume => {
                    let tidings = guest.until_ready(deadline, |_| {}, |words| self.warn(words)).await?;
                    tokio::spawn(end_connections(guest.agent.clone()));
                    tidings
                }
            };
            Ok((guest, tidings))
        };
        let risen = self.unless_cancelled(waking).await;
        self.settle(found, how, risen).await
    }

    async fn unless_cancelled<T>(
        &self,
        rising: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        tokio::select! {
            risen = rising => risen,
            () = self.cancel.cancelled() => Err("it was called off".to_owned()),
        }
    }

    /// A VM that didn't come up is gone when this is back: whoever is told of the failure may at once make another.
    async fn settle(
        &self,
        found: Found,
        how: StartHow,
        risen: Result<(Guest, Tidings), String>,
    ) -> Result<Risen, String> {
        let Found { vm, purpose, pump } = found;
        let reason = match risen {
            Ok((guest, tidings)) => return Ok(Risen { up: Up { vm, guest, purpose }, how, tidings, pump }),
            Err(reason) => reason,
        };
        let last = last_words(&self.shared.console.borrow());
        vm.kill();
        let exit = pump.await.ok().flatten();
        let reason = exit.map_or(reason.clone(), |exit| match exit.cause {
            ExitCause::Unknown => reason,
            _ => exit.details,
        });
        Err(format!("{reason}{last}"))
    }

    async fn connect_console(&self, vm: &Vm) -> Result<(), String> {
        let console = vm.console().await.map_err(|error| format!("can't connect to the console: {error}"))?;
        self.shared.console.send_replace(Some(Arc::new(console)));
        Ok(())
    }

    fn identity(&self) -> Result<Identity, String> {
        let hostname = self.shared.hostname.clone();
        Ok(Identity { seed: random()?, machine_id: random()?, hostname })
    }

    /// A template's disk may be smaller than this session's is to be.
    async fn fit_disk(&self, vm: &Vm, guest: &Guest) -> Result<(), String> {
        let disk: PathBuf = self.shared.store.join(dormouse_snapshot::DISK);
        let wanted = self.shared.disk_bytes;
        let present = std::fs::metadata(&disk).map_err(|error| error.to_string())?.len();
        if present >= wanted {
            return Ok(());
        }
        blocking(move || dormouse_vm::grow_data_disk(&disk, wanted)).await?;
        vm.resize_data_disk(wanted).await.map_err(|error| error.to_string())?;
        guest.agent.grow_disk(wanted).await.map_err(|error| error.to_string())
    }

    /// Waits for an engine that lists its containers, and tells it of registries and of whom the host trusts. One that
    /// doesn't take that over works all the same, and its user is told. `told` is what it knows of the latter.
    async fn introduce(
        &self,
        guest: &Guest,
        deadline: Instant,
        told: Option<&str>,
        step: impl Fn(&str),
    ) -> Result<Tidings, String> {
        let registries = &self.shared.registries;
        let (tidings, trusted) = tokio::join!(
            guest.until_ready(deadline, step, |words| self.warn(words)),
            authorities::introduce(&guest.agent, &registries.authorities, told),
        );
        let tidings = tidings?;
        match trusted {
            Ok(Introduced { complaints, .. }) => {
                let complaints = complaints.into_iter();
                complaints.for_each(|why| self.warn(format!("an authority can't be trusted: {why}")));
            }
            Err(why) => self.warn(format!("the guest could not be told of the host's authorities: {why}")),
        }
        if let Err(why) = registries::introduce(&guest.agent, registries).await {
            self.warn(format!("the engine could not be told of the session's registries: {why}"));
        }
        Ok(tidings)
    }

    fn warn(&self, words: String) {
        self.shared.note(self.generation, words);
    }

    fn step(&self, step: &str) {
        self.shared.tell(Event::VmProgress { generation: self.generation, step: step.into() });
    }
}

/// While whoever woke the VM is served: only who was connected to somewhere outside waits for it.
async fn end_connections(agent: Agent) {
    if let Err(error) = agent.end_connections().await {
        tracing::warn!(%error, "connections from before the suspend weren't ended");
    }
}

/// Lets a VM run whose host has not done so, or has stopped it. One that its disk has paused stays so.
async fn run(vm: &Vm) -> Result<(), String> {
    match vm.found() {
        RunState::Prelaunch
        | RunState::Inmigrate
        | RunState::Paused
        | RunState::FinishMigrate
        | RunState::Postmigrate => vm.cont().await.map_err(|error| format!("the VM doesn't run: {error}")),
        RunState::Running
        | RunState::IoError
        | RunState::GuestPanicked
        | RunState::Shutdown
        | RunState::InternalError
        | RunState::Other => Ok(()),
    }
}

/// Runs what waits for a disk off the async threads.
pub(super) async fn blocking<T: Send + 'static, E: std::fmt::Display + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())
}
