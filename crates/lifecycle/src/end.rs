//! How a VM ends unasked, and how an incarnation ends.

use alloc::vec::Vec;

use crate::action::{Action, EndReason, Record, Refusal, SleepHow, SleepOutcome, StartHow, StopHow};
use crate::config::{CrashPolicy, Lifetime, Storage};
use crate::durable::Crash;
use crate::event::{Exit, SnapshotFate};
use crate::flaw::flaw;
use crate::hold::{Census, Claims, Text};
use crate::id::{Generation, Incarnation};
use crate::lease::{answer, end_leases, refuse_all};
use crate::phase::{
    Cause, Counting, Dozing, Killed, Phase, Reopen, Running, Source, Stage, Starting, Stopping, Termination,
    TerminationReason, Then, Vm,
};
use crate::session::{Mode, Session, Step};

impl Session {
    /// A VM's process is gone: here, once per generation, it is decided whether that was wanted. Any later report
    /// finds another phase and is ignored.
    pub(crate) fn vm_exited(&mut self, step: &mut Step<'_>, generation: Generation, exit: &Exit) {
        if self.remains == Some(generation) {
            self.remains = None;
            step.persist();
            return;
        }
        if self.phase.generation() != Some(generation) {
            return;
        }
        match self.phase.take() {
            phase @ (Phase::Absent | Phase::Terminated(_)) => self.phase = phase,
            Phase::Starting(starting) => match (starting.source, exit) {
                (Source::Made(_), _) => self.start_ended(step, starting, exit.in_words(), SnapshotFate::Void),
                (Source::Left(how), Exit::GuestShutdown) => self.left_asleep(step, starting, how),
                (Source::Left(how), Exit::Crashed(_) | Exit::Unknown(_)) => {
                    let vm = Vm::new(generation, how, step.now, Census::default());
                    self.crash_gone(step, vm, starting.queue, Cause::VmExited, exit.in_words());
                }
            },
            Phase::Running(Running { vm, .. }) | Phase::Dozing(Dozing { vm, .. }) => {
                self.crash_gone(step, vm, Claims::new(), Cause::VmExited, exit.in_words());
            }
            Phase::Counting(Counting { vm, requests, .. }) => {
                answer(step, requests, &SleepOutcome::Terminated);
                self.crash_gone(step, vm, Claims::new(), Cause::VmExited, exit.in_words());
            }
            Phase::Committed(committed) => self.exited_while_committed(step, committed),
            Phase::Stopping(stopping) => self.exited_while_stopping(step, stopping),
        }
    }

    /// A VM that an earlier host process left had no host for so long that it shut itself down in order.
    fn left_asleep(&mut self, step: &mut Step<'_>, starting: Starting, how: StartHow) {
        let Starting { generation, since, queue, .. } = starting;
        let mut vm = Vm::new(generation, how, step.now, Census::default());
        let (by, bound) = (SleepHow::Stop, self.config.limits.hooks);
        step.act(Action::RunStoppingHooks { ask: vm.next_ask(), how: StopHow::Sleep(by), bound });
        let trouble = Some("it had no host and shut itself down".into());
        self.record(step, Record::Slept { generation, how: by, took: step.now.since(since), trouble });
        self.enter(step, Phase::Absent);
        step.persist();
        self.serve(step, queue);
    }

    /// A VM is lost and its process is gone.
    pub(crate) fn crash_gone(
        &mut self,
        step: &mut Step<'_>,
        vm: Vm,
        queue: Claims,
        cause: Cause,
        details: Text,
    ) {
        let termination = self.crashed(step, vm, cause, details);
        self.end(step, termination);
        self.serve(step, queue);
    }

    /// A VM is lost and its process has to be killed.
    pub(crate) fn crash_alive(
        &mut self,
        step: &mut Step<'_>,
        vm: Vm,
        mut queue: Claims,
        cause: Cause,
        details: Text,
    ) {
        let generation = vm.generation;
        let termination = self.crashed(step, vm, cause, details);
        if termination.reopen == Reopen::OnStart {
            refuse_all(step, core::mem::take(&mut queue), &Refusal::Terminating);
        }
        step.act(Action::KillVm { generation });
        let stopping = Stopping {
            generation,
            stage: Stage::Killing { tries: 1, was: Killed::Crash },
            then: Then::Terminated(termination),
            since: step.now,
            deadline: step.now.after(self.config.limits.kill),
            trouble: None,
            queue,
            requests: Vec::new(),
        };
        self.enter(step, Phase::Stopping(stopping));
    }

    /// Writes a crash down: work in flight fails with the reason, hooks learn of the end.
    fn crashed(&mut self, step: &mut Step<'_>, mut vm: Vm, cause: Cause, details: Text) -> Termination {
        let generation = vm.generation;
        let bound = self.config.limits.hooks;
        end_leases(step, &mut vm, EndReason::Crashed(details.clone()));
        step.act(Action::RunStoppingHooks { ask: vm.next_ask(), how: StopHow::Crash, bound });
        self.record(step, Record::Crashed { generation, details: details.clone() });
        self.snapshot = None;
        self.crashes.retain(|crash| crash.until > step.now);
        let until = step.now.after(self.config.limits.crash_window);
        self.crashes.push(Crash { details: details.clone(), until });
        step.persist();
        let reason = match cause {
            Cause::NotAdopted => TerminationReason::Unknown,
            Cause::VmExited | Cause::EngineDied | Cause::EngineSilent | Cause::IoError => {
                TerminationReason::Crashed
            }
            Cause::Asked | Cause::CreatorGone | Cause::HostLeaving => TerminationReason::Shutdown,
        };
        let reopen = match self.config.crash {
            CrashPolicy::Reopen => Reopen::OnRequest,
            CrashPolicy::Terminate => Reopen::OnStart,
        };
        Termination { reason, cause, details, reopen }
    }

    /// Somebody wants the incarnation to end. May be repeated.
    pub(crate) fn terminate(&mut self, step: &mut Step<'_>, cause: Cause, details: Text) {
        let termination =
            Termination { reason: TerminationReason::Shutdown, cause, details, reopen: Reopen::OnStart };
        match self.phase.take() {
            Phase::Absent => {
                step.persist();
                self.end(step, termination);
            }
            Phase::Starting(starting) => {
                refuse_all(step, starting.queue, &Refusal::Terminating);
                flaw!(self, H54, self.tell_anyway(step, starting.generation));
                match starting.source {
                    Source::Made(_) => self.cancel(step, starting.generation, Then::Terminated(termination)),
                    Source::Left(how) => {
                        let vm = Vm::new(starting.generation, how, step.now, Census::default());
                        self.commit_termination(step, vm, termination);
                    }
                }
            }
            Phase::Running(Running { vm, .. }) | Phase::Dozing(Dozing { vm, .. }) => {
                self.commit_termination(step, vm, termination);
            }
            Phase::Counting(Counting { vm, requests, .. }) => {
                answer(step, requests, &SleepOutcome::Terminated);
                self.commit_termination(step, vm, termination);
            }
            Phase::Committed(committed) if flaw!(self, H98) => self.phase = Phase::Committed(committed),
            Phase::Committed(mut committed) => {
                flaw!(self, H53, self.tell_anyway(step, committed.vm.generation));
                end_leases(step, &mut committed.vm, EndReason::Terminating);
                refuse_all(step, core::mem::take(&mut committed.queue), &Refusal::Terminating);
                committed.then = then_terminated(committed.then, termination);
                self.phase = Phase::Committed(committed);
                step.persist();
            }
            Phase::Stopping(mut stopping) => {
                if !flaw!(self, H57) {
                    refuse_all(step, core::mem::take(&mut stopping.queue), &Refusal::Terminating);
                }
                stopping.then = then_terminated(stopping.then, termination);
                self.phase = Phase::Stopping(stopping);
                step.persist();
            }
            Phase::Terminated(ended) => {
                flaw!(self, H56, step.act(Action::AnnounceTerminated { incarnation: self.incarnation }));
                if ended.reopen == Reopen::OnRequest {
                    step.persist();
                }
                self.phase = Phase::Terminated(Termination { reopen: Reopen::OnStart, ..ended });
            }
        }
    }

    fn commit_termination(&mut self, step: &mut Step<'_>, mut vm: Vm, termination: Termination) {
        end_leases(step, &mut vm, EndReason::Terminating);
        flaw!(self, H41, step.act(Action::AnnounceTerminated { incarnation: self.incarnation }));
        self.commit(step, vm, SleepHow::Stop, Then::Terminated(termination), Vec::new());
    }

    /// The incarnation is over. The reason can be read before anybody is told (rule 10).
    pub(crate) fn end(&mut self, step: &mut Step<'_>, termination: Termination) {
        let incarnation = self.incarnation;
        self.snapshot = None;
        self.failure = None;
        self.record(step, Record::Terminated { incarnation, termination: termination.clone() });
        self.enter(step, Phase::Terminated(termination));
        step.persist();
        step.act(Action::AnnounceTerminated { incarnation });
    }

    pub(crate) fn open_incarnation(&mut self, step: &mut Step<'_>) {
        self.incarnation = Incarnation(self.incarnation.0 + 1);
        self.record(step, Record::Opened { incarnation: self.incarnation });
        self.enter(step, Phase::Absent);
        step.persist();
    }

    /// Somebody who can see why it ended opens the session again: earlier crashes don't count any more.
    pub(crate) fn start_requested(&mut self, step: &mut Step<'_>) {
        if self.termination().is_some() {
            self.crashes.clear();
            self.open_incarnation(step);
        }
    }

    pub(crate) fn creator_gone(&mut self, step: &mut Step<'_>) {
        match self.config.lifetime {
            Lifetime::Temporary => {
                self.terminate(
                    step,
                    Cause::CreatorGone,
                    "the connection that made the session closed".into(),
                );
            }
            Lifetime::Lasting => {}
        }
    }

    /// This host process has to go. Nobody waits any more, and a VM that is up is put to sleep.
    pub(crate) fn host_leaving(&mut self, step: &mut Step<'_>) {
        self.mode = Mode::Leaving;
        step.publish();
        if let Some(queue) = self.phase.queue_mut() {
            refuse_all(step, core::mem::take(queue), &Refusal::HostLeaving);
        }
        match self.phase.take() {
            Phase::Starting(starting) => match starting.source {
                Source::Made(_) => self.cancel(step, starting.generation, Then::Absent),
                // Another host will find it as this one did.
                Source::Left(_) => self.phase = Phase::Starting(starting),
            },
            Phase::Running(Running { vm, .. }) | Phase::Dozing(Dozing { vm, .. }) => self.leave(step, vm),
            Phase::Counting(Counting { vm, requests, .. }) => {
                answer(step, requests, &SleepOutcome::Busy);
                self.leave(step, vm);
            }
            phase @ (Phase::Absent | Phase::Committed(_) | Phase::Stopping(_) | Phase::Terminated(_)) => {
                self.phase = phase;
            }
        }
    }

    /// Puts a VM to sleep whatever holds it. What can't be kept over a sleep ends with its VM.
    pub(crate) fn leave(&mut self, step: &mut Step<'_>, mut vm: Vm) {
        end_leases(step, &mut vm, EndReason::HostLeaving);
        match self.config.storage {
            Storage::Persistent => {
                let by = self.sleep_how(&vm);
                self.commit(step, vm, by, Then::Absent, Vec::new());
            }
            Storage::Ephemeral => {
                let details = "the host process had to go".into();
                let termination = Termination {
                    reason: TerminationReason::Shutdown,
                    cause: Cause::HostLeaving,
                    details,
                    reopen: Reopen::OnStart,
                };
                self.commit_termination(step, vm, termination);
            }
        }
    }
}

/// A reason that was decided stays; only what opens the session again may change.
fn then_terminated(then: Then, termination: Termination) -> Then {
    match then {
        Then::Absent => Then::Terminated(termination),
        Then::Terminated(decided) => Then::Terminated(Termination { reopen: Reopen::OnStart, ..decided }),
    }
}

impl Exit {
    fn in_words(&self) -> Text {
        match self {
            Self::GuestShutdown => "the guest shut itself down".into(),
            Self::Crashed(details) | Self::Unknown(details) => details.clone(),
        }
    }
}
