//! What the session host and `dorm-init` say to each other. Pure: types, framing and limits, no I/O.
//!
//! The channel is a virtio-serial port, which is not a connection: bytes of an earlier peer may still be in it.
//! So each (re)connection starts with a *preamble* that both sides use to find each other, and only then yamux
//! begins (the host is yamux's client, the guest its server).
//!
//! ```text
//! host  -> guest   DORM/1 <nonce>\n             the nonce: 32 hex digits, new for each connection; may be repeated
//! guest -> host    DORM/1 <nonce> <boot>\n      to each of these; boot: 32 hex digits, one guest kernel
//! host  -> guest   DORM/1 <nonce> go\n          once; then the host's yamux
//! guest -> host    DORM/1 <nonce> ready\n       once; then the guest's yamux
//! ```
//!
//! Everything else is dropped by both sides until they have read the other's last line, so neither an earlier peer's
//! bytes nor a question or answer that was repeated reaches yamux.
//!
//! On the port `agent` the host opens one yamux stream per [`Request`]: a length-prefixed JSON frame, answered by a
//! length-prefixed JSON [`Reply`], after which the stream belongs to what was asked for:
//!
//! | request | after the reply |
//! |---|---|
//! | `Hello`, `Activity`, `Sync`, `SetClock`, `Freeze`, `Wake`, `EndConnections`, `GrowDisk`, `PowerOff` | closed |
//! | `Dial` | raw bytes, both directions, half-close kept; of UDP, datagrams |
//! | `Run` | [`ProcessFrame`]s, both directions |
//! | `Watch` | length-prefixed JSON [`GuestEvent`]s from the guest, until closed |
//!
//! On the port `ports` only `Dial` is served, so that a flood of forwarded connections can't starve control.

mod activity;
mod datagram;
mod frame;
mod preamble;
mod process;

pub use activity::{Activity, BUSY_DIR, CONTAINERS_MAX, ContainerActivity};
pub use datagram::{DATAGRAM_BYTES_MAX, decode_datagram, encode_datagram};
pub use frame::{FrameError, JSON_BYTES_MAX, decode_json, encode_json};
pub use preamble::{Boot, Nonce, PREAMBLE_LINE_MAX, PreambleError};
pub use process::{PROCESS_PAYLOAD_MAX, ProcessFrame, ProcessFrameError};

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Version of this protocol. A host and a guest of different versions don't talk: the guest image is the host's own.
pub const VERSION: u32 = 3;

/// What a host asks at the start of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Who is there? Answered with [`Answer::Hello`] at any time, also before the engine is ready.
    Hello {
        /// The host's [`VERSION`].
        version: u32,
        /// Echoed in the answer: proof that the answer is to this question, not one from before a resume.
        nonce: String,
    },
    /// Connect this stream to a socket in the guest.
    Dial(Target),
    /// Run a root process.
    Run(RunProcess),
    /// Tell what happens in the guest from now on. What runs and the present engine state come first, in this order.
    Watch,
    /// What goes on in the containers? Answered with [`Answer::Activity`].
    Activity,
    /// Flush every file system to the disk.
    Sync,
    /// Set the guest's wall clock.
    SetClock {
        /// Nanoseconds since the Unix epoch, as the host sees them.
        unix_nanos: u64,
    },
    /// Flush the data disk's file system and keep it from being written to, so that the disk is whole as it stands: the
    /// VM is about to be suspended. The engine can't be asked anything meanwhile. Ends with [`Request::Wake`], and by
    /// itself after [`FROZEN_MAX`] of guest time, in which nobody stopped the VM: its host may have died.
    Freeze,
    /// The VM runs on after a [`Request::Freeze`]: set the clock, be somebody else if this is a clone, and thaw.
    Wake {
        /// Nanoseconds since the Unix epoch, as the host sees them.
        unix_nanos: u64,
        /// For a clone: what must not be the same in two guests.
        identity: Option<Identity>,
    },
    /// The VM was suspended, and runs on in another QEMU: end the connections that led out of the guest before, because
    /// nobody outside knows of them any more. Answered before that is done; a guest of before this request doesn't answer.
    EndConnections,
    /// The data disk has this size now, or is about to: have its file system fill it.
    GrowDisk {
        /// The device's size.
        bytes: u64,
    },
    /// Stop the engine in order, sync, unmount and power off. Answered before the power goes.
    PowerOff,
}

/// Longest time, of the guest's, that a file system stays frozen while the VM runs.
pub const FROZEN_MAX: Duration = Duration::from_secs(5);

/// What makes a clone a guest of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// 32 random bytes for the kernel's random number generator.
    pub seed: [u8; 32],
    /// The machine id, see machine-id(5): 16 random bytes.
    pub machine_id: [u8; 16],
    /// The host name.
    pub hostname: String,
}

/// Where [`Request::Dial`] leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The engine's API socket.
    Engine,
    /// Any unix socket, by absolute path in the guest.
    Unix(String),
    /// A TCP address as seen from the guest's root namespace, e.g. `172.17.0.2:80`.
    Tcp(String),
    /// A UDP address as seen from the guest's root namespace. The stream carries datagrams, each behind its length as a
    /// big-endian `u16`.
    Udp(String),
}

/// A process in the VM's root namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunProcess {
    /// Program and arguments; the program is looked up in the `PATH` of `env`, or of the guest.
    pub argv: Vec<String>,
    /// `KEY=VALUE` pairs added to the guest's own.
    #[serde(default)]
    pub env: Vec<String>,
    /// Working directory; `/` when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Numeric `uid[:gid]` or a name from the guest's `/etc/passwd`; root when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// With a terminal of this size; without one stdin, stdout and stderr are pipes.
    #[serde(default)]
    pub tty: Option<TerminalSize>,
    /// The process lives on when this stream ends. Otherwise it gets SIGHUP, and SIGKILL 10 s later.
    #[serde(default)]
    pub detach: bool,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Height.
    pub rows: u16,
    /// Width.
    pub columns: u16,
}

/// The guest's reply to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It was done, or the stream is now what was asked for.
    Ok(Answer),
    /// It was not.
    Err(Failure),
}

/// The good half of a [`Reply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Request::Hello`].
    Hello {
        /// The guest's [`VERSION`].
        version: u32,
        /// The nonce of the request.
        nonce: String,
        /// This guest kernel: stays over a resume, differs after every boot.
        boot: String,
        /// Nanoseconds since the guest's kernel started.
        uptime_nanos: u64,
        /// The engine, as [`GuestEvent::Engine`] last said.
        engine: EngineState,
    },
    /// To [`Request::Run`].
    Running {
        /// Process id in the guest.
        pid: u32,
    },
    /// To [`Request::Activity`].
    Activity(Activity),
    /// To everything else.
    Done,
}

/// Why a [`Request`] was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs.
    pub code: FailureCode,
    /// For people: one line.
    pub message: String,
}

/// The closed set of ways in which a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// Host and guest speak different versions.
    Version,
    /// No such socket, program, user or directory.
    NotFound,
    /// The target refused the connection.
    Refused,
    /// The request makes no sense, or this port doesn't serve it.
    Invalid,
    /// A limit was met; try again later.
    Busy,
    /// The guest's system call failed.
    Io,
    /// The guest is powering off.
    Stopping,
}

/// What the guest tells on a [`Request::Watch`] stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestEvent {
    /// A step of the bring-up began; for progress and timings.
    Step {
        /// `modules`, `mounts`, `network`, `disk`, `containerd`, `dockerd`, `listing`, `ready`.
        name: String,
        /// Nanoseconds since the guest's kernel started.
        uptime_nanos: u64,
    },
    /// The engine's state changed.
    Engine(EngineState),
    /// The root processes that run, [`RUNNING_MAX`] at most: all of them, at first and whenever one began or ended.
    Running(Vec<RunningProcess>),
    /// Something is wrong, but the guest goes on.
    Warning(String),
}

/// Root processes that a guest tells of. It runs more, but only these are known to a host that didn't start them.
pub const RUNNING_MAX: usize = 256;

/// A root process that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningProcess {
    /// Process id in the guest.
    pub pid: u32,
    /// Program and arguments in one line, cut to 100 bytes.
    pub command: String,
}

/// The engine as PID 1 sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineState {
    /// On its way up: the containers and images can't be listed yet.
    Starting,
    /// Containers and images can be listed.
    Ready,
    /// dockerd or containerd died and is being restarted once.
    Restarting {
        /// Which program, how it ended, and its last words.
        details: String,
    },
    /// Dead for good: it died again within 60 s, or never came up.
    Dead {
        /// Which program, how it ended, and its last words.
        details: String,
    },
}
