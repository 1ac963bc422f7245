//! All that a session wants done.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::time::Duration;

use crate::durable::Durable;
use crate::hold::Text;
use crate::id::{Ask, Generation, Incarnation, LeaseId, RequestId};
use crate::phase::Termination;
use crate::time::Timestamp;

/// Something to be done. Actions are carried out in order; none is waited for, results come back as events.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Write this where it survives, *before* any action that follows is begun (rule 13).
    Persist(Box<Durable>),
    /// Make a VM. Ends in `VmReady`, `StartFailed` or `VmExited`.
    StartVm {
        /// The VM's number.
        generation: Generation,
        /// What it may be made from.
        from: StartFrom,
        /// After so long the core gives up.
        bound: Duration,
    },
    /// Give up a bring-up and end its VM. Ends in `StartFailed` or `VmExited`.
    CancelStart {
        /// Which one.
        generation: Generation,
    },
    /// Tell the hooks that a VM is up.
    AnnounceStarted {
        /// Which one.
        generation: Generation,
        /// How it was started.
        how: StartHow,
    },
    /// Tell the hooks that a VM stops. Ends in `HooksDone`.
    RunStoppingHooks {
        /// The order's number.
        ask: Ask,
        /// How it stops.
        how: StopHow,
        /// After so long the core goes on without them.
        bound: Duration,
    },
    /// Tell the hooks that the VM they were told would sleep runs on.
    RunSleepFailedHooks {
        /// Which VM.
        generation: Generation,
        /// Why, in words.
        reason: Text,
    },
    /// Put the VM to sleep. Ends in `SleepDone` or `SuspendFailed`; for a stop, `VmExited` is enough.
    BeginSleep {
        /// The order's number.
        ask: Ask,
        /// By what means.
        how: SleepHow,
        /// After so long the core has the VM killed.
        bound: Duration,
    },
    /// Kill the VM's process and whatever is under way for it. Ends in `VmExited`.
    KillVm {
        /// Which one.
        generation: Generation,
    },
    /// Ask the engine what runs. Ends in `ContainersCounted`.
    CountContainers {
        /// The question's number.
        ask: Ask,
        /// After so long the core takes it as unanswered.
        bound: Duration,
    },
    /// Try to run a VM on that was paused by an I/O error. Ends in `VmResumed`.
    ResumeVm {
        /// Which one.
        generation: Generation,
    },
    /// Stop the VM's vCPUs and keep everything else.
    Doze {
        /// Which one.
        generation: Generation,
    },
    /// Run a VM on that dozes, and tell it what time it is. Whoever is granted it from now on is served once that is done.
    Rouse {
        /// Which one.
        generation: Generation,
    },
    /// The request is granted.
    Grant {
        /// The lease.
        lease: LeaseId,
        /// The VM that it is for.
        generation: Generation,
    },
    /// The request is refused.
    Refuse {
        /// The request.
        lease: LeaseId,
        /// Why.
        refusal: Refusal,
    },
    /// All leases on this VM are over; work in flight fails with this reason.
    EndLeases {
        /// The VM.
        generation: Generation,
        /// Why.
        reason: EndReason,
    },
    /// The answer to `SleepRequested`.
    AnswerSleep {
        /// The request.
        request: RequestId,
        /// What happened.
        outcome: SleepOutcome,
    },
    /// An entry for the history.
    Record(Record),
    /// What [`crate::Session::view`] shows has changed.
    Publish,
    /// The incarnation is over; the reason can be read by now ([`crate::Latest::termination`], and
    /// [`crate::Session::termination`] unless somebody who waited opens the next one at once).
    AnnounceTerminated {
        /// Which one.
        incarnation: Incarnation,
    },
}

/// What a VM may be made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum StartFrom {
    /// The session's own snapshot, made when this generation was suspended; else as `Fresh`.
    Snapshot(Generation),
    /// A template or a cold boot. A snapshot that lies about is void.
    Fresh,
}

/// How a VM was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum StartHow {
    /// From the kernel up.
    Cold,
    /// From a template.
    Clone,
    /// From the session's own snapshot.
    Resume,
}

impl StartHow {
    /// The word that users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Clone => "clone",
            Self::Resume => "resume",
        }
    }
}

/// How a VM is put to sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum SleepHow {
    /// Shut it down.
    Stop,
    /// Keep its memory in a snapshot.
    Suspend,
}

impl SleepHow {
    /// The word that users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Suspend => "suspend",
        }
    }
}

/// How a VM that was announced comes to its end, for hooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopHow {
    /// It is put to sleep, or stopped for good.
    Sleep(SleepHow),
    /// It crashed.
    Crash,
}

/// Why a request for a lease is refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// `ExistingOnly`, and no VM is up.
    NotRunning,
    /// The VM couldn't be started.
    StartFailed {
        /// Why, in words.
        reason: Text,
        /// When the next request may try again.
        retry_at: Timestamp,
    },
    /// The session is being terminated.
    Terminating,
    /// The session is terminated and must be started by name.
    Terminated(Termination),
    /// The session crashed too often.
    CrashBackoff {
        /// The last crash, in words.
        details: Text,
        /// When the next request may try again.
        until: Timestamp,
    },
    /// The VM is paused by an I/O error.
    IoPaused {
        /// The error, in words.
        reason: Text,
    },
    /// The former VM was killed and didn't exit; no other can be made beside it.
    VmStuck {
        /// Which one.
        generation: Generation,
    },
    /// The host process is about to go; ask its successor.
    HostLeaving,
    /// Too many others wait or are served.
    TooMany {
        /// How many there may be.
        limit: usize,
    },
}

/// Why all leases of a VM are over.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// The VM crashed: details in words.
    Crashed(Text),
    /// The session is being terminated.
    Terminating,
    /// The VM goes to sleep; only leases that keep nothing awake and those of hooks can still be out.
    Sleeping,
    /// The host process is about to go.
    HostLeaving,
}

/// What became of a request to sleep.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SleepOutcome {
    /// There was no VM.
    NoVm,
    /// Something strong holds: see [`crate::Session::holds`].
    Busy,
    /// This session is never put to sleep.
    Disabled,
    /// The VM is gone.
    Asleep {
        /// Which one.
        generation: Generation,
        /// By what means.
        how: SleepHow,
    },
    /// The suspend failed and the VM runs on: why, in words.
    Failed(Text),
    /// The incarnation ended instead.
    Terminated,
    /// Too many requests wait already.
    TooMany,
}

/// An entry of the history.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Record {
    /// An incarnation began.
    Opened {
        /// Which one.
        incarnation: Incarnation,
    },
    /// A VM became ready.
    Started {
        /// Which one.
        generation: Generation,
        /// How.
        how: StartHow,
        /// From the order to the first answer.
        took: Duration,
    },
    /// A VM of an earlier host process was taken over.
    Adopted {
        /// Which one.
        generation: Generation,
    },
    /// A VM couldn't be started.
    StartFailed {
        /// Which one.
        generation: Generation,
        /// Why, in words.
        reason: Text,
        /// From the order to the failure.
        took: Duration,
    },
    /// A VM went to sleep.
    Slept {
        /// Which one.
        generation: Generation,
        /// How.
        how: SleepHow,
        /// From the commit to the end of the VM.
        took: Duration,
        /// What went wrong on the way, in words.
        trouble: Option<Text>,
    },
    /// A suspend failed and the VM runs on.
    SleepFailed {
        /// Which one.
        generation: Generation,
        /// Why, in words.
        reason: Text,
    },
    /// A VM crashed.
    Crashed {
        /// Which one.
        generation: Generation,
        /// Details in words.
        details: Text,
    },
    /// An incarnation ended.
    Terminated {
        /// Which one.
        incarnation: Incarnation,
        /// Why.
        termination: Termination,
    },
}

/// Where [`crate::Session::handle`] puts what is to be done. Reused from step to step; only the core writes to
/// it, only the driver drains it.
#[derive(Debug, Default)]
pub struct Actions(Vec<Action>);

impl Actions {
    /// An empty list.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Takes all actions out, in the order in which they are to be carried out.
    pub fn drain(&mut self) -> impl Iterator<Item = Action> + '_ {
        self.0.drain(..)
    }

    /// The actions that wait to be carried out.
    pub fn as_slice(&self) -> &[Action] {
        &self.0
    }

    pub(crate) fn push(&mut self, action: Action) {
        self.0.push(action);
    }

    pub(crate) fn insert(&mut self, index: usize, action: Action) {
        self.0.insert(index, action);
    }
}
