//! Random histories, larger than the model's: many clients, real times, every setting, a driver that is late, repeats
//! itself, mixes up its answers, and dies. Histories that failed once are kept in `property.proptest-regressions`.

use std::collections::BTreeSet;
use std::time::Duration;

use dormouse_lifecycle::*;
use proptest::prelude::*;

/// One thing that happens; numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Deed {
    Ask { lease: u64, kind: HoldKind, policy: Policy },
    Drop { lease: u64 },
    Report { generation_back: u64, what: Report },
    Answer { sequence_back: u32, what: Answer },
    Outside(Event),
    Wait(Duration),
    Due,
    HostDies,
}

#[derive(Debug, Clone)]
enum Report {
    Ready(StartHow, u32),
    Adopted(u32),
    Failed(SnapshotFate),
    Exited(Exit),
    Paused,
    Resumed,
    EngineDied,
    Containers(Census),
    Progress,
}

#[derive(Debug, Clone)]
enum Answer {
    Counted(Option<Census>),
    HooksDone,
    SleepDone,
    SuspendFailed(AfterFailure),
}

fn text() -> Text {
    "".into()
}

fn census() -> impl Strategy<Value = Census> {
    (0..3_u32, 0..3_u32, 0..2_u32).prop_map(|(active, inactive, execs)| Census { active, inactive, execs })
}

fn report() -> impl Strategy<Value = Report> {
    prop_oneof![
        6 => (prop_oneof![Just(StartHow::Cold), Just(StartHow::Clone), Just(StartHow::Resume)], 0..2_u32)
            .prop_map(|(how, active)| Report::Ready(how, active)),
        1 => (0..2_u32).prop_map(Report::Adopted),
        2 => prop_oneof![Just(SnapshotFate::Intact), Just(SnapshotFate::Void)].prop_map(Report::Failed),
        3 => prop_oneof![
            Just(Exit::GuestShutdown),
            Just(Exit::Crashed("signal 9".into())),
            Just(Exit::Unknown("gone".into()))
        ].prop_map(Report::Exited),
        1 => Just(Report::Paused),
        2 => Just(Report::Resumed),
        1 => Just(Report::EngineDied),
        3 => census().prop_map(Report::Containers),
        1 => Just(Report::Progress),
    ]
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        4 => proptest::option::weighted(0.8, census()).prop_map(Answer::Counted),
        2 => Just(Answer::Counted(Some(Census::default()))),
        4 => Just(Answer::HooksDone),
        3 => Just(Answer::SleepDone),
        2 => prop_oneof![Just(AfterFailure::RunsOn), Just(AfterFailure::Lost)].prop_map(Answer::SuspendFailed),
    ]
}

fn outside() -> impl Strategy<Value = Event> {
    prop_oneof![
        2 => (0..4_u64, proptest::option::of(0..10_000_000_u64)).prop_map(|(pin, until)| Event::PinSet {
            pin: PinId(pin), owner: text(), reason: text(), until: until.map(Timestamp::from_millis),
        }),
        3 => (0..4_u64).prop_map(|pin| Event::PinRemoved { pin: PinId(pin) }),
        1 => (0..4_u64).prop_map(|weak| Event::WeakAdded {
            weak: WeakId(weak), kind: HoldKind::Events, owner: text(), reason: text(),
        }),
        1 => (0..4_u64).prop_map(|weak| Event::WeakRemoved { weak: WeakId(weak) }),
        1 => grace().prop_map(Event::GraceChanged),
        1 => Just(Event::Terminate { reason: text() }),
        2 => Just(Event::StartRequested),
        3 => (0..30_u64, proptest::option::of(any::<bool>())).prop_map(|(request, stop)| {
            let how = stop.map(|stop| if stop { SleepHow::Stop } else { SleepHow::Suspend });
            Event::SleepRequested { request: RequestId(request), how }
        }),
        1 => Just(Event::CreatorGone),
        1 => Just(Event::HostLeaving),
    ]
}

fn deed() -> impl Strategy<Value = Deed> {
    let kind = prop_oneof![
        Just(HoldKind::Request),
        Just(HoldKind::Read),
        Just(HoldKind::Operation),
        Just(HoldKind::RootProcess)
    ];
    let policy = prop_oneof![3 => Just(Policy::Acquire), 1 => Just(Policy::ExistingOnly)];
    prop_oneof![
        8 => (0..12_u64, kind, policy).prop_map(|(lease, kind, policy)| Deed::Ask { lease, kind, policy }),
        8 => (0..12_u64).prop_map(|lease| Deed::Drop { lease }),
        10 => (prop_oneof![9 => Just(0), 1 => 1..3_u64], report())
            .prop_map(|(generation_back, what)| Deed::Report { generation_back, what }),
        10 => (prop_oneof![9 => Just(0), 1 => 1..3_u32], answer())
            .prop_map(|(sequence_back, what)| Deed::Answer { sequence_back, what }),
        4 => outside().prop_map(Deed::Outside),
        4 => (0..400_000_u64).prop_map(|millis| Deed::Wait(Duration::from_millis(millis))),
        10 => Just(Deed::Due),
        1 => Just(Deed::HostDies),
    ]
}

fn grace() -> impl Strategy<Value = Grace> {
    prop_oneof![
        Just(Grace::Never),
        (0..60_000_u64).prop_map(|millis| Grace::After(Duration::from_millis(millis)))
    ]
}

fn config() -> impl Strategy<Value = Config> {
    let either = any::<[bool; 6]>();
    (grace(), either, 1..8_usize, 1..8_usize).prop_map(
        |(grace, [suspend, carry, kept, lasting, reopen, dozes], queued, leases)| Config {
            grace,
            doze: dozes.then_some(Duration::from_secs(5)),
            idle_action: if suspend { SleepHow::Suspend } else { SleepHow::Stop },
            running: if carry { RunningContainers::Suspend } else { RunningContainers::Hold },
            storage: if kept { Storage::Persistent } else { Storage::Ephemeral },
            lifetime: if lasting { Lifetime::Lasting } else { Lifetime::Temporary },
            crash: if reopen { CrashPolicy::Reopen } else { CrashPolicy::Terminate },
            limits: Limits { queued, leases, ..Limits::default() },
        },
    )
}

/// A driver that remembers what it was told, and the checks that need no model.
struct Driver {
    config: Config,
    session: Session,
    trace: Trace,
    now: Timestamp,
    written: Durable,
    /// The latest question or order.
    ask: Ask,
    waiting: BTreeSet<LeaseId>,
    granted: BTreeSet<LeaseId>,
    generations: BTreeSet<Generation>,
}

impl Driver {
    fn new(config: Config) -> Self {
        let now = Timestamp::from_millis(1_000);
        let session = Session::new(config, Durable::default(), now);
        let trace = Trace::new(&session, 16);
        let written = session.durable();
        let ask = Ask { generation: Generation(0), sequence: 0 };
        let (waiting, granted, generations) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        Self { config, session, trace, now, written, ask, waiting, granted, generations }
    }

    fn feed(&mut self, event: Event) {
        match &event {
            Event::LeaseRequested { lease, .. } if !self.granted.contains(lease) => {
                self.waiting.insert(*lease);
            }
            Event::LeaseDropped { lease } => {
                self.waiting.remove(lease);
                self.granted.remove(lease);
            }
            _ => {}
        }
        let mut actions = Actions::new();
        self.trace.note(self.now, &event);
        self.session.handle(self.now, event, &mut actions);
        self.session.check().expect("no contradiction");
        for (index, action) in actions.drain().enumerate() {
            self.carry_out(index, action);
        }
        assert_eq!(self.written, self.session.durable(), "what must survive was written");
        let view = self.session.view();
        assert_eq!((view.queued, view.leases), (self.waiting.len(), self.granted.len()));
        assert!(view.queued <= self.config.limits.queued && view.leases <= self.config.limits.leases);
    }

    fn carry_out(&mut self, index: usize, action: Action) {
        match action {
            Action::Persist(durable) => {
                assert_eq!(index, 0, "written before anything is done");
                self.written = *durable;
            }
            Action::StartVm { generation, .. } => {
                assert!(self.generations.insert(generation), "a generation is never used twice");
                assert_eq!((self.written.generation, &self.written.vm), (generation, &LastVm::Starting));
            }
            Action::Grant { lease, generation } => {
                assert!(self.waiting.remove(&lease), "granted to somebody who waits");
                assert!(self.granted.insert(lease));
                assert_eq!(generation, self.session.view().generation);
            }
            Action::Refuse { lease, .. } => {
                assert!(self.waiting.remove(&lease), "refused to somebody who waits")
            }
            Action::EndLeases { .. } => self.granted.clear(),
            Action::RunStoppingHooks { ask, .. }
            | Action::BeginSleep { ask, .. }
            | Action::CountContainers { ask, .. } => {
                self.ask = ask;
            }
            Action::CancelStart { .. }
            | Action::AnnounceStarted { .. }
            | Action::RunSleepFailedHooks { .. }
            | Action::KillVm { .. }
            | Action::ResumeVm { .. }
            | Action::Doze { .. }
            | Action::Rouse { .. }
            | Action::AnswerSleep { .. }
            | Action::Record(_)
            | Action::Publish
            | Action::AnnounceTerminated { .. } => {}
        }
    }

    fn host_dies(&mut self) {
        self.session = Session::new(self.config, self.written.clone(), self.now);
        self.trace = Trace::new(&self.session, 16);
        self.written = self.session.durable();
        self.waiting.clear();
        self.granted.clear();
    }

    fn make(&mut self, deed: Deed) {
        match deed {
            Deed::Ask { lease, kind, policy } => {
                let claim = Claim { kind, policy, owner: text(), reason: text() };
                self.feed(Event::LeaseRequested { lease: LeaseId(lease), claim });
            }
            Deed::Drop { lease } => self.feed(Event::LeaseDropped { lease: LeaseId(lease) }),
            Deed::Report { generation_back, what } => {
                let generation = Generation(self.session.view().generation.0.saturating_sub(generation_back));
                self.feed(what.event(generation));
            }
            Deed::Answer { sequence_back, what } => {
                let ask = Ask { sequence: self.ask.sequence.saturating_sub(sequence_back), ..self.ask };
                self.feed(what.event(ask));
            }
            Deed::Outside(event) => self.feed(event),
            Deed::Wait(wait) => self.now = self.now.after(wait),
            Deed::Due => {
                self.now = self.session.next_deadline().map_or(self.now, |deadline| deadline.max(self.now));
                self.feed(Event::DeadlineReached);
            }
            Deed::HostDies => self.host_dies(),
        }
    }
}

impl Report {
    fn event(self, generation: Generation) -> Event {
        let active = |active| Census { active, ..Census::default() };
        match self {
            Self::Ready(how, count) => Event::VmReady { generation, how, census: active(count) },
            Self::Adopted(count) => Event::VmAdopted { generation, census: active(count), holds: Vec::new() },
            Self::Failed(snapshot) => Event::StartFailed { generation, reason: "no".into(), snapshot },
            Self::Exited(exit) => Event::VmExited { generation, exit },
            Self::Paused => Event::VmPaused { generation, reason: "no space".into() },
            Self::Resumed => Event::VmResumed { generation },
            Self::EngineDied => Event::EngineDied { generation, reason: "twice".into() },
            Self::Containers(census) => Event::ContainersChanged { generation, census },
            Self::Progress => Event::VmProgress { generation, step: "kernel".into() },
        }
    }
}

impl Answer {
    fn event(self, ask: Ask) -> Event {
        match self {
            Self::Counted(census) => Event::ContainersCounted { ask, census },
            Self::HooksDone => Event::HooksDone { ask },
            Self::SleepDone => Event::SleepDone { ask },
            Self::SuspendFailed(vm) => Event::SuspendFailed { ask, vm, reason: "no".into() },
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6_000, ..ProptestConfig::default() })]

    #[test]
    fn a_random_history_breaks_no_rule_and_silence_ends_every_wait(
        config in config(),
        deeds in proptest::collection::vec(deed(), 1..120),
    ) {
        let mut driver = Driver::new(config);
        for deed in deeds {
            driver.make(deed);
        }
        let terminating = driver.session.view().state == State::Terminating;
        for _ in 0..64 {
            let view = driver.session.view();
            if view.queued == 0 && view.state != State::Terminating {
                break;
            }
            prop_assert!(driver.session.next_deadline().is_some(), "somebody waits for ever");
            driver.make(Deed::Due);
        }
        prop_assert_eq!(driver.session.view().queued, 0);
        prop_assert!(!terminating || driver.session.view().state != State::Terminating);
    }

    #[test]
    fn a_trace_that_was_written_and_read_replays_to_the_same_session(
        config in config(),
        deeds in proptest::collection::vec(deed(), 1..60),
    ) {
        let mut driver = Driver::new(config);
        for deed in deeds {
            driver.make(deed);
        }
        let written = serde_json::to_string(&driver.trace).expect("a trace can be written");
        let read: Trace = serde_json::from_str(&written).expect("and read");
        let last = read.replay().last().map(|replayed| replayed.session);
        prop_assert_eq!(last.as_ref().unwrap_or(read.base()), &driver.session);
    }

    #[test]
    fn what_was_written_restores_to_what_was_written(
        config in config(),
        deeds in proptest::collection::vec(deed(), 1..60),
    ) {
        let mut driver = Driver::new(config);
        for deed in deeds {
            driver.make(deed);
        }
        let snapshot = driver.written.snapshot.filter(|_| driver.written.vm != LastVm::Starting);
        let restored = Session::new(config, driver.written.clone(), driver.now).durable();
        prop_assert_eq!(restored, Durable { snapshot, ..driver.written });
    }
}
