//! The task itself: handle, persist, act.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dormouse_api::{ChangeSettings, Fact, HistoryEntry, SessionEvent, SessionInfo, SleepAnswer};
use dormouse_lifecycle::{
    Action, Actions, Ask, Census, Claim, Config, Durable, EndReason, Event, Generation, HoldKind, LeaseId,
    PhaseName, Policy, Record, Refusal, RequestId, Session, SleepHow, SleepOutcome, TerminationReason,
};
use dormouse_mux::Agent;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::{EngineEvent, Facts, Granted, Inbox, Message, Question, Ready};
use crate::clock::{due, now};
use crate::fault;
use crate::hooks::{self, Hooks, Job, Reply, Verdict};
use crate::journal::Journal;
use crate::lease::Refused;
use crate::machine::Machines;
use crate::ports::Stays;
use crate::state;
use crate::trace::SharedTrace;
use crate::view;

/// Starts, sleeps and crashes that are remembered.
const HISTORY_MAX: usize = 1000;

/// Events for hooks that are remembered.
const EVENTS_MAX: usize = 1000;

/// Events that a follower may be behind.
const FOLLOWERS_BEHIND: usize = 256;

/// Starts of containers that were asked for and that the engine hasn't told of yet.
const VETTED_MAX: usize = 256;

/// Warnings of one VM that are kept.
const WARNINGS_MAX: usize = 64;

/// A VM whose engine hasn't said by then what runs is up all the same.
const FIRST_CENSUS_WITHIN: Duration = Duration::from_secs(30);

/// Watchers may see a lease that comes and goes so late: a client that makes many requests doesn't wait for what each of
/// them looks like.
const PUBLISH_WITHIN: Duration = Duration::from_millis(2);

/// The guest of the VM that is up.
#[derive(Debug)]
struct Guest {
    generation: Generation,
    agent: Agent,
    ended: watch::Sender<Option<EndReason>>,
    pace: Pace,
}

/// Whether a guest can serve.
#[derive(Debug)]
enum Pace {
    Runs,
    /// It is being run on after a doze. Who was granted it meanwhile gets it when it knows what time it is.
    Rousing {
        order: u64,
        granted: Vec<(oneshot::Sender<Result<Granted, Refused>>, Granted)>,
    },
}

impl Guest {
    fn new(generation: Generation, agent: Agent) -> Self {
        Self { generation, agent, ended: watch::channel(None).0, pace: Pace::Runs }
    }

    /// Gives it to those who wait for it to run on.
    fn runs(&mut self) {
        if let Pace::Rousing { granted, .. } = std::mem::replace(&mut self.pace, Pace::Runs) {
            for (reply, granted) in granted {
                let _ = reply.send(Ok(granted));
            }
        }
    }
}

/// The holds of root processes that an earlier host had started, by process id.
#[derive(Debug, Default)]
struct Left {
    generation: Generation,
    processes: BTreeMap<u32, LeaseId>,
}

impl Left {
    /// The hold of a process that is gone.
    fn take_if_of(&mut self, generation: Generation, pid: u32) -> Option<LeaseId> {
        if generation == self.generation { self.processes.remove(&pid) } else { None }
    }
}

pub(super) struct Task<M> {
    facts: Arc<Facts>,
    config: Config,
    session: Session,
    trace: SharedTrace,
    machines: M,
    inbox: Inbox,
    waiting: BTreeMap<LeaseId, oneshot::Sender<Result<Granted, Refused>>>,
    sleepers: BTreeMap<RequestId, oneshot::Sender<SleepAnswer>>,
    requests: u64,
    guest: Option<Guest>,
    /// How often a VM was run on after a doze.
    rouses: u64,
    /// The generation that an earlier host left up, until it is found.
    adopting: Option<Generation>,
    history: Journal<HistoryEntry>,
    events: Journal<SessionEvent>,
    followers: broadcast::Sender<SessionEvent>,
    hooks: Hooks,
    /// What is not as it should be with the latest VM, and the request that gets to hear of it.
    warnings: Vec<String>,
    waker: Option<LeaseId>,
    /// Processes started by `exec` that run, and in which VM.
    execs: (Generation, u32),
    /// Root processes that run though the host that started them is gone.
    left: Left,
    lease_ids: Arc<AtomicU64>,
    /// Containers whose start the hooks were asked about, by the name or id that was given.
    vetted: VecDeque<String>,
    info: watch::Sender<SessionInfo>,
    /// Since when watchers see something that isn't so any more.
    stale_since: Option<Instant>,
}

impl<M: Machines> Task<M> {
    pub(super) fn new(
        facts: Facts,
        config: Config,
        durable: Durable,
        machines: M,
        inbox: Inbox,
        adopting: Option<Generation>,
        hooks: Hooks,
    ) -> Self {
        let session = Session::new(config, durable, now());
        Self {
            config,
            trace: SharedTrace::new(&session, &facts.session_dir),
            machines,
            inbox,
            waiting: BTreeMap::new(),
            sleepers: BTreeMap::new(),
            requests: 0,
            guest: None,
            rouses: 0,
            adopting,
            history: Journal::open(facts.session_dir.join("history.jsonl"), HISTORY_MAX),
            events: Journal::open(facts.session_dir.join("facts.jsonl"), EVENTS_MAX),
            followers: broadcast::channel(FOLLOWERS_BEHIND).0,
            hooks,
            warnings: Vec::new(),
            waker: None,
            execs: (Generation(0), 0),
            left: Left::default(),
            lease_ids: Arc::new(AtomicU64::new(1)),
            vetted: VecDeque::new(),
            info: watch::channel(view::info(&facts, &session, config)).0,
            stale_since: None,
            session,
            facts: Arc::new(facts),
        }
    }

    pub(super) fn info(&self) -> watch::Receiver<SessionInfo> {
        self.info.subscribe()
    }

    /// Where leases get their numbers.
    pub(super) fn lease_ids(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.lease_ids)
    }

    pub(super) fn trace(&self) -> SharedTrace {
        self.trace.clone()
    }

    /// Tells the hooks that there is a session, if none was ever told of it. Returns what they say.
    pub(super) fn tell_creation(&mut self) -> watch::Receiver<Option<Verdict>> {
        if self.events.last().is_some() {
            return watch::channel(Some(Verdict::Fine)).1;
        }
        let (reply, answer) = oneshot::channel();
        let (sender, verdict) = watch::channel(None);
        let incarnation = self.session.view().incarnation.0;
        self.tell(Fact::SessionCreated { incarnation }, Reply::Verdict(reply));
        tokio::spawn(async move {
            sender.send_replace(Some(answer.await.unwrap_or(Verdict::Fine)));
        });
        verdict
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        let mut actions = Actions::new();
        loop {
            let event = tokio::select! {
                biased;
                message = inbox.recv() => match message {
                    Some(message) => self.receive(message),
                    None => return,
                },
                () = due(self.session.next_deadline()) => Some(Event::DeadlineReached),
                () = publish_by(self.stale_since) => {
                    self.publish();
                    None
                }
            };
            let Some(event) = event else { continue };
            tracing::debug!(?event, "event");
            let now = now();
            self.trace.note(now, &event);
            self.session.handle(now, event, &mut actions);
            debug_assert_eq!(self.session.check(), Ok(()));
            let todo: Vec<_> = actions.drain().collect();
            // What must survive is also what watchers must see at once.
            let is_weighty = todo.iter().any(|action| matches!(action, Action::Persist(_)));
            for action in todo {
                tracing::debug!(?action, "action");
                self.act(action);
            }
            if is_weighty {
                self.publish();
            }
        }
    }

    /// Turns a message into the core's event, and keeps what only the driver needs.
    fn receive(&mut self, message: Message) -> Option<Event> {
        match message {
            Message::Event(event) => Some(self.complete(event)),
            Message::Lease { claim, lease, reply } => {
                self.waiting.insert(lease, reply);
                Some(Event::LeaseRequested { lease, claim })
            }
            Message::Ready(ready) => {
                self.take_first_census(ready);
                None
            }
            Message::Revived { generation, agent } => {
                if self.session.view().generation == generation {
                    self.guest = Some(Guest::new(generation, agent));
                }
                None
            }
            Message::Roused { generation, order } => {
                let is_it = |guest: &Guest| {
                    guest.generation == generation
                        && matches!(guest.pace, Pace::Rousing { order: latest, .. } if latest == order)
                };
                if let Some(guest) = self.guest.as_mut().filter(|guest| is_it(guest)) {
                    guest.runs();
                }
                None
            }
            Message::Note { generation, what } => {
                self.warn(generation, what);
                None
            }
            Message::FirstCensus { ready, census } => self.ready(ready, census),
            Message::ProcessEnded { generation, pid } => {
                let lease = self.left.take_if_of(generation, pid)?;
                Some(Event::LeaseDropped { lease })
            }
            Message::Sleep { how, reply } => {
                fault::fall(&self.facts.runtime_dir, "owner.sleep");
                self.requests += 1;
                let request = RequestId(self.requests);
                self.sleepers.insert(request, reply);
                Some(Event::SleepRequested { request, how })
            }
            Message::Engine { generation, events, execs, taken } => {
                self.execs = (generation, execs);
                for event in events {
                    self.engine_told(generation, event);
                }
                let _ = taken.send(());
                None
            }
            Message::HookFailed { generation, words } => {
                self.remember(view::entry("hook_failed", generation.unwrap_or_default(), words));
                None
            }
            Message::MayStart { generation, container, reply } => {
                if self.vetted.len() == VETTED_MAX {
                    self.vetted.pop_front();
                }
                self.vetted.push_back(container.clone());
                self.tell(Fact::ContainerStarting { generation, container }, Reply::Verdict(reply));
                None
            }
            Message::Change(change) => Some(self.change(change)),
            Message::Ask(question) => {
                self.answer(question);
                None
            }
        }
    }

    /// Takes what is to be another way from now on.
    fn change(&mut self, change: ChangeSettings) -> Event {
        let ChangeSettings { idle_timeout, doze_seconds, crash, asleep_answers } = change;
        if let Some(timeout) = idle_timeout {
            self.config.grace = view::grace(timeout);
        }
        if let Some(seconds) = doze_seconds {
            self.config.doze = view::doze(seconds);
        }
        if let Some(policy) = crash {
            self.config.crash = view::crash(policy);
        }
        if let Some(may) = asleep_answers {
            self.facts.face.asleep.enable(may);
        }
        Event::Configured(Box::new(self.config))
    }

    /// Adds to an event what only the driver knows.
    fn complete(&mut self, mut event: Event) -> Event {
        match &mut event {
            // Whoever waited is gone.
            Event::LeaseDropped { lease } => drop(self.waiting.remove(lease)),
            // A list of containers doesn't tell of execs.
            Event::ContainersChanged { generation, census }
            | Event::ContainersCounted { ask: Ask { generation, .. }, census: Some(census) }
                if *generation == self.execs.0 =>
            {
                census.execs = self.execs.1;
            }
            _ => {}
        }
        event
    }

    /// Whether a VM of this generation is being brought up.
    fn is_awaited(&self, generation: Generation) -> bool {
        let view = self.session.view();
        view.phase == PhaseName::Starting && view.generation == generation
    }

    /// What runs in it is part of being ready: a VM with containers has a hold from its first moment. An engine that
    /// doesn't say is asked again before any sleep.
    fn take_first_census(&self, ready: Ready) {
        let inbox = self.inbox.clone();
        tokio::spawn(async move {
            let counted = timeout(FIRST_CENSUS_WITHIN, crate::machine::first_census(&ready.agent)).await;
            let census = counted.unwrap_or_else(|_| Err("no answer in time".to_owned())).unwrap_or_default();
            inbox.send(Message::FirstCensus { ready, census });
        });
    }

    /// The VM serves from now on. What runs in it that an earlier host had started holds it as it did then.
    fn ready(&mut self, ready: Ready, census: Census) -> Option<Event> {
        let Ready { generation, how, agent, processes, _counted } = ready;
        // One that ended meanwhile must not take the place of its successor.
        if !self.is_awaited(generation) {
            return None;
        }
        self.guest = Some(Guest::new(generation, agent));
        self.execs = (generation, census.execs);
        let holds: Vec<_> = processes
            .into_iter()
            .map(|process| {
                (process.pid, LeaseId(self.lease_ids.fetch_add(1, Ordering::Relaxed)), process.command)
            })
            .collect();
        self.left =
            Left { generation, processes: holds.iter().map(|(pid, lease, _)| (*pid, *lease)).collect() };
        let claim = |command: String| Claim {
            kind: HoldKind::RootProcess,
            policy: Policy::ExistingOnly,
            owner: "an earlier host's client".into(),
            reason: command.into(),
        };
        let holds = holds.into_iter().map(|(_, lease, command)| (lease, claim(command)));
        if self.adopting.take_if(|adopting| *adopting == generation).is_some() {
            return Some(Event::VmAdopted { generation, census, holds: holds.collect() });
        }
        for (lease, claim) in holds {
            self.inbox.send(Message::Event(Event::LeaseRequested { lease, claim }));
        }
        Some(Event::VmReady { generation, how, census })
    }

    fn answer(&mut self, question: Question) {
        match question {
            Question::Info(reply) => {
                if self.stale_since.is_some() {
                    self.publish();
                }
                let mut info = self.info.borrow().clone();
                // Its checksum is made while nothing else changes.
                info.snapshot = view::snapshot(&self.facts, &info.vm);
                let _ = reply.send(info);
            }
            Question::History(reply) => {
                let _ = reply.send(self.history.entries().cloned().collect());
            }
            Question::Events(reply) => {
                let told = self.events.entries().cloned().collect();
                let _ = reply.send((told, self.followers.subscribe()));
            }
            Question::Why(reply) => {
                let _ = reply.send(crate::why::why(&self.session, self.config, &self.warnings));
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Persist(durable) => self.persist(&durable),
            Action::StartVm { generation, from, bound } => {
                self.warnings.clear();
                self.waker = self.waiting.keys().next().copied();
                self.machines.start(generation, from, bound);
            }
            Action::CancelStart { generation } => self.machines.cancel(generation),
            Action::BeginSleep { ask, how, .. } => self.machines.sleep(ask, how),
            Action::KillVm { generation } => self.machines.kill(generation),
            Action::CountContainers { ask, bound } => self.machines.count(ask, bound),
            Action::ResumeVm { generation } => self.machines.resume(generation),
            Action::Doze { generation } => self.machines.doze(generation),
            Action::Rouse { generation } => self.rouse(generation),
            Action::RunStoppingHooks { ask, how, .. } => {
                let how = view::vm_end(how);
                self.tell(Fact::VmStopping { generation: ask.generation.0, how }, Reply::Sleep(ask));
            }
            Action::AnnounceStarted { generation, how } => {
                self.tell(Fact::VmStarted { generation: generation.0, how: view::how(how) }, Reply::Nobody);
            }
            Action::RunSleepFailedHooks { generation, reason } => {
                let reason = reason.to_string();
                self.tell(Fact::VmSleepFailed { generation: generation.0, reason }, Reply::Nobody);
            }
            Action::Grant { lease, generation } => self.grant(lease, generation),
            Action::Refuse { lease, refusal } => {
                if let Some(reply) = self.waiting.remove(&lease) {
                    let _ = reply.send(Err(Refused(refusal)));
                }
            }
            Action::EndLeases { generation, reason } => self.end_leases(generation, reason),
            Action::AnswerSleep { request, outcome } => self.answer_sleep(request, outcome),
            Action::Record(record) => self.record(&record),
            Action::AnnounceTerminated { incarnation } => {
                self.publish();
                if let Some(fact) = view::session_stopping(&self.session, incarnation) {
                    self.tell(fact, Reply::Nobody);
                }
            }
            Action::Publish => {
                self.stale_since.get_or_insert_with(Instant::now);
            }
        }
    }

    /// Written in place: the next action may not begin before it is on disk, and the owner has nothing else to do.
    fn persist(&self, durable: &Durable) {
        if let Err(error) = state::write(&self.facts.session_dir, durable) {
            tracing::error!(%error, "the session's state can't be written");
        }
    }

    /// Tells the hooks and whoever follows.
    fn tell(&mut self, fact: Fact, reply: Reply) {
        let event = SessionEvent {
            sequence: self.events.last().map_or(0, |event| event.sequence) + 1,
            at: jiff::Timestamp::now(),
            session: self.facts.settings.name.clone(),
            fact,
        };
        self.events.push(event.clone());
        let _ = self.followers.send(event.clone());
        if let Err(Job { event, reply }) = self.hooks.tell(Job { event, reply }) {
            let words = format!("{}: too many events wait for hooks", event.fact.name());
            self.remember(view::entry("hook_failed", event.fact.generation().unwrap_or_default(), words));
            hooks::answer(&self.inbox, reply, Verdict::Fine);
        }
    }

    fn engine_told(&mut self, generation: Generation, event: EngineEvent) {
        let generation = generation.0;
        match event {
            EngineEvent::Started { id, name } => {
                let is_vetted = |given: &String| *given == name || id.starts_with(given.as_str());
                if let Some(index) = self.vetted.iter().position(is_vetted) {
                    self.vetted.remove(index);
                    return;
                }
                let (reply, verdict) = oneshot::channel();
                let fact = Fact::ContainerStarting { generation, container: id.clone() };
                self.tell(fact, Reply::Verdict(reply));
                let (inbox, agent) =
                    (self.inbox.clone(), self.guest.as_ref().map(|guest| guest.agent.clone()));
                tokio::spawn(async move {
                    let Ok(Verdict::Veto(why)) = verdict.await else { return };
                    let Some(agent) = agent else { return };
                    let stopped = crate::machine::stop_container(&agent, &id).await;
                    let outcome = stopped.map_or_else(
                        |error| format!("can't be stopped: {error}"),
                        |()| "was stopped".to_owned(),
                    );
                    let words =
                        format!("the container {name} was started within the VM and {outcome}: {why}");
                    inbox.send(Message::Note { generation: Generation(generation), what: words });
                });
            }
            EngineEvent::Died { id } => {
                self.tell(Fact::ContainerStopping { generation, container: id }, Reply::Nobody);
            }
            EngineEvent::ImageCreated { image } => {
                self.tell(Fact::ImageCreated { generation, image }, Reply::Nobody);
            }
            EngineEvent::ImageDeleted { image } => {
                self.tell(Fact::ImageDeleted { generation, image }, Reply::Nobody);
            }
        }
    }

    fn warn(&mut self, generation: Generation, words: String) {
        tracing::warn!(generation = generation.0, words, "warning");
        if generation == self.session.view().generation && self.warnings.len() < WARNINGS_MAX {
            self.warnings.push(words.clone());
        }
        self.remember(view::entry("warning", generation.0, words));
    }

    fn rouse(&mut self, generation: Generation) {
        self.rouses += 1;
        let order = self.rouses;
        if let Some(guest) = self.guest.as_mut().filter(|guest| guest.generation == generation) {
            guest.pace = Pace::Rousing { order, granted: Vec::new() };
        }
        self.machines.rouse(generation, order);
    }

    fn grant(&mut self, lease: LeaseId, generation: Generation) {
        let Some(reply) = self.waiting.remove(&lease) else { return };
        let guest = self.guest.as_mut().filter(|guest| guest.generation == generation);
        let granted = match guest {
            Some(guest) => {
                let warnings = match self.waker.take_if(|waker| *waker == lease) {
                    Some(_) => self.warnings.clone(),
                    None => Vec::new(),
                };
                let (agent, ended) = (guest.agent.for_client(), guest.ended.subscribe());
                let given = Granted { generation, agent, ended, warnings };
                if let Pace::Rousing { granted, .. } = &mut guest.pace {
                    granted.push((reply, given));
                    return;
                }
                Ok(given)
            }
            // The core grants only on a VM that was reported ready, so there is a guest; were there none, nobody hangs.
            None => Err(Refused(Refusal::NotRunning)),
        };
        let _ = reply.send(granted);
    }

    /// A VM whose suspend fails runs on: it can be leased again.
    fn end_leases(&mut self, generation: Generation, reason: EndReason) {
        if let Some(guest) = self.guest.as_mut().filter(|guest| guest.generation == generation) {
            guest.ended.send_replace(Some(reason));
            guest.ended = watch::channel(None).0;
            guest.runs();
        }
    }

    fn answer_sleep(&mut self, request: RequestId, outcome: SleepOutcome) {
        let Some(reply) = self.sleepers.remove(&request) else { return };
        let failed = |reason: &str| SleepAnswer::Failed { reason: reason.to_owned() };
        let _ = reply.send(match outcome {
            SleepOutcome::NoVm => SleepAnswer::NoVm,
            SleepOutcome::Busy => SleepAnswer::Busy { holds: view::holds(&self.session) },
            SleepOutcome::Disabled => SleepAnswer::Disabled,
            SleepOutcome::Asleep { generation, how } => {
                SleepAnswer::Asleep { generation: generation.0, how: view::idle_action(how) }
            }
            SleepOutcome::Failed(reason) => failed(&reason),
            SleepOutcome::Terminated => failed("the session was terminated instead"),
            SleepOutcome::TooMany => failed("too many others asked for the same"),
        });
    }

    fn record(&mut self, record: &Record) {
        // Of a disk that goes with its VM nothing is left to tell of.
        if let Record::Slept { generation, how, trouble: None, .. } = record
            && !self.facts.settings.ephemeral
        {
            self.facts.face.asleep.seal(generation.0, *how == SleepHow::Suspend);
        }
        if let Record::Terminated { .. } = record {
            self.facts.face.asleep.memory_goes();
        }
        match record {
            Record::Slept { how: SleepHow::Suspend, trouble: None, .. } => {
                self.facts.face.ports.vm_gone(Stays::Everybody);
            }
            // A suspend that went wrong keeps no more than a stop.
            Record::Slept { .. } | Record::Crashed { .. } => {
                self.facts.face.ports.vm_gone(Stays::WhoeverRestarts);
            }
            Record::Terminated { termination, .. } if termination.reason != TerminationReason::Crashed => {
                self.facts.face.ports.vm_gone(Stays::Nobody);
            }
            _ => {}
        }
        if let Record::Opened { incarnation } = record {
            self.tell(Fact::SessionCreated { incarnation: incarnation.0 }, Reply::Nobody);
        }
        self.remember(view::history_entry(record));
    }

    fn remember(&mut self, entry: HistoryEntry) {
        tracing::info!(
            what = entry.what,
            generation = entry.generation,
            how = entry.how,
            ms = entry.duration_ms,
            reason = entry.reason,
            "history"
        );
        self.history.push(entry);
    }

    fn publish(&mut self) {
        self.stale_since = None;
        let info = view::info(&self.facts, &self.session, self.config);
        self.info.send_replace(info);
    }
}

/// Waits until watchers must see what has changed since then; for ever if nothing has.
async fn publish_by(stale_since: Option<Instant>) {
    match stale_since {
        Some(since) => sleep_until(since + PUBLISH_WITHIN).await,
        None => std::future::pending().await,
    }
}
