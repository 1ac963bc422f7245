//! Bringing a VM up: Absent and Starting.

use alloc::vec::Vec;
use core::time::Duration;

use crate::action::{Action, Record, Refusal, StartFrom, StartHow};
use crate::event::SnapshotFate;
use crate::flaw::flaw;
#[cfg(feature = "model")]
use crate::flaw::grant_all;
use crate::hold::{Census, Claim, Claims, Held, Text};
use crate::id::{Generation, LeaseId};
use crate::lease::refuse_all;
use crate::phase::{Cause, Phase, Source, Stage, Starting, Stopping, Then, Vm};
use crate::session::{Session, StartFailure, Step};

/// The longest time between two tries to start a VM.
const RETRY_MAX: Duration = Duration::from_secs(60);

impl Session {
    /// Starts a VM for those who wait, unless something forbids it.
    pub(crate) fn start_for(&mut self, step: &mut Step<'_>, queue: Claims) {
        if let Some(refusal) = self.start_gate(step.now) {
            refuse_all(step, queue, &refusal);
            return;
        }
        self.generation = Generation(self.generation.0 + 1);
        let bound = self.config.limits.boot;
        let from = self.snapshot.map_or(StartFrom::Fresh, StartFrom::Snapshot);
        let starting = Starting {
            generation: self.generation,
            source: Source::Made(from),
            progress: None,
            since: step.now,
            deadline: step.now.after(bound),
            woken_by: queue.values().next().map(|held| held.claim.clone()),
            queue,
        };
        self.enter(step, Phase::Starting(starting));
        step.persist();
        step.act(Action::StartVm { generation: self.generation, from, bound });
    }

    pub(crate) fn vm_progress(&mut self, step: &mut Step<'_>, generation: Generation, reached: Text) {
        if let Phase::Starting(starting) = &mut self.phase
            && starting.generation == generation
        {
            starting.progress = Some(reached);
            step.publish();
        }
    }

    /// The start of this generation, if that is what is under way.
    fn take_start(&mut self, generation: Generation) -> Option<Starting> {
        match self.phase.take() {
            Phase::Starting(starting) if starting.generation == generation || flaw!(self, H38) => {
                Some(starting)
            }
            phase @ (Phase::Absent
            | Phase::Starting(_)
            | Phase::Running(_)
            | Phase::Counting(_)
            | Phase::Dozing(_)
            | Phase::Committed(_)
            | Phase::Stopping(_)
            | Phase::Terminated(_)) => {
                self.phase = phase;
                None
            }
        }
    }

    pub(crate) fn vm_ready(
        &mut self,
        step: &mut Step<'_>,
        generation: Generation,
        how: StartHow,
        census: Census,
    ) {
        flaw!(self, H50, self.announce_anyway(step, generation, how, crate::PhaseName::Stopping));
        flaw!(self, H52, self.announce_anyway(step, generation, how, crate::PhaseName::Running));
        let Some(starting) = self.take_start(generation) else { return };
        if matches!(starting.source, Source::Left(_)) {
            self.phase = Phase::Starting(starting);
            return;
        }
        if how != StartHow::Resume {
            self.boots += 1;
        }
        self.start_count += 1;
        if !flaw!(self, H39) {
            self.snapshot = None;
        }
        self.failure = None;
        let took = step.now.since(starting.since);
        self.record(step, Record::Started { generation, how, took });
        if !(flaw!(self, H55) && how == StartHow::Resume) {
            step.act(Action::AnnounceStarted { generation, how });
        }
        self.came_up(step, Vm::new(generation, how, step.now, census), starting);
    }

    pub(crate) fn vm_adopted(
        &mut self,
        step: &mut Step<'_>,
        generation: Generation,
        census: Census,
        holds: Vec<(LeaseId, Claim)>,
    ) {
        let Some(starting) = self.take_start(generation) else { return };
        let Source::Left(how) = starting.source else {
            self.phase = Phase::Starting(starting);
            return;
        };
        let mut vm = Vm::new(generation, how, step.now, census);
        vm.leases = holds
            .into_iter()
            .take(self.config.limits.leases)
            .map(|(lease, claim)| (lease, Held { claim, since: step.now }))
            .collect();
        self.record(step, Record::Adopted { generation });
        self.came_up(step, vm, starting);
    }

    fn came_up(&mut self, step: &mut Step<'_>, mut vm: Vm, starting: Starting) {
        vm.woken_by = starting.woken_by;
        step.persist();
        flaw!(self, H59, grant_all(step, Generation(vm.generation.0 - 1), starting.queue.clone()));
        self.settle(step, vm);
        self.serve(step, starting.queue);
    }

    pub(crate) fn start_failed(
        &mut self,
        step: &mut Step<'_>,
        generation: Generation,
        reason: Text,
        snapshot: SnapshotFate,
    ) {
        if let Some(starting) = self.take_start(generation) {
            self.start_ended(step, starting, reason, snapshot);
        } else {
            self.cancelled(step, generation, snapshot);
        }
    }

    /// A start came to nothing, and its VM is gone.
    pub(crate) fn start_ended(
        &mut self,
        step: &mut Step<'_>,
        starting: Starting,
        reason: Text,
        snapshot: SnapshotFate,
    ) {
        if let Source::Left(how) = starting.source {
            let vm = Vm::new(starting.generation, how, step.now, Census::default());
            self.crash_gone(step, vm, starting.queue, Cause::NotAdopted, reason);
            return;
        }
        if snapshot == SnapshotFate::Void && !flaw!(self, H40) {
            self.snapshot = None;
        }
        flaw!(self, H35, return self.end_anyway(step));
        self.enter(step, Phase::Absent);
        step.persist();
        let refusal = self.note_failure(step, &starting, reason);
        refuse_all(step, starting.queue, &refusal);
    }

    /// The bound of a start has passed: those who wait are told, and its VM has to go before the next.
    pub(crate) fn start_timed_out(&mut self, step: &mut Step<'_>, mut starting: Starting) {
        let generation = starting.generation;
        if let Source::Left(how) = starting.source {
            let vm = Vm::new(generation, how, step.now, Census::default());
            self.crash_alive(step, vm, starting.queue, Cause::NotAdopted, "the VM doesn't answer".into());
            return;
        }
        let refusal = self.note_failure(step, &starting, "the VM wasn't ready in time".into());
        refuse_all(step, core::mem::take(&mut starting.queue), &refusal);
        self.cancel(step, generation, Then::Absent);
    }

    /// Has a bring-up given up.
    pub(crate) fn cancel(&mut self, step: &mut Step<'_>, generation: Generation, then: Then) {
        let stopping = Stopping {
            generation,
            stage: Stage::Cancelling,
            then,
            since: step.now,
            deadline: step.now.after(self.config.limits.cancel),
            trouble: None,
            queue: Claims::new(),
            requests: Vec::new(),
        };
        self.enter(step, Phase::Stopping(stopping));
        step.persist();
        step.act(Action::CancelStart { generation });
    }

    /// Counts a failed start. The first is tried again by the next request, later ones after a growing wait.
    fn note_failure(&mut self, step: &mut Step<'_>, starting: &Starting, reason: Text) -> Refusal {
        let count = self.failure.as_ref().map_or(1, |failure| failure.count.saturating_add(1));
        let wait = match count {
            0 | 1 => Duration::ZERO,
            2..=7 => Duration::from_secs(1 << (count - 2)),
            8.. => RETRY_MAX,
        };
        let retry_at = step.now.after(wait);
        self.failure = Some(StartFailure { count, reason: reason.clone(), retry_at });
        let took = step.now.since(starting.since);
        self.record(
            step,
            Record::StartFailed { generation: starting.generation, reason: reason.clone(), took },
        );
        Refusal::StartFailed { reason, retry_at }
    }
}
