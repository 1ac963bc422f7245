//! What happens to a session, as hooks and `dorm session events` are told.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{How, SessionName, TerminationReason};

/// Something that happened. A hook reads one of these from its standard input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionEvent {
    /// Counts the session's events, from 1, without a gap.
    pub sequence: u64,
    /// When.
    pub at: Timestamp,
    /// Which session's.
    pub session: SessionName,
    /// What.
    #[serde(flatten)]
    pub fact: Fact,
}

/// What happened. Facts about a VM carry its generation; each is told once, in the order in which they happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Fact {
    /// An incarnation begins. A hook that fails keeps a session from being created; a later incarnation it can't stop.
    SessionCreated {
        /// Counts the session's lives.
        incarnation: u64,
    },
    /// An incarnation is over.
    SessionStopping {
        /// Which one.
        incarnation: u64,
        /// Why, in one word.
        reason: TerminationReason,
        /// Why, in words.
        details: String,
    },
    /// A VM is up.
    VmStarted {
        /// Which one.
        generation: u64,
        /// How it was started.
        how: How,
    },
    /// A VM that was up goes, or has crashed.
    VmStopping {
        /// Which one.
        generation: u64,
        /// How it ends.
        how: VmEnd,
    },
    /// A VM of which `vm-stopping` was told runs on.
    VmSleepFailed {
        /// Which one.
        generation: u64,
        /// Why, in words.
        reason: String,
    },
    /// A container is to be started. A hook that fails keeps it from that, where the start was asked for over the session's
    /// own socket; one that was started within the engine is stopped again.
    ContainerStarting {
        /// In which VM.
        generation: u64,
        /// Name or id, as it was asked for; the id of one that was started within the engine.
        container: String,
    },
    /// A container's main process is gone.
    ContainerStopping {
        /// In which VM.
        generation: u64,
        /// Its id.
        container: String,
    },
    /// There is a new image, or a new name for one.
    ImageCreated {
        /// In which VM.
        generation: u64,
        /// Its name or id.
        image: String,
    },
    /// An image is gone.
    ImageDeleted {
        /// In which VM.
        generation: u64,
        /// Its id.
        image: String,
    },
}

/// How a VM ends, for hooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmEnd {
    /// It is shut down.
    Stop,
    /// Its memory is kept in a snapshot.
    Suspend,
    /// It crashed.
    Crash,
}

impl Fact {
    /// The event's name, which is a hook's first argument.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::SessionCreated { .. } => "session-created",
            Self::SessionStopping { .. } => "session-stopping",
            Self::VmStarted { .. } => "vm-started",
            Self::VmStopping { .. } => "vm-stopping",
            Self::VmSleepFailed { .. } => "vm-sleep-failed",
            Self::ContainerStarting { .. } => "container-starting",
            Self::ContainerStopping { .. } => "container-stopping",
            Self::ImageCreated { .. } => "image-created",
            Self::ImageDeleted { .. } => "image-deleted",
        }
    }

    /// The VM that it is about.
    #[must_use]
    pub const fn generation(&self) -> Option<u64> {
        match self {
            Self::SessionCreated { .. } | Self::SessionStopping { .. } => None,
            Self::VmStarted { generation, .. }
            | Self::VmStopping { generation, .. }
            | Self::VmSleepFailed { generation, .. }
            | Self::ContainerStarting { generation, .. }
            | Self::ContainerStopping { generation, .. }
            | Self::ImageCreated { generation, .. }
            | Self::ImageDeleted { generation, .. } => Some(*generation),
        }
    }
}

/// What `dorm why` tells: why the VM is awake or asleep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// One line each, the most telling first.
    pub lines: Vec<String>,
    /// The request that woke the VM that is up, in words.
    pub woken_by: Option<String>,
    /// What the guest and the bring-up warned of, for the VM that is up or the last one.
    pub warnings: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_object_that_names_its_fact() {
        let event = SessionEvent {
            sequence: 3,
            at: Timestamp::UNIX_EPOCH,
            session: "default".parse().unwrap(),
            fact: Fact::VmStopping { generation: 2, how: VmEnd::Crash },
        };
        let text = serde_json::to_string(&event).unwrap();
        assert_eq!(
            text,
            r#"{"sequence":3,"at":"1970-01-01T00:00:00Z","session":"default","event":"vm-stopping","generation":2,"how":"crash"}"#
        );
        assert_eq!(serde_json::from_str::<SessionEvent>(&text).unwrap(), event);
        assert_eq!(event.fact.name(), "vm-stopping");
    }
}
