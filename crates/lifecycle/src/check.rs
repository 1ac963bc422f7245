//! What holds in every state.

use crate::config::Limits;
use crate::hold::Policy;
use crate::idle::Holding;
use crate::phase::{Disk, Engine, Phase, Reopen, Rest, Stage, Then};
use crate::session::{Mode, Session};

impl Session {
    /// Looks for a contradiction in the state itself; the driver's debug builds and the model ask after each step.
    ///
    /// # Errors
    ///
    /// The first contradiction that is found, in words.
    pub fn check(&self) -> Result<(), &'static str> {
        let ensure = |holds: bool, words| if holds { Ok(()) } else { Err(words) };
        if let Some(generation) = self.phase.generation() {
            ensure(generation == self.generation, "the VM isn't of the latest generation")?;
            ensure(generation.0 > 0, "a VM without a number")?;
            ensure(self.remains.is_none(), "a VM beside the remains of another")?;
        }
        if let Some(vm) = self.phase.vm() {
            ensure(vm.generation == self.generation, "the VM isn't of the latest generation")?;
            ensure(vm.leases.len() <= self.config.limits.leases, "too many leases")?;
        }
        if let Some(queue) = self.phase.queue() {
            ensure(queue.len() <= self.config.limits.queued, "too many in the queue")?;
            ensure(queue.values().all(|held| held.claim.policy == Policy::Acquire), "ExistingOnly waits")?;
            ensure(queue.is_empty() || self.mode == Mode::Serving, "somebody waits for a host that goes")?;
            let known = |lease| self.phase.vm().is_some_and(|vm| vm.leases.contains_key(lease));
            ensure(!queue.keys().any(known), "a lease waits and is granted")?;
        }
        match &self.phase {
            Phase::Absent | Phase::Starting(_) | Phase::Terminated(_) => Ok(()),
            Phase::Running(running) => {
                ensure(self.mode == Mode::Serving, "a VM is up at a host that goes")?;
                let holding = self.holding(&running.vm, None);
                match running.rest {
                    Rest::Busy => ensure(holding == Holding::Used, "busy with nothing"),
                    Rest::Looked { .. } => {
                        ensure(holding == Holding::LookedAt, "looked at by nobody, or used")
                    }
                    Rest::Idle { since, deadline } => {
                        ensure(holding == Holding::Nothing, "idle though something holds")?;
                        let expected = self.idle_deadline(since, running.vm.not_before);
                        ensure(deadline == expected, "the idle deadline isn't what was set")
                    }
                    Rest::Paused { .. } => {
                        ensure(running.vm.disk != Disk::Writable, "paused without an error")
                    }
                }
            }
            Phase::Counting(counting) => {
                let holding = self.holding(&counting.vm, counting.aim.wish());
                ensure(holding != Holding::Used, "counting though something holds")?;
                ensure(self.config.storage.may_sleep(), "counting though it may not sleep")?;
                ensure(counting.unanswered < Limits::COUNTS, "asked too often")
            }
            Phase::Dozing(dozing) => {
                ensure(self.mode == Mode::Serving, "a VM dozes at a host that goes")?;
                ensure(!self.is_held(&dozing.vm), "dozing though something holds")?;
                ensure(self.config.storage.may_sleep(), "dozing though it may not sleep")?;
                ensure(dozing.vm.disk == Disk::Writable, "dozing with a disk that can't be written")?;
                ensure(dozing.vm.engine == Engine::Alive, "dozing without an engine")
            }
            Phase::Committed(committed) => {
                ensure(committed.queue.is_empty() || can_queue(&committed.then), "somebody waits for the end")
            }
            Phase::Stopping(stopping) => {
                ensure(stopping.queue.is_empty() || can_queue(&stopping.then), "somebody waits for the end")?;
                match &stopping.stage {
                    Stage::Killing { tries, .. } => ensure(*tries <= Limits::KILLS, "killed too often"),
                    Stage::Suspending(vm) => ensure(vm.leases.is_empty(), "a lease outlives the VM"),
                    Stage::Cancelling | Stage::Sealing { .. } | Stage::ShuttingDown { .. } => Ok(()),
                }
            }
        }
    }
}

fn can_queue(then: &Then) -> bool {
    match then {
        Then::Absent => true,
        Then::Terminated(termination) => termination.reopen == Reopen::OnRequest,
    }
}
