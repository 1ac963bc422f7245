//! Being up: Running, Counting and Dozing, and what keeps the VM there.

use alloc::vec::Vec;

use crate::action::{Action, SleepHow, SleepOutcome};
use crate::config::{Grace, Limits, RunningContainers};
use crate::flaw::flaw;
use crate::hold::{Census, Claims, HoldKind, Text};
use crate::id::{Ask, Generation, RequestId};
use crate::lease::answer;
use crate::phase::{
    Aim, Cause, Committed, Counting, Disk, Dozing, Engine, Phase, Rest, Running, Stopping, Then, Vm,
};
use crate::session::{Mode, Session, Step};

/// What holds a VM, from nothing to what its grace period begins after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Holding {
    Nothing,
    /// Requests that only look: no sleep begins under them, and the grace period runs on.
    LookedAt,
    Used,
}

impl Session {
    /// Whether anything strong holds this VM against the sleep that comes by itself.
    pub(crate) fn is_held(&self, vm: &Vm) -> bool {
        self.is_held_against(vm, None)
    }

    /// Whether anything strong holds this VM against a sleep, by the means that somebody asked for if anybody did.
    pub(crate) fn is_held_against(&self, vm: &Vm, wish: Option<SleepHow>) -> bool {
        self.holding(vm, wish) != Holding::Nothing
    }

    /// What holds this VM against such a sleep.
    pub(crate) fn holding(&self, vm: &Vm, wish: Option<SleepHow>) -> Holding {
        let containers = vm.census.holds(self.running_containers());
        let leases = vm.leases.values().map(|held| self.holding_of(held.claim.kind, wish));
        let strongest = leases.max().unwrap_or(Holding::Nothing);
        if containers || !self.pins.is_empty() { Holding::Used } else { strongest }
    }

    /// What a lease of this kind does: all hold but those that are only listed.
    fn holding_of(&self, kind: HoldKind, wish: Option<SleepHow>) -> Holding {
        let overlooked = match kind {
            HoldKind::Operation => flaw!(self, H23),
            HoldKind::RootProcess => flaw!(self, H24),
            HoldKind::Activity => wish == Some(SleepHow::Suspend),
            HoldKind::Events | HoldKind::Connection => true,
            HoldKind::Read | HoldKind::Request | HoldKind::Exec | HoldKind::Container | HoldKind::Pin => {
                false
            }
        };
        match kind {
            _ if overlooked => Holding::Nothing,
            HoldKind::Read => Holding::LookedAt,
            _ => Holding::Used,
        }
    }

    /// Running containers may only sleep where there is a suspend to keep them.
    pub(crate) fn running_containers(&self) -> RunningContainers {
        match self.config.idle_action {
            SleepHow::Stop => RunningContainers::Hold,
            SleepHow::Suspend => self.config.running,
        }
    }

    /// Has a VM run, as busy or as idle as it is.
    pub(crate) fn settle(&mut self, step: &mut Step<'_>, vm: Vm) {
        if self.mode == Mode::Leaving {
            self.leave(step, vm);
            return;
        }
        if let Engine::Dead(details) = &vm.engine {
            let details = details.clone();
            self.crash_alive(step, vm, Claims::new(), Cause::EngineDied, details);
            return;
        }
        let (since, deadline) = (step.now, self.idle_deadline(step.now, vm.not_before));
        let rest = match (&vm.disk, self.holding(&vm, None)) {
            (Disk::Failing(_), _) => Rest::Paused {
                retry_at: step.now.after(self.config.limits.io_retry),
                give_up_at: step.now.after(self.config.limits.io_give_up),
            },
            (Disk::Writable, Holding::Used) => Rest::Busy,
            (Disk::Writable, Holding::LookedAt) => Rest::Looked { since, deadline, then: self.aim() },
            (Disk::Writable, Holding::Nothing) => Rest::Idle { since, deadline },
        };
        self.enter(step, Phase::Running(Running { vm, rest }));
    }

    /// Looks again at whether the VM is held, after something that holds came or went.
    pub(crate) fn review(&mut self, step: &mut Step<'_>) {
        let changed = match &self.phase {
            Phase::Running(Running { vm, rest }) => match (rest, self.holding(vm, None)) {
                (Rest::Idle { since, deadline }, Holding::LookedAt) => {
                    let looked = Rest::Looked { since: *since, deadline: *deadline, then: self.aim() };
                    return self.rest(step, looked);
                }
                (Rest::Looked { since, deadline, then }, Holding::Nothing) => {
                    let (since, deadline, then) = (*since, *deadline, *then);
                    return match deadline {
                        Some(end) if end <= step.now => self.look_away(step, then),
                        _ => self.rest(step, Rest::Idle { since, deadline }),
                    };
                }
                (Rest::Busy, holding) => holding != Holding::Used && !flaw!(self, H18),
                (Rest::Looked { .. } | Rest::Idle { .. }, holding) => holding == Holding::Used,
                (Rest::Paused { .. }, _) => false,
            },
            Phase::Counting(counting) => {
                self.holding(&counting.vm, counting.aim.wish()) == Holding::Used && !flaw!(self, H4)
            }
            Phase::Dozing(dozing) => match self.holding(&dozing.vm, None) {
                Holding::Nothing => false,
                Holding::LookedAt => return self.look(step),
                Holding::Used => !flaw!(self, D2),
            },
            Phase::Absent
            | Phase::Starting(_)
            | Phase::Committed(_)
            | Phase::Stopping(_)
            | Phase::Terminated(_) => false,
        };
        if changed {
            self.resettle(step, &SleepOutcome::Busy);
        }
    }

    /// What a sleep that comes by itself begins with.
    pub(crate) fn aim(&self) -> Aim {
        self.config.doze.map_or(Aim::Sleep(None), |_| Aim::Doze(None))
    }

    /// The grace period runs on, whoever looks.
    fn rest(&mut self, step: &mut Step<'_>, rest: Rest) {
        if let Phase::Running(Running { vm, .. }) = self.phase.take() {
            self.enter(step, Phase::Running(Running { vm, rest }));
        }
    }

    /// Nobody looks any more at a VM whose grace period is over.
    fn look_away(&mut self, step: &mut Step<'_>, then: Aim) {
        if let Phase::Running(Running { vm, .. }) = self.phase.take() {
            self.begin_counting(step, vm, Vec::new(), then);
        }
    }

    /// Somebody looks at a VM whose grace period is over, unless it has been told meanwhile that there is none. How long it is
    /// to doze goes on to count as well.
    fn look(&mut self, step: &mut Step<'_>) {
        let (vm, then) = match self.phase.take() {
            Phase::Counting(Counting { vm, aim, .. }) => (vm, aim),
            Phase::Dozing(Dozing { vm, deadline }) => (vm, Aim::Doze(Some(deadline))),
            phase => {
                self.phase = phase;
                return;
            }
        };
        let deadline = self.idle_deadline(step.now, vm.not_before).map(|_| step.now);
        let rest = Rest::Looked { since: step.now, deadline, then };
        self.enter(step, Phase::Running(Running { vm, rest }));
    }

    /// Decides anew whether a VM that is up is busy or idle. A count under way is called off, and so is a doze.
    pub(crate) fn resettle(&mut self, step: &mut Step<'_>, outcome: &SleepOutcome) {
        match self.phase.take() {
            Phase::Running(running) => self.settle(step, running.vm),
            Phase::Counting(counting) => {
                answer(step, counting.requests, outcome);
                self.settle(step, counting.vm);
            }
            Phase::Dozing(dozing) => self.settle(step, dozing.vm),
            phase @ (Phase::Absent
            | Phase::Starting(_)
            | Phase::Committed(_)
            | Phase::Stopping(_)
            | Phase::Terminated(_)) => self.phase = phase,
        }
    }

    /// Asks the engine what runs. The question is no activity.
    pub(crate) fn begin_counting(&mut self, step: &mut Step<'_>, vm: Vm, requests: Vec<RequestId>, aim: Aim) {
        self.count(step, Counting { vm, unanswered: 0, deadline: step.now, requests, aim });
    }

    fn count(&mut self, step: &mut Step<'_>, mut counting: Counting) {
        let bound = self.config.limits.count;
        step.act(Action::CountContainers { ask: counting.vm.next_ask(), bound });
        counting.deadline = step.now.after(bound);
        self.enter(step, Phase::Counting(counting));
    }

    pub(crate) fn count_unanswered(&mut self, step: &mut Step<'_>, counting: Counting) {
        let unanswered = counting.unanswered + 1;
        if unanswered < Limits::COUNTS {
            self.count(step, Counting { unanswered, ..counting });
        } else {
            answer(step, counting.requests, &SleepOutcome::Terminated);
            let details = "the engine didn't say what runs".into();
            self.crash_alive(step, counting.vm, Claims::new(), Cause::EngineSilent, details);
        }
    }

    /// The engine has answered. Looking at what holds and the commit are this one step.
    pub(crate) fn containers_counted(&mut self, step: &mut Step<'_>, ask: Ask, census: Option<Census>) {
        let Phase::Counting(counting) = &self.phase else { return };
        let stale = counting.vm.current_ask() != ask;
        if stale && !(flaw!(self, H86) && ask.generation == counting.vm.generation) {
            return;
        }
        let Phase::Counting(mut counting) = self.phase.take() else { return };
        let Some(census) = census else {
            // An engine that is being restarted refuses at once: it is asked again when its time to answer is over.
            self.phase = Phase::Counting(counting);
            return;
        };
        counting.vm.set_census(step.now, census);
        let looks = !flaw!(self, H4 | H65);
        let wish = counting.aim.wish();
        let by = wish.unwrap_or_else(|| self.sleep_how(&counting.vm));
        // Whatever the settings say of a suspend, no running container is stopped.
        let loses = by == SleepHow::Stop && counting.vm.census.is_working();
        let holding = self.holding(&counting.vm, wish);
        let is_looked_at = holding == Holding::LookedAt && !flaw!(self, L1);
        if looks && is_looked_at && !loses && counting.requests.is_empty() {
            self.phase = Phase::Counting(counting);
            self.look(step);
            return;
        }
        if looks && (loses || is_looked_at || holding == Holding::Used) {
            answer(step, counting.requests, &SleepOutcome::Busy);
            self.settle(step, counting.vm);
            return;
        }
        match (counting.aim, self.config.doze) {
            // It was told meanwhile never to fall asleep by itself.
            (Aim::Doze(_), _) if self.config.grace == Grace::Never => self.settle(step, counting.vm),
            (Aim::Doze(until), Some(doze)) if until.is_none_or(|until| until > step.now) => {
                let Counting { vm, .. } = counting;
                step.act(Action::Doze { generation: vm.generation });
                let deadline = until.unwrap_or_else(|| step.now.after(doze));
                self.enter(step, Phase::Dozing(Dozing { vm, deadline }));
            }
            (Aim::Doze(_) | Aim::Sleep(_), _) => {
                self.commit(step, counting.vm, by, Then::Absent, counting.requests);
            }
        }
    }

    /// By what means an idle VM is put to sleep: as set, but a VM whose suspend failed and in which nothing runs
    /// is stopped.
    pub(crate) fn sleep_how(&self, vm: &Vm) -> SleepHow {
        match self.config.idle_action {
            SleepHow::Suspend if vm.failed_suspends > 0 && !vm.census.is_working() => SleepHow::Stop,
            how @ (SleepHow::Stop | SleepHow::Suspend) => how,
        }
    }

    pub(crate) fn containers_changed(&mut self, step: &mut Step<'_>, generation: Generation, census: Census) {
        let now = step.now;
        let inactive = if flaw!(self, H26) { census.inactive } else { 0 };
        let deaf = flaw!(self, H60) && generation > Generation(1);
        let careless = flaw!(self, H21) && !census.is_working();
        let Some(vm) = self.current_vm(generation).filter(|_| !deaf) else { return };
        vm.set_census(now, Census { active: census.active + inactive, ..census });
        if careless {
            vm.leases.clear();
        }
        step.publish();
        self.review(step);
    }

    pub(crate) fn vm_paused(&mut self, step: &mut Step<'_>, generation: Generation, reason: Text) {
        let Some(vm) = self.current_vm(generation) else { return };
        if vm.disk == Disk::Writable {
            vm.disk = Disk::Failing(reason);
            step.publish();
            self.resettle(step, &SleepOutcome::Busy);
        }
    }

    pub(crate) fn vm_resumed(&mut self, step: &mut Step<'_>, generation: Generation) {
        let Some(vm) = self.current_vm(generation) else { return };
        if vm.disk != Disk::Writable {
            vm.disk = Disk::Writable;
            step.publish();
            self.resettle(step, &SleepOutcome::Busy);
        }
    }

    pub(crate) fn resume_or_give_up(&mut self, step: &mut Step<'_>, vm: Vm, give_up_at: crate::Timestamp) {
        if give_up_at <= step.now {
            let details = match &vm.disk {
                Disk::Failing(reason) => reason.clone(),
                Disk::Writable => "the VM stayed paused".into(),
            };
            self.crash_alive(step, vm, Claims::new(), Cause::IoError, details);
            return;
        }
        step.act(Action::ResumeVm { generation: vm.generation });
        let retry_at = step.now.after(self.config.limits.io_retry);
        self.phase = Phase::Running(Running { vm, rest: Rest::Paused { retry_at, give_up_at } });
    }

    /// The engine is lost. A VM that is being put to sleep is only told of it if it comes back.
    pub(crate) fn engine_died(&mut self, step: &mut Step<'_>, generation: Generation, reason: Text) {
        let Some(vm) = self.current_vm(generation) else { return };
        vm.engine = Engine::Dead(reason);
        self.resettle(step, &SleepOutcome::Terminated);
    }

    /// The VM of this generation, as long as it is whole.
    fn current_vm(&mut self, generation: Generation) -> Option<&mut Vm> {
        self.phase.vm_mut().filter(|vm| vm.generation == generation)
    }

    /// Somebody wants the sleep now: the same path, with all its guards, but for the grace period.
    pub(crate) fn sleep_requested(&mut self, step: &mut Step<'_>, request: RequestId, how: Option<SleepHow>) {
        let is_held = match &self.phase {
            Phase::Running(Running { vm, .. }) => self.is_held_against(vm, how) && !flaw!(self, H65),
            _ => false,
        };
        let outcome = match &mut self.phase {
            Phase::Absent | Phase::Terminated(_) => SleepOutcome::NoVm,
            Phase::Starting(_) => SleepOutcome::Busy,
            Phase::Running(_) if !self.config.storage.may_sleep() && !flaw!(self, H31) => {
                SleepOutcome::Disabled
            }
            Phase::Running(Running { rest: Rest::Busy | Rest::Looked { .. }, .. }) if is_held => {
                SleepOutcome::Busy
            }
            Phase::Running(Running { rest: Rest::Paused { .. }, .. }) => {
                SleepOutcome::Failed("the VM is paused by an I/O error".into())
            }
            Phase::Running(Running {
                rest: Rest::Idle { .. } | Rest::Looked { .. } | Rest::Busy, ..
            }) => {
                if let Phase::Running(running) = self.phase.take() {
                    self.begin_counting(step, running.vm, Vec::from([request]), Aim::Sleep(how));
                }
                return;
            }
            Phase::Dozing(_) => {
                if let Phase::Dozing(dozing) = self.phase.take() {
                    self.begin_counting(step, dozing.vm, Vec::from([request]), Aim::Sleep(how));
                }
                return;
            }
            // Who asks is told of a sleep, and not of a doze.
            Phase::Counting(Counting { requests, aim: aim @ Aim::Doze(_), .. }) => {
                *aim = Aim::Sleep(how);
                requests.push(request);
                return;
            }
            Phase::Counting(Counting { requests, .. })
            | Phase::Committed(Committed { requests, .. })
            | Phase::Stopping(Stopping { requests, .. }) => {
                if requests.len() < Limits::REQUESTS {
                    requests.push(request);
                    return;
                }
                SleepOutcome::TooMany
            }
        };
        answer(step, [request], &outcome);
    }
}
