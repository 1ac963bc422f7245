//! A session as the outside sees it, and what may be asked of it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Registries, SessionId, SessionName, Wake};

/// Who answers on `dormd.sock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Of the package.
    pub version: String,
    /// [`crate::API_VERSION`].
    pub api: u32,
    /// The service's process id.
    pub pid: u32,
}

/// How long a VM stays up after its last hold is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleTimeout {
    /// This many seconds; 0: at once.
    Seconds(u64),
    /// It never falls asleep by itself.
    Never,
}

impl Default for IdleTimeout {
    fn default() -> Self {
        Self::Seconds(30)
    }
}

impl FromStr for IdleTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "never" => Ok(Self::Never),
            _ => text
                .parse()
                .map(Self::Seconds)
                .map_err(|_| format!("{text:?} is neither a number of seconds nor \"never\"")),
        }
    }
}

impl fmt::Display for IdleTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seconds(seconds) => write!(f, "{seconds}"),
            Self::Never => f.write_str("never"),
        }
    }
}

/// On the wire: a number of seconds, or `null` for never.
impl Serialize for IdleTimeout {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Seconds(seconds) => Some(*seconds),
            Self::Never => None,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for IdleTimeout {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map_or(Self::Never, Self::Seconds))
    }
}

/// What follows a crash of the VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CrashPolicy {
    /// The next request opens a new incarnation.
    #[default]
    Reopen,
    /// Requests are refused until the session is started by name.
    Terminate,
}

/// What to make. Everything but the name has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSession {
    /// What the user calls it.
    pub name: SessionName,
    /// Where its disk lives; under the data directory when absent.
    #[serde(default)]
    pub storage: Option<PathBuf>,
    /// The storage must be there already, and be a store.
    #[serde(default)]
    pub no_create: bool,
    /// The disk lives in memory and goes with the VM, which therefore never sleeps.
    #[serde(default)]
    pub ephemeral: bool,
    /// Ends when the creating connection closes.
    #[serde(default)]
    pub temporary: bool,
    /// Virtual CPUs; all of the host's up to 4 when absent.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// RAM in MiB; a quarter of the host's within 1..8 GiB (1 GiB under emulation) when absent.
    #[serde(default)]
    pub memory_mib: Option<u64>,
    /// Size of the data disk in bytes; 64 GiB, sparse, when absent.
    #[serde(default)]
    pub storage_bytes: Option<u64>,
    /// The grace period.
    #[serde(default)]
    pub idle_timeout: IdleTimeout,
    /// How long the VM dozes after it before it is put to sleep, in seconds; 0: not at all.
    #[serde(default)]
    pub doze_seconds: u64,
    /// How the VM is put to sleep after it.
    #[serde(default)]
    pub idle_action: IdleAction,
    /// What follows a crash.
    #[serde(default)]
    pub crash: CrashPolicy,
    /// Whether running containers keep the VM awake.
    #[serde(default)]
    pub running: RunningContainers,
    /// Which guest image it boots.
    #[serde(default)]
    pub image: ImageChoice,
    /// Longest bring-up; 240 s when absent.
    #[serde(default)]
    pub boot_timeout_seconds: Option<u64>,
    /// May reads of the engine be answered without waking it, from what it answered before it fell asleep? Yes when
    /// absent.
    #[serde(default)]
    pub asleep_answers: Option<bool>,
    /// Registries that its engine treats in a way of their own.
    #[serde(default)]
    pub registries: Registries,
    /// Where ports are published whose clients name no address; 127.0.0.1 when absent.
    #[serde(default)]
    pub publish_address: Option<IpAddr>,
}

impl CreateSession {
    /// A session of this name with all the defaults.
    #[must_use]
    pub fn named(name: SessionName) -> Self {
        Self {
            name,
            storage: None,
            no_create: false,
            ephemeral: false,
            temporary: false,
            cpus: None,
            memory_mib: None,
            storage_bytes: None,
            idle_timeout: IdleTimeout::default(),
            doze_seconds: 0,
            crash: CrashPolicy::default(),
            idle_action: IdleAction::default(),
            running: RunningContainers::default(),
            image: ImageChoice::default(),
            boot_timeout_seconds: None,
            asleep_answers: None,
            registries: Registries::default(),
            publish_address: None,
        }
    }
}

/// Which guest image a session boots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageChoice {
    /// At each boot the newest.
    #[default]
    Newest,
    /// Always the one that it was first booted from.
    Pinned,
}

/// What may be changed while a session lives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeSettings {
    /// A new grace period; it counts from the moment when the last hold went.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "present")]
    pub idle_timeout: Option<IdleTimeout>,
    /// How long the VM dozes before it is put to sleep, in seconds; 0: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doze_seconds: Option<u64>,
    /// What follows a crash from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crash: Option<CrashPolicy>,
    /// May reads of the engine be answered without waking it from now on?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asleep_answers: Option<bool>,
}

/// `null` means "never" here, so a field that is absent must not be read as `null`.
mod present {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::IdleTimeout;

    pub(super) fn serialize<S: Serializer>(
        value: &Option<IdleTimeout>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<IdleTimeout>, D::Error> {
        IdleTimeout::deserialize(deserializer).map(Some)
    }
}

/// Keeps a VM that is up from sleeping; never starts one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// Until then; for ever when absent.
    #[serde(default)]
    pub until: Option<Timestamp>,
    /// Why, in the user's words.
    #[serde(default)]
    pub reason: Option<String>,
}

/// An operation token: a hold for a job of several calls, gone when its connection ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// What the job is, e.g. `dorm run busybox`.
    pub reason: String,
}

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitFor {
    /// The incarnation is over.
    Terminated,
    /// There is no VM.
    Absent,
    /// There is one, and it serves.
    Running,
}

/// Everything that can be told of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// What the user calls it.
    pub name: SessionName,
    /// What sockets and folders call it.
    pub id: SessionId,
    /// The owner's uid.
    pub owner: u32,
    /// Of the API: running (asleep or not), terminating, terminated.
    pub state: SessionState,
    /// Counts the session's lives, from 1.
    pub incarnation: u64,
    /// Its VM.
    pub vm: VmInfo,
    /// What keeps the VM awake, and what is merely listed.
    pub holds: Vec<HoldInfo>,
    /// When it falls asleep, and how.
    pub idle: IdleInfo,
    /// What follows a crash.
    #[serde(default)]
    pub crash: CrashPolicy,
    /// How guests reach the network.
    pub network: NetworkInfo,
    /// Its disk.
    pub storage: StorageInfo,
    /// What it wakes from; `null` while its VM is up, and when it would be booted.
    #[serde(default)]
    pub snapshot: Option<SnapshotInfo>,
    /// When it will be woken though nobody asks for it, soonest first. Only the service knows of it: its host tells none.
    #[serde(default)]
    pub wakes: Vec<Wake>,
    /// Why the last incarnation ended; `null` while none has.
    pub termination: Option<TerminationInfo>,
    /// The Docker socket, for `DOCKER_HOST=unix://...`.
    pub docker_socket: PathBuf,
    /// The session's control socket.
    pub control_socket: PathBuf,
}

/// State of a session's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    /// Requests are served, waking the VM if need be.
    Running,
    /// Requests are refused: it is ending.
    Terminating,
    /// Requests are refused: it ended.
    Terminated,
}

/// A session's VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// What it is doing.
    pub phase: Phase,
    /// The latest generation; 0 before the first.
    pub generation: u64,
    /// The guest kernel; `null` while none is known.
    pub boot: Option<String>,
    /// How the latest start went.
    pub how: Option<How>,
    /// Successful starts of all kinds.
    pub start_count: u64,
    /// Guest kernels booted.
    pub boots: u64,
    /// Since when it is in this phase.
    pub since: Timestamp,
    /// When the phase ends by itself, if nothing happens.
    pub deadline: Option<Timestamp>,
    /// The step of a bring-up under way.
    pub step: Option<String>,
    /// `kvm` or `tcg`; `null` while no VM was made.
    pub acceleration: Option<String>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
}

/// Phases of a VM (ARCHITECTURE.md, "The lifecycle").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// There is none.
    Absent,
    /// It is being made.
    Starting,
    /// It serves.
    Running,
    /// Nothing holds it and the grace period is over: the engine is asked what runs.
    Counting,
    /// Its processors are stopped, its memory is kept: it runs on at once.
    Dozing,
    /// A sleep will happen; hooks are being told.
    Committed,
    /// It is being suspended or shut down.
    Stopping,
}

/// The ways to start a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// From the kernel up.
    Cold,
    /// From the template.
    Clone,
    /// From the session's own snapshot.
    Resume,
}

/// Something that keeps the VM awake, or is listed without doing so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldInfo {
    /// What it is.
    pub kind: HoldKind,
    /// Who has it, e.g. `pid 4711 (docker)` or a container's name.
    pub owner: String,
    /// Why, in words.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
    /// Listed only: keeps nothing awake.
    pub weak: bool,
}

/// Kinds of holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HoldKind {
    /// A request in flight.
    Request,
    /// One that only looks: the grace period runs on meanwhile.
    Read,
    /// An operation token.
    Operation,
    /// A root process.
    RootProcess,
    /// A process started in a container by `exec`.
    Exec,
    /// A container that runs, is paused, restarting or being removed.
    Container,
    /// What goes on in a container that may be suspended. It holds but against a suspend that is asked for by name.
    Activity,
    /// A user's wish.
    Pin,
    /// An open `/events` stream, an idle connection.
    Connection,
}

/// When a session falls asleep, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleInfo {
    /// The grace period; `null`: never.
    pub timeout_seconds: IdleTimeout,
    /// How long the VM dozes after it before it is put to sleep; 0: not at all.
    #[serde(default)]
    pub doze_seconds: u64,
    /// What happens then.
    pub action: IdleAction,
    /// Whether running containers keep the VM awake.
    #[serde(default)]
    pub running: RunningContainers,
}

/// The ways to put a VM to sleep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdleAction {
    /// Shut it down.
    Stop,
    /// Keep its memory in a snapshot.
    #[default]
    Suspend,
}

/// What a running container means for the sleep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunningContainers {
    /// It keeps the VM awake.
    #[default]
    Hold,
    /// It is suspended together with the VM. It still keeps the VM from being *stopped*.
    Suspend,
}

/// How guests reach the network, and are reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInfo {
    /// The means.
    pub kind: NetworkKind,
    /// Can a guest reach the host's loopback? If so, it is unsafe for code that isn't trusted.
    pub host_loopback: bool,
    /// Where ports are published whose clients name no address.
    #[serde(default = "this_host_only")]
    pub publish_address: IpAddr,
    /// Registries that the engine treats in a way of their own.
    #[serde(default)]
    pub registries: Registries,
}

/// Where ports are published unless something else is asked for.
#[must_use]
pub fn this_host_only() -> IpAddr {
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}

/// Means of a guest's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// passt without a map to the host: the default.
    Passt,
    /// QEMU's user network: the unsafe fallback.
    User,
    /// None at all.
    None,
}

/// A session's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageInfo {
    /// The folder that holds it.
    pub path: PathBuf,
    /// Size that the guest sees.
    pub size_bytes: u64,
    /// What it takes on the host.
    pub used_bytes: u64,
}

/// The memory of a VM that was suspended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// When the VM was put to sleep.
    pub made_at: Timestamp,
    /// Which VM.
    pub generation: u64,
    /// What it takes on the host, in bytes.
    pub used_bytes: u64,
    /// How its memory lies there.
    #[serde(default)]
    pub memory: MemoryForm,
    /// Of its memory.
    pub checksum: Checksum,
    /// What it fits: a VM with another value of any of these can't be woken from it.
    pub key: BTreeMap<String, String>,
    /// Why it can't be woken as things are, in words; `null` if it can. The disk is booted instead.
    pub unfit: Option<String>,
    /// What would void it, in words.
    pub voided_by: Vec<String>,
}

impl SnapshotInfo {
    /// One whose description can't be read.
    #[must_use]
    pub fn damaged() -> Self {
        Self {
            made_at: Timestamp::UNIX_EPOCH,
            generation: 0,
            used_bytes: 0,
            memory: MemoryForm::Plain,
            checksum: Checksum::Pending,
            key: BTreeMap::new(),
            unfit: Some("its description is damaged".to_owned()),
            voided_by: Vec::new(),
        }
    }
}

/// How the memory of a snapshot lies on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryForm {
    /// A VM can be made of it as it is.
    #[default]
    Plain,
    /// It takes less space, and is decompressed when it is woken.
    Compressed,
}

/// How far the checksum of a snapshot's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checksum {
    /// Being made; until it is there, a restart of the host voids the snapshot.
    Pending,
    /// It is there.
    Made,
    /// The memory was compared with it, and is another one.
    Wrong,
}

/// What came of `dorm session verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum VerifyAnswer {
    /// There is none: the VM is up, or would be booted.
    NoSnapshot,
    /// It is what was put to sleep.
    Intact,
    /// There was no checksum to compare with; now there is.
    SumMade,
    /// It is not what was put to sleep, and will not be woken.
    Damaged {
        /// What is wrong with it, in words.
        reason: String,
    },
}

/// Why an incarnation ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminationInfo {
    /// In one word.
    pub reason: TerminationReason,
    /// QMP's reason, a signal, the console's last lines.
    pub details: String,
    /// When.
    pub at: Timestamp,
}

/// Why an incarnation ended, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub enum TerminationReason {
    /// Somebody asked for it.
    Shutdown,
    /// The VM ended and nobody had asked.
    Crashed,
    /// It can't be told.
    Unknown,
}

/// What came of `dorm session sleep`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum SleepAnswer {
    /// There was no VM.
    NoVm,
    /// These held it awake.
    Busy {
        /// What keeps the VM awake.
        holds: Vec<HoldInfo>,
    },
    /// The session never sleeps (ephemeral).
    Disabled,
    /// It fell asleep.
    Asleep {
        /// The generation that ended.
        generation: u64,
        /// By what means.
        how: IdleAction,
    },
    /// The sleep was tried and failed; the VM runs on.
    Failed {
        /// Why.
        reason: String,
    },
}

/// One start, sleep or crash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// When it began.
    pub at: Timestamp,
    /// `start`, `sleep`, `crash`, `start_failed`, `sleep_failed`, `terminate`.
    pub what: String,
    /// The generation.
    pub generation: u64,
    /// `cold`, `clone`, `resume`, `stop`, `suspend`; empty where it has no meaning.
    pub how: String,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// Who or what caused it, in words.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_is_null_on_the_wire_and_absent_means_unchanged() {
        let change = |text: &str| serde_json::from_str::<ChangeSettings>(text).unwrap().idle_timeout;
        assert_eq!(change("{}"), None);
        assert_eq!(change(r#"{"idle_timeout":null}"#), Some(IdleTimeout::Never));
        assert_eq!(change(r#"{"idle_timeout":0}"#), Some(IdleTimeout::Seconds(0)));
        let text = |change: &ChangeSettings| serde_json::to_string(change).unwrap();
        assert_eq!(
            text(&ChangeSettings { idle_timeout: Some(IdleTimeout::Never), ..ChangeSettings::default() }),
            r#"{"idle_timeout":null}"#
        );
        assert_eq!(text(&ChangeSettings::default()), "{}");
    }

    #[test]
    fn an_unknown_setting_is_an_error() {
        assert!(serde_json::from_str::<CreateSession>(r#"{"name":"a","colour":"red"}"#).is_err());
    }
}
