//! All that can happen to a session.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::action::{SleepHow, StartHow};
use crate::config::{Config, Grace};
use crate::hold::{Census, Claim, HoldKind, Text};
use crate::id::{Ask, Generation, LeaseId, PinId, RequestId, WeakId};
use crate::time::Timestamp;

/// Something that happened. Every event is legal in every phase; what no longer matters is ignored, above all
/// every report about a generation that isn't the present one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Event {
    /// Somebody needs the VM. Answered by one [`crate::Action::Grant`] or [`crate::Action::Refuse`], now or later.
    LeaseRequested {
        /// The request, and the lease that comes of it.
        lease: LeaseId,
        /// Who and what for.
        claim: Claim,
    },
    /// A lease was dropped, or whoever waited for it went away.
    LeaseDropped {
        /// Which one.
        lease: LeaseId,
    },
    /// Something is to be listed that keeps nothing awake.
    WeakAdded {
        /// Its number.
        weak: WeakId,
        /// What it is.
        kind: HoldKind,
        /// Who, in words.
        owner: Text,
        /// What for, in words.
        reason: Text,
    },
    /// A weak hold is gone.
    WeakRemoved {
        /// Which one.
        weak: WeakId,
    },
    /// The VM is to stay up while it is up.
    PinSet {
        /// Its number; an earlier pin of that number is replaced.
        pin: PinId,
        /// Who, in words.
        owner: Text,
        /// What for, in words.
        reason: Text,
        /// When it ends by itself.
        until: Option<Timestamp>,
    },
    /// A pin is to go.
    PinRemoved {
        /// Which one.
        pin: PinId,
    },
    /// The grace period was changed; counts from when the VM became idle.
    GraceChanged(Grace),
    /// Other settings were changed; what is under way goes on with those it began with.
    Configured(Box<Config>),

    /// A start gets on.
    VmProgress {
        /// Of which VM.
        generation: Generation,
        /// The step that was reached, in words.
        step: Text,
    },
    /// The VM answers and its engine lists its containers.
    VmReady {
        /// Which VM.
        generation: Generation,
        /// How it was started in the end.
        how: StartHow,
        /// What runs in it.
        census: Census,
    },
    /// A VM that an earlier host process left up was found, and answers.
    VmAdopted {
        /// Which VM.
        generation: Generation,
        /// What runs in it.
        census: Census,
        /// What of the earlier host's holds lives on (root processes, and clients that came back).
        holds: Vec<(LeaseId, Claim)>,
    },
    /// A start failed, and nothing is left of its VM.
    StartFailed {
        /// Which VM.
        generation: Generation,
        /// Why, in words.
        reason: Text,
        /// What became of the snapshot that it was started from.
        snapshot: SnapshotFate,
    },
    /// A VM's process is gone.
    VmExited {
        /// Which VM.
        generation: Generation,
        /// What is known of it.
        exit: Exit,
    },
    /// A VM was paused by an I/O error of its disk.
    VmPaused {
        /// Which VM.
        generation: Generation,
        /// The error, in words.
        reason: Text,
    },
    /// A VM runs on after an I/O error.
    VmResumed {
        /// Which VM.
        generation: Generation,
    },
    /// The engine died, and the agent couldn't bring it back.
    EngineDied {
        /// In which VM.
        generation: Generation,
        /// What is known of it, in words.
        reason: Text,
    },
    /// The engine reported a change of what runs.
    ContainersChanged {
        /// In which VM.
        generation: Generation,
        /// What runs now.
        census: Census,
    },
    /// The engine answered [`crate::Action::CountContainers`], or can't.
    ContainersCounted {
        /// The question.
        ask: Ask,
        /// What runs; `None` if the engine gave no answer, which is the same as silence.
        census: Option<Census>,
    },
    /// All hooks that were told of a sleep are done, whether well or not.
    HooksDone {
        /// The order.
        ask: Ask,
    },
    /// A sleep is complete: the VM is gone and, after a suspend, its snapshot is sealed.
    SleepDone {
        /// The order.
        ask: Ask,
    },
    /// A suspend failed.
    SuspendFailed {
        /// The order.
        ask: Ask,
        /// Whether the VM runs on.
        vm: AfterFailure,
        /// Why, in words.
        reason: Text,
    },

    /// The time of [`crate::Session::next_deadline`] has come. Harmless when it hasn't.
    DeadlineReached,
    /// The incarnation is to end.
    Terminate {
        /// Who or what asked, in words.
        reason: Text,
    },
    /// A terminated session is to be opened again.
    StartRequested,
    /// The VM is to be put to sleep if nothing strong holds, without waiting for the grace period.
    /// Answered by one [`crate::Action::AnswerSleep`], now or later.
    SleepRequested {
        /// Whom to answer.
        request: RequestId,
        /// By what means; as the settings say when absent. A sleep that is under way goes on as it began.
        how: Option<SleepHow>,
    },
    /// The connection that made a temporary session is closed.
    CreatorGone,
    /// This host process is told to go (service stopped, shutdown, logout): the VM is put to sleep
    /// whatever holds, and nothing is served from now on.
    HostLeaving,
}

/// What is known of a VM's exit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Exit {
    /// The guest shut itself down.
    GuestShutdown,
    /// QEMU or the guest crashed, or was killed: details in words.
    Crashed(Text),
    /// It is gone, and nobody saw how (a VM that was adopted): details in words.
    Unknown(Text),
}

/// What became of a snapshot that a VM was to be started from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum SnapshotFate {
    /// It wasn't touched and may be tried again.
    Intact,
    /// It was used, refused or lost.
    Void,
}

/// What a failed suspend leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum AfterFailure {
    /// It failed before the device state was complete: the VM runs on.
    RunsOn,
    /// It failed later: the VM is of no use any more.
    Lost,
}
