//! A VM that stands still for a while, with everything in memory.
//!
//! ```text
//! run ── doze ──► halt ── rouse ──► vCPUs run ─► the guest is told what time it is ─► Roused
//!                                        └─────────────┴─► EngineDied
//! ```

use dormouse_lifecycle::{Event, Generation};
use tokio::sync::watch;

use super::Up;
use super::guest::unix_nanos;
use crate::owner::{Inbox, Message};

/// What a VM's vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vcpus {
    /// Run; which order that was.
    Run { order: u64 },
    /// Stand still.
    Halt,
}

/// Has a VM's vCPUs do what was ordered last, one order after the other, until nobody is there to order anything.
pub(super) async fn pace(
    up: watch::Receiver<Option<Up>>,
    generation: Generation,
    mut ordered: watch::Receiver<Vcpus>,
    inbox: Inbox,
) {
    let mut halted = false;
    while ordered.changed().await.is_ok() {
        let vcpus = *ordered.borrow_and_update();
        let Some(Up { vm, guest, .. }) = up.borrow().clone() else { continue };
        match vcpus {
            // One that runs on costs what it cost before.
            Vcpus::Halt => match vm.stop().await {
                Ok(()) => halted = true,
                Err(error) => tracing::warn!(generation = generation.0, %error, "the VM doesn't doze"),
            },
            Vcpus::Run { order } => {
                let running = async {
                    if std::mem::take(&mut halted) {
                        vm.cont().await.map_err(|error| error.to_string())?;
                        guest.agent.wake(unix_nanos(), None).await.map_err(|error| error.to_string())?;
                    }
                    Ok::<_, String>(())
                };
                inbox.send(match running.await {
                    Ok(()) => Message::Roused { generation, order },
                    Err(error) => Message::Event(Event::EngineDied {
                        generation,
                        reason: format!("the VM doesn't run on after it dozed: {error}").into(),
                    }),
                });
            }
        }
    }
}
