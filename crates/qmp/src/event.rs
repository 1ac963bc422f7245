//! The events that we act on.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::codec::CodecError;

/// Something that happened in QEMU. Names and fields are those of `qapi/run-state.json` and its siblings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The VM is about to end; QEMU exits next. The only trustworthy word on why: the exit status is 0 for a guest's
    /// triple fault as well.
    Shutdown {
        /// The guest did it, not the host.
        guest: bool,
        /// What did it.
        reason: ShutdownReason,
    },
    /// The guest was told to power off.
    Powerdown,
    /// vCPUs stopped.
    Stop,
    /// vCPUs run.
    Resume,
    /// A disk failed.
    BlockIoError {
        /// Name of the block node, empty when QEMU knows none.
        node: String,
        /// What was tried.
        operation: BlockOperation,
        /// What QEMU does about it.
        action: BlockErrorAction,
        /// The host's disk is full.
        no_space: bool,
        /// For people.
        reason: String,
    },
    /// The guest's kernel panicked and could tell (pvpanic).
    GuestPanicked,
    /// The guest opened or closed a virtio-serial port.
    VserportChange {
        /// Id of the port's device.
        id: String,
        /// The guest has it open.
        open: bool,
    },
    /// A migration went on.
    Migration {
        /// `setup`, `active`, `completed`, `failed`, ...
        status: String,
    },
    /// The balloon changed its size.
    BalloonChange {
        /// RAM that the guest has left, bytes.
        actual: u64,
    },
    /// An unplugged device is gone.
    DeviceDeleted {
        /// Its id, empty when it had none.
        device: String,
    },
    /// Events came faster than they were taken: this many of the oldest ones were dropped here.
    Lost(u64),
    /// Something that we do nothing about.
    Other {
        /// Its name.
        name: String,
    },
}

/// Why a VM ends (`ShutdownCause`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownReason {
    /// QEMU met an error, such as a failed incoming migration.
    HostError,
    /// Somebody said `quit`.
    HostQmpQuit,
    /// Somebody said `system_reset`.
    HostQmpSystemReset,
    /// QEMU got SIGTERM, SIGINT or SIGHUP.
    HostSignal,
    /// The guest powered off.
    GuestShutdown,
    /// The guest reset itself. Our guests never do, except by a triple fault: with `reboot=t` a kernel panic ends so.
    GuestReset,
    /// The guest's kernel panicked and could tell.
    GuestPanic,
    /// Any other, also those of newer QEMUs.
    #[serde(other)]
    Other,
}

/// What a disk was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockOperation {
    /// A read.
    Read,
    /// A write, discard or flush.
    Write,
}

/// What QEMU does about a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockErrorAction {
    /// Nothing.
    Ignore,
    /// The guest sees the error.
    Report,
    /// The vCPUs are stopped; the request is repeated at `cont`.
    Stop,
}

#[derive(Deserialize)]
struct ShutdownData {
    guest: bool,
    #[serde(default = "unknown_reason")]
    reason: ShutdownReason,
}

const fn unknown_reason() -> ShutdownReason {
    ShutdownReason::Other
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockIoErrorData {
    #[serde(default)]
    node_name: String,
    operation: BlockOperation,
    action: BlockErrorAction,
    #[serde(default)]
    nospace: bool,
    #[serde(default)]
    reason: String,
}

#[derive(Deserialize)]
struct VserportData {
    id: String,
    open: bool,
}

#[derive(Deserialize)]
struct MigrationData {
    status: String,
}

#[derive(Deserialize)]
struct BalloonData {
    actual: u64,
}

#[derive(Deserialize)]
struct DeviceData {
    #[serde(default)]
    device: String,
}

impl Event {
    pub(crate) fn parse(name: String, data: Option<Value>) -> Result<Self, CodecError> {
        Ok(match name.as_str() {
            "SHUTDOWN" => {
                let ShutdownData { guest, reason } = typed(&name, data)?;
                Self::Shutdown { guest, reason }
            }
            "POWERDOWN" => Self::Powerdown,
            "STOP" => Self::Stop,
            "RESUME" => Self::Resume,
            "BLOCK_IO_ERROR" => {
                let data: BlockIoErrorData = typed(&name, data)?;
                Self::BlockIoError {
                    node: data.node_name,
                    operation: data.operation,
                    action: data.action,
                    no_space: data.nospace,
                    reason: data.reason,
                }
            }
            "GUEST_PANICKED" => Self::GuestPanicked,
            "VSERPORT_CHANGE" => {
                let VserportData { id, open } = typed(&name, data)?;
                Self::VserportChange { id, open }
            }
            "MIGRATION" => {
                let MigrationData { status } = typed(&name, data)?;
                Self::Migration { status }
            }
            "BALLOON_CHANGE" => {
                let BalloonData { actual } = typed(&name, data)?;
                Self::BalloonChange { actual }
            }
            "DEVICE_DELETED" => {
                let DeviceData { device } = typed(&name, data)?;
                Self::DeviceDeleted { device }
            }
            _ => Self::Other { name },
        })
    }
}

fn typed<T: DeserializeOwned>(name: &str, data: Option<Value>) -> Result<T, CodecError> {
    serde_json::from_value(data.unwrap_or(Value::Null))
        .map_err(|error| CodecError::NotAMessage(format!("event {name}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_full_host_disk_is_told_from_a_broken_one() {
        let data = json!({"device": "", "node-name": "data", "operation": "write", "action": "stop",
                          "nospace": true, "reason": "No space left on device"});
        let event = Event::parse("BLOCK_IO_ERROR".into(), Some(data)).unwrap();
        assert!(matches!(event, Event::BlockIoError { no_space: true, action: BlockErrorAction::Stop, .. }));
    }

    #[test]
    fn an_unheard_of_reason_is_kept_as_other() {
        let data = json!({"guest": false, "reason": "cosmic-ray"});
        let event = Event::parse("SHUTDOWN".into(), Some(data)).unwrap();
        assert_eq!(event, Event::Shutdown { guest: false, reason: ShutdownReason::Other });
    }

    #[test]
    fn a_known_event_with_wrong_data_is_refused() {
        assert!(Event::parse("VSERPORT_CHANGE".into(), Some(json!({"id": 3}))).is_err());
        assert!(Event::parse("SHUTDOWN".into(), None).is_err());
    }

    #[test]
    fn an_unknown_event_keeps_its_name() {
        let event = Event::parse("RTC_CHANGE".into(), Some(json!({"offset": 1}))).unwrap();
        assert_eq!(event, Event::Other { name: "RTC_CHANGE".into() });
    }
}
