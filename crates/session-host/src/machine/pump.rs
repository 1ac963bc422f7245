//! What is told of a VM until it is gone.

use std::path::PathBuf;
use std::sync::Arc;

use dormouse_lifecycle::{Event, Exit, Generation};
use dormouse_vm::{Console, ExitCause, Vm, VmEvent, VmEvents, VmExit};
use tokio::sync::watch;

use super::Purpose;
use crate::owner::{Inbox, Message};

/// How many of the console's lines go into an error.
const LAST_LINES: usize = 12;

/// How many of them a fault is looked for in.
const SEARCHED_LINES: usize = 200;

/// How a kernel begins to tell of its own end.
const FAULTS: &[&str] = &["Kernel panic", "Oops:", "BUG:"];

pub(super) struct Pump {
    pub(super) generation: Generation,
    pub(super) vm: Arc<Vm>,
    pub(super) events: VmEvents,
    pub(super) store: PathBuf,
    pub(super) inbox: Inbox,
    pub(super) purpose: watch::Receiver<Purpose>,
    pub(super) console: watch::Receiver<Option<Arc<Console>>>,
}

impl Pump {
    /// Passes a VM's events on until it is gone, and then removes what it leaves. Who still brings it up is told of its
    /// exit by what is returned; everybody else by an event.
    pub(super) async fn run(mut self) -> Option<VmExit> {
        let generation = self.generation;
        let mut exit = loop {
            let event = match self.events.next().await {
                VmEvent::Exited(exit) => break exit,
                VmEvent::PausedByDisk { reason, .. } => Event::VmPaused { generation, reason: reason.into() },
                VmEvent::Resumed => Event::VmResumed { generation },
                VmEvent::Stopped | VmEvent::AgentPort { .. } | VmEvent::PortsPort { .. } => continue,
            };
            self.inbox.send(Message::Event(event));
        };
        // Only now is the record nobody's: the same order as in `Vm::remove`, which wants the VM for itself.
        self.vm.discard().await;
        let purpose = *self.purpose.borrow();
        match purpose {
            Purpose::BringUp => return Some(exit),
            Purpose::Serve => discard_memory(self.store).await,
            Purpose::Suspend => {}
        }
        // Why a guest's kernel gave up stands on its console.
        if matches!(exit.cause, ExitCause::GuestPanic | ExitCause::GuestReset) {
            exit.details.push_str(&last_words(&self.console.borrow()));
        }
        self.inbox.send(Message::Event(Event::VmExited { generation, exit: classify(&exit) }));
        None
    }
}

/// What a guest wrote to its console last, as the end of a sentence; empty if it wrote nothing.
pub(super) fn last_words(console: &Option<Arc<Console>>) -> String {
    let lines = console.as_ref().map(|console| console.last_lines(SEARCHED_LINES)).unwrap_or_default();
    match telling(&lines) {
        [] => String::new(),
        lines => format!("; the console's last lines:\n{}", lines.join("\n")),
    }
}

/// Those that go into an error: the last, or where a kernel's fault begins, which ends in a page of registers.
fn telling(lines: &[String]) -> &[String] {
    let is_fault = |line: &String| FAULTS.iter().any(|fault| line.contains(fault));
    let last = lines.len().saturating_sub(LAST_LINES);
    let start = lines.iter().position(is_fault).map_or(last, |fault| fault.min(last));
    &lines[start..(start + LAST_LINES).min(lines.len())]
}

/// Removes the memory of a VM that is gone, unless it is sealed.
pub(super) async fn discard_memory(store: PathBuf) {
    let removed = tokio::task::spawn_blocking(move || match dormouse_snapshot::Seal::read(&store) {
        Ok(Some(_)) => Ok(()),
        Ok(None) | Err(_) => dormouse_snapshot::discard(&store),
    });
    if let Ok(Err(error)) = removed.await {
        tracing::warn!(%error, "can't remove the memory of a VM that is gone");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_console_the_last_lines_are_told_or_the_kernels_fault() {
        let lines = |fault: usize| -> Vec<String> {
            (0..40)
                .map(|line| if line == fault { "Oops: 0000".to_owned() } else { line.to_string() })
                .collect()
        };
        assert_eq!(telling(&lines(99))[0], "28");
        assert_eq!((telling(&lines(20))[0].as_str(), telling(&lines(20)).len()), ("Oops: 0000", LAST_LINES));
        assert_eq!(telling(&lines(38))[0], "28", "what came before it is shown where there is room");
        assert!(telling(&[]).is_empty());
    }
}
