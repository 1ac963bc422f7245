//! The commands that we give.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::codec::Version;

/// A QMP command: a value serialises to its arguments.
pub trait Command: Serialize {
    /// Its name in the protocol.
    const NAME: &'static str;
    /// What QEMU answers.
    type Answer: DeserializeOwned;
}

macro_rules! commands {
    ($($(#[$doc:meta])* $name:literal $command:ident { $($(#[$field_doc:meta])* $field:ident : $type:ty),* $(,)? } -> $answer:ty;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Serialize)]
            #[serde(rename_all = "kebab-case")]
            pub struct $command { $($(#[$field_doc])* pub $field: $type),* }
            impl Command for $command {
                const NAME: &'static str = $name;
                type Answer = $answer;
            }
        )*
    };
}

commands! {
    /// Whether the vCPUs run, and if not, why.
    "query-status" QueryStatus {} -> Status;
    /// The name that QEMU was started with.
    "query-name" QueryName {} -> Name;
    /// The UUID that QEMU was started with.
    "query-uuid" QueryUuid {} -> Uuid;
    /// Version of this QEMU.
    "query-version" QueryVersion {} -> Version;
    /// Every type of object and device that this QEMU has.
    "qom-list-types" QomListTypes {} -> Vec<QomType>;
    /// Every command and event of this QEMU; only the commands' names are kept.
    "query-qmp-schema" QueryQmpSchema {} -> Vec<SchemaEntity>;
    /// The migration capabilities of this QEMU.
    "query-migrate-capabilities" QueryMigrateCapabilities {} -> Vec<MigrationCapability>;
    /// Tell the guest to power off (ACPI).
    "system_powerdown" SystemPowerdown {} -> IgnoredAny;
    /// End QEMU at once.
    "quit" Quit {} -> IgnoredAny;
    /// Stop the vCPUs.
    "stop" Stop {} -> IgnoredAny;
    /// Let the vCPUs run.
    "cont" Cont {} -> IgnoredAny;
    /// Switch migration capabilities.
    "migrate-set-capabilities" MigrateSetCapabilities {
        /// Those to switch.
        capabilities: Vec<MigrationCapability>,
    } -> IgnoredAny;
    /// Write the state of the VM to `uri`. Answered at once; [`QueryMigrate`] tells the end.
    "migrate" Migrate {
        /// `fd:NAME` after [`GetFd`].
        uri: String,
    } -> IgnoredAny;
    /// Read the state of the VM from `uri`. Answered at once.
    "migrate-incoming" MigrateIncoming {
        /// `fd:NAME` after [`GetFd`].
        uri: String,
    } -> IgnoredAny;
    /// Give up an outgoing migration.
    "migrate_cancel" MigrateCancel {} -> IgnoredAny;
    /// How far a migration is.
    "query-migrate" QueryMigrate {} -> MigrationState;
    /// Receive a file descriptor, sent along with this command, under a name.
    "getfd" GetFd {
        /// The name.
        fdname: String,
    } -> IgnoredAny;
    /// Close a file descriptor that was received and not used.
    "closefd" CloseFd {
        /// Its name.
        fdname: String,
    } -> IgnoredAny;
    /// Tell the guest that a disk has a new size.
    "block_resize" BlockResize {
        /// The block node.
        node_name: String,
        /// Bytes.
        size: u64,
    } -> IgnoredAny;
    /// The disks.
    "query-block" QueryBlock {} -> Vec<BlockDevice>;
    /// Set how much RAM the guest should have.
    "balloon" Balloon {
        /// Bytes.
        value: u64,
    } -> IgnoredAny;
    /// How much RAM the guest has.
    "query-balloon" QueryBalloon {} -> BalloonInfo;
    /// Unplug a device. Answered at once; [`crate::Event::DeviceDeleted`] tells the end.
    "device_del" DeviceDel {
        /// Its id.
        id: String,
    } -> IgnoredAny;
    /// Open a character device.
    "chardev-add" ChardevAdd {
        /// Its id.
        id: String,
        /// What it is, such as `{"type": "socket", "data": {...}}`.
        backend: serde_json::Value,
    } -> IgnoredAny;
    /// Close a character device. Refused while a device uses it.
    "chardev-remove" ChardevRemove {
        /// Its id.
        id: String,
    } -> IgnoredAny;
    /// What an object of QEMU's has.
    "qom-list" QomList {
        /// Its path, such as `/machine/peripheral`, which has the devices that were given an id.
        path: String,
    } -> Vec<QomType>;
    /// Have the network card tell its peers where it is, after a resume.
    "announce-self" AnnounceSelf {
        /// First delay, milliseconds.
        initial: u64,
        /// Longest delay, milliseconds.
        max: u64,
        /// How many times.
        rounds: u64,
        /// Growth of the delay, milliseconds.
        step: u64,
    } -> IgnoredAny;
}

/// Plug a device in.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceAdd {
    /// The type of device.
    pub driver: String,
    /// Its id.
    pub id: String,
    /// The bus, such as a spare root port.
    pub bus: String,
    /// The device's own properties.
    #[serde(flatten)]
    pub properties: serde_json::Map<String, serde_json::Value>,
}

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Answer = IgnoredAny;
}

/// Answer to [`QueryStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// The vCPUs run.
    pub running: bool,
    /// In which state the VM is.
    pub status: RunState,
}

/// State of a VM as QEMU knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// vCPUs run.
    Running,
    /// Stopped by `stop`, or after an incoming migration.
    Paused,
    /// Started with `-S`, never ran.
    Prelaunch,
    /// Waits for an incoming migration, or is receiving it.
    Inmigrate,
    /// An outgoing migration is finishing.
    FinishMigrate,
    /// An outgoing migration has ended; the state is now elsewhere.
    Postmigrate,
    /// A disk failed, the host's may be full.
    IoError,
    /// The guest's kernel panicked.
    GuestPanicked,
    /// The guest has shut down and QEMU was told to stay.
    Shutdown,
    /// QEMU itself has broken down.
    InternalError,
    /// Any other.
    #[serde(other)]
    Other,
}

/// Answer to [`QueryName`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Name {
    /// Absent when QEMU was started without `-name`.
    pub name: Option<String>,
}

/// Answer to [`QueryUuid`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Uuid {
    /// In the usual form, lower case.
    #[serde(rename = "UUID")]
    pub uuid: String,
}

/// One of [`QomListTypes`]' answer, or of [`QomList`]'s.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct QomType {
    /// Name of the type, or of the property.
    pub name: String,
}

/// One of [`QueryQmpSchema`]'s answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SchemaEntity {
    /// Name of a command or event; a number for a type.
    pub name: String,
    /// `command`, `event`, `object`, ...
    pub meta_type: String,
}

/// A switch of migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCapability {
    /// Such as `x-ignore-shared`.
    pub capability: String,
    /// On or off.
    pub state: bool,
}

/// Answer to [`QueryMigrate`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationState {
    /// Absent while there was no migration at all.
    pub status: Option<MigrationStatus>,
    /// Why it failed.
    pub error_desc: Option<String>,
}

/// Where a migration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// Done.
    Completed,
    /// It failed.
    Failed,
    /// It was given up.
    Cancelled,
    /// Any of the states on the way.
    #[serde(other)]
    Ongoing,
}

/// One of [`QueryBlock`]'s answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockDevice {
    /// Path of the device in QEMU's object tree.
    #[serde(default)]
    pub qdev: String,
    /// How the last requests went.
    pub io_status: Option<BlockIoStatus>,
}

/// How a disk does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockIoStatus {
    /// No error.
    Ok,
    /// A request failed.
    Failed,
    /// A request failed because the host's disk is full.
    Nospace,
}

/// Answer to [`QueryBalloon`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BalloonInfo {
    /// RAM that the guest has, bytes.
    pub actual: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn arguments_have_the_protocols_names() {
        assert_eq!(serde_json::to_value(Quit {}).unwrap(), json!({}));
        assert_eq!(
            serde_json::to_value(BlockResize { node_name: "data".into(), size: 5 }).unwrap(),
            json!({"node-name": "data", "size": 5})
        );
        let mut properties = serde_json::Map::new();
        properties.insert("tag".into(), json!("src"));
        let plug = DeviceAdd {
            driver: "vhost-user-fs-pci".into(),
            id: "folder0".into(),
            bus: "spare0".into(),
            properties,
        };
        assert_eq!(
            serde_json::to_value(plug).unwrap(),
            json!({"driver": "vhost-user-fs-pci", "id": "folder0", "bus": "spare0", "tag": "src"})
        );
    }

    #[test]
    fn states_of_newer_qemus_are_no_errors() {
        let status: Status = serde_json::from_value(json!({"status": "dreaming", "running": false})).unwrap();
        assert_eq!(status.status, RunState::Other);
        let state: MigrationState = serde_json::from_value(json!({"status": "pre-switchover"})).unwrap();
        assert_eq!(state.status, Some(MigrationStatus::Ongoing));
    }
}
