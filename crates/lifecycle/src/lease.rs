//! Who is served, who waits, who is refused.

use crate::action::{Action, EndReason, Refusal, SleepOutcome};
use crate::flaw::flaw;
use crate::hold::{Claim, Claims, Held, HoldKind, Policy};
use crate::id::LeaseId;
use crate::phase::{Disk, Phase, Reopen, Rest, Then, Vm};
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
        if self.knows(lease) || (flaw!(self, H2) && matches!(self.phase, Phase::Counting(_))) {
            return;
        }
        flaw!(self, H6, self.call_off(step));
        match self.verdict(claim.policy) {
            Verdict::Refuse(refusal) => step.act(Action::Refuse { lease, refusal }),
            Verdict::Grant => self.grant(step, lease, claim),
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

    /// Whoever asks while the engine is being asked is served at once: the count is called off, but by those who only look.
    /// Whoever asks while the VM dozes has it run on, even if it keeps nothing awake.
    fn grant(&mut self, step: &mut Step<'_>, lease: LeaseId, claim: Claim) {
        let limit = self.config.limits.leases;
        let (counted, looks) = (!flaw!(self, H1), claim.kind == HoldKind::Read);
        let Some(vm) = self.phase.vm_mut() else { return };
        if vm.leases.len() >= limit {
            step.act(Action::Refuse { lease, refusal: Refusal::TooMany { limit } });
            return;
        }
        if counted {
            vm.leases.insert(lease, Held { claim, since: step.now });
        }
        step.act(Action::Grant { lease, generation: vm.generation });
        step.publish();
        if self.phase.dozes().is_some() && !looks && !flaw!(self, D2) {
            self.resettle(step, &SleepOutcome::Busy);
        } else {
            self.review(step);
        }
    }

    fn verdict(&self, policy: Policy) -> Verdict {
        if self.mode == Mode::Leaving {
            return Verdict::Refuse(Refusal::HostLeaving);
        }
        match (&self.phase, policy) {
            (Phase::Absent, Policy::ExistingOnly) if flaw!(self, H11) => Verdict::Start,
            (Phase::Absent | Phase::Starting(_), Policy::ExistingOnly) => {
                Verdict::Refuse(Refusal::NotRunning)
            }
            (Phase::Absent, Policy::Acquire) => Verdict::Start,
            (Phase::Starting(_), Policy::Acquire) => Verdict::Wait,
            (Phase::Running(running), Policy::Acquire | Policy::ExistingOnly) => match &running.rest {
                Rest::Busy | Rest::Looked { .. } | Rest::Idle { .. } => Verdict::Grant,
                Rest::Paused { .. } => Verdict::Refuse(running.vm.pause_refusal()),
            },
            (Phase::Counting(_) | Phase::Dozing(_), Policy::Acquire | Policy::ExistingOnly) => Verdict::Grant,
            (Phase::Committed(committed), policy) => match (&committed.then, policy) {
                (Then::Absent, Policy::Acquire) if flaw!(self, H5) => Verdict::Grant,
                (Then::Absent, Policy::ExistingOnly) if flaw!(self, H10) => Verdict::Wait,
                (Then::Terminated(_), Policy::ExistingOnly) if flaw!(self, H16) => Verdict::Grant,
                (Then::Absent, Policy::Acquire) => Verdict::Wait,
                (Then::Absent, Policy::ExistingOnly) => match committed.vm.disk {
                    Disk::Writable => Verdict::Grant,
                    Disk::Failing(_) => Verdict::Refuse(committed.vm.pause_refusal()),
                },
                (Then::Terminated(_), Policy::Acquire | Policy::ExistingOnly) => {
                    Verdict::Refuse(Refusal::Terminating)
                }
            },
            (Phase::Stopping(stopping), policy) => match (&stopping.then, policy) {
                (Then::Terminated(_), Policy::Acquire) if flaw!(self, H17) => Verdict::Wait,
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
        let queued = match self.phase.queue_mut() {
            Some(queue) if !flaw!(self, H25) => queue.remove(&lease),
            Some(_) | None => None,
        };
        flaw!(self, H27, self.drop_another(granted.is_none()));
        flaw!(self, H28, self.call_off(step));
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
