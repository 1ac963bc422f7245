//! What `dormd` and a session's host say to each other, over the host's `service.sock`.
//!
//! The host listens, the service connects: so a new `dormd` finds the hosts that outlived the last one. One JSON line
//! is one message, [`LINE_BYTES_MAX`] at most. The order of a link:
//!
//! 1. dormd: [`ToHost::Attach`]. A host that was just started got its listeners as inherited descriptors; one that
//!    outlived its service is asked for duplicates.
//! 2. host: [`ToService::Attached`], with the duplicates (docker, control) as ancillary data if they were asked for.
//! 3. Then both at any time, until one side closes. A host goes on without a service; it needs one only to make a VM.
//!
//! A host leaves only by asking: it stops accepting, sends [`ToService::Leave`], and exits on [`ToHost::Go`]. dormd
//! polls its duplicates once more before it says so; a knock that came meanwhile is answered with [`ToHost::Stay`].
//! After [`ToHost::Go`] dormd says nothing more, as nobody may be there to hear it, until the link ends or the host asks
//! for something: that is a host which had given up waiting, and says [`ToService::Stays`].

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    ChangeSettings, CrashPolicy, IdleAction, IdleTimeout, NetworkKind, Registries, RunningContainers,
    SessionId, SessionInfo, SessionName,
};

/// Most sockets of published ports that a host may leave behind. One with more doesn't leave.
pub const DOORS_MAX: usize = 128;

/// The environment variable that tells a host how many of them it inherits.
pub const DOORS_VARIABLE: &str = "DORM_DOORS";

/// What a host leaves in the session's folder beside them: what they are for.
pub const DOORS_FILE: &str = "doors.json";

/// Longest message, in bytes.
pub const LINE_BYTES_MAX: usize = 256 * 1024;

/// A session's settings as its host needs them. The factory takes none of them from it: it has its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSettings {
    /// The session.
    pub id: SessionId,
    /// What the user calls it.
    pub name: SessionName,
    /// The owner's uid.
    pub owner: u32,
    /// Where its disk lives.
    pub storage: PathBuf,
    /// Its disk lives in memory: it never sleeps.
    pub ephemeral: bool,
    /// It ends with the connection that made it.
    #[serde(default)]
    pub temporary: bool,
    /// The grace period.
    pub idle_timeout: IdleTimeout,
    /// How long the VM dozes after it, in seconds; 0: not at all.
    #[serde(default)]
    pub doze_seconds: u64,
    /// How the VM is put to sleep after it.
    pub idle_action: IdleAction,
    /// Whether running containers keep the VM awake.
    pub running: RunningContainers,
    /// The guest's host name.
    pub hostname: String,
    /// What follows a crash.
    pub crash: CrashPolicy,
    /// Longest bring-up, in seconds.
    pub boot_timeout_seconds: u64,
    /// May reads be answered without waking the VM?
    pub asleep_answers: bool,
    /// Registries that its engine treats in a way of their own.
    pub registries: Registries,
    /// Where ports are published whose clients name no address.
    pub publish_address: IpAddr,
    /// The engine that a first VM of this session would have; `None` if there is no image to make one of.
    pub engine: Option<EngineFacts>,
    /// For display: virtual CPUs.
    pub cpus: u32,
    /// For display: RAM in MiB.
    pub memory_mib: u64,
    /// For display: size of the data disk in bytes.
    pub storage_bytes: u64,
    /// For display: the way out.
    pub network: NetworkKind,
    /// Where the machine's hooks lie.
    pub machine_hooks: PathBuf,
    /// Where the machine's administrator says which folders may be shared; without that, the owner's home and the folder
    /// for temporary files.
    pub folder_rules: PathBuf,
    /// Dormouse's own folders, which never may.
    pub own_folders: Vec<PathBuf>,
}

/// What is known of an engine that never ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineFacts {
    /// Its version, as it tells it.
    pub version: String,
    /// The newest version of its API.
    pub api: String,
    /// The kernel under it.
    pub kernel: String,
}

/// From dormd to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToHost {
    /// First: who the session is.
    Attach {
        /// The service's version; a host of another one finishes its work and leaves.
        version: String,
        /// Are duplicates of the listeners wanted?
        listeners: bool,
    },
    /// The VM that was asked for takes its time: what is being done, in words. Told every second or so.
    Making {
        /// The request's generation.
        generation: u64,
        /// The step.
        step: String,
    },
    /// The VM that was asked for runs; its record lies in the session's runtime directory.
    Made {
        /// The request's generation.
        generation: u64,
        /// What was tried in vain before, in words: a snapshot or a template that can't be used.
        notes: Vec<String>,
    },
    /// It could not be made.
    NotMade {
        /// The request's generation.
        generation: u64,
        /// Why, in one line, and what to try.
        reason: String,
    },
    /// To [`ToService::Leave`]: nobody knocked, exit.
    Go,
    /// To [`ToService::Leave`]: somebody knocked, accept again.
    Stay,
    /// The service is going down: put the VM to sleep, then exit.
    Shutdown,
    /// The session is being removed.
    Terminate,
    /// A temporary session's creator is gone.
    CreatorGone,
    /// Settings were changed, and are written down already.
    Change(ChangeSettings),
}

/// From the host to dormd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToService {
    /// To [`ToHost::Attach`].
    Attached {
        /// The host's version.
        version: String,
        /// The session as it is now.
        info: Box<SessionInfo>,
    },
    /// Make one more VM. All that it is made of was settled when the session was created.
    MakeVm {
        /// Must be this link's session.
        session: SessionId,
        /// Above every earlier one; names the VM's sockets.
        generation: u64,
    },
    /// Something of the session changed.
    Changed(Box<SessionInfo>),
    /// Before [`ToService::Leave`]: duplicates of the published ports' sockets, so many of them, as ancillary data. The
    /// service polls them while there is no host, and passes them to the next one as inherited descriptors behind its
    /// listeners, their number in [`DOORS_VARIABLE`].
    Doors {
        /// At most [`DOORS_MAX`].
        count: usize,
    },
    /// May I go?
    Leave,
    /// To a [`ToHost::Go`] that came when it wasn't waited for any more: the host is still there.
    Stays,
}
