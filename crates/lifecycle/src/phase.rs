//! The phases, each with the data that is legal only in it.

use alloc::vec::Vec;
use core::mem;

use crate::action::{Refusal, SleepHow, StartFrom, StartHow};
use crate::hold::{Census, Claim, Claims, Text};
use crate::id::{Ask, Generation, RequestId};
use crate::time::Timestamp;

/// What the session's VM is doing; the transitions are drawn in the crate's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Phase {
    /// No VM; maybe a snapshot.
    Absent,
    /// A VM is being made, or one that an earlier host process left is being looked for.
    Starting(Starting),
    /// The VM is up and serves.
    Running(Running),
    /// The engine is asked what runs, as nothing else holds.
    Counting(Counting),
    /// The VM stands still, in memory.
    Dozing(Dozing),
    /// A sleep that will happen; the hooks are told while the VM is still alive.
    Committed(Committed),
    /// The VM is being suspended, shut down or killed.
    Stopping(Stopping),
    /// The incarnation is over.
    Terminated(Termination),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Starting {
    pub(crate) generation: Generation,
    pub(crate) source: Source,
    pub(crate) progress: Option<Text>,
    pub(crate) since: Timestamp,
    pub(crate) deadline: Timestamp,
    pub(crate) woken_by: Option<Claim>,
    pub(crate) queue: Claims,
}

/// Where the VM of a start comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Source {
    /// It is being made.
    Made(StartFrom),
    /// An earlier host process left it up, started so; it has to be found and asked.
    Left(StartHow),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Running {
    pub(crate) vm: Vm,
    pub(crate) rest: Rest,
}

/// Whether a running VM has a reason to be up.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Rest {
    /// Something strong holds.
    Busy,
    /// Only those hold who look, and the grace period runs on: from when, to which end, and what follows then.
    Looked { since: Timestamp, deadline: Option<Timestamp>, then: Aim },
    /// Nothing strong holds; at the deadline the engine is asked. No deadline: never by itself.
    Idle { since: Timestamp, deadline: Option<Timestamp> },
    /// The VM is paused by an I/O error.
    Paused { retry_at: Timestamp, give_up_at: Timestamp },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Counting {
    pub(crate) vm: Vm,
    pub(crate) unanswered: u8,
    pub(crate) deadline: Timestamp,
    pub(crate) requests: Vec<RequestId>,
    pub(crate) aim: Aim,
}

/// What follows when nothing runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Aim {
    /// The VM dozes first; if it has done so, to the end that this had.
    Doze(Option<Timestamp>),
    /// It is put to sleep: by the means that somebody wants, or as the settings say.
    Sleep(Option<SleepHow>),
}

impl Aim {
    /// By what means somebody wants the sleep.
    pub(crate) fn wish(self) -> Option<SleepHow> {
        match self {
            Self::Doze(_) => None,
            Self::Sleep(wish) => wish,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Dozing {
    pub(crate) vm: Vm,
    pub(crate) deadline: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Committed {
    pub(crate) vm: Vm,
    pub(crate) by: SleepHow,
    pub(crate) then: Then,
    pub(crate) since: Timestamp,
    pub(crate) deadline: Timestamp,
    pub(crate) queue: Claims,
    pub(crate) requests: Vec<RequestId>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Stopping {
    pub(crate) generation: Generation,
    pub(crate) stage: Stage,
    pub(crate) then: Then,
    pub(crate) since: Timestamp,
    pub(crate) deadline: Timestamp,
    pub(crate) trouble: Option<Text>,
    pub(crate) queue: Claims,
    pub(crate) requests: Vec<RequestId>,
}

/// How far the end of a VM has got.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Stage {
    /// A bring-up was told to give up.
    Cancelling,
    /// A suspend is under way; until its device state is complete the VM may come back.
    Suspending(Vm),
    /// A suspended VM has exited, its snapshot isn't sealed yet.
    Sealing { ask: Ask, how: StartHow },
    /// The guest was told to shut down.
    ShuttingDown { ask: Ask, how: StartHow },
    /// The VM was killed, so many times.
    Killing { tries: u8, was: Killed },
}

/// What a VM was at when it was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Killed {
    /// A bring-up that was given up.
    BringUp,
    /// A sleep that took too long.
    Sleep(SleepHow, Ask),
    /// A VM of no use any more, with its crash already recorded.
    Crash,
}

/// What follows once the VM is gone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Then {
    /// The session is asleep.
    Absent,
    /// The incarnation is over.
    Terminated(Termination),
}

/// Why an incarnation is over.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Termination {
    /// The class of the reason.
    pub reason: TerminationReason,
    /// What exactly happened.
    pub cause: Cause,
    /// Details in words.
    pub details: Text,
    /// What opens the session again.
    pub reopen: Reopen,
}

/// The class of a termination's reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum TerminationReason {
    /// Somebody asked.
    Shutdown,
    /// The VM crashed.
    Crashed,
    /// The VM is gone and nobody saw how.
    Unknown,
}

impl TerminationReason {
    /// The word that users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Shutdown => "shutdown",
            Self::Crashed => "crashed",
            Self::Unknown => "unknown",
        }
    }
}

/// What ended an incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Cause {
    /// Somebody asked.
    Asked,
    /// The connection that made the temporary session closed.
    CreatorGone,
    /// The host process had to go, and the session's data was in its VM's memory.
    HostLeaving,
    /// The VM exited though nobody had asked.
    VmExited,
    /// The engine died and couldn't be brought back.
    EngineDied,
    /// The engine didn't say what runs.
    EngineSilent,
    /// The VM was paused by an I/O error for too long.
    IoError,
    /// The VM of an earlier host process couldn't be taken over.
    NotAdopted,
}

/// What opens a terminated session again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Reopen {
    /// The next request.
    OnRequest,
    /// Only a start by name.
    OnStart,
}

/// A VM that is up, with everything that is bound to it and ends with it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Vm {
    pub(crate) generation: Generation,
    pub(crate) how: StartHow,
    pub(crate) since: Timestamp,
    pub(crate) woken_by: Option<Claim>,
    pub(crate) leases: Claims,
    pub(crate) census: Census,
    pub(crate) census_since: Timestamp,
    pub(crate) disk: Disk,
    pub(crate) engine: Engine,
    /// The number of the latest question or order; an answer to any other is ignored.
    pub(crate) sequence: u32,
    pub(crate) failed_suspends: u32,
    /// No sleep by itself before this: a suspend failed shortly ago.
    pub(crate) not_before: Timestamp,
}

/// Whether a VM's disk takes its writes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Disk {
    Writable,
    /// The VM is paused by this error.
    Failing(Text),
}

/// Whether a VM's engine lives.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Engine {
    Alive,
    Dead(Text),
}

impl Vm {
    pub(crate) fn new(generation: Generation, how: StartHow, now: Timestamp, census: Census) -> Self {
        Self {
            generation,
            how,
            since: now,
            woken_by: None,
            leases: Claims::new(),
            census,
            census_since: now,
            disk: Disk::Writable,
            engine: Engine::Alive,
            sequence: 0,
            failed_suspends: 0,
            not_before: Timestamp::default(),
        }
    }

    /// Numbers the next question or order; from now on only its answer counts.
    pub(crate) fn next_ask(&mut self) -> Ask {
        self.sequence = self.sequence.wrapping_add(1);
        self.current_ask()
    }

    pub(crate) fn current_ask(&self) -> Ask {
        Ask { generation: self.generation, sequence: self.sequence }
    }

    /// What a request is told while the VM is paused.
    pub(crate) fn pause_refusal(&self) -> Refusal {
        match &self.disk {
            Disk::Failing(reason) => Refusal::IoPaused { reason: reason.clone() },
            Disk::Writable => Refusal::NotRunning,
        }
    }

    pub(crate) fn set_census(&mut self, now: Timestamp, census: Census) {
        if self.census != census {
            self.census = census;
            self.census_since = now;
        }
    }
}

impl Stopping {
    /// The order to sleep that is under way, if this is a sleep.
    pub(crate) fn ask(&self) -> Option<Ask> {
        match &self.stage {
            Stage::Suspending(vm) => Some(vm.current_ask()),
            Stage::Sealing { ask, .. } | Stage::ShuttingDown { ask, .. } => Some(*ask),
            Stage::Killing { was: Killed::Sleep(_, ask), .. } => Some(*ask),
            Stage::Cancelling | Stage::Killing { was: Killed::BringUp | Killed::Crash, .. } => None,
        }
    }

    /// How the VM was to be put to sleep, if this is a sleep.
    pub(crate) fn by(&self) -> Option<SleepHow> {
        match self.stage {
            Stage::Suspending(_) | Stage::Sealing { .. } => Some(SleepHow::Suspend),
            Stage::ShuttingDown { .. } => Some(SleepHow::Stop),
            Stage::Killing { was: Killed::Sleep(by, _), .. } => Some(by),
            Stage::Cancelling | Stage::Killing { was: Killed::BringUp | Killed::Crash, .. } => None,
        }
    }
}

impl Phase {
    /// Takes the phase out, to be replaced by the one that follows.
    pub(crate) fn take(&mut self) -> Self {
        mem::replace(self, Self::Absent)
    }

    /// The present VM's generation.
    pub(crate) fn generation(&self) -> Option<Generation> {
        match self {
            Self::Absent | Self::Terminated(_) => None,
            Self::Starting(starting) => Some(starting.generation),
            Self::Running(running) => Some(running.vm.generation),
            Self::Counting(counting) => Some(counting.vm.generation),
            Self::Dozing(dozing) => Some(dozing.vm.generation),
            Self::Committed(committed) => Some(committed.vm.generation),
            Self::Stopping(stopping) => Some(stopping.generation),
        }
    }

    /// The VM that stands still.
    pub(crate) fn dozes(&self) -> Option<Generation> {
        match self {
            Self::Dozing(dozing) => Some(dozing.vm.generation),
            Self::Absent
            | Self::Starting(_)
            | Self::Running(_)
            | Self::Counting(_)
            | Self::Committed(_)
            | Self::Stopping(_)
            | Self::Terminated(_) => None,
        }
    }

    /// The present VM, as long as it is whole.
    pub(crate) fn vm(&self) -> Option<&Vm> {
        match self {
            Self::Running(running) => Some(&running.vm),
            Self::Counting(counting) => Some(&counting.vm),
            Self::Dozing(dozing) => Some(&dozing.vm),
            Self::Committed(committed) => Some(&committed.vm),
            Self::Stopping(Stopping { stage: Stage::Suspending(vm), .. }) => Some(vm),
            Self::Absent | Self::Starting(_) | Self::Stopping(_) | Self::Terminated(_) => None,
        }
    }

    /// The same, to be changed.
    pub(crate) fn vm_mut(&mut self) -> Option<&mut Vm> {
        match self {
            Self::Running(running) => Some(&mut running.vm),
            Self::Counting(counting) => Some(&mut counting.vm),
            Self::Dozing(dozing) => Some(&mut dozing.vm),
            Self::Committed(committed) => Some(&mut committed.vm),
            Self::Stopping(Stopping { stage: Stage::Suspending(vm), .. }) => Some(vm),
            Self::Absent | Self::Starting(_) | Self::Stopping(_) | Self::Terminated(_) => None,
        }
    }

    /// The requests that wait for a VM.
    pub(crate) fn queue(&self) -> Option<&Claims> {
        match self {
            Self::Starting(starting) => Some(&starting.queue),
            Self::Committed(committed) => Some(&committed.queue),
            Self::Stopping(stopping) => Some(&stopping.queue),
            Self::Absent | Self::Running(_) | Self::Counting(_) | Self::Dozing(_) | Self::Terminated(_) => {
                None
            }
        }
    }

    /// The same, to be changed.
    pub(crate) fn queue_mut(&mut self) -> Option<&mut Claims> {
        match self {
            Self::Starting(starting) => Some(&mut starting.queue),
            Self::Committed(committed) => Some(&mut committed.queue),
            Self::Stopping(stopping) => Some(&mut stopping.queue),
            Self::Absent | Self::Running(_) | Self::Counting(_) | Self::Dozing(_) | Self::Terminated(_) => {
                None
            }
        }
    }

    /// When this phase ends by itself.
    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        match self {
            Self::Absent | Self::Terminated(_) => None,
            Self::Starting(starting) => Some(starting.deadline),
            Self::Running(Running { rest, .. }) => match rest {
                Rest::Busy | Rest::Looked { .. } => None,
                Rest::Idle { deadline, .. } => *deadline,
                Rest::Paused { retry_at, give_up_at } => Some(*retry_at.min(give_up_at)),
            },
            Self::Counting(counting) => Some(counting.deadline),
            Self::Dozing(dozing) => Some(dozing.deadline),
            Self::Committed(committed) => Some(committed.deadline),
            Self::Stopping(stopping) => Some(stopping.deadline),
        }
    }
}
