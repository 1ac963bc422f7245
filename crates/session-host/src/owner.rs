//! The owner task: the only place where a session's lifecycle changes.
//!
//! handle, persist, act: an event goes through the pure core; what must survive is on disk before an action that needs
//! it is begun; actions start work elsewhere, whose results come back as events. The task awaits nothing but its inbox
//! and the next deadline.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dormouse_api::{HistoryEntry, SessionInfo, SleepAnswer};
use dormouse_lifecycle::{
    Action, Actions, Ask, Census, Claim, Config, Durable, EndReason, Event, Generation, LastVm, LeaseId,
    Policy, Record, Refusal, RequestId, Session, SleepOutcome,
};
use dormouse_mux::Agent;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::clock::now;
use crate::lease::{Lease, LeaseClaim, Refused};
use crate::machine::{HOW, Machines};
use crate::state;
use crate::view;

/// Requests that are waiting or served at a time. Everything in the inbox stands for one of these, for a VM's own
/// bounded events, or for a control request: so the inbox is bounded by it.
const REQUESTS_MAX: usize = 4096;

/// Starts, sleeps and crashes that are remembered.
const HISTORY_MAX: usize = 1000;

/// What comes to the owner.
#[derive(Debug)]
pub(crate) enum Message {
    /// For the core.
    Event(Event),
    /// Somebody wants a lease.
    Lease { claim: Claim, lease: LeaseId, reply: oneshot::Sender<Result<Granted, Refused>> },
    /// The guest answers and its engine lists.
    Ready { generation: Generation, agent: Agent },
    /// It was asked what runs, once ready.
    FirstCensus { generation: Generation, census: Census, agent: Agent },
    /// Somebody wants the VM asleep.
    Sleep { reply: oneshot::Sender<SleepAnswer> },
    /// Somebody wants to know what happened so far.
    History { reply: oneshot::Sender<Vec<HistoryEntry>> },
}

/// What a granted request gets to make its lease of.
#[derive(Debug)]
pub(crate) struct Granted {
    generation: Generation,
    agent: Agent,
    ended: watch::Receiver<Option<EndReason>>,
}

/// The way to the owner.
#[derive(Debug, Clone)]
pub struct Inbox(mpsc::UnboundedSender<Message>);

impl Inbox {
    /// An owner that is gone has nobody left to serve.
    pub(crate) fn send(&self, message: Message) {
        let _ = self.0.send(message);
    }
}

/// Who asks for a lease, and what for.
#[derive(Debug, Clone)]
pub struct Claimant {
    /// What the hold is.
    pub kind: dormouse_lifecycle::HoldKind,
    /// May it start a VM?
    pub policy: Policy,
    /// Who, in words.
    pub owner: String,
    /// What for, in words.
    pub reason: String,
}

/// What of a session never changes, or only through its host.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The session as the service tells it.
    pub settings: dormouse_api::link::HostSettings,
    /// Where the state lies.
    pub session_dir: PathBuf,
    /// Where the sockets lie.
    pub runtime_dir: PathBuf,
}

/// A handle on the owner task. Clones are the same owner.
#[derive(Debug, Clone)]
pub struct Owner {
    inbox: Inbox,
    info: watch::Receiver<SessionInfo>,
    requests: Arc<Semaphore>,
    next: Arc<AtomicU64>,
}

impl Owner {
    /// Starts the owner of a session from what its last host left.
    ///
    /// # Errors
    /// When that can't be read.
    pub fn start<M: Machines>(
        facts: Facts,
        config: Config,
        machines: impl FnOnce(Inbox) -> M,
    ) -> Result<Self, state::StateError> {
        let durable = state::read(&facts.session_dir)?;
        let (sender, inbox) = mpsc::unbounded_channel();
        let sender = Inbox(sender);
        let left_up = match &durable.vm {
            LastVm::Up { .. } if durable.termination.is_none() => Some(durable.generation),
            _ => None,
        };
        let mut machines = machines(sender.clone());
        if let Some(generation) = left_up {
            machines.adopt(generation, config.limits.boot);
        }
        let session = Session::new(config, durable, now());
        let facts = Arc::new(facts);
        let (info, seen) = watch::channel(view::info(&facts, &session, config));
        let task = Task {
            facts,
            config,
            session,
            machines,
            inbox: sender.clone(),
            waiting: BTreeMap::new(),
            sleepers: BTreeMap::new(),
            requests: 0,
            guest: None,
            adopting: left_up,
            history: VecDeque::new(),
            info,
        };
        tokio::spawn(task.run(inbox));
        Ok(Self {
            inbox: sender,
            info: seen,
            requests: Arc::new(Semaphore::new(REQUESTS_MAX)),
            next: Arc::new(AtomicU64::new(1)),
        })
    }

    /// Asks for a lease. Dropping the future takes the request back.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn lease(&self, claimant: Claimant) -> Result<HeldLease, Refused> {
        let too_many = Refused(Refusal::TooMany { limit: REQUESTS_MAX });
        let permit = Arc::clone(&self.requests).try_acquire_owned().map_err(|_| too_many)?;
        let id = LeaseId(self.next.fetch_add(1, Ordering::Relaxed));
        let (reply, granted) = oneshot::channel();
        let Claimant { kind, policy, owner, reason } = claimant;
        let claim = Claim { kind, policy, owner: owner.into(), reason: reason.into() };
        self.inbox.send(Message::Lease { claim, lease: id, reply });
        let claim = LeaseClaim { id, inbox: self.inbox.clone() };
        let Granted { generation, agent, ended } =
            granted.await.unwrap_or(Err(Refused(Refusal::HostLeaving)))?;
        Ok(HeldLease { lease: Lease { _claim: claim, generation, agent, ended }, _permit: permit })
    }

    /// Feeds the core an event from outside: terminate, start, a changed setting, a pin.
    pub fn tell(&self, event: Event) {
        self.inbox.send(Message::Event(event));
    }

    /// Asks for the idle path now, with all its guards.
    pub async fn sleep(&self) -> SleepAnswer {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Message::Sleep { reply });
        answer.await.unwrap_or(SleepAnswer::Failed { reason: "the session's host is going down".to_owned() })
    }

    /// What happened so far, oldest first.
    pub async fn history(&self) -> Vec<HistoryEntry> {
        let (reply, history) = oneshot::channel();
        self.inbox.send(Message::History { reply });
        history.await.unwrap_or_default()
    }

    /// The session as it is, and its changes.
    #[must_use]
    pub fn info(&self) -> watch::Receiver<SessionInfo> {
        self.info.clone()
    }
}

/// A lease, and its place among the requests.
#[derive(Debug)]
pub struct HeldLease {
    lease: Lease,
    _permit: OwnedSemaphorePermit,
}

impl std::ops::Deref for HeldLease {
    type Target = Lease;

    fn deref(&self) -> &Lease {
        &self.lease
    }
}

/// The guest of the VM that is up.
#[derive(Debug)]
struct Guest {
    generation: Generation,
    agent: Agent,
    ended: watch::Sender<Option<EndReason>>,
}

struct Task<M> {
    facts: Arc<Facts>,
    config: Config,
    session: Session,
    machines: M,
    inbox: Inbox,
    waiting: BTreeMap<LeaseId, oneshot::Sender<Result<Granted, Refused>>>,
    sleepers: BTreeMap<RequestId, oneshot::Sender<SleepAnswer>>,
    requests: u64,
    guest: Option<Guest>,
    /// The generation that an earlier host left up, until it is found.
    adopting: Option<Generation>,
    history: VecDeque<HistoryEntry>,
    info: watch::Sender<SessionInfo>,
}

impl<M: Machines> Task<M> {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        let mut actions = Actions::new();
        loop {
            let event = tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => self.receive(message),
                    None => return,
                },
                () = due(self.session.next_deadline()) => Some(Event::DeadlineReached),
            };
            let Some(event) = event else { continue };
            tracing::debug!(?event, "event");
            self.session.handle(now(), event, &mut actions);
            let todo: Vec<_> = actions.drain().collect();
            for action in todo {
                tracing::debug!(?action, "action");
                self.act(action);
            }
        }
    }

    /// Turns a message into the core's event, and keeps what only the driver needs.
    fn receive(&mut self, message: Message) -> Option<Event> {
        match message {
            Message::Event(event) => {
                if let Event::GraceChanged(grace) = &event {
                    self.config.grace = *grace;
                }
                Some(event)
            }
            Message::Lease { claim, lease, reply } => {
                self.waiting.insert(lease, reply);
                Some(Event::LeaseRequested { lease, claim })
            }
            Message::Ready { generation, agent } => {
                // What runs in it is part of being ready: a VM with containers has a hold from its first moment.
                let inbox = self.inbox.clone();
                tokio::spawn(async move {
                    let counted =
                        tokio::time::timeout(Duration::from_secs(30), crate::machine::census(&agent)).await;
                    let census =
                        counted.unwrap_or_else(|_| Err("no answer in time".to_owned())).unwrap_or_default();
                    inbox.send(Message::FirstCensus { generation, census, agent });
                });
                None
            }
            Message::FirstCensus { generation, census, agent } => {
                self.guest = Some(Guest { generation, agent, ended: watch::channel(None).0 });
                if self.adopting.take_if(|adopting| *adopting == generation).is_some() {
                    Some(Event::VmAdopted { generation, census, holds: Vec::new() })
                } else {
                    Some(Event::VmReady { generation, how: HOW, census })
                }
            }
            Message::Sleep { reply } => {
                self.requests += 1;
                let request = RequestId(self.requests);
                self.sleepers.insert(request, reply);
                Some(Event::SleepRequested { request })
            }
            Message::History { reply } => {
                let _ = reply.send(self.history.iter().cloned().collect());
                None
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Persist(durable) => self.persist(&durable),
            Action::StartVm { generation, bound, .. } => self.machines.start(generation, bound),
            Action::CancelStart { generation } => self.machines.cancel(generation),
            Action::BeginSleep { ask, .. } => self.machines.shut_down(ask),
            Action::KillVm { generation } => self.machines.kill(generation),
            Action::CountContainers { ask, bound } => self.machines.count(ask, bound),
            Action::ResumeVm { generation } => self.machines.resume(generation),
            Action::RunStoppingHooks { ask, .. } => self.no_hooks(ask),
            Action::AnnounceStarted { .. } | Action::RunSleepFailedHooks { .. } => {}
            Action::Grant { lease, generation } => self.grant(lease, generation),
            Action::Refuse { lease, refusal } => {
                if let Some(reply) = self.waiting.remove(&lease) {
                    let _ = reply.send(Err(Refused(refusal)));
                }
            }
            Action::EndLeases { generation, reason } => {
                if let Some(guest) = self.guest.take_if(|guest| guest.generation == generation) {
                    guest.ended.send_replace(Some(reason));
                }
            }
            Action::AnswerSleep { request, outcome } => self.answer_sleep(request, outcome),
            Action::Record(record) => self.record(&record),
            Action::Publish | Action::AnnounceTerminated { .. } => self.publish(),
        }
    }

    /// Written in place: the next action may not begin before it is on disk, and the owner has nothing else to do.
    fn persist(&self, durable: &Durable) {
        if let Err(error) = state::write(&self.facts.session_dir, durable) {
            tracing::error!(%error, "the session's state can't be written");
        }
    }

    /// This session has no hooks: all of them are done.
    fn no_hooks(&self, ask: Ask) {
        self.inbox.send(Message::Event(Event::HooksDone { ask }));
    }

    fn grant(&mut self, lease: LeaseId, generation: Generation) {
        let Some(reply) = self.waiting.remove(&lease) else { return };
        let guest = self.guest.as_ref().filter(|guest| guest.generation == generation);
        let granted = match guest {
            Some(guest) => {
                Ok(Granted { generation, agent: guest.agent.clone(), ended: guest.ended.subscribe() })
            }
            // The core grants only on a VM that was reported ready, so there is a guest; were there none, nobody hangs.
            None => Err(Refused(Refusal::NotRunning)),
        };
        let _ = reply.send(granted);
    }

    fn answer_sleep(&mut self, request: RequestId, outcome: SleepOutcome) {
        let Some(reply) = self.sleepers.remove(&request) else { return };
        let failed = |reason: &str| SleepAnswer::Failed { reason: reason.to_owned() };
        let _ = reply.send(match outcome {
            SleepOutcome::NoVm => SleepAnswer::NoVm,
            SleepOutcome::Busy => SleepAnswer::Busy { holds: view::holds(&self.session) },
            SleepOutcome::Disabled => SleepAnswer::Disabled,
            SleepOutcome::Asleep { generation, .. } => SleepAnswer::Asleep { generation: generation.0 },
            SleepOutcome::Failed(reason) => failed(&reason),
            SleepOutcome::Terminated => failed("the session was terminated instead"),
            SleepOutcome::TooMany => failed("too many others asked for the same"),
        });
    }

    fn record(&mut self, record: &Record) {
        let entry = view::history_entry(record);
        tracing::info!(
            what = entry.what,
            generation = entry.generation,
            how = entry.how,
            ms = entry.duration_ms,
            reason = entry.reason,
            "history"
        );
        if self.history.len() == HISTORY_MAX {
            self.history.pop_front();
        }
        self.history.push_back(entry);
    }

    fn publish(&self) {
        let info = view::info(&self.facts, &self.session, self.config);
        self.info.send_replace(info);
    }
}

/// Waits until the core wants to be called; for ever if it doesn't.
async fn due(deadline: Option<dormouse_lifecycle::Timestamp>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(Instant::now() + deadline.since(now())).await,
        None => std::future::pending().await,
    }
}
