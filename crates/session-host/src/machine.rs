//! The real side of the core's actions: QEMU and the guest, one generation at a time.
//!
//! ```text
//! start ─► factory makes ─► connect ─► cont ─► agent answers ─► engine lists ─► Ready
//!                                        └─ pump: exits, pauses ─► events, until the VM is gone
//! ```
//!
//! Every step runs in a task of its own and ends in a message to the owner. A start that is cancelled, or whose VM
//! ends, is over at once, wherever it is.

mod bring_up;
mod census;

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dormouse_agent_proto::Target;
use dormouse_lifecycle::{Ask, Event, Generation, StartHow};
use dormouse_mux::Agent;
use dormouse_vm::{Console, Vm};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::bring_up::{BringUp, Origin};
pub(crate) use self::census::census;
use crate::asleep::Asleep;
use crate::events::Events;
use crate::owner::{Inbox, Message};

/// From the end of a bring-up that failed to its report: its VM is killed, and the console's last lines are read. The core
/// waits so much longer than the boot timeout, since what it could say of a late one is only that it was late.
pub(crate) const REPORT_WITHIN: Duration = Duration::from_secs(10);

/// A bring-up that makes no progress for so long has failed.
const PROGRESS_WITHIN: Duration = Duration::from_secs(60);

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
    asleep: Asleep,
    events: Events,
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
    pub fn new(factory: F, runtime_dir: PathBuf, inbox: Inbox, asleep: Asleep, events: Events) -> Self {
        let console = watch::channel(None).0;
        Self {
            shared: Arc::new(Shared { factory, runtime_dir, inbox, asleep, events, console }),
            present: None,
        }
    }

    fn begin(&mut self, generation: Generation, bound: Duration, origin: Origin) {
        let cancel = CancellationToken::new();
        let (vm, vm_seen) = watch::channel(None);
        let (agent, agent_seen) = watch::channel(None);
        self.present = Some(Present { generation, cancel: cancel.clone(), vm: vm_seen, agent: agent_seen });
        let bring_up = BringUp { shared: Arc::clone(&self.shared), generation, cancel, vm, agent };
        tokio::spawn(bring_up.run(origin, Instant::now() + bound.saturating_sub(REPORT_WITHIN)));
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
        let (asleep, events) = (self.shared.asleep.clone(), self.shared.events.clone());
        tokio::spawn(async move {
            let dial = || async { agent.dial(Target::Engine).await.map_err(io::Error::other) };
            asleep.capture(dial, ask.generation.0).await;
            events.leave();
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

/// How a VM that became ready was started, as long as there is one way only.
pub(crate) const HOW: StartHow = StartHow::Cold;
