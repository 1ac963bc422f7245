//! The owner task: the only place where a session's lifecycle changes.
//!
//! handle, persist, act: an event goes through the pure core; what must survive is on disk before an action that needs
//! it is begun; actions start work elsewhere, whose results come back as events. The task awaits nothing but its inbox
//! and the next deadline.

mod task;
#[cfg(test)]
pub(crate) mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_agent_proto::RunningProcess;
use dormouse_api::{ChangeSettings, HistoryEntry, SessionEvent, SessionInfo, SleepAnswer, Why};
use dormouse_lifecycle::{
    Census, Claim, Config, EndReason, Event, Generation, LastVm, LeaseId, Policy, Refusal, SleepHow,
    StartHow, Trace,
};
use dormouse_mux::Agent;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::DropGuard;

use crate::hooks::{Hooks, Jobs, Verdict};
use crate::lease::{Lease, LeaseClaim, Refused};
use crate::machine::Machines;
use crate::owner::task::Task;
use crate::state;
use crate::trace::SharedTrace;

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
    Ready(Ready),
    /// A guest that was to be suspended runs on, on a new channel.
    Revived { generation: Generation, agent: Agent },
    /// A VM that dozed runs, and its guest knows what time it is.
    Roused { generation: Generation, order: u64 },
    /// Something is not as it should be: it was tried in vain, or the guest warns of it. For whoever woke the VM, and for
    /// the history.
    Note { generation: Generation, what: String },
    /// It was asked what runs, once ready.
    FirstCensus { ready: Ready, census: Census },
    /// A root process that an earlier host had started is gone.
    ProcessEnded { generation: Generation, pid: u32 },
    /// Somebody wants the VM asleep.
    Sleep { how: Option<SleepHow>, reply: oneshot::Sender<SleepAnswer> },
    /// The engine tells what happened in it. Answered when it was taken in, so that a guest can't flood this inbox.
    Engine { generation: Generation, events: Vec<EngineEvent>, execs: u32, taken: oneshot::Sender<()> },
    /// A hook failed or hung.
    HookFailed { generation: Option<u64>, words: String },
    /// Somebody is about to start a container, and asks the hooks.
    MayStart { generation: u64, container: String, reply: oneshot::Sender<Verdict> },
    /// Settings were changed.
    Change(ChangeSettings),
    /// Somebody wants to know.
    Ask(Question),
}

/// A guest that answers, and whose engine lists.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) generation: Generation,
    pub(crate) how: StartHow,
    pub(crate) agent: Agent,
    /// Root processes that an earlier host had started.
    pub(crate) processes: Vec<RunningProcess>,
    /// Dropped when what runs in it was counted.
    pub(crate) _counted: DropGuard,
}

/// What may be asked without waking anything.
#[derive(Debug)]
pub(crate) enum Question {
    Info(oneshot::Sender<SessionInfo>),
    History(oneshot::Sender<Vec<HistoryEntry>>),
    Events(oneshot::Sender<(Vec<SessionEvent>, broadcast::Receiver<SessionEvent>)>),
    Why(oneshot::Sender<Why>),
}

/// What the engine tells of a container or an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EngineEvent {
    /// A container was started: its id and its name.
    Started { id: String, name: String },
    /// A container's main process is gone.
    Died { id: String },
    /// There is a new image, or a new name for one.
    ImageCreated { image: String },
    /// An image is gone.
    ImageDeleted { image: String },
}

/// What a granted request gets to make its lease of.
#[derive(Debug)]
pub(crate) struct Granted {
    generation: Generation,
    agent: Agent,
    ended: watch::Receiver<Option<EndReason>>,
    /// For whoever woke the VM, and nobody else.
    warnings: Vec<String>,
}

/// The way to the owner.
#[derive(Debug, Clone)]
pub struct Inbox(pub(crate) mpsc::UnboundedSender<Message>);

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
    /// What clients of its docker socket see beside the engine.
    pub face: crate::docker::Face,
}

/// An owner that was started, and what is to be done with it.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) owner: Owner,
    /// For the runner of hooks.
    pub(crate) jobs: Jobs,
    /// Ends with the task: never, but for a fault in it.
    pub(crate) task: JoinHandle<()>,
}

/// A handle on the owner task. Clones are the same owner.
#[derive(Debug, Clone)]
pub struct Owner {
    pub(crate) inbox: Inbox,
    info: watch::Receiver<SessionInfo>,
    hooks: Hooks,
    trace: SharedTrace,
    /// What the hooks said to the session's creation.
    created: watch::Receiver<Option<Verdict>>,
    requests: Arc<Semaphore>,
    next: Arc<AtomicU64>,
}

impl Owner {
    /// Starts the owner of a session from what its last host left.
    ///
    /// # Errors
    /// When that can't be read.
    pub(crate) fn start<M: Machines>(
        facts: Facts,
        config: Config,
        machines: impl FnOnce(Inbox) -> M,
    ) -> Result<Started, state::StateError> {
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
        let (hooks, jobs) = Hooks::new();
        let mut task = Task::new(facts, config, durable, machines, sender.clone(), left_up, hooks.clone());
        let created = task.tell_creation();
        let owner = Self {
            inbox: sender,
            info: task.info(),
            hooks,
            trace: task.trace(),
            created,
            requests: Arc::new(Semaphore::new(REQUESTS_MAX)),
            next: task.lease_ids(),
        };
        Ok(Started { owner, jobs, task: tokio::spawn(task.run(inbox)) })
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
        let Granted { generation, agent, ended, warnings } =
            granted.await.unwrap_or(Err(Refused(Refusal::HostLeaving)))?;
        let lease = Lease { _claim: claim, generation, agent, ended, warnings };
        Ok(HeldLease { lease, _permit: permit })
    }

    /// Feeds the core an event from outside: terminate, start, a changed setting, a pin.
    pub fn tell(&self, event: Event) {
        self.inbox.send(Message::Event(event));
    }

    /// Asks for the idle path now, with all its guards; by the means of the settings when none is named.
    pub async fn sleep(&self, how: Option<SleepHow>) -> SleepAnswer {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Message::Sleep { how, reply });
        answer.await.unwrap_or(SleepAnswer::Failed { reason: "the session's host is going down".to_owned() })
    }

    /// Changes settings of a session that lives.
    pub(crate) fn change(&self, change: ChangeSettings) {
        self.inbox.send(Message::Change(change));
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Message::Ask(question(reply)));
        answer.await.ok()
    }

    /// Starts, sleeps and crashes so far, oldest first.
    pub async fn history(&self) -> Vec<HistoryEntry> {
        self.ask(Question::History).await.unwrap_or_default()
    }

    /// What hooks were told so far, oldest first, and what they will be told.
    pub(crate) async fn events(&self) -> Option<(Vec<SessionEvent>, broadcast::Receiver<SessionEvent>)> {
        self.ask(Question::Events).await
    }

    /// Why the VM is awake or asleep.
    pub(crate) async fn why(&self) -> Option<Why> {
        self.ask(Question::Why).await
    }

    /// The session after everything that this handle was told before.
    pub(crate) async fn present(&self) -> SessionInfo {
        match self.ask(Question::Info).await {
            Some(info) => info,
            None => self.info.borrow().clone(),
        }
    }

    /// The last events of the core.
    pub(crate) fn trace(&self) -> Trace {
        self.trace.copy()
    }

    /// What a host left that crashed, as it wrote it.
    pub(crate) fn crash_trace(&self) -> std::io::Result<Vec<u8>> {
        self.trace.left_by_a_crash()
    }

    /// Has the trace written should this process panic.
    pub(crate) fn write_trace_on_panic(&self) {
        self.trace.write_on_panic();
    }

    /// Asks the hooks whether a container may be started.
    pub(crate) async fn may_start(&self, generation: u64, container: String) -> Verdict {
        let (reply, verdict) = oneshot::channel();
        self.inbox.send(Message::MayStart { generation, container, reply });
        verdict.await.unwrap_or(Verdict::Fine)
    }

    /// Waits for what the hooks say to the session's creation.
    pub(crate) async fn created(&self) -> Verdict {
        let mut created = self.created.clone();
        let verdict = created.wait_for(Option::is_some).await;
        verdict.ok().and_then(|verdict| verdict.clone()).unwrap_or(Verdict::Fine)
    }

    /// Waits until no hook has anything left to be told.
    pub(crate) async fn hooks_done(&self) {
        self.hooks.done().await;
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
