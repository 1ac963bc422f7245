//! Putting a VM to sleep: Committed and Stopping.

use alloc::vec::Vec;
use core::time::Duration;

use crate::action::{Action, EndReason, Record, SleepHow, SleepOutcome, StopHow};
use crate::config::Limits;
use crate::event::{AfterFailure, SnapshotFate};
use crate::flaw::flaw;
#[cfg(feature = "model")]
use crate::flaw::{grant_all, overwritten};
use crate::hold::{Claims, Text};
use crate::id::{Ask, Generation, RequestId};
use crate::lease::{answer, end_leases};
use crate::phase::{Committed, Disk, Engine, Killed, Phase, Stage, Stopping, Then, Vm};
use crate::session::{Mode, Session, Step};

/// The wait after a failed suspend doubles from the first value up to the second.
const SUSPEND_RETRY_MIN: Duration = Duration::from_secs(60);
const SUSPEND_RETRY_MAX: Duration = Duration::from_secs(3600);

impl Session {
    /// From here on the sleep will happen. The hooks are told now, while the VM is alive.
    pub(crate) fn commit(
        &mut self,
        step: &mut Step<'_>,
        mut vm: Vm,
        by: SleepHow,
        then: Then,
        requests: Vec<RequestId>,
    ) {
        let bound = self.config.limits.hooks;
        step.persist();
        step.act(Action::RunStoppingHooks { ask: vm.next_ask(), how: StopHow::Sleep(by), bound });
        let committed = Committed {
            vm,
            by,
            then,
            since: step.now,
            deadline: step.now.after(bound),
            queue: Claims::new(),
            requests,
        };
        if flaw!(self, H34) {
            self.begin_sleep(step, committed);
            return;
        }
        self.enter(step, Phase::Committed(committed));
    }

    pub(crate) fn hooks_done(&mut self, step: &mut Step<'_>, ask: Ask) {
        match self.phase.take() {
            Phase::Committed(committed)
                if committed.vm.current_ask() == ask
                    || (flaw!(self, H8) && committed.vm.generation == ask.generation) =>
            {
                self.begin_sleep(step, committed);
            }
            phase @ (Phase::Absent
            | Phase::Starting(_)
            | Phase::Running(_)
            | Phase::Counting(_)
            | Phase::Dozing(_)
            | Phase::Committed(_)
            | Phase::Stopping(_)
            | Phase::Terminated(_)) => self.phase = phase,
        }
    }

    /// The hooks are done, or had their time.
    pub(crate) fn begin_sleep(&mut self, step: &mut Step<'_>, mut committed: Committed) {
        if flaw!(self, H9) && !committed.queue.is_empty() {
            let deadline = step.now.after(self.config.limits.hooks);
            self.phase = Phase::Committed(Committed { deadline, ..committed });
            return;
        }
        flaw!(self, H7, grant_all(step, committed.vm.generation, core::mem::take(&mut committed.queue)));
        flaw!(self, H12, committed.queue.append(&mut committed.vm.leases));
        end_leases(step, &mut committed.vm, EndReason::Sleeping);
        let Committed { vm, by, then, since, queue, requests, .. } = committed;
        let (stage, bound) = self.order_sleep(step, vm, by);
        let deadline = step.now.after(bound);
        let stopping = Stopping {
            stage,
            then,
            since,
            deadline,
            trouble: None,
            queue,
            requests,
            generation: self.generation,
        };
        self.enter(step, Phase::Stopping(stopping));
        step.persist();
    }

    /// Has the VM put to sleep. What can't be kept is stopped, what can't shut down is killed.
    fn order_sleep(&mut self, step: &mut Step<'_>, mut vm: Vm, by: SleepHow) -> (Stage, Duration) {
        let limits = self.config.limits;
        let (generation, how) = (vm.generation, vm.how);
        let by = if matches!(vm.engine, Engine::Dead(_)) { SleepHow::Stop } else { by };
        match (by, &vm.disk) {
            (SleepHow::Stop, Disk::Failing(_)) => {
                step.act(Action::KillVm { generation });
                (Stage::Killing { tries: 1, was: Killed::Sleep(by, vm.current_ask()) }, limits.kill)
            }
            (SleepHow::Stop, Disk::Writable) => {
                let ask = vm.next_ask();
                step.act(Action::BeginSleep { ask, how: by, bound: limits.stop });
                (Stage::ShuttingDown { ask, how }, limits.stop)
            }
            (SleepHow::Suspend, Disk::Writable | Disk::Failing(_)) => {
                let ask = vm.next_ask();
                step.act(Action::BeginSleep { ask, how: by, bound: limits.suspend });
                (Stage::Suspending(vm), limits.suspend)
            }
        }
    }

    /// The VM's end, if that is what is under way.
    fn take_stop(&mut self, is_it: impl FnOnce(&Stopping) -> bool) -> Option<Stopping> {
        match self.phase.take() {
            Phase::Stopping(stopping) if is_it(&stopping) => Some(stopping),
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

    pub(crate) fn sleep_done(&mut self, step: &mut Step<'_>, ask: Ask) {
        let Some(stopping) = self.take_stop(|stopping| stopping.ask() == Some(ask)) else { return };
        // A snapshot that is sealed after the VM was ordered killed may have been swept away with it.
        let sealed = matches!(stopping.stage, Stage::Suspending(_) | Stage::Sealing { .. });
        self.vm_gone(step, stopping, sealed);
    }

    pub(crate) fn suspend_failed(&mut self, step: &mut Step<'_>, ask: Ask, vm: AfterFailure, reason: Text) {
        let Some(mut stopping) = self.take_stop(|stopping| stopping.ask() == Some(ask)) else { return };
        stopping.trouble = Some(reason.clone());
        match (stopping.stage, vm) {
            (Stage::Suspending(vm), AfterFailure::RunsOn) if self.may_run_on(&stopping.then) => {
                answer(step, stopping.requests, &SleepOutcome::Failed(reason.clone()));
                self.run_on(step, vm, reason);
                self.serve(step, stopping.queue);
            }
            (Stage::Suspending(vm), AfterFailure::RunsOn) => {
                let (stage, bound) = self.order_sleep(step, vm, SleepHow::Stop);
                self.stop_goes_on(step, Stopping { stage, ..stopping }, bound);
            }
            (Stage::Suspending(vm), AfterFailure::Lost) => {
                let was = Killed::Sleep(SleepHow::Suspend, vm.current_ask());
                let stopping = Stopping { stage: Stage::Killing { tries: 1, was }, ..stopping };
                if flaw!(self, H99) {
                    self.vm_gone(step, stopping, false);
                    return;
                }
                step.act(Action::KillVm { generation: stopping.generation });
                self.stop_goes_on(step, stopping, self.config.limits.kill);
            }
            (stage @ Stage::Sealing { .. }, AfterFailure::RunsOn | AfterFailure::Lost) => {
                self.vm_gone(step, Stopping { stage, ..stopping }, false);
            }
            (
                stage @ (Stage::Cancelling | Stage::ShuttingDown { .. } | Stage::Killing { .. }),
                AfterFailure::RunsOn | AfterFailure::Lost,
            ) => self.phase = Phase::Stopping(Stopping { stage, ..stopping }),
        }
    }

    fn may_run_on(&self, then: &Then) -> bool {
        self.mode == Mode::Serving && *then == Then::Absent
    }

    /// The VM's end has reached another stage, with a bound of its own.
    fn stop_goes_on(&mut self, step: &mut Step<'_>, mut stopping: Stopping, bound: Duration) {
        stopping.deadline = step.now.after(bound);
        self.phase = Phase::Stopping(stopping);
        step.persist();
    }

    /// A suspend failed in time: the VM runs on, and the next try is put off.
    fn run_on(&mut self, step: &mut Step<'_>, mut vm: Vm, reason: Text) {
        let generation = vm.generation;
        let wait = SUSPEND_RETRY_MIN.saturating_mul(1 << vm.failed_suspends.min(6)).min(SUSPEND_RETRY_MAX);
        vm.failed_suspends = vm.failed_suspends.saturating_add(1);
        vm.not_before = step.now.after(wait);
        self.record(step, Record::SleepFailed { generation, reason: reason.clone() });
        step.act(Action::RunSleepFailedHooks { generation, reason });
        step.persist();
        self.settle(step, vm);
    }

    /// A bring-up that was given up has come to its end.
    pub(crate) fn cancelled(&mut self, step: &mut Step<'_>, generation: Generation, snapshot: SnapshotFate) {
        let ended = |stopping: &Stopping| {
            stopping.generation == generation
                && matches!(stopping.stage, Stage::Cancelling | Stage::Killing { was: Killed::BringUp, .. })
        };
        let Some(stopping) = self.take_stop(ended) else { return };
        if snapshot == SnapshotFate::Void && !flaw!(self, H40) {
            self.snapshot = None;
        }
        self.vm_gone(step, stopping, false);
    }

    /// The process of a VM that was to end is gone.
    pub(crate) fn exited_while_stopping(&mut self, step: &mut Step<'_>, stopping: Stopping) {
        match stopping.stage {
            Stage::Suspending(ref vm) => {
                let stage = Stage::Sealing { ask: vm.current_ask(), how: vm.how };
                self.stop_goes_on(step, Stopping { stage, ..stopping }, self.config.limits.seal);
            }
            Stage::Sealing { .. } => self.phase = Phase::Stopping(stopping),
            Stage::Cancelling | Stage::Killing { was: Killed::BringUp, .. } => {
                // It may have run on from its snapshot.
                self.snapshot = None;
                self.vm_gone(step, stopping, false);
            }
            Stage::ShuttingDown { .. } | Stage::Killing { .. } if flaw!(self, H32) => {
                self.phase = Phase::Stopping(stopping);
            }
            Stage::ShuttingDown { .. } | Stage::Killing { .. } => {
                flaw!(self, H33, self.crash_again(step));
                flaw!(self, H64, return self.vm_gone(step, overwritten(stopping), false));
                self.vm_gone(step, stopping, false);
            }
        }
    }

    /// The VM exited while its hooks were being told: the sleep that will happen has happened.
    pub(crate) fn exited_while_committed(&mut self, step: &mut Step<'_>, committed: Committed) {
        if flaw!(self, H36) {
            self.phase = Phase::Committed(committed);
            return;
        }
        if flaw!(self, H43) {
            self.begin_sleep(step, committed);
            return;
        }
        let Committed { mut vm, by, then, since, deadline, queue, requests } = committed;
        end_leases(step, &mut vm, EndReason::Sleeping);
        let ask = vm.current_ask();
        let stopping = Stopping {
            generation: vm.generation,
            stage: Stage::Killing { tries: 0, was: Killed::Sleep(by, ask) },
            then,
            since,
            deadline,
            trouble: Some("the VM exited before it was told to".into()),
            queue,
            requests,
        };
        self.vm_gone(step, stopping, false);
    }

    /// A wait for the VM's end has passed its bound.
    pub(crate) fn stopping_timed_out(&mut self, step: &mut Step<'_>, mut stopping: Stopping) {
        let (tries, was) = match &stopping.stage {
            Stage::Sealing { .. } => {
                stopping.trouble = Some("the snapshot wasn't sealed in time".into());
                step.act(Action::KillVm { generation: stopping.generation });
                self.vm_gone(step, stopping, false);
                return;
            }
            Stage::Cancelling => (1, Killed::BringUp),
            Stage::Suspending(vm) => (1, Killed::Sleep(SleepHow::Suspend, vm.current_ask())),
            Stage::ShuttingDown { .. } if flaw!(self, H88) => {
                self.stop_goes_on(step, stopping, self.config.limits.stop);
                return;
            }
            Stage::ShuttingDown { ask, .. } => (1, Killed::Sleep(SleepHow::Stop, *ask)),
            Stage::Killing { tries, was } => (tries + 1, *was),
        };
        if tries > Limits::KILLS {
            self.remains = Some(stopping.generation);
            stopping.trouble = Some("the VM was killed and didn't exit".into());
            self.vm_gone(step, stopping, false);
            return;
        }
        if matches!(was, Killed::Sleep(..)) {
            stopping.trouble.get_or_insert_with(|| "the VM didn't end in time and was killed".into());
        }
        step.act(Action::KillVm { generation: stopping.generation });
        stopping.stage = Stage::Killing { tries, was };
        self.stop_goes_on(step, stopping, self.config.limits.kill);
    }

    /// The VM is gone. What was to follow follows, and those who waited are served.
    fn vm_gone(&mut self, step: &mut Step<'_>, stopping: Stopping, sealed: bool) {
        let generation = stopping.generation;
        flaw!(self, H58, self.weak.clear());
        if let Some(by) = stopping.by() {
            self.snapshot = sealed.then_some(generation);
            let took = step.now.since(stopping.since);
            self.record(step, Record::Slept { generation, how: by, took, trouble: stopping.trouble });
            let outcome = match stopping.then {
                Then::Absent if self.remains == Some(generation) => {
                    SleepOutcome::Failed("the VM was killed and didn't exit".into())
                }
                Then::Absent => SleepOutcome::Asleep { generation, how: by },
                Then::Terminated(_) => SleepOutcome::Terminated,
            };
            answer(step, stopping.requests, &outcome);
        } else {
            answer(step, stopping.requests, &SleepOutcome::NoVm);
        }
        step.persist();
        match stopping.then {
            Then::Absent => self.enter(step, Phase::Absent),
            Then::Terminated(termination) => self.end(step, termination),
        }
        self.serve(step, stopping.queue);
    }
}
