//! A session in the world: clients, a VM that is real, and a world that repeats, delays and reorders its reports,
//! never answers, or answers twice.

use dormouse_lifecycle::model::{BASE, FAR};
use dormouse_lifecycle::{
    Actions, AfterFailure, Ask, Census, Claim, Config, Durable, Event, Exit, Flaw, Generation, Grace,
    HoldKind, LastVm, LeaseId, PhaseName, PinId, RequestId, Session, SleepHow, SnapshotFate, StartHow, Then,
    Timestamp, WeakId,
};

use crate::checker::Model;
use crate::coverage::Coverage;
use crate::monitor::{Hooks, Seen, Stage};
use crate::scope::Scope;

/// The time of every step; what is still to come is at [`FAR`].
pub(crate) const NOW: Timestamp = Timestamp::from_millis(1_000_000_000);

pub(crate) const PRESENT: Generation = Generation(BASE as u64);
const EARLIER: Generation = Generation(BASE as u64 - 1);
const REQUEST: RequestId = RequestId(1);

pub(crate) const NOTHING: Census = Census { active: 0, inactive: 0, execs: 0 };
const CREATED: Census = Census { active: 0, inactive: 1, execs: 0 };
const RUNNING: Census = Census { active: 1, inactive: 0, execs: 0 };

/// A client with at most one lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Client {
    /// Wants nothing.
    Idle,
    /// Asked, and has no answer yet.
    Waiting(usize),
    /// Has a lease.
    Holding(usize),
    /// Was told that its lease is over, and hasn't dropped it yet.
    Ended,
}

/// What the world was last asked for; its answers carry the latest number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Order {
    None,
    Count,
    Hooks,
    Sleep {
        how: SleepHow,
        /// The world said that the VM runs on: no other end of this sleep can follow.
        failed: bool,
    },
}

/// Whether somebody waits for a sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Request {
    None,
    Sleep,
    /// For a suspend, named as such.
    Suspend,
}

/// A state of the model.
#[derive(Debug, Clone, Hash)]
pub struct State {
    pub(crate) session: Session,
    pub(crate) clients: Vec<Client>,
    /// Whether the VM of the present generation is alive, as a matter of fact.
    pub(crate) alive: bool,
    /// Whether it was asked to end.
    pub(crate) doomed: bool,
    pub(crate) order: Order,
    /// Whether the engine's answer is still waited for.
    pub(crate) counting: bool,
    pub(crate) weak: bool,
    /// A request for sleep that waits for its answer.
    pub(crate) request: Request,
    pub(crate) seen: Seen,
}

/// Something that may happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Move {
    /// A client asks.
    Ask {
        /// Which client.
        client: usize,
        /// For which of the scope's claims.
        claim: usize,
    },
    /// A client drops its lease, gives up waiting, or drops a lease that was ended.
    Drop {
        /// Which client.
        client: usize,
    },
    /// The VM dies; nobody is told yet.
    Die,
    /// A point in time comes.
    Due {
        /// Which one of those that are still to come.
        index: usize,
    },
    /// An event, given as it is.
    Tell(Event),
    /// The host process dies between two steps, and another takes over.
    HostDies,
    /// The host process dies within a step: what had to survive was written, nothing else was done.
    CutShort(Box<Move>),
}

/// A scope as a model.
#[derive(Debug)]
pub struct Lifecycle {
    scope: Scope,
    flaw: Option<Flaw>,
    /// What happened in which phase.
    pub coverage: Coverage,
}

impl Lifecycle {
    /// The scope, with a bug if one is to be planted.
    pub fn new(scope: Scope, flaw: Option<Flaw>) -> Self {
        Self { scope, flaw, coverage: Coverage::default() }
    }

    fn client_moves(&self, state: &State, moves: &mut Vec<Move>) {
        for (client, is) in state.clients.iter().enumerate() {
            // Clients in the same state can't be told apart: one of them stands for all.
            if client > 0 && state.clients[client - 1] == *is {
                continue;
            }
            match is {
                Client::Idle => {
                    moves.extend((0..self.scope.claims.len()).map(|claim| Move::Ask { client, claim }));
                }
                Client::Waiting(_) | Client::Holding(_) | Client::Ended => moves.push(Move::Drop { client }),
            }
        }
    }

    /// What people and settings may do.
    fn outer_moves(&self, state: &State, moves: &mut Vec<Move>) {
        let world = self.scope.world;
        let text = || "".into();
        let mut tell = |event| moves.push(Move::Tell(event));
        if world.terminate {
            tell(Event::Terminate { reason: text() });
        }
        tell(Event::StartRequested);
        if world.weak {
            tell(match state.weak {
                true => Event::WeakRemoved { weak: WeakId(1) },
                false => Event::WeakAdded {
                    weak: WeakId(1),
                    kind: HoldKind::Events,
                    owner: text(),
                    reason: text(),
                },
            });
        }
        if world.pins {
            let set = |until| Event::PinSet { pin: PinId(1), owner: text(), reason: text(), until };
            tell(Event::PinRemoved { pin: PinId(1) });
            if !state.seen.pinned {
                [None, Some(FAR)].map(set).into_iter().for_each(&mut tell);
            }
        }
        if world.sleep_requests && state.request == Request::None {
            // Means are named where that makes a difference.
            let by_name = self.scope.claims.iter().any(|(kind, _)| *kind == HoldKind::Activity);
            let how = match self.scope.config.idle_action {
                SleepHow::Suspend if by_name => &[None, Some(SleepHow::Stop), Some(SleepHow::Suspend)][..],
                SleepHow::Suspend => &[None, Some(SleepHow::Stop)],
                SleepHow::Stop => &[None],
            };
            how.iter().for_each(|how| tell(Event::SleepRequested { request: REQUEST, how: *how }));
        }
        if world.creator {
            tell(Event::CreatorGone);
        }
        if world.leaving {
            tell(Event::HostLeaving);
        }
        if world.settings {
            tell(Event::GraceChanged(match state.seen.never {
                true => self.scope.config.grace,
                false => Grace::Never,
            }));
            tell(Event::Configured(Box::new(Config { grace: Grace::Never, ..self.scope.config })));
        }
    }

    /// What can be said of the present VM and is or may be true.
    fn vm_moves(&self, state: &State, moves: &mut Vec<Move>) {
        let world = self.scope.world;
        let (generation, text) = (PRESENT, || "".into());
        let mut tell = |event| moves.push(Move::Tell(event));
        tell(Event::VmProgress { generation, step: text() });
        if state.seen.stage == Stage::Adopting && state.alive {
            for census in if world.containers { vec![NOTHING, RUNNING] } else { vec![NOTHING] } {
                tell(Event::VmAdopted { generation, census, holds: Vec::new() });
            }
        }
        if state.seen.made {
            let hows: &[StartHow] = match state.seen.snapshot {
                true => &[StartHow::Cold, StartHow::Resume],
                false => &[StartHow::Cold],
            };
            hows.iter().for_each(|how| tell(Event::VmReady { generation, how: *how, census: NOTHING }));
        }
        if !state.alive {
            tell(Event::VmExited { generation, exit: Exit::Crashed(text()) });
            if state.seen.stage == Stage::Adopting {
                tell(Event::VmExited { generation, exit: Exit::GuestShutdown });
            }
            if state.seen.made {
                let failed = |snapshot| Event::StartFailed { generation, reason: text(), snapshot };
                [SnapshotFate::Intact, SnapshotFate::Void].map(failed).into_iter().for_each(&mut tell);
            }
        }
        if world.io_errors {
            tell(Event::VmPaused { generation, reason: text() });
            tell(Event::VmResumed { generation });
        }
        if world.engine_deaths {
            tell(Event::EngineDied { generation, reason: text() });
        }
        if world.containers {
            for census in [NOTHING, CREATED, RUNNING] {
                tell(Event::ContainersChanged { generation, census });
            }
        }
        let may_die = state.doomed
            || world.deaths
            || (world.start_failures && matches!(state.seen.stage, Stage::Starting | Stage::Cancelling));
        if state.alive && may_die {
            moves.push(Move::Die);
        }
    }

    /// Answers to the latest question or order.
    fn answers(&self, state: &State, moves: &mut Vec<Move>) {
        let ask = Ask { generation: PRESENT, sequence: BASE };
        let mut tell = |event| moves.push(Move::Tell(event));
        match state.order {
            Order::None => {}
            Order::Count => {
                tell(Event::ContainersCounted { ask, census: Some(NOTHING) });
                if self.scope.world.containers {
                    tell(Event::ContainersCounted { ask, census: Some(RUNNING) });
                    tell(Event::ContainersCounted { ask, census: None });
                }
            }
            Order::Hooks => tell(Event::HooksDone { ask }),
            Order::Sleep { how, failed } => {
                if !state.alive && !failed {
                    tell(Event::SleepDone { ask });
                }
                if how == SleepHow::Suspend {
                    if state.alive || failed {
                        tell(Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, reason: "".into() });
                    }
                    tell(Event::SuspendFailed { ask, vm: AfterFailure::Lost, reason: "".into() });
                }
            }
        }
    }

    /// Whether a move is an answer to something that was asked, or the end of something that somebody holds.
    fn is_polite_event(state: &State, event: &Event) -> bool {
        match event {
            Event::LeaseDropped { .. }
            | Event::WeakRemoved { .. }
            | Event::PinRemoved { .. }
            | Event::VmReady { .. }
            | Event::VmExited { .. }
            | Event::VmResumed { .. }
            | Event::HooksDone { .. }
            | Event::SleepDone { .. }
            | Event::SuspendFailed { .. }
            | Event::DeadlineReached => true,
            Event::ContainersChanged { census, .. } => *census == NOTHING,
            Event::ContainersCounted { census, .. } => *census == Some(NOTHING),
            Event::StartFailed { .. } => state.doomed,
            Event::GraceChanged(grace) => *grace != Grace::Never,
            Event::LeaseRequested { .. }
            | Event::WeakAdded { .. }
            | Event::PinSet { .. }
            | Event::Configured(_)
            | Event::VmProgress { .. }
            | Event::VmAdopted { .. }
            | Event::VmPaused { .. }
            | Event::EngineDied { .. }
            | Event::Terminate { .. }
            | Event::StartRequested
            | Event::SleepRequested { .. }
            | Event::CreatorGone
            | Event::HostLeaving => false,
        }
    }

    /// The event of a move that is one.
    fn event(&self, made: &Move) -> Option<Event> {
        Some(match made {
            Move::Ask { client, claim } => {
                let (kind, policy) = self.scope.claims[*claim];
                let claim = Claim { kind, policy, owner: "".into(), reason: "".into() };
                Event::LeaseRequested { lease: lease(*client), claim }
            }
            Move::Drop { client } => Event::LeaseDropped { lease: lease(*client) },
            Move::Due { .. } => Event::DeadlineReached,
            Move::Tell(event) => event.clone(),
            Move::Die | Move::HostDies | Move::CutShort(_) => return None,
        })
    }

    /// Makes a move that is an event.
    fn happen(&self, state: &State, made: &Move, cut_short: bool) -> Result<Option<State>, String> {
        let Some(event) = self.event(made) else { return Ok(None) };
        let mut next = state.clone();
        if let Move::Due { index } = made {
            next.session.ripen(*index, NOW);
        }
        let before = next.session.durable();
        let mut actions = Actions::new();
        next.session.handle(NOW, event.clone(), &mut actions);
        next.session.check().map_err(|words| format!("the state contradicts itself: {words}"))?;
        let durable = next.session.durable();
        let actions: Vec<_> = actions.drain().collect();
        if cut_short {
            if before == durable || actions.len() < 2 {
                return Ok(None);
            }
            next.watch_cut_short(&self.scope, made, &event, &before, &actions);
            next.host_dies(&self.scope.config, self.flaw, durable);
        } else {
            next.watch(&self.scope, made, &event, [&before, &durable], &actions)?;
        }
        next.normalise();
        Ok(Some(next))
    }
}

/// The lease of a client.
pub(crate) fn lease(client: usize) -> LeaseId {
    LeaseId(client as u64)
}

impl State {
    /// Another host process takes over, with what was written.
    fn host_dies(&mut self, config: &Config, flaw: Option<Flaw>, durable: Durable) {
        self.seen.stage = match &durable.vm {
            LastVm::Gone => Stage::NoVm,
            LastVm::Starting | LastVm::Ending { .. } => Stage::Ending,
            LastVm::Up { .. } => Stage::Adopting,
            LastVm::Sleeping { by, .. } => Stage::Committed(*by),
        };
        self.seen.made = false;
        self.seen.exit_told = false;
        self.seen.never = false;
        self.seen.leaving = false;
        self.seen.pinned = !durable.pins.is_empty();
        self.seen.census = NOTHING;
        self.seen.paused = false;
        self.seen.dozes = false;
        self.seen.snapshot &= durable.snapshot.is_some() && durable.vm != LastVm::Starting;
        self.seen.ended = durable.termination.is_some();
        self.seen.terminating = match &durable.vm {
            LastVm::Sleeping { then: Then::Terminated(_), .. } => true,
            LastVm::Ending { then: Then::Terminated(end) } => {
                end.reopen == dormouse_lifecycle::Reopen::OnStart
            }
            LastVm::Gone | LastVm::Starting | LastVm::Up { .. } => false,
            LastVm::Sleeping { then: Then::Absent, .. } | LastVm::Ending { then: Then::Absent } => false,
        };
        self.clients.fill(Client::Idle);
        self.order = Order::None;
        self.counting = false;
        self.weak = false;
        self.request = Request::None;
        self.session = Session::new(*config, durable, NOW);
        self.session.plant(flaw);
    }

    /// Sorts the clients, and gives their leases the numbers of their new places.
    fn normalise(&mut self) {
        let mut order: Vec<usize> = (0..self.clients.len()).collect();
        order.sort_by_key(|client| self.clients[*client]);
        let place = |id: LeaseId| {
            let client = order.iter().position(|client| lease(*client) == id);
            client.map_or(id, lease)
        };
        self.session.normalise(NOW, &place);
        self.clients.sort_unstable();
    }

    /// Whether everybody who waits gets an answer, and a terminate its end, although the world is silent.
    fn arrives_in_silence(&self) -> Result<(), String> {
        let mut session = self.session.clone();
        let mut now = NOW;
        let mut requested = self.request != Request::None;
        let mut terminating = self.seen.terminating && !self.seen.ended;
        for _ in 0..32 {
            if session.view().queued == 0 && !requested && !terminating {
                return Ok(());
            }
            let Some(deadline) = session.next_deadline() else { break };
            now = now.max(deadline);
            let mut actions = Actions::new();
            session.handle(now, Event::DeadlineReached, &mut actions);
            requested &= !actions
                .as_slice()
                .iter()
                .any(|action| matches!(action, dormouse_lifecycle::Action::AnswerSleep { .. }));
            terminating &= session.view().phase != PhaseName::Terminated;
        }
        Err(match terminating {
            true => "rule 9: a terminate never arrives in a silent world".to_owned(),
            false => "rule 7: somebody waits for ever in a silent world".to_owned(),
        })
    }
}

impl Model for Lifecycle {
    type State = State;
    type Move = Move;

    fn initial(&self) -> State {
        let mut session = Session::new(self.scope.config, Durable::default(), NOW);
        session.plant(self.flaw);
        let mut state = State {
            session,
            clients: vec![Client::Idle; self.scope.clients],
            alive: false,
            doomed: false,
            order: Order::None,
            counting: false,
            weak: false,
            request: Request::None,
            seen: Seen::default(),
        };
        state.normalise();
        state
    }

    fn moves(&self, state: &State, moves: &mut Vec<Move>) {
        self.client_moves(state, moves);
        self.outer_moves(state, moves);
        // A point in time that comes, and a driver that only thinks so.
        let pending = state.session.clone().pending();
        moves.extend((0..pending).map(|index| Move::Due { index }));
        moves.push(Move::Tell(Event::DeadlineReached));
        if state.session.view().generation == PRESENT {
            self.vm_moves(state, moves);
            self.answers(state, moves);
            moves.extend(stragglers(Ask { generation: PRESENT, sequence: BASE - 1 }).map(Move::Tell));
            moves.extend(stragglers(Ask { generation: EARLIER, sequence: BASE }).map(Move::Tell));
            moves.extend(reports_of(EARLIER).map(Move::Tell));
        }
        if self.scope.world.host_deaths {
            let cut_short: Vec<Move> =
                moves.iter().map(|made| Move::CutShort(Box::new(made.clone()))).collect();
            moves.push(Move::HostDies);
            moves.extend(cut_short);
        }
    }

    fn step(&self, state: &State, made: &Move) -> Result<Option<State>, String> {
        match made {
            Move::Die => {
                let mut next = state.clone();
                next.alive = false;
                Ok(Some(next))
            }
            Move::HostDies => {
                let mut next = state.clone();
                next.host_dies(&self.scope.config, self.flaw, state.session.durable());
                next.normalise();
                Ok(Some(next))
            }
            Move::CutShort(made) => self.happen(state, made, true),
            Move::Ask { .. } | Move::Drop { .. } | Move::Due { .. } | Move::Tell(_) => {
                self.happen(state, made, false)
            }
        }
    }

    fn check(&self, state: &State) -> Result<(), String> {
        state.arrives_in_silence()
    }

    fn is_polite(&self, state: &State, made: &Move) -> bool {
        match made {
            Move::Ask { .. } | Move::HostDies | Move::CutShort(_) => false,
            Move::Drop { .. } | Move::Due { .. } => true,
            Move::Die => state.doomed,
            Move::Tell(event) => Self::is_polite_event(state, event),
        }
    }

    fn is_at_rest(&self, state: &State) -> bool {
        let view = state.session.view();
        let stays_up = view.phase == PhaseName::Running
            && state.session.next_deadline().is_none()
            && (state.seen.never || !state.seen.may_sleep(&self.scope.config));
        let nobody_waits =
            state.clients.iter().all(|client| *client == Client::Idle) && state.request == Request::None;
        nobody_waits && (matches!(view.phase, PhaseName::Absent | PhaseName::Terminated) || stays_up)
    }

    fn visit(&mut self, state: &State, made: &Move) {
        if let Some(event) = self.event(made) {
            self.coverage.count(state.session.view().phase, &event);
        }
    }
}

/// Answers to a question or order that isn't the latest any more.
fn stragglers(ask: Ask) -> impl Iterator<Item = Event> {
    [
        Event::ContainersCounted { ask, census: Some(NOTHING) },
        Event::ContainersCounted { ask, census: Some(RUNNING) },
        Event::ContainersCounted { ask, census: None },
        Event::HooksDone { ask },
        Event::SleepDone { ask },
        Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, reason: "".into() },
        Event::SuspendFailed { ask, vm: AfterFailure::Lost, reason: "".into() },
    ]
    .into_iter()
}

/// Late reports of a VM that is gone.
fn reports_of(generation: Generation) -> impl Iterator<Item = Event> {
    let text = || "".into();
    [
        Event::VmProgress { generation, step: text() },
        Event::VmReady { generation, how: StartHow::Cold, census: RUNNING },
        Event::VmAdopted { generation, census: RUNNING, holds: Vec::new() },
        Event::StartFailed { generation, reason: text(), snapshot: SnapshotFate::Void },
        Event::VmExited { generation, exit: Exit::Crashed(text()) },
        Event::VmPaused { generation, reason: text() },
        Event::VmResumed { generation },
        Event::EngineDied { generation, reason: text() },
        Event::ContainersChanged { generation, census: RUNNING },
    ]
    .into_iter()
}

impl Hooks {
    /// What a host's death within a step leaves of the hooks' state: nobody knows whether they ran.
    pub(crate) const AFTER_A_CUT: Self = Self::Unsure;
}
