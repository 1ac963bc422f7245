//! The real side of the core's actions: QEMU and the guest, one generation at a time.
//!
//! ```text
//! start ─► factory makes ─┬─ from the kernel up ────────────────────────────┬─► agent answers ─► engine lists ─► Ready
//!                         └─ snapshot or template: load ─► break the seal ──┘
//! sleep ─► stop: power off
//!       └► suspend: freeze ─► save ─► QEMU quits ─► seal
//! doze: vCPUs stop ─► vCPUs run ─► what time is it ─► Roused
//! pump: exits, pauses ─► events, until the VM is gone
//! ```
//!
//! Every step runs in a task of its own and ends in a message to the owner. A start that is cancelled, or whose VM
//! ends, is over at once, wherever it is.

pub(crate) mod authorities;
mod bring_up;
mod census;
mod doze;
mod engine_events;
mod guest;
mod pump;
mod quiet;
mod registries;
mod script;
mod sleep;
mod sums;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dormouse_api::Registries;
use dormouse_lifecycle::{Ask, Event, Generation, SleepHow, StartFrom};
use dormouse_vm::{Console, Vm};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::bring_up::{BringUp, Order};
use self::census::census;
pub(crate) use self::census::{engine_answer, first_census, stop_container};
use self::doze::{Vcpus, pace};
use self::guest::Ears;
pub(crate) use self::guest::Guest;
use self::sleep::Sleep;
pub(crate) use self::sleep::save;
pub(crate) use self::sums::Sums;
use crate::docker::Face;
use crate::owner::{Inbox, Message};

/// From the end of a bring-up that failed to its report: its VM is killed, and the console's last lines are read. The core
/// waits so much longer than the boot timeout, since what it could say of a late one is only that it was late.
pub(crate) const REPORT_WITHIN: Duration = Duration::from_secs(10);

/// A bring-up that makes no progress for so long has failed.
const PROGRESS_WITHIN: Duration = Duration::from_secs(60);

/// Makes VMs. The request names the session and the generation, and nothing else.
pub trait Factory: Send + Sync + 'static {
    /// Makes one more VM; its record lies in the session's runtime directory afterwards. From what it is made the store
    /// tells: one that is sealed is woken. Answered with what was tried in vain before, in words. Steps that take long are
    /// told.
    fn make(
        &self,
        generation: u64,
        tell: impl Fn(&str) + Send + Sync,
    ) -> impl Future<Output = Result<Vec<String>, String>> + Send;
}

/// What the owner has done for it. Nothing here waits: results come back through the inbox.
pub trait Machines: Send + 'static {
    /// Makes a VM and brings it up. Ends in `Ready`, `StartFailed` or `VmExited`.
    fn start(&mut self, generation: Generation, from: StartFrom, bound: Duration);
    /// Looks for the VM that an earlier host left up. Ends in `Ready` or `VmExited`.
    fn adopt(&mut self, generation: Generation, bound: Duration);
    /// Gives a bring-up up.
    fn cancel(&mut self, generation: Generation);
    /// Puts the VM to sleep, also one that an earlier host had begun to. A stop ends in `VmExited`, a suspend in
    /// `SleepDone` or `SuspendFailed`.
    fn sleep(&mut self, ask: Ask, how: SleepHow);
    /// Ends the VM. Ends in `VmExited`.
    fn kill(&mut self, generation: Generation);
    /// Lets a VM run on that its disk had paused.
    fn resume(&mut self, generation: Generation);
    /// Stops the VM's vCPUs.
    fn doze(&mut self, generation: Generation);
    /// Lets them run, and tells the guest what time it is. Ends in `Roused` with the order's number, or as a crash.
    fn rouse(&mut self, generation: Generation, order: u64);
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
    /// The session's store: disk, memory, snapshot.
    store: PathBuf,
    /// How large its disk is to be, in bytes.
    disk_bytes: u64,
    /// The guest's host name.
    hostname: String,
    /// What its engine is told of registries.
    registries: Registries,
    inbox: Inbox,
    face: Face,
    console: watch::Sender<Option<Arc<Console>>>,
    /// Checksums being made.
    sums: Sums,
}

impl<F> Shared<F> {
    fn tell(&self, event: Event) {
        self.inbox.send(Message::Event(event));
    }

    /// Who hears of what happens in the guest.
    fn ears(&self, heard_before: bool) -> Ears {
        Ears { inbox: self.inbox.clone(), face: self.face.clone(), heard_before }
    }

    /// Says what was tried in vain, or is not as it should be.
    fn note(&self, generation: Generation, what: String) {
        self.inbox.send(Message::Note { generation, what });
    }
}

/// The generation that was started or adopted last.
#[derive(Debug)]
struct Present {
    generation: Generation,
    cancel: CancellationToken,
    up: watch::Sender<Option<Up>>,
    vm: watch::Receiver<Option<Arc<Vm>>>,
    vcpus: watch::Sender<Vcpus>,
}

/// A VM whose guest answered.
#[derive(Debug, Clone)]
pub(crate) struct Up {
    pub(crate) vm: Arc<Vm>,
    pub(crate) guest: Guest,
    pub(crate) purpose: watch::Sender<Purpose>,
}

/// What a VM's exit means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A failed start, which the bring-up tells.
    BringUp,
    /// A crash, or the end that was asked for.
    Serve,
    /// The end of a suspend, whose task goes on with its memory.
    Suspend,
}

/// What the VMs of a session have in common.
#[derive(Debug)]
pub(crate) struct Traits {
    /// Sockets and the VM's record.
    pub(crate) runtime_dir: PathBuf,
    /// Disk, memory, snapshot.
    pub(crate) store: PathBuf,
    /// How large the disk is to be, in bytes.
    pub(crate) disk_bytes: u64,
    /// The guest's host name.
    pub(crate) hostname: String,
    /// What its engine is told of registries.
    pub(crate) registries: Registries,
}

impl<F: Factory> Qemus<F> {
    /// VMs of this session. `sums` are the checksums of snapshots that are being made.
    pub(crate) fn new(factory: F, traits: Traits, inbox: Inbox, face: Face, sums: Sums) -> Self {
        let Traits { runtime_dir, store, disk_bytes, hostname, registries } = traits;
        let console = watch::channel(None).0;
        let shared = Shared {
            factory,
            runtime_dir,
            store,
            disk_bytes,
            hostname,
            registries,
            inbox,
            face,
            console,
            sums,
        };
        Self { shared: Arc::new(shared), present: None }
    }

    fn begin(&mut self, generation: Generation, bound: Duration, order: Order) {
        let cancel = CancellationToken::new();
        let (vm, vm_seen) = watch::channel(None);
        let up = watch::channel(None).0;
        let vcpus = watch::channel(Vcpus::Run { order: 0 }).0;
        let paced = pace(up.subscribe(), generation, vcpus.subscribe(), self.shared.inbox.clone());
        tokio::spawn(paced);
        self.present =
            Some(Present { generation, cancel: cancel.clone(), up: up.clone(), vm: vm_seen, vcpus });
        let bring_up = BringUp { shared: Arc::clone(&self.shared), generation, cancel, vm, up };
        tokio::spawn(bring_up.run(order, Instant::now() + bound.saturating_sub(REPORT_WITHIN)));
    }

    fn present(&self, generation: Generation) -> Option<&Present> {
        self.present.as_ref().filter(|present| present.generation == generation)
    }

    fn up(&self, generation: Generation) -> Option<Up> {
        self.present(generation).and_then(|present| present.up.borrow().clone())
    }
}

impl<F: Factory> Machines for Qemus<F> {
    fn start(&mut self, generation: Generation, from: StartFrom, bound: Duration) {
        self.begin(generation, bound, Order::Make(from));
    }

    fn adopt(&mut self, generation: Generation, bound: Duration) {
        self.begin(generation, bound, Order::Adopt);
    }

    fn cancel(&mut self, generation: Generation) {
        if let Some(present) = self.present(generation) {
            present.cancel.cancel();
        }
    }

    fn sleep(&mut self, ask: Ask, how: SleepHow) {
        let present = self.present(ask.generation).map(|present| present.up.clone());
        let up = self.up(ask.generation);
        match present.zip(up) {
            Some((present, up)) => {
                let sleep = Sleep { shared: Arc::clone(&self.shared), ask, up, present };
                tokio::spawn(sleep.run(how));
            }
            // Begun by an earlier host, of which nobody knows how far it came.
            None => self.begin(ask.generation, PROGRESS_WITHIN, Order::PutToSleep(ask, how)),
        }
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
                self.begin(generation, PROGRESS_WITHIN, Order::Adopt);
                self.cancel(generation);
            }
        }
    }

    fn resume(&mut self, generation: Generation) {
        if let Some(Up { vm, .. }) = self.up(generation) {
            tokio::spawn(async move {
                if let Err(error) = vm.cont().await {
                    tracing::warn!(generation = generation.0, %error, "the VM can't run on");
                }
            });
        }
    }

    fn doze(&mut self, generation: Generation) {
        if let Some(present) = self.present(generation) {
            present.vcpus.send_replace(Vcpus::Halt);
        }
    }

    fn rouse(&mut self, generation: Generation, order: u64) {
        if let Some(present) = self.present(generation) {
            present.vcpus.send_replace(Vcpus::Run { order });
        }
    }

    fn count(&mut self, ask: Ask, bound: Duration) {
        let up = self.up(ask.generation);
        let inbox = self.shared.inbox.clone();
        tokio::spawn(async move {
            let census = match up {
                Some(up) => timeout(bound, census(&up.guest.agent))
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
