//! The task itself: handle, persist, act.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use dormouse_api::{HistoryEntry, SessionInfo, SleepAnswer};
use dormouse_lifecycle::{
    Action, Actions, Ask, Config, Durable, EndReason, Event, Generation, LeaseId, Record, Refusal, RequestId,
    Session, SleepOutcome,
};
use dormouse_mux::Agent;
use tokio::sync::{mpsc, oneshot, watch};

use super::{Facts, Granted, Inbox, Message};
use crate::clock::{due, now};
use crate::lease::Refused;
use crate::machine::Machines;
use crate::state;
use crate::view;

/// Starts, sleeps and crashes that are remembered.
const HISTORY_MAX: usize = 1000;

/// The guest of the VM that is up.
#[derive(Debug)]
struct Guest {
    generation: Generation,
    agent: Agent,
    ended: watch::Sender<Option<EndReason>>,
}

pub(super) struct Task<M> {
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
    pub(super) fn new(
        facts: Facts,
        config: Config,
        durable: Durable,
        machines: M,
        inbox: Inbox,
        adopting: Option<Generation>,
    ) -> (Self, watch::Receiver<SessionInfo>) {
        let session = Session::new(config, durable, now());
        let facts = Arc::new(facts);
        let (info, seen) = watch::channel(view::info(&facts, &session, config));
        let task = Self {
            facts,
            config,
            session,
            machines,
            inbox,
            waiting: BTreeMap::new(),
            sleepers: BTreeMap::new(),
            requests: 0,
            guest: None,
            adopting,
            history: VecDeque::new(),
            info,
        };
        (task, seen)
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
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
            Message::Ready { generation, how, agent } => {
                // What runs in it is part of being ready: a VM with containers has a hold from its first moment.
                let inbox = self.inbox.clone();
                tokio::spawn(async move {
                    let counted =
                        tokio::time::timeout(Duration::from_secs(30), crate::machine::census(&agent)).await;
                    let census =
                        counted.unwrap_or_else(|_| Err("no answer in time".to_owned())).unwrap_or_default();
                    inbox.send(Message::FirstCensus { generation, how, census, agent });
                });
                None
            }
            Message::Revived { generation, agent } => {
                self.guest = Some(Guest { generation, agent, ended: watch::channel(None).0 });
                None
            }
            Message::Note { generation, what } => {
                self.remember(view::note(generation, &what));
                None
            }
            Message::FirstCensus { generation, how, census, agent } => {
                self.guest = Some(Guest { generation, agent, ended: watch::channel(None).0 });
                if self.adopting.take_if(|adopting| *adopting == generation).is_some() {
                    Some(Event::VmAdopted { generation, census, holds: Vec::new() })
                } else {
                    Some(Event::VmReady { generation, how, census })
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
            Action::StartVm { generation, from, bound } => self.machines.start(generation, from, bound),
            Action::CancelStart { generation } => self.machines.cancel(generation),
            Action::BeginSleep { ask, how, .. } => self.machines.sleep(ask, how),
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
        if let Record::Slept { generation, trouble: None, .. } = record {
            self.facts.asleep.seal(generation.0);
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
