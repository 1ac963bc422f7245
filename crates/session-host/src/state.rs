//! What a session's host leaves for the next one: `state.json`, written beside and renamed before the action that
//! needs it (rule 13). Times are wall-clock, because the core's clock ends with the host's boot.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use dormouse_lifecycle::{
    Cause, Crash, Durable, Generation, Incarnation, LastVm, Pin, PinId, Reopen, SleepHow, StartHow,
    Termination, TerminationReason, Then,
};
use serde::{Deserialize, Serialize};

use crate::clock::{from_wall, to_wall};

const FORMAT: u32 = 1;
const FILE: &str = "state.json";

/// Why the state can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It can't be read or written.
    #[error("can't use the session's state file: {0}")]
    Io(#[from] io::Error),
    /// It is damaged.
    #[error("the session's state file is damaged: {0}")]
    Damaged(#[from] serde_json::Error),
    /// A later version wrote it.
    #[error("the session's state file has format {0}, this version reads {FORMAT}")]
    Format(u32),
}

/// Reads what an earlier host left; a session that never had one begins afresh.
///
/// # Errors
/// See [`StateError`].
pub fn read(folder: &Path) -> Result<Durable, StateError> {
    let bytes = match fs::read(folder.join(FILE)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Durable::default()),
        Err(error) => return Err(error.into()),
    };
    let state: State = serde_json::from_slice(&bytes)?;
    if state.format != FORMAT {
        return Err(StateError::Format(state.format));
    }
    Ok(state.into())
}

/// Writes what the next host must know, and waits until the disk has it.
///
/// # Errors
/// See [`StateError`].
pub fn write(folder: &Path, durable: &Durable) -> Result<(), StateError> {
    let beside = folder.join("state.json.new");
    let mut file = File::create(&beside)?;
    file.write_all(&serde_json::to_vec_pretty(&State::from(durable))?)?;
    file.sync_all()?;
    fs::rename(beside, folder.join(FILE))?;
    File::open(folder)?.sync_all()?;
    Ok(())
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    format: u32,
    incarnation: u64,
    generation: u64,
    boots: u64,
    start_count: u64,
    vm: Vm,
    snapshot: Option<u64>,
    remains: Option<u64>,
    pins: Vec<PinEntry>,
    crashes: Vec<CrashEntry>,
    termination: Option<End>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Vm {
    Gone,
    Starting,
    Up { how: How },
    Sleeping { how: How, by: By, then: Next },
    Ending { then: Next },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum How {
    Cold,
    Clone,
    Resume,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum By {
    Stop,
    Suspend,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Next {
    Absent,
    Terminated(End),
}

#[derive(Debug, Serialize, Deserialize)]
struct PinEntry {
    id: u64,
    owner: String,
    reason: String,
    since: jiff::Timestamp,
    until: Option<jiff::Timestamp>,
}

#[derive(Debug, Serialize, Deserialize)]
struct CrashEntry {
    details: String,
    until: jiff::Timestamp,
}

#[derive(Debug, Serialize, Deserialize)]
struct End {
    reason: Reason,
    cause: CauseWord,
    details: String,
    reopen_on_request: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reason {
    Shutdown,
    Crashed,
    Unknown,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CauseWord {
    Asked,
    CreatorGone,
    HostLeaving,
    VmExited,
    EngineDied,
    EngineSilent,
    IoError,
    NotAdopted,
}

/// Two enums of the same variants, either way.
macro_rules! same {
    ($ours:ident, $theirs:ident, $($variant:ident),+) => {
        impl From<&$theirs> for $ours {
            fn from(value: &$theirs) -> Self {
                match value { $($theirs::$variant => Self::$variant,)+ }
            }
        }
        impl From<$ours> for $theirs {
            fn from(value: $ours) -> Self {
                match value { $($ours::$variant => Self::$variant,)+ }
            }
        }
    };
}

same!(How, StartHow, Cold, Clone, Resume);
same!(By, SleepHow, Stop, Suspend);
same!(Reason, TerminationReason, Shutdown, Crashed, Unknown);
same!(
    CauseWord,
    Cause,
    Asked,
    CreatorGone,
    HostLeaving,
    VmExited,
    EngineDied,
    EngineSilent,
    IoError,
    NotAdopted
);

impl From<&Termination> for End {
    fn from(end: &Termination) -> Self {
        Self {
            reason: (&end.reason).into(),
            cause: (&end.cause).into(),
            details: end.details.to_string(),
            reopen_on_request: end.reopen == Reopen::OnRequest,
        }
    }
}

impl From<End> for Termination {
    fn from(end: End) -> Self {
        Self {
            reason: end.reason.into(),
            cause: end.cause.into(),
            details: end.details.into(),
            reopen: if end.reopen_on_request { Reopen::OnRequest } else { Reopen::OnStart },
        }
    }
}

impl From<&Then> for Next {
    fn from(then: &Then) -> Self {
        match then {
            Then::Absent => Self::Absent,
            Then::Terminated(end) => Self::Terminated(end.into()),
        }
    }
}

impl From<Next> for Then {
    fn from(next: Next) -> Self {
        match next {
            Next::Absent => Self::Absent,
            Next::Terminated(end) => Self::Terminated(end.into()),
        }
    }
}

impl From<&LastVm> for Vm {
    fn from(vm: &LastVm) -> Self {
        match vm {
            LastVm::Gone => Self::Gone,
            LastVm::Starting => Self::Starting,
            LastVm::Up { how } => Self::Up { how: how.into() },
            LastVm::Sleeping { how, by, then } => {
                Self::Sleeping { how: how.into(), by: by.into(), then: then.into() }
            }
            LastVm::Ending { then } => Self::Ending { then: then.into() },
        }
    }
}

impl From<Vm> for LastVm {
    fn from(vm: Vm) -> Self {
        match vm {
            Vm::Gone => Self::Gone,
            Vm::Starting => Self::Starting,
            Vm::Up { how } => Self::Up { how: how.into() },
            Vm::Sleeping { how, by, then } => {
                Self::Sleeping { how: how.into(), by: by.into(), then: then.into() }
            }
            Vm::Ending { then } => Self::Ending { then: then.into() },
        }
    }
}

impl From<&Durable> for State {
    fn from(durable: &Durable) -> Self {
        let pin = |pin: &Pin| PinEntry {
            id: pin.id.0,
            owner: pin.owner.to_string(),
            reason: pin.reason.to_string(),
            since: to_wall(pin.since),
            until: pin.until.map(to_wall),
        };
        let crash =
            |crash: &Crash| CrashEntry { details: crash.details.to_string(), until: to_wall(crash.until) };
        Self {
            format: FORMAT,
            incarnation: durable.incarnation.0,
            generation: durable.generation.0,
            boots: durable.boots,
            start_count: durable.start_count,
            vm: (&durable.vm).into(),
            snapshot: durable.snapshot.map(|generation| generation.0),
            remains: durable.remains.map(|generation| generation.0),
            pins: durable.pins.iter().map(pin).collect(),
            crashes: durable.crashes.iter().map(crash).collect(),
            termination: durable.termination.as_ref().map(End::from),
        }
    }
}

impl From<State> for Durable {
    fn from(state: State) -> Self {
        let pin = |pin: PinEntry| Pin {
            id: PinId(pin.id),
            owner: pin.owner.into(),
            reason: pin.reason.into(),
            since: from_wall(pin.since),
            until: pin.until.map(from_wall),
        };
        let crash =
            |crash: CrashEntry| Crash { details: crash.details.into(), until: from_wall(crash.until) };
        Self {
            incarnation: Incarnation(state.incarnation),
            generation: Generation(state.generation),
            boots: state.boots,
            start_count: state.start_count,
            vm: state.vm.into(),
            snapshot: state.snapshot.map(Generation),
            remains: state.remains.map(Generation),
            pins: state.pins.into_iter().map(pin).collect(),
            crashes: state.crashes.into_iter().map(crash).collect(),
            termination: state.termination.map(Termination::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), Durable::default());
        let end = Termination {
            reason: TerminationReason::Crashed,
            cause: Cause::VmExited,
            details: "killed".into(),
            reopen: Reopen::OnRequest,
        };
        let durable = Durable {
            incarnation: Incarnation(3),
            generation: Generation(7),
            boots: 6,
            start_count: 7,
            vm: LastVm::Sleeping {
                how: StartHow::Cold,
                by: SleepHow::Stop,
                then: Then::Terminated(end.clone()),
            },
            snapshot: None,
            remains: Some(Generation(6)),
            pins: Vec::new(),
            crashes: Vec::new(),
            termination: Some(end),
        };
        write(folder.path(), &durable).unwrap();
        assert_eq!(read(folder.path()).unwrap(), durable);
    }

    #[test]
    fn damage_and_other_formats_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(matches!(read(folder.path()), Err(StateError::Damaged(_))));
    }
}
