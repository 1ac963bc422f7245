//! The owner task: the only place where a session's lifecycle changes.
//!
//! handle, persist, act: an event goes through the pure core; what must survive is on disk before an action that needs
//! it is begun; actions start work elsewhere, whose results come back as events. The task awaits nothing but its inbox
//! and the next deadline.

mod task;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_api::{HistoryEntry, SessionInfo, SleepAnswer};
use dormouse_lifecycle::{
    Census, Claim, Config, EndReason, Event, Generation, LastVm, LeaseId, Policy, Refusal, StartHow,
};
use dormouse_mux::Agent;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::lease::{Lease, LeaseClaim, Refused};
use crate::machine::Machines;
use crate::owner::task::Task;
use crate::state;

/// Requests that are waiting or served at a time. Everything in the inbox stands for one of these, for a VM's own
/// bounded events, or for a control request: so the inbox is bounded by it.
const REQUESTS_MAX: usize = 4096;

/// What comes to the owner.
#[derive(Debug)]
pub(crate) enum Message {
    /// For the core.
    Event(Event),
    /// Somebody wants a lease.
    Lease { claim: Claim, lease: LeaseId, reply: oneshot::Sender<Result<Granted, Refused>> },
    /// The guest answers and its engine lists.
    Ready { generation: Generation, how: StartHow, agent: Agent },
    /// A guest that was to be suspended runs on, on a new channel.
    Revived { generation: Generation, agent: Agent },
    /// Something was tried in vain, in words for the history.
    Note { generation: Generation, what: String },
    /// It was asked what runs, once ready.
    FirstCensus { generation: Generation, how: StartHow, census: Census, agent: Agent },
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
    /// What is answered while the VM sleeps.
    pub asleep: crate::asleep::Asleep,
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
        let (task, info) = Task::new(facts, config, durable, machines, sender.clone(), left_up);
        tokio::spawn(task.run(inbox));
        Ok(Self {
            inbox: sender,
            info,
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
