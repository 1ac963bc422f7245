//! A session on a desk: events go in by hand, actions are laid out to be looked at.

use std::time::Duration;

use dormouse_lifecycle::*;

pub(crate) struct Desk {
    pub(crate) session: Session,
    pub(crate) now: Timestamp,
    pub(crate) persisted: Durable,
}

pub(crate) fn g(generation: u64) -> Generation {
    Generation(generation)
}

pub(crate) fn claim(kind: HoldKind, policy: Policy) -> Claim {
    Claim { kind, policy, owner: "uid 1000".into(), reason: "a test".into() }
}

pub(crate) const RUNNING: Census = Census { active: 1, inactive: 0, execs: 0 };
pub(crate) const NOTHING: Census = Census { active: 0, inactive: 0, execs: 0 };

pub(crate) fn suspending() -> Config {
    Config { idle_action: SleepHow::Suspend, ..Config::default() }
}

impl Desk {
    pub(crate) fn new(config: Config) -> Self {
        Self::restored(config, Durable::default())
    }

    pub(crate) fn restored(config: Config, durable: Durable) -> Self {
        let now = Timestamp::from_millis(1_000_000);
        Self { session: Session::new(config, durable.clone(), now), now, persisted: durable }
    }

    /// Feeds one event; returns what is to be done, without what is written and published.
    pub(crate) fn feed(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Actions::new();
        self.session.handle(self.now, event, &mut actions);
        self.session.check().expect("no contradiction");
        let all: Vec<Action> = actions.drain().collect();
        let mut rest = Vec::new();
        for (index, action) in all.into_iter().enumerate() {
            match action {
                Action::Persist(durable) => {
                    assert_eq!(index, 0, "what must survive is written before anything else is done");
                    self.persisted = *durable;
                }
                Action::Publish => {}
                action => rest.push(action),
            }
        }
        assert_eq!(self.persisted, self.session.durable(), "what must survive was written");
        rest
    }

    /// As [`Desk::feed`], without the entries of the history.
    pub(crate) fn act(&mut self, event: Event) -> Vec<Action> {
        self.feed(event).into_iter().filter(|action| !matches!(action, Action::Record(_))).collect()
    }

    pub(crate) fn wait(&mut self, wait: Duration) {
        self.now = self.now.after(wait);
    }

    /// Goes to the next deadline and lets it come.
    pub(crate) fn due(&mut self) -> Vec<Action> {
        self.now = self.session.next_deadline().expect("there is a deadline").max(self.now);
        self.act(Event::DeadlineReached)
    }

    pub(crate) fn ask(&mut self, lease: u64) -> Vec<Action> {
        self.ask_as(lease, HoldKind::Request, Policy::Acquire)
    }

    pub(crate) fn ask_existing(&mut self, lease: u64) -> Vec<Action> {
        self.ask_as(lease, HoldKind::Request, Policy::ExistingOnly)
    }

    pub(crate) fn ask_as(&mut self, lease: u64, kind: HoldKind, policy: Policy) -> Vec<Action> {
        self.act(Event::LeaseRequested { lease: LeaseId(lease), claim: claim(kind, policy) })
    }

    pub(crate) fn release(&mut self, lease: u64) -> Vec<Action> {
        self.act(Event::LeaseDropped { lease: LeaseId(lease) })
    }

    pub(crate) fn ready(&mut self, generation: u64) -> Vec<Action> {
        self.act(Event::VmReady { generation: g(generation), how: StartHow::Cold, census: NOTHING })
    }

    pub(crate) fn exited(&mut self, generation: u64) -> Vec<Action> {
        self.act(Event::VmExited { generation: g(generation), exit: Exit::Crashed("signal 9".into()) })
    }

    pub(crate) fn counted(&mut self, sequence: u32, census: Census) -> Vec<Action> {
        let ask = Ask { generation: self.session.view().generation, sequence };
        self.act(Event::ContainersCounted { ask, census: Some(census) })
    }

    pub(crate) fn phase(&self) -> PhaseName {
        self.session.view().phase
    }

    /// A session whose first VM is up, with lease 1 out.
    pub(crate) fn running(config: Config) -> Self {
        let mut desk = Self::new(config);
        desk.ask(1);
        desk.ready(1);
        assert_eq!(desk.phase(), PhaseName::Running);
        desk
    }

    /// A session whose first VM is about to sleep: lease 1 was dropped, nothing runs, the hooks are being told.
    pub(crate) fn committed(config: Config) -> (Self, Ask) {
        let mut desk = Self::running(config);
        desk.release(1);
        desk.due();
        let actions = desk.counted(1, NOTHING);
        let ask = hooks_ask(&actions);
        assert_eq!(desk.phase(), PhaseName::Committed);
        (desk, ask)
    }

    /// A session whose first VM is being put to sleep.
    pub(crate) fn stopping(config: Config) -> (Self, Ask) {
        let (mut desk, ask) = Self::committed(config);
        let actions = desk.act(Event::HooksDone { ask });
        let ask = sleep_ask(&actions);
        assert_eq!(desk.phase(), PhaseName::Stopping);
        (desk, ask)
    }
}

pub(crate) fn hooks_ask(actions: &[Action]) -> Ask {
    let ask = actions.iter().find_map(|action| match action {
        Action::RunStoppingHooks { ask, .. } => Some(*ask),
        _ => None,
    });
    ask.unwrap_or_else(|| panic!("hooks are told: {actions:?}"))
}

pub(crate) fn sleep_ask(actions: &[Action]) -> Ask {
    let ask = actions.iter().find_map(|action| match action {
        Action::BeginSleep { ask, .. } => Some(*ask),
        _ => None,
    });
    ask.unwrap_or_else(|| panic!("the sleep is begun: {actions:?}"))
}

pub(crate) fn granted(lease: u64, generation: u64) -> Action {
    Action::Grant { lease: LeaseId(lease), generation: g(generation) }
}

pub(crate) fn refused(lease: u64, refusal: Refusal) -> Action {
    Action::Refuse { lease: LeaseId(lease), refusal }
}

pub(crate) fn starts(actions: &[Action]) -> Option<(u64, StartFrom)> {
    actions.iter().find_map(|action| match action {
        Action::StartVm { generation, from, .. } => Some((generation.0, *from)),
        _ => None,
    })
}

pub(crate) fn kills(actions: &[Action], generation: u64) -> bool {
    actions.contains(&Action::KillVm { generation: g(generation) })
}
