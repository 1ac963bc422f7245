//! What keeps a VM awake, and what is only listed.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;

use crate::config::{RunningContainers, Storage};
use crate::id::{LeaseId, PinId};
use crate::time::Timestamp;

/// Words for people, chosen by the driver. The core never reads them.
pub type Text = Arc<str>;

/// Whether a request may start a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Policy {
    /// Start the VM if need be, wait out a stop.
    Acquire,
    /// Be served by the VM that runs, or fail at once. For hooks: waiting for a stop that waits for the hook
    /// would never end.
    ExistingOnly,
}

/// What a hold is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum HoldKind {
    /// A request that is being answered.
    Request,
    /// A request that only looks. It holds while it is answered, and the grace period runs on meanwhile: so whoever polls
    /// keeps no VM up that nobody uses.
    Read,
    /// A job of several requests.
    Operation,
    /// A process in the VM's root namespace; lasts as long as the process or a client that holds it.
    RootProcess,
    /// A process started in a container by `exec`.
    Exec,
    /// Containers that hold, as counted by the engine.
    Container,
    /// What goes on in containers that may be suspended. It holds against the sleep that comes by itself, and not against
    /// a suspend that somebody asks for by name: nothing is lost by that.
    Activity,
    /// Somebody asked for the VM to stay up.
    Pin,
    /// An open stream of events (weak).
    Events,
    /// A connection on which nothing is asked (weak).
    Connection,
}

impl HoldKind {
    /// Whether it is only listed, and keeps nothing awake.
    pub const fn is_weak(self) -> bool {
        match self {
            Self::Events | Self::Connection => true,
            Self::Request
            | Self::Read
            | Self::Operation
            | Self::RootProcess
            | Self::Exec
            | Self::Container
            | Self::Activity
            | Self::Pin => false,
        }
    }

    /// The word that users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Read => "read",
            Self::Operation => "operation",
            Self::RootProcess => "root-process",
            Self::Exec => "exec",
            Self::Container => "container",
            Self::Activity => "activity",
            Self::Pin => "pin",
            Self::Events => "events",
            Self::Connection => "connection",
        }
    }
}

/// Who wants the VM, and what for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Claim {
    /// What the hold is.
    pub kind: HoldKind,
    /// Whether it may start a VM.
    pub policy: Policy,
    /// Who, in words.
    pub owner: Text,
    /// What for, in words.
    pub reason: Text,
}

/// A claim that was made: waiting, or granted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Held {
    pub(crate) claim: Claim,
    pub(crate) since: Timestamp,
}

/// Claims by number, which is also the order in which they were made.
pub(crate) type Claims = BTreeMap<LeaseId, Held>;

/// A weak hold: listed, but it keeps nothing awake.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct WeakHold {
    /// What it is.
    pub kind: HoldKind,
    /// Who, in words.
    pub owner: Text,
    /// What for, in words.
    pub reason: Text,
    /// Since when.
    pub since: Timestamp,
}

/// Keeps a VM that is up awake; never starts one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Pin {
    /// Its number.
    pub id: PinId,
    /// Who set it, in words.
    pub owner: Text,
    /// What for, in words.
    pub reason: Text,
    /// Since when.
    pub since: Timestamp,
    /// When it ends by itself.
    pub until: Option<Timestamp>,
}

/// What the engine says of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[allow(missing_docs, reason = "the engine's own words")]
pub enum ContainerState {
    Created,
    Running,
    Paused,
    Restarting,
    Removing,
    Exited,
    Dead,
}

impl ContainerState {
    /// Whether such a container keeps the VM awake: all that would be cut short by a stop do (rule 12).
    pub const fn holds(self) -> bool {
        match self {
            Self::Running | Self::Paused | Self::Restarting | Self::Removing => true,
            Self::Created | Self::Exited | Self::Dead => false,
        }
    }
}

/// What runs in a VM, as counted by its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Census {
    /// Containers that are running, paused, restarting or being removed.
    pub active: u32,
    /// Containers that are created, exited or dead.
    pub inactive: u32,
    /// Processes started by `exec` that run.
    pub execs: u32,
}

impl Census {
    /// Counts containers.
    pub fn of(states: impl IntoIterator<Item = ContainerState>) -> Self {
        let mut census = Self::default();
        for state in states {
            let count = if state.holds() { &mut census.active } else { &mut census.inactive };
            *count = count.saturating_add(1);
        }
        census
    }

    /// Whether anything runs that a stop would end.
    pub(crate) fn is_working(self) -> bool {
        self.active > 0 || self.execs > 0
    }

    /// Whether this keeps a VM awake that would be put to sleep with the given rule about its containers.
    pub(crate) fn holds(self, running: RunningContainers) -> bool {
        match running {
            RunningContainers::Hold => self.is_working(),
            RunningContainers::Suspend => self.execs > 0,
        }
    }
}

impl Storage {
    /// Whether a VM may be put to sleep at all (rule 11).
    pub(crate) const fn may_sleep(self) -> bool {
        match self {
            Self::Persistent => true,
            Self::Ephemeral => false,
        }
    }
}
