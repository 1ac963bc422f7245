//! The session: its state, and the one door through which everything comes in.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::action::{Action, Actions, Refusal};
use crate::config::{Config, Grace, Limits};
use crate::durable::Crash;
use crate::event::Event;
use crate::flaw::flaw;
use crate::hold::{Pin, Text, WeakHold};
use crate::id::{Generation, Incarnation, PinId, WeakId};
use crate::phase::{Aim, Cause, Phase, Rest, Running, Termination};
use crate::time::Timestamp;
use crate::view::{Latest, PhaseName};

/// The life of one session; see the crate's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Session {
    pub(crate) config: Config,
    pub(crate) mode: Mode,
    pub(crate) phase: Phase,
    /// The phase that was last entered, and when: `phase` itself is taken out while a step is made.
    pub(crate) entered: (PhaseName, Timestamp),
    pub(crate) incarnation: Incarnation,
    pub(crate) generation: Generation,
    pub(crate) boots: u64,
    pub(crate) start_count: u64,
    pub(crate) snapshot: Option<Generation>,
    pub(crate) remains: Option<Generation>,
    pub(crate) pins: BTreeMap<PinId, Pin>,
    pub(crate) weak: BTreeMap<WeakId, WeakHold>,
    pub(crate) failure: Option<StartFailure>,
    pub(crate) crashes: Vec<Crash>,
    pub(crate) latest: Latest,
    #[cfg(feature = "model")]
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(crate) flaw: Option<crate::flaw::Flaw>,
}

/// Whether the host process has a future.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Mode {
    Serving,
    /// The host process was told to go: no VM is started or kept up from now on.
    Leaving,
}

/// Starts that failed in a row.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct StartFailure {
    pub(crate) count: u32,
    pub(crate) reason: Text,
    pub(crate) retry_at: Timestamp,
}

/// One call of [`Session::handle`]: the time, and what comes of it.
pub(crate) struct Step<'a> {
    pub(crate) now: Timestamp,
    actions: &'a mut Actions,
    /// Whether something changed that must survive the host process.
    persist: bool,
    /// Whether something changed that can be seen.
    publish: bool,
}

impl Step<'_> {
    /// Wants something done.
    pub(crate) fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    /// Has what survives the host process written before any action of this step.
    pub(crate) fn persist(&mut self) {
        self.persist = true;
        self.publish = true;
    }

    /// Has watchers look again, once, after this step.
    pub(crate) fn publish(&mut self) {
        self.publish = true;
    }
}

impl Session {
    /// Advances the session by one event. Total: every event is legal in every phase. What is to be done is
    /// appended to `actions`, in order.
    pub fn handle(&mut self, now: Timestamp, event: Event, actions: &mut Actions) {
        let first = actions.as_slice().len();
        let dozed = self.phase.dozes();
        let mut step = Step { now, actions, persist: false, publish: false };
        self.dispatch(&mut step, event);
        let Step { persist, publish, .. } = step;
        // Whatever else is to be done with a VM that stood still, it has to run for it.
        if let Some(generation) = dozed
            && self.phase.dozes().is_none()
            && self.phase.generation() == dozed
            && !flaw!(self, D1)
        {
            actions.insert(first, Action::Rouse { generation });
        }
        if persist {
            actions.insert(first, Action::Persist(Box::new(self.durable())));
        }
        if publish {
            actions.push(Action::Publish);
        }
    }

    fn dispatch(&mut self, step: &mut Step<'_>, event: Event) {
        match event {
            Event::LeaseRequested { lease, claim } => self.lease_requested(step, lease, claim),
            Event::LeaseDropped { lease } => self.lease_dropped(step, lease),
            Event::WeakAdded { weak, kind, owner, reason } => {
                if self.weak.len() < Limits::WEAK {
                    self.weak.insert(weak, WeakHold { kind, owner, reason, since: step.now });
                    step.publish();
                }
            }
            Event::WeakRemoved { weak } => {
                if self.weak.remove(&weak).is_some() {
                    step.publish();
                }
            }
            Event::PinSet { pin, owner, reason, until } => {
                self.pin(step, Pin { id: pin, owner, reason, since: step.now, until });
            }
            Event::PinRemoved { pin } => self.unpin(step, pin),
            Event::GraceChanged(grace) => self.configure(step, Config { grace, ..self.config }),
            Event::Configured(config) => self.configure(step, *config),
            Event::VmProgress { generation, step: reached } => self.vm_progress(step, generation, reached),
            Event::VmReady { generation, how, census } => self.vm_ready(step, generation, how, census),
            Event::VmAdopted { generation, census, holds } => {
                self.vm_adopted(step, generation, census, holds)
            }
            Event::StartFailed { generation, reason, snapshot } => {
                self.start_failed(step, generation, reason, snapshot);
            }
            Event::VmExited { generation, exit } => self.vm_exited(step, generation, &exit),
            Event::VmPaused { generation, reason } => self.vm_paused(step, generation, reason),
            Event::VmResumed { generation } => self.vm_resumed(step, generation),
            Event::EngineDied { generation, reason } => self.engine_died(step, generation, reason),
            Event::ContainersChanged { generation, census } => {
                self.containers_changed(step, generation, census)
            }
            Event::ContainersCounted { ask, census } => self.containers_counted(step, ask, census),
            Event::HooksDone { ask } => self.hooks_done(step, ask),
            Event::SleepDone { ask } => self.sleep_done(step, ask),
            Event::SuspendFailed { ask, vm, reason } => self.suspend_failed(step, ask, vm, reason),
            Event::DeadlineReached => self.deadline_reached(step),
            Event::Terminate { reason } => self.terminate(step, Cause::Asked, reason),
            Event::StartRequested => self.start_requested(step),
            Event::SleepRequested { request, how } => self.sleep_requested(step, request, how),
            Event::CreatorGone => self.creator_gone(step),
            Event::HostLeaving => self.host_leaving(step),
        }
    }

    /// When [`Session::handle`] must next be called with [`Event::DeadlineReached`], if nothing else happens
    /// before. A deadline that has passed is due at once.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let pins = self.pins.values().filter_map(|pin| pin.until);
        self.phase.deadline().into_iter().chain(pins).min()
    }

    /// Why the incarnation is over; `None` while it isn't (asking earlier is the caller's error).
    pub fn termination(&self) -> Option<&Termination> {
        match &self.phase {
            Phase::Terminated(termination) => Some(termination),
            Phase::Absent
            | Phase::Starting(_)
            | Phase::Running(_)
            | Phase::Counting(_)
            | Phase::Dozing(_)
            | Phase::Committed(_)
            | Phase::Stopping(_) => None,
        }
    }

    pub(crate) fn enter(&mut self, step: &mut Step<'_>, phase: Phase) {
        if self.entered.0 != phase.name() {
            self.entered = (phase.name(), step.now);
        }
        self.phase = phase;
        step.publish();
    }

    /// Does what is due: first pins that end, as they decide what the phase does next.
    fn deadline_reached(&mut self, step: &mut Step<'_>) {
        let before = self.pins.len();
        self.pins.retain(|_, pin| pin.until.is_none_or(|until| until > step.now));
        if self.pins.len() != before {
            step.persist();
            self.review(step);
        }
        if self.phase.deadline().is_none_or(|deadline| deadline > step.now) {
            return;
        }
        match self.phase.take() {
            phase @ (Phase::Absent | Phase::Terminated(_)) => self.phase = phase,
            Phase::Starting(starting) => self.start_timed_out(step, starting),
            Phase::Running(Running { vm, rest }) => match rest {
                Rest::Busy | Rest::Looked { .. } => self.phase = Phase::Running(Running { vm, rest }),
                Rest::Idle { .. } => {
                    self.begin_counting(step, vm, Vec::new(), self.aim());
                }
                Rest::Paused { give_up_at, .. } => self.resume_or_give_up(step, vm, give_up_at),
            },
            Phase::Counting(counting) => self.count_unanswered(step, counting),
            Phase::Dozing(dozing) => self.begin_counting(step, dozing.vm, Vec::new(), Aim::Sleep(None)),
            Phase::Committed(committed) if flaw!(self, H13) => self.settle(step, committed.vm),
            Phase::Committed(committed) => self.begin_sleep(step, committed),
            Phase::Stopping(stopping) => self.stopping_timed_out(step, stopping),
        }
    }

    fn pin(&mut self, step: &mut Step<'_>, pin: Pin) {
        if self.pins.len() >= Limits::PINS && !self.pins.contains_key(&pin.id) {
            return;
        }
        self.pins.insert(pin.id, pin);
        step.persist();
        self.review(step);
    }

    fn unpin(&mut self, step: &mut Step<'_>, pin: PinId) {
        if self.pins.remove(&pin).is_some() {
            step.persist();
            self.review(step);
        }
    }

    fn configure(&mut self, step: &mut Step<'_>, config: Config) {
        self.config = config;
        step.publish();
        if self.phase.dozes().is_some() {
            // With these settings it might not have come to it.
            self.resettle(step, &crate::SleepOutcome::Busy);
        } else {
            self.review(step);
        }
        if let Phase::Running(Running { vm, rest: Rest::Looked { since, .. } | Rest::Idle { since, .. } }) =
            &self.phase
        {
            let renewed = self.idle_deadline(*since, vm.not_before);
            if let Phase::Running(Running {
                rest: Rest::Looked { deadline, .. } | Rest::Idle { deadline, .. },
                ..
            }) = &mut self.phase
            {
                *deadline = renewed;
            }
        }
    }

    /// When a VM that has been idle since `since` is put to sleep; `None` if never by itself.
    pub(crate) fn idle_deadline(&self, since: Timestamp, not_before: Timestamp) -> Option<Timestamp> {
        let may_sleep = self.config.storage.may_sleep() || flaw!(self, H31);
        match self.config.grace {
            Grace::After(_) if flaw!(self, H3) => Some(Timestamp::default()),
            Grace::After(grace) if may_sleep => Some(since.after(grace).max(not_before)),
            Grace::After(_) | Grace::Never => None,
        }
    }

    /// Why no VM may be started now, if so.
    pub(crate) fn start_gate(&mut self, now: Timestamp) -> Option<Refusal> {
        if self.mode == Mode::Leaving {
            return Some(Refusal::HostLeaving);
        }
        if let Some(generation) = self.remains {
            return Some(Refusal::VmStuck { generation });
        }
        if let Some(failure) = self.failure.as_ref().filter(|failure| failure.retry_at > now) {
            return Some(Refusal::StartFailed { reason: failure.reason.clone(), retry_at: failure.retry_at });
        }
        self.crashes.retain(|crash| crash.until > now);
        match self.crashes.as_slice() {
            [first, .., last] if self.crashes.len() >= Limits::CRASHES => {
                Some(Refusal::CrashBackoff { details: last.details.clone(), until: first.until })
            }
            [] | [_] | [_, .., _] => None,
        }
    }
}
