//! Who is served, who waits, who is refused.

use crate::action::{Action, EndReason, Refusal, SleepOutcome};
use crate::hold::{Claim, Claims, Held, Policy};
use crate::id::LeaseId;
use crate::phase::{Phase, Reopen, Rest, Then, Vm};
use crate::session::{Mode, Session, Step};

/// What is to be done with a request, decided from the phase alone.
enum Verdict {
    Grant,
    Wait,
    Refuse(Refusal),
    /// Start a VM for it.
    Start,
    /// Open a new incarnation and start a VM for it.
    Reopen,
}

impl Session {
    pub(crate) fn lease_requested(&mut self, step: &mut Step<'_>, lease: LeaseId, claim: Claim) {
        if self.knows(lease) {
            return;
        }
        match self.verdict(claim.policy) {
            Verdict::Refuse(refusal) => step.act(Action::Refuse { lease, refusal }),
            Verdict::Grant => {
                if let Some(vm) = self.phase.vm_mut() {
                    grant(step, vm, self.config.limits.leases, lease, claim);
                }
                self.review(step);
            }
            Verdict::Wait => {
                let limit = self.config.limits.queued;
                match self.phase.queue_mut() {
                    Some(queue) if queue.len() < limit => {
                        queue.insert(lease, Held { claim, since: step.now });
                        step.publish();
                    }
                    Some(_) | None => {
                        step.act(Action::Refuse { lease, refusal: Refusal::TooMany { limit } });
                    }
                }
            }
            Verdict::Start => self.start_for(step, Claims::from([(lease, Held { claim, since: step.now })])),
            Verdict::Reopen => match self.start_gate(step.now) {
                Some(refusal) => step.act(Action::Refuse { lease, refusal }),
                None => {
                    self.open_incarnation(step);
                    self.start_for(step, Claims::from([(lease, Held { claim, since: step.now })]));
                }
            },
        }
    }

    fn verdict(&self, policy: Policy) -> Verdict {
        if self.mode == Mode::Leaving {
            return Verdict::Refuse(Refusal::HostLeaving);
        }
        match (&self.phase, policy) {
            (Phase::Absent | Phase::Starting(_), Policy::ExistingOnly) => {
                Verdict::Refuse(Refusal::NotRunning)
            }
            (Phase::Absent, Policy::Acquire) => Verdict::Start,
            (Phase::Starting(_), Policy::Acquire) => Verdict::Wait,
            (Phase::Running(running), Policy::Acquire | Policy::ExistingOnly) => match &running.rest {
                Rest::Busy | Rest::Idle { .. } => Verdict::Grant,
                Rest::Paused { .. } => Verdict::Refuse(running.vm.pause_refusal()),
            },
            (Phase::Counting(_), Policy::Acquire | Policy::ExistingOnly) => Verdict::Grant,
            (Phase::Committed(committed), policy) => match (&committed.then, policy) {
                (Then::Absent, Policy::Acquire) => Verdict::Wait,
                (Then::Absent, Policy::ExistingOnly) => Verdict::Grant,
                (Then::Terminated(_), Policy::Acquire | Policy::ExistingOnly) => {
                    Verdict::Refuse(Refusal::Terminating)
                }
            },
            (Phase::Stopping(stopping), policy) => match (&stopping.then, policy) {
                (Then::Terminated(termination), _) if termination.reopen == Reopen::OnStart => {
                    Verdict::Refuse(Refusal::Terminating)
                }
                (Then::Absent | Then::Terminated(_), Policy::Acquire) => Verdict::Wait,
                (Then::Absent | Then::Terminated(_), Policy::ExistingOnly) => {
                    Verdict::Refuse(Refusal::NotRunning)
                }
            },
            (Phase::Terminated(termination), policy) => match (termination.reopen, policy) {
                (Reopen::OnStart, Policy::Acquire | Policy::ExistingOnly) => {
                    Verdict::Refuse(Refusal::Terminated(termination.clone()))
                }
                (Reopen::OnRequest, Policy::Acquire) => Verdict::Reopen,
                (Reopen::OnRequest, Policy::ExistingOnly) => Verdict::Refuse(Refusal::NotRunning),
            },
        }
    }

    fn knows(&self, lease: LeaseId) -> bool {
        self.phase.vm().is_some_and(|vm| vm.leases.contains_key(&lease))
            || self.phase.queue().is_some_and(|queue| queue.contains_key(&lease))
    }

    pub(crate) fn lease_dropped(&mut self, step: &mut Step<'_>, lease: LeaseId) {
        let granted = self.phase.vm_mut().and_then(|vm| vm.leases.remove(&lease));
        let queued = self.phase.queue_mut().and_then(|queue| queue.remove(&lease));
        if granted.is_some() || queued.is_some() {
            step.publish();
            self.review(step);
        }
    }

    /// Serves those who waited, in order, as if they asked now: by the VM that is up, by a new one, or not.
    pub(crate) fn serve(&mut self, step: &mut Step<'_>, queue: Claims) {
        for (lease, held) in queue {
            self.lease_requested(step, lease, held.claim);
        }
    }
}

pub(crate) fn grant(step: &mut Step<'_>, vm: &mut Vm, limit: usize, lease: LeaseId, claim: Claim) {
    if vm.leases.len() >= limit {
        step.act(Action::Refuse { lease, refusal: Refusal::TooMany { limit } });
        return;
    }
    vm.leases.insert(lease, Held { claim, since: step.now });
    step.act(Action::Grant { lease, generation: vm.generation });
    step.publish();
}

pub(crate) fn refuse_all(step: &mut Step<'_>, queue: Claims, refusal: &Refusal) {
    for lease in queue.into_keys() {
        step.act(Action::Refuse { lease, refusal: refusal.clone() });
    }
}

/// Ends all leases of a VM, if there are any.
pub(crate) fn end_leases(step: &mut Step<'_>, vm: &mut Vm, reason: EndReason) {
    if !vm.leases.is_empty() {
        vm.leases.clear();
        step.act(Action::EndLeases { generation: vm.generation, reason });
    }
}

/// Answers all who asked for the sleep.
pub(crate) fn answer(
    step: &mut Step<'_>,
    requests: impl IntoIterator<Item = crate::id::RequestId>,
    outcome: &SleepOutcome,
) {
    for request in requests {
        step.act(Action::AnswerSleep { request, outcome: outcome.clone() });
    }
}
