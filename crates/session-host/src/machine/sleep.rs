//! Putting a VM to sleep.
//!
//! ```text
//! stop:     power off ─────────────────────────────────────────────────────────────► VmExited
//! suspend:  freeze ─► hang up ─► save ─► QEMU quits ─► seal ───────────────────────► SleepDone
//!              └─────────┴─────────┴─► run on, greet, thaw ─► SuspendFailed, runs on
//!                                                └─────────┴─► SuspendFailed, lost
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dormouse_agent_proto::Target;
use dormouse_lifecycle::{AfterFailure, Ask, Event, SleepHow};
use dormouse_snapshot::{FREE_BYTES_MIN, Origin, STATE, Seal};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::bring_up::blocking;
use super::guest::{Guest, Tidings};
use super::pump::discard_memory;
use super::{Factory, PROGRESS_WITHIN, Purpose, Shared, Up};
use crate::fault::point;
use crate::owner::Message;

/// How long the guest may take to see that its host hung up.
const HANG_UP_WITHIN: Duration = Duration::from_secs(2);

/// How long QEMU may take to go after it was told to.
const QUIT_WITHIN: Duration = Duration::from_secs(10);

/// A sleep under way.
pub(super) struct Sleep<F> {
    pub(super) shared: Arc<Shared<F>>,
    pub(super) ask: Ask,
    pub(super) up: Up,
    /// Where others find the guest, to be told of a new channel to it.
    pub(super) present: watch::Sender<Option<Up>>,
}

/// Why a VM was not saved, by what is left of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SaveError {
    /// It can run on.
    #[error("{0}")]
    Early(String),
    /// It is of no use any more.
    #[error("{0}")]
    Late(String),
}

impl<F: Factory> Sleep<F> {
    pub(super) async fn run(self, how: SleepHow) {
        let agent = &self.up.guest.agent;
        let dial = || async { agent.dial(Target::Engine).await.map_err(std::io::Error::other) };
        let face = &self.shared.face;
        let changes = face.events.container_changes();
        face.asleep.capture(dial, self.ask.generation.0).await;
        // Containers that run may have come and gone while the engine was asked.
        if changes.has_changed().unwrap_or(true) {
            face.asleep.forget();
        }
        face.events.leave();
        match how {
            SleepHow::Stop => self.stop().await,
            SleepHow::Suspend => self.suspend(changes).await,
        }
    }

    async fn stop(self) {
        // What doesn't answer is killed by the core when the bound has passed.
        if let Err(error) = self.up.guest.agent.power_off().await {
            tracing::warn!(generation = self.ask.generation.0, %error, "the guest did not take the power-off");
        }
    }

    /// `changes` of containers since what they are was asked.
    async fn suspend(self, changes: watch::Receiver<u64>) {
        let ask = self.ask;
        let origin = Origin::Session { generation: ask.generation.0 };
        let saved = match self.shared.face.folders.leave(&self.up.guest.agent).await {
            Ok(()) => save(&self.up, &self.shared.store, origin, None).await,
            Err(reason) => Err(SaveError::Early(reason)),
        };
        match saved {
            Ok(seal) => {
                // Until it was stopped they ran.
                if changes.has_changed().unwrap_or(true) {
                    self.shared.face.asleep.forget();
                }
                point(&self.shared.runtime_dir, "suspend.sealed").await;
                // Nobody waits for it but a host that has to go: without it the snapshot holds as long as the machine isn't
                // started again.
                let store = self.shared.store.clone();
                self.shared.sums.begin(move || {
                    if let Err(error) = seal.make_sum(&store) {
                        tracing::warn!(%error, "no checksum of the memory");
                    }
                });
                self.shared.tell(Event::SleepDone { ask });
            }
            Err(SaveError::Early(reason)) => self.run_on(reason).await,
            Err(SaveError::Late(reason)) => self.lost(reason).await,
        }
    }

    /// The VM is still whole: it goes on where it was.
    async fn run_on(self, reason: String) {
        // What was captured is of before, and this sleep is the only one that it may be told in.
        self.shared.face.asleep.forget();
        let (ask, generation) = (self.ask, self.ask.generation);
        match self.revive().await {
            Ok((up, tidings)) => {
                // Before the failure: whoever waited is served by this guest.
                self.shared.inbox.send(Message::Revived { generation, agent: up.guest.agent.clone() });
                let vm = AfterFailure::RunsOn;
                self.shared.tell(Event::SuspendFailed { ask, vm, reason: reason.into() });
                let gone = async move { up.vm.ended().await };
                let counted = CancellationToken::new();
                counted.cancel();
                up.guest.clone().follow(tidings, generation, self.shared.ears(true), counted, gone).await;
            }
            Err(error) => self.lost(format!("{reason}; and it does not run on: {error}")).await,
        }
    }

    /// Lets the vCPUs run, and asks the guest anew who it is.
    async fn revive(&self) -> Result<(Up, Tidings), String> {
        let Up { vm, guest, purpose } = &self.up;
        guest.quiet.cancel();
        let _ = timeout(HANG_UP_WITHIN, guest.agent.close()).await;
        vm.cont().await.map_err(|error| error.to_string())?;
        let deadline = Instant::now() + PROGRESS_WITHIN;
        let guest = Guest::greet(vm, deadline, None).await?;
        let tidings =
            guest.until_ready(deadline, |_| {}, |words| self.shared.note(self.ask.generation, words)).await?;
        let up = Up { vm: Arc::clone(vm), guest, purpose: purpose.clone() };
        self.present.send_replace(Some(up.clone()));
        Ok((up, tidings))
    }

    async fn lost(&self, reason: String) {
        // Its memory is nobody's any more, whether it is gone already or has to be killed.
        self.up.purpose.send_replace(Purpose::Serve);
        if timeout(Duration::ZERO, self.up.vm.ended()).await.is_ok() {
            discard_memory(self.shared.store.clone()).await;
        }
        let vm = AfterFailure::Lost;
        self.shared.tell(Event::SuspendFailed { ask: self.ask, vm, reason: reason.into() });
    }
}

/// Puts a VM's memory and devices into its store, and seals it.
/// `told` is what its copies needn't be told again.
pub(crate) async fn save(
    up: &Up,
    store: &Path,
    origin: Origin,
    told: Option<String>,
) -> Result<Seal, SaveError> {
    let Up { vm, guest, purpose } = up;
    let early = |what: &str, error: &dyn std::fmt::Display| SaveError::Early(format!("{what}: {error}"));
    let faults = vm.runtime_dir();
    check_space(store)?;
    point(faults, "suspend.begun").await;
    guest.agent.freeze().await.map_err(|error| early("the guest's disk was not frozen", &error))?;
    point(faults, "suspend.frozen").await;
    guest.quiet.cancel();
    let _ = timeout(HANG_UP_WITHIN, guest.agent.close()).await;
    let old = store.to_owned();
    blocking(move || dormouse_snapshot::clear(&old))
        .await
        .map_err(|error| early("what an earlier snapshot left is in the way", &error))?;
    vm.save_state(&store.join(STATE))
        .await
        .map_err(|error| early("the state of the devices was not saved", &error))?;

    point(faults, "suspend.saved").await;
    purpose.send_replace(Purpose::Suspend);
    if let Err(error) = vm.quit().await {
        tracing::warn!(%error, "QEMU did not take the order to quit");
        vm.kill();
    }
    timeout(QUIT_WITHIN, vm.ended()).await.map_err(|_| SaveError::Late("QEMU did not quit".to_owned()))?;
    point(faults, "suspend.quit").await;
    let (store, key, boot) = (store.to_owned(), vm.record().key.clone(), guest.boot.clone());
    blocking(move || Seal::make(&store, origin, key, boot, told)).await.map_err(SaveError::Late)
}

fn check_space(store: &Path) -> Result<(), SaveError> {
    let free = dormouse_vm::free_bytes(store)
        .map_err(|error| SaveError::Early(format!("can't look at free space: {error}")))?;
    if free < FREE_BYTES_MIN {
        let (free, least) = (free >> 20, FREE_BYTES_MIN >> 20);
        let message = format!("the session's storage has {free} MiB free, a snapshot needs at least {least}");
        return Err(SaveError::Early(message));
    }
    Ok(())
}
