//! The rules, told apart from the core: what is known from the events that went in and the actions that came out,
//! and what may be done then. Nothing here reads the core's phase to decide what is right; it is compared at the end.

use dormouse_lifecycle::{
    Action, Ask, Census, Config, Durable, EndReason, Event, Exit, Generation, Grace, HoldKind, Incarnation,
    LastVm, Lifetime, Policy, Record, Refusal, RunningContainers, SleepHow, SleepOutcome, SnapshotFate,
    StartFrom, State as ApiState, StopHow, Storage, Termination, Then,
};
use dormouse_lifecycle::{AfterFailure, PhaseName};

use crate::scope::Scope;
use crate::world::{Client, Move, NOTHING, Order, PRESENT, Request, State, lease};

/// How far the present VM has got, as far as orders and reports say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) enum Stage {
    /// None was ordered, or it is over.
    #[default]
    NoVm,
    /// Ordered.
    Starting,
    /// Ordered by an earlier host process, which died.
    Adopting,
    /// Ready.
    Up,
    /// Its sleep is settled.
    Committed(SleepHow),
    /// Its sleep was ordered.
    Sleeping(SleepHow),
    /// It is to be ended by force.
    Ending,
    /// Its bring-up was cancelled.
    Cancelling,
}

/// What hooks know of the present VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) enum Hooks {
    /// Nothing.
    #[default]
    Silent,
    /// That it is up.
    Started,
    /// That it stops.
    Stopping,
    /// A host died while it told them: anything may be next.
    Unsure,
}

/// What was seen so far.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
#[allow(clippy::struct_excessive_bools, reason = "facts that are independent of each other")]
pub(crate) struct Seen {
    pub(crate) stage: Stage,
    pub(crate) hooks: Hooks,
    /// The last count of containers that was told.
    pub(crate) census: Census,
    pub(crate) paused: bool,
    /// The VM was told to stand still, and not yet to run on.
    pub(crate) dozes: bool,
    /// The grace period is over, and nobody but those who look has held the VM since.
    pub(crate) graced: bool,
    pub(crate) pinned: bool,
    /// The grace period is `never`.
    pub(crate) never: bool,
    pub(crate) leaving: bool,
    /// Somebody asked for the end of this incarnation.
    pub(crate) terminating: bool,
    /// The end of this incarnation was announced.
    pub(crate) ended: bool,
    /// A crash of the present VM was recorded.
    pub(crate) crashed: bool,
    /// There may be a snapshot that nobody has used.
    pub(crate) snapshot: bool,
    /// The exit of the present VM was told.
    pub(crate) exit_told: bool,
    /// The present VM was ordered by this host process.
    pub(crate) made: bool,
}

impl Seen {
    pub(crate) fn may_sleep(&self, config: &Config) -> bool {
        config.storage == Storage::Persistent
    }
}

type Checked = Result<(), String>;

fn ensure(holds: bool, rule: &str) -> Checked {
    if holds { Ok(()) } else { Err(rule.to_owned()) }
}

/// One step as it is watched.
struct Glance<'a> {
    scope: &'a Scope,
    made: &'a Move,
    event: &'a Event,
    /// The order that stood before this step.
    order: Order,
    actions: &'a [Action],
}

impl Glance<'_> {
    fn is_due(&self) -> bool {
        matches!(self.made, Move::Due { .. })
    }
}

impl State {
    /// Watches one step: `self` is the state before it, but for the session.
    pub(crate) fn watch(
        &mut self,
        scope: &Scope,
        made: &Move,
        event: &Event,
        [before, after]: [&Durable; 2],
        actions: &[Action],
    ) -> Checked {
        let stage = self.seen.stage;
        let glance = Glance { scope, made, event, order: self.order, actions };
        written_first(before, after, actions)?;
        self.hear(&glance, before);
        for action in actions {
            self.see(&glance, before, action)?;
        }
        self.mind_the_grace(&glance);
        self.compare(scope, stage)?;
        self.judge_exit(stage, event, before)?;
        self.judge_rest(scope, after)?;
        self.judge_end(before, actions)
    }

    /// A step of which only what had to survive was written.
    pub(crate) fn watch_cut_short(
        &mut self,
        scope: &Scope,
        made: &Move,
        event: &Event,
        before: &Durable,
        actions: &[Action],
    ) {
        self.hear(&Glance { scope, made, event, order: self.order, actions }, before);
        let told = |action: &Action| {
            matches!(
                action,
                Action::AnnounceStarted { .. }
                    | Action::RunStoppingHooks { .. }
                    | Action::RunSleepFailedHooks { .. }
            )
        };
        if actions.iter().any(told) {
            self.seen.hooks = Hooks::AFTER_A_CUT;
        }
        if actions.iter().any(|action| matches!(action, Action::StartVm { .. })) {
            self.seen.hooks = Hooks::Silent;
            self.alive = false;
        }
    }

    /// Takes in what an event says.
    fn hear(&mut self, glance: &Glance<'_>, before: &Durable) {
        let current = Ask { generation: PRESENT, sequence: dormouse_lifecycle::model::BASE };
        let whole = matches!(self.seen.stage, Stage::Up | Stage::Committed(_) | Stage::Sleeping(_));
        // What can't be kept over a sleep ends with the host.
        let is_ephemeral = glance.scope.config.storage == Storage::Ephemeral;
        match (glance.made, glance.event) {
            (Move::Ask { client, claim }, _) => self.clients[*client] = Client::Waiting(*claim),
            (Move::Drop { client }, _) => self.clients[*client] = Client::Idle,
            (_, Event::WeakAdded { .. }) => self.weak = true,
            (_, Event::WeakRemoved { .. }) => self.weak = false,
            (_, Event::PinSet { .. }) => self.seen.pinned = true,
            (_, Event::PinRemoved { .. }) => self.seen.pinned = false,
            (_, Event::GraceChanged(grace)) => self.seen.never = *grace == Grace::Never,
            (_, Event::Configured(config)) => self.seen.never = config.grace == Grace::Never,
            (_, Event::SleepRequested { how: Some(SleepHow::Suspend), .. }) => {
                self.request = Request::Suspend
            }
            (_, Event::SleepRequested { .. }) => self.request = Request::Sleep,
            (_, Event::HostLeaving) => {
                self.seen.leaving = true;
                self.seen.terminating |= self.seen.stage == Stage::Up && is_ephemeral;
            }
            (_, Event::Terminate { .. }) => self.seen.terminating = true,
            (_, Event::CreatorGone) => {
                self.seen.terminating |= glance.scope.config.lifetime == Lifetime::Temporary;
            }
            (_, Event::VmReady { generation: PRESENT, census, .. }) if self.seen.stage == Stage::Starting => {
                self.seen.census = *census;
                self.seen.snapshot = false;
            }
            (_, Event::VmAdopted { generation: PRESENT, census, .. })
                if self.seen.stage == Stage::Adopting =>
            {
                self.seen.census = *census;
                self.seen.stage = Stage::Up;
                self.seen.terminating |= self.seen.leaving && is_ephemeral;
            }
            (_, Event::ContainersChanged { generation: PRESENT, census }) if whole => {
                self.seen.census = *census
            }
            (_, Event::ContainersCounted { ask, census: Some(census) })
                if *ask == current && self.seen.stage == Stage::Up && self.order == Order::Count =>
            {
                // The order to count is over with the first answer, or with whatever called it off.
                self.seen.census = if self.counting { *census } else { self.seen.census };
            }
            (_, Event::VmPaused { generation: PRESENT, .. }) if whole => self.seen.paused = true,
            (_, Event::VmResumed { generation: PRESENT }) if whole => self.seen.paused = false,
            (_, Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, .. }) if *ask == current => {
                if let Order::Sleep { failed, .. } = &mut self.order {
                    *failed = true;
                }
            }
            (_, Event::SleepDone { ask }) if *ask == current => {
                self.seen.snapshot |= matches!(self.order, Order::Sleep { how: SleepHow::Suspend, .. });
            }
            (_, Event::StartFailed { generation: PRESENT, snapshot: SnapshotFate::Void, .. }) => {
                self.seen.snapshot &= !self.is_coming();
            }
            (_, Event::VmExited { generation: PRESENT, .. }) => {
                self.seen.exit_told = true;
                self.seen.snapshot &= !self.is_coming() && before.vm != LastVm::Starting;
            }
            _ => {}
        }
    }

    /// Whether a VM is being brought up, wanted or not.
    fn is_coming(&self) -> bool {
        matches!(self.seen.stage, Stage::Starting | Stage::Cancelling)
    }

    /// Whether anything holds against the sleep that comes by itself, or against the one that is asked for.
    fn is_held(&self, scope: &Scope, request: Request) -> bool {
        self.is_used(scope, request) || self.clients.iter().any(|client| is_looking(scope, client))
    }

    /// The same, without those who only look.
    fn is_used(&self, scope: &Scope, request: Request) -> bool {
        let config = &scope.config;
        let containers = match (config.idle_action, config.running) {
            (SleepHow::Suspend, RunningContainers::Suspend) => false,
            (SleepHow::Stop | SleepHow::Suspend, RunningContainers::Hold | RunningContainers::Suspend) => {
                self.seen.census.active > 0
            }
        };
        let strong = |client: &Client| match client {
            Client::Holding(claim) => match scope.claims[*claim].0 {
                HoldKind::Activity => request != Request::Suspend,
                HoldKind::Read => false,
                kind => !kind.is_weak(),
            },
            Client::Idle | Client::Waiting(_) | Client::Ended => false,
        };
        self.clients.iter().any(strong) || self.seen.pinned || containers
    }

    /// Keeps in mind whether the grace period has come to its end while nobody but lookers held the VM.
    fn mind_the_grace(&mut self, glance: &Glance<'_>) {
        let begins_anew = match (glance.made, glance.event) {
            (Move::Ask { claim, .. }, _) => match glance.scope.claims[*claim].0 {
                HoldKind::Read => false,
                kind => !kind.is_weak() || glance.actions.contains(&Action::Rouse { generation: PRESENT }),
            },
            (_, Event::GraceChanged(_) | Event::Configured(_)) => !self.counting,
            _ => false,
        };
        let is_used = self.is_used(glance.scope, self.request);
        let rests = self.seen.stage == Stage::Up && !self.seen.paused && !is_used;
        self.seen.graced = rests && !begins_anew && (self.seen.graced || glance.is_due());
    }

    fn holding(&self) -> usize {
        self.clients.iter().filter(|client| matches!(client, Client::Holding(_))).count()
    }

    fn waiting(&self) -> usize {
        self.clients.iter().filter(|client| matches!(client, Client::Waiting(_))).count()
    }

    fn present(&self) -> Generation {
        self.session.view().generation
    }

    /// Looks at one action.
    fn see(&mut self, glance: &Glance<'_>, before: &Durable, action: &Action) -> Checked {
        match action {
            Action::Persist(_) | Action::Publish => Ok(()),
            Action::StartVm { generation, from, .. } => self.see_start(before, *generation, *from),
            Action::CancelStart { .. } => {
                ensure(self.seen.stage == Stage::Starting, "a bring-up is cancelled that isn't one")?;
                self.seen.stage = Stage::Cancelling;
                self.doomed = true;
                Ok(())
            }
            Action::AnnounceStarted { generation, .. } => {
                let ready = matches!(glance.event, Event::VmReady { generation: PRESENT, .. });
                let expected = ready && *generation == PRESENT && self.seen.stage == Stage::Starting;
                ensure(
                    expected && self.seen.hooks == Hooks::Silent,
                    "rule 5: a start is announced that wasn't one",
                )?;
                self.seen.hooks = Hooks::Started;
                self.seen.stage = Stage::Up;
                Ok(())
            }
            Action::RunStoppingHooks { ask, how, .. } => self.see_stopping_hooks(glance, *ask, *how),
            Action::RunSleepFailedHooks { .. } => self.see_failed_sleep(glance),
            Action::BeginSleep { how, .. } => self.see_sleep(glance, *how),
            Action::KillVm { .. } => self.see_kill(glance),
            Action::CountContainers { .. } => self.see_count(glance),
            Action::Doze { .. } => self.see_doze(glance),
            Action::Rouse { .. } => {
                ensure(self.seen.dozes, "a VM is roused that doesn't doze")?;
                self.seen.dozes = false;
                Ok(())
            }
            Action::ResumeVm { .. } => {
                ensure(self.seen.stage == Stage::Up && self.seen.paused, "a VM is resumed that isn't paused")
            }
            Action::Grant { lease, generation } => self.see_grant(glance.scope, *lease, *generation),
            Action::Refuse { lease, refusal } => self.see_refusal(*lease, refusal),
            Action::EndLeases { generation, reason } => {
                ensure(*generation == PRESENT, "leases of another VM are ended")?;
                let asked = matches!(reason, EndReason::Sleeping);
                ensure(
                    !asked || self.seen.stage != Stage::Up,
                    "rule 3: leases are ended for a sleep that isn't settled",
                )?;
                for client in &mut self.clients {
                    if matches!(client, Client::Holding(_)) {
                        *client = Client::Ended;
                    }
                }
                Ok(())
            }
            Action::AnswerSleep { outcome, .. } => {
                ensure(self.request != Request::None, "a request to sleep is answered twice")?;
                self.request = Request::None;
                let asleep = matches!(outcome, SleepOutcome::Asleep { .. });
                ensure(!asleep || !self.alive, "somebody is told of a sleep while the VM is alive")
            }
            Action::Record(record) => self.see_record(glance, record),
            Action::AnnounceTerminated { incarnation } => self.see_end(glance, *incarnation),
        }
    }

    fn see_failed_sleep(&mut self, glance: &Glance<'_>) -> Checked {
        let failed = self.seen.stage == Stage::Sleeping(SleepHow::Suspend)
            && matches!(glance.event, Event::SuspendFailed { vm: AfterFailure::RunsOn, .. });
        ensure(failed, "rule 4: a sleep is called off that didn't fail in time")?;
        ensure(
            matches!(self.seen.hooks, Hooks::Stopping | Hooks::Unsure),
            "rule 5: hooks learn of the failure of a sleep that they weren't told of",
        )?;
        ensure(!self.seen.terminating && !self.seen.leaving, "rule 9: a VM runs on that was to end")?;
        self.seen.hooks = Hooks::Started;
        self.seen.stage = Stage::Up;
        self.order = Order::None;
        self.doomed = false;
        Ok(())
    }

    fn see_end(&mut self, glance: &Glance<'_>, incarnation: Incarnation) -> Checked {
        let written = glance.actions.iter().any(|action| {
            matches!(action, Action::Record(Record::Terminated { incarnation: ended, .. }) if *ended == incarnation)
        });
        ensure(written, "rule 10: the end is announced before its reason can be read")?;
        ensure(!self.seen.ended, "rule 10: the end is announced twice")?;
        ensure(!self.seen.terminating || self.waiting() == 0, "rule 9: somebody waits past the end")?;
        self.seen.ended = true;
        Ok(())
    }

    fn see_start(&mut self, before: &Durable, generation: Generation, from: StartFrom) -> Checked {
        ensure(!self.alive, "rule 2: a VM is made beside another")?;
        ensure(
            generation > before.generation && generation == self.present(),
            "rule 2: a generation is used twice",
        )?;
        ensure(
            self.session.durable().vm == LastVm::Starting,
            "rule 13: a start isn't written down before it is ordered",
        )?;
        ensure(self.seen.hooks != Hooks::Started, "rule 5: hooks weren't told that the VM before stopped")?;
        ensure(
            !self.seen.terminating && !self.seen.leaving,
            "rule 9: a VM is made after the end was asked for",
        )?;
        let snapshot = matches!(from, StartFrom::Snapshot(_));
        ensure(!snapshot || self.seen.snapshot, "a VM is made from a snapshot that was used or is void")?;
        self.alive = true;
        self.doomed = false;
        self.order = Order::None;
        self.seen = Seen {
            stage: Stage::Starting,
            hooks: Hooks::Silent,
            census: NOTHING,
            paused: false,
            dozes: false,
            crashed: false,
            exit_told: false,
            made: true,
            ..self.seen.clone()
        };
        Ok(())
    }

    fn see_stopping_hooks(&mut self, glance: &Glance<'_>, ask: Ask, how: StopHow) -> Checked {
        ensure(ask.generation == PRESENT, "rule 5: hooks learn of the stop of another VM")?;
        // Of one that is gone there is nothing left to run.
        if !self.seen.exit_told {
            self.runs()?;
        }
        ensure(
            matches!(self.seen.hooks, Hooks::Started | Hooks::Unsure),
            "rule 5: hooks learn of a stop of which they were told, or of a VM of which they weren't",
        )?;
        ensure(
            matches!(self.seen.stage, Stage::Up | Stage::Adopting),
            "rule 5: hooks learn of the stop of a VM that isn't up",
        )?;
        self.seen.hooks = Hooks::Stopping;
        self.order = Order::Hooks;
        let slept_alone = matches!(glance.event, Event::VmExited { exit: Exit::GuestShutdown, .. });
        match how {
            StopHow::Crash => self.seen.stage = Stage::Ending,
            StopHow::Sleep(_) if slept_alone => {
                ensure(
                    self.seen.stage == Stage::Adopting,
                    "rule 6: an exit that nobody asked for is no crash",
                )?;
                self.seen.stage = Stage::Ending;
            }
            StopHow::Sleep(by) => {
                let forced = self.seen.terminating || self.seen.leaving;
                let counted = matches!(glance.event, Event::ContainersCounted { census: Some(_), .. });
                ensure(
                    forced || !self.is_held(glance.scope, self.request),
                    "rule 3: a sleep begins while something holds",
                )?;
                ensure(forced || counted, "rule 3: a sleep begins though the engine wasn't asked")?;
                let loses = by == SleepHow::Stop && self.seen.census.active > 0;
                ensure(forced || !loses, "rule 3: a running container is stopped")?;
                ensure(
                    self.seen.terminating || self.seen.may_sleep(&glance.scope.config),
                    "rule 11: an ephemeral session is put to sleep",
                )?;
                self.seen.stage = Stage::Committed(by);
            }
        }
        Ok(())
    }

    /// Whether hooks had their answer or their time.
    fn hooks_are_over(&self, glance: &Glance<'_>) -> bool {
        let current = Ask { generation: PRESENT, sequence: dormouse_lifecycle::model::BASE };
        match glance.event {
            Event::HooksDone { ask } => *ask == current && glance.order == Order::Hooks,
            // A host that found the sleep settled has nobody to wait for.
            Event::DeadlineReached => glance.is_due() || glance.order == Order::None,
            _ => false,
        }
    }

    fn see_sleep(&mut self, glance: &Glance<'_>, how: SleepHow) -> Checked {
        ensure(!self.seen.exit_told, "a VM that is known to be dead is put to sleep")?;
        self.runs()?;
        match self.seen.stage {
            Stage::Committed(by) => {
                ensure(
                    self.hooks_are_over(glance),
                    "rule 5: the sleep begins while the hooks are being told",
                )?;
                ensure(
                    how == by || how == SleepHow::Stop,
                    "the sleep isn't the one that the hooks were told of",
                )?;
            }
            Stage::Sleeping(SleepHow::Suspend) => {
                let failed = matches!(glance.event, Event::SuspendFailed { vm: AfterFailure::RunsOn, .. });
                let forced = self.seen.terminating || self.seen.leaving;
                ensure(failed && forced && how == SleepHow::Stop, "rule 4: a sleep is ordered twice")?;
            }
            Stage::NoVm
            | Stage::Starting
            | Stage::Adopting
            | Stage::Up
            | Stage::Sleeping(SleepHow::Stop)
            | Stage::Ending
            | Stage::Cancelling => return Err("rule 4: a sleep is ordered that wasn't settled".to_owned()),
        }
        self.seen.stage = Stage::Sleeping(how);
        self.order = Order::Sleep { how, failed: false };
        self.doomed = true;
        Ok(())
    }

    fn see_kill(&mut self, glance: &Glance<'_>) -> Checked {
        match self.seen.stage {
            Stage::Ending | Stage::Cancelling => {
                ensure(!self.seen.exit_told, "a VM that is known to be dead is killed")?;
            }
            Stage::Sleeping(SleepHow::Stop) => {
                ensure(!self.seen.exit_told, "a VM that is known to be dead is killed")?;
            }
            Stage::Sleeping(SleepHow::Suspend) => {}
            Stage::Committed(by) => {
                ensure(
                    self.hooks_are_over(glance),
                    "rule 5: the VM is killed while the hooks are being told",
                )?;
                ensure(!self.seen.exit_told, "a VM that is known to be dead is killed")?;
                self.seen.stage = Stage::Sleeping(by);
                self.order = Order::None;
            }
            Stage::NoVm | Stage::Starting | Stage::Adopting | Stage::Up => {
                return Err("a VM is killed of whose end nobody was told".to_owned());
            }
        }
        self.doomed = true;
        Ok(())
    }

    fn see_count(&mut self, glance: &Glance<'_>) -> Checked {
        let asked = matches!(glance.event, Event::SleepRequested { .. });
        self.runs()?;
        ensure(
            self.seen.stage == Stage::Up && !self.seen.exit_told,
            "the engine of a VM is asked that isn't up",
        )?;
        let looked_away = self.seen.graced && matches!(glance.made, Move::Drop { .. });
        ensure(
            glance.is_due() || asked || looked_away,
            "rule 3: the engine is asked before the grace period is over",
        )?;
        ensure(
            !self.is_used(glance.scope, self.request),
            "rule 3: the engine is asked while something holds",
        )?;
        ensure(self.seen.may_sleep(&glance.scope.config), "rule 11: an ephemeral session is about to sleep")?;
        self.order = Order::Count;
        Ok(())
    }

    fn see_doze(&mut self, glance: &Glance<'_>) -> Checked {
        let counted = matches!(glance.event, Event::ContainersCounted { census: Some(_), .. });
        ensure(self.seen.stage == Stage::Up && counted, "rule 3: a VM dozes though the engine wasn't asked")?;
        ensure(!self.is_held(glance.scope, Request::None), "rule 3: a VM dozes though something holds")?;
        ensure(self.request == Request::None, "a VM dozes that somebody wants asleep")?;
        ensure(glance.scope.config.doze.is_some(), "a VM dozes that isn't to")?;
        self.seen.dozes = true;
        Ok(())
    }

    /// Nothing can be done with a VM that stands still.
    fn runs(&self) -> Checked {
        ensure(!self.seen.dozes, "something is done with a VM that dozes")
    }

    fn see_grant(
        &mut self,
        scope: &Scope,
        granted: dormouse_lifecycle::LeaseId,
        generation: Generation,
    ) -> Checked {
        let client = (0..self.clients.len()).find(|client| lease(*client) == granted);
        let Some((client, Client::Waiting(claim))) = client.map(|client| (client, self.clients[client]))
        else {
            return Err("rule 1: a lease is granted that nobody waits for".to_owned());
        };
        ensure(generation == self.present(), "rule 1: a lease is granted on another VM")?;
        ensure(
            !self.seen.terminating && !self.seen.leaving,
            "rule 9: a lease is granted after the end was asked for",
        )?;
        ensure(!self.seen.paused, "a lease is granted on a VM that is paused")?;
        self.runs()?;
        let existing = scope.claims[claim].1 == Policy::ExistingOnly;
        match self.seen.stage {
            Stage::Up => {}
            Stage::Committed(_) if existing => {}
            Stage::Committed(_) => return Err("rule 1: Acquire is granted on a committed VM".to_owned()),
            Stage::NoVm
            | Stage::Starting
            | Stage::Adopting
            | Stage::Sleeping(_)
            | Stage::Ending
            | Stage::Cancelling => return Err("rule 1: a lease is granted on a VM that isn't up".to_owned()),
        }
        self.clients[client] = Client::Holding(claim);
        Ok(())
    }

    fn see_refusal(&mut self, refused: dormouse_lifecycle::LeaseId, refusal: &Refusal) -> Checked {
        let client = (0..self.clients.len()).find(|client| lease(*client) == refused);
        let Some((client, Client::Waiting(_))) = client.map(|client| (client, self.clients[client])) else {
            return Err("a lease is refused that nobody waits for".to_owned());
        };
        self.clients[client] = Client::Idle;
        let honest = !self.seen.terminating
            || self.seen.ended
            || matches!(refusal, Refusal::Terminating | Refusal::HostLeaving);
        ensure(honest, "rule 9: a request after the terminate isn't told of it")
    }

    fn see_record(&mut self, glance: &Glance<'_>, record: &Record) -> Checked {
        match record {
            Record::Crashed { .. } => {
                ensure(!self.seen.crashed, "rule 6: an exit is decided twice")?;
                ensure(self.seen.stage == Stage::Ending, "rule 6: an exit that was asked for is a crash")?;
                self.seen.crashed = true;
                self.seen.snapshot = false;
            }
            Record::Opened { .. } => {
                let by_name = matches!(glance.event, Event::StartRequested);
                ensure(by_name || !self.seen.terminating, "rule 9: a terminated session opens by itself")?;
                ensure(self.seen.ended, "rule 10: an incarnation begins before the one before has ended")?;
                self.seen.terminating = false;
                self.seen.ended = false;
            }
            Record::Terminated { .. } => self.seen.snapshot = false,
            Record::Started { .. }
            | Record::Adopted { .. }
            | Record::StartFailed { .. }
            | Record::Slept { .. }
            | Record::SleepFailed { .. } => {}
        }
        Ok(())
    }

    /// Compares what was seen with what the core says.
    fn compare(&mut self, scope: &Scope, before: Stage) -> Checked {
        let view = self.session.view();
        let (phase, remains, present) = (view.phase, view.remains, view.generation);
        if matches!(phase, PhaseName::Absent | PhaseName::Terminated) && self.seen.stage != Stage::NoVm {
            let left = remains == Some(present);
            ensure(!self.alive || left, "rule 2: a VM is taken for gone that is alive")?;
            ensure(self.seen.hooks != Hooks::Started, "rule 5: hooks weren't told that the VM stopped")?;
            self.seen.stage = Stage::NoVm;
            self.seen.made = false;
            self.seen.dozes = false;
            self.order = Order::None;
        }
        let expected = match phase {
            PhaseName::Absent | PhaseName::Terminated => self.seen.stage == Stage::NoVm,
            PhaseName::Starting => matches!(self.seen.stage, Stage::Starting | Stage::Adopting),
            PhaseName::Running | PhaseName::Counting => self.seen.stage == Stage::Up && !self.seen.dozes,
            PhaseName::Dozing => self.seen.stage == Stage::Up && self.seen.dozes,
            PhaseName::Committed => matches!(self.seen.stage, Stage::Committed(_)),
            PhaseName::Stopping => {
                matches!(self.seen.stage, Stage::Sleeping(_) | Stage::Ending | Stage::Cancelling)
            }
        };
        self.counting = phase == PhaseName::Counting;
        let seen = self.seen.stage;
        if !expected {
            return Err(format!("rule 4: {} doesn't follow: {before:?}, then {seen:?}", phase.as_str()));
        }
        let may_wait = |client: &Client| match client {
            Client::Waiting(claim) => scope.claims[*claim].1 == Policy::Acquire,
            Client::Idle | Client::Holding(_) | Client::Ended => true,
        };
        ensure(
            self.clients.iter().all(may_wait),
            "rule 1: a request of a hook starts a VM or waits for one",
        )?;
        ensure(self.waiting() == view.queued, "rule 7: who waits and who is in the queue aren't the same")?;
        ensure(self.holding() == view.leases, "rule 1: who holds and who is listed aren't the same")?;
        ensure(view.snapshot.is_none() || self.seen.snapshot, "a snapshot is kept that was used or is void")?;
        ensure((view.weak == 1) == self.weak, "a weak hold got lost, or stays for ever")
    }

    /// Rule 6: an exit is either expected or a crash.
    fn judge_exit(&self, stage: Stage, event: &Event, before: &Durable) -> Checked {
        let view = self.session.view();
        if let Event::VmExited { generation: PRESENT, exit } = event {
            ensure(view.remains.is_none(), "the remains of a VM stay though its exit was told")?;
            let over =
                view.generation != PRESENT || matches!(view.phase, PhaseName::Absent | PhaseName::Terminated);
            let sealing = stage == Stage::Sleeping(SleepHow::Suspend) && view.phase == PhaseName::Stopping;
            ensure(over || sealing, "rule 6: an exit isn't looked at")?;
            let by_itself = stage == Stage::Adopting && *exit == Exit::GuestShutdown;
            if matches!(stage, Stage::Up | Stage::Adopting) && !by_itself && view.generation == PRESENT {
                ensure(self.seen.crashed, "rule 6: an exit that nobody asked for is no crash")?;
            }
        }
        let failed =
            matches!(event, Event::VmExited { .. } | Event::StartFailed { .. }) && stage == Stage::Starting;
        let ended = view.phase == PhaseName::Terminated && before.termination.is_none();
        ensure(!failed || !ended, "rule 6: a failed start ends the incarnation")
    }

    /// Rule 8: a VM that is up and isn't held has a deadline, and one that is held has none.
    fn judge_rest(&mut self, scope: &Scope, after: &Durable) -> Checked {
        let pinned = !after.pins.is_empty();
        ensure(!pinned || self.seen.pinned, "a pin is set that nobody asked for")?;
        self.seen.pinned = pinned;
        let view = self.session.view();
        let held = self.is_held(scope, Request::None);
        let may_sleep = self.seen.may_sleep(&scope.config) && !self.seen.never;
        match view.phase {
            PhaseName::Running if self.seen.paused => {
                ensure(view.deadline.is_some(), "rule 8: a paused VM has no deadline")
            }
            PhaseName::Running if held || !may_sleep => {
                ensure(view.deadline.is_none(), "rule 3: a VM is about to sleep that is held or may not")
            }
            PhaseName::Running => {
                ensure(view.deadline.is_some(), "rule 8: a VM without a hold has no deadline")
            }
            PhaseName::Counting => {
                ensure(!self.is_used(scope, self.request), "rule 3: a count goes on though something holds")
            }
            PhaseName::Dozing => {
                ensure(!held && may_sleep, "rule 3: a VM dozes that is held or may not sleep")?;
                ensure(view.deadline.is_some(), "rule 8: a VM that dozes has no deadline")
            }
            PhaseName::Absent
            | PhaseName::Starting
            | PhaseName::Committed
            | PhaseName::Stopping
            | PhaseName::Terminated => Ok(()),
        }
    }

    /// Rules 9 and 10: a terminate isn't lost, the end is announced, and its reason is the one that was decided.
    fn judge_end(&self, before: &Durable, actions: &[Action]) -> Checked {
        let view = self.session.view();
        ensure(
            self.seen.ended == (view.phase == PhaseName::Terminated),
            "rule 10: the end and its announcement aren't together",
        )?;
        ensure(!self.seen.terminating || view.state != ApiState::Running, "rule 9: a terminate is lost")?;
        let decided = match &before.vm {
            LastVm::Sleeping { then: Then::Terminated(decided), .. }
            | LastVm::Ending { then: Then::Terminated(decided) } => decided,
            LastVm::Gone
            | LastVm::Starting
            | LastVm::Up { .. }
            | LastVm::Sleeping { then: Then::Absent, .. }
            | LastVm::Ending { then: Then::Absent } => return Ok(()),
        };
        let same = |termination: &Termination| {
            (termination.reason, termination.cause) == (decided.reason, decided.cause)
        };
        let kept = actions.iter().all(|action| match action {
            Action::Record(Record::Terminated { termination, .. }) => same(termination),
            _ => true,
        });
        ensure(kept, "rule 10: the reason that was decided is overwritten")
    }
}

fn is_looking(scope: &Scope, client: &Client) -> bool {
    matches!(client, Client::Holding(claim) if scope.claims[*claim].0 == HoldKind::Read)
}

/// Rule 13: what must survive is written before anything is done about it.
fn written_first(before: &Durable, after: &Durable, actions: &[Action]) -> Checked {
    let written = actions.iter().position(|action| matches!(action, Action::Persist(_)));
    match (written, actions.first()) {
        (Some(0), Some(Action::Persist(durable))) => {
            ensure(**durable == *after, "rule 13: something else is written than what must survive")
        }
        (Some(_), _) => Err("rule 13: something is done before it is written".to_owned()),
        (None, _) => ensure(before == after, "rule 13: what must survive isn't written"),
    }
}
