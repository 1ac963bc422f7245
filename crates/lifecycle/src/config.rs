//! What is set for a session.

use core::time::Duration;

use crate::action::SleepHow;

/// How long a VM stays up after its last strong hold is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Grace {
    /// So long; zero puts the VM to sleep at once.
    After(Duration),
    /// Until somebody asks for the sleep.
    Never,
}

/// What a running container means for the sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum RunningContainers {
    /// It keeps the VM awake.
    Hold,
    /// It may be suspended together with the VM. It still keeps the VM from being *stopped*.
    Suspend,
}

/// Where the session's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Storage {
    /// On a disk that outlives the VM.
    Persistent,
    /// In the VM's memory: such a session is never put to sleep.
    Ephemeral,
}

/// How long the session lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Lifetime {
    /// Until it is removed.
    Lasting,
    /// Until the connection that made it closes.
    Temporary,
}

/// What follows a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum CrashPolicy {
    /// The next request opens a new incarnation.
    Reopen,
    /// Requests are refused until the session is started by name.
    Terminate,
}

/// Settings of one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Config {
    /// Time from the last strong hold to the sleep.
    pub grace: Grace,
    /// After the grace period the VM first stands still for so long, with its memory kept; it isn't put to sleep before.
    #[cfg_attr(feature = "serde", serde(default))]
    pub doze: Option<Duration>,
    /// How the VM is put to sleep when it is idle.
    pub idle_action: SleepHow,
    /// Whether running containers keep the VM awake.
    pub running: RunningContainers,
    /// Where the data is.
    pub storage: Storage,
    /// How long the session lasts.
    pub lifetime: Lifetime,
    /// What follows a crash.
    pub crash: CrashPolicy,
    /// Bounds of every wait and every queue.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grace: Grace::After(Duration::from_secs(30)),
            doze: None,
            idle_action: SleepHow::Stop,
            running: RunningContainers::Hold,
            storage: Storage::Persistent,
            lifetime: Lifetime::Lasting,
            crash: CrashPolicy::Reopen,
            limits: Limits::default(),
        }
    }
}

/// The bound of each wait and each queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Limits {
    /// From the order to start a VM to its first answer (`boot-timeout`).
    pub boot: Duration,
    /// From the order to give up a bring-up to the end of its VM.
    pub cancel: Duration,
    /// For all hooks that are told of a sleep.
    pub hooks: Duration,
    /// For a guest to shut down.
    pub stop: Duration,
    /// For a suspend, from the order to the sealed snapshot.
    pub suspend: Duration,
    /// From a VM's exit inside a suspend to the sealed snapshot.
    pub seal: Duration,
    /// From a kill to the exit, for each of [`Limits::KILLS`] tries.
    pub kill: Duration,
    /// For the engine to say what runs, for each of [`Limits::COUNTS`] tries.
    pub count: Duration,
    /// Between two tries to run a VM on that was paused by an I/O error.
    pub io_retry: Duration,
    /// After so long a VM that was paused by an I/O error is given up as crashed.
    pub io_give_up: Duration,
    /// Crashes longer ago than this are forgotten.
    pub crash_window: Duration,
    /// Leases that may wait for a VM; more are refused.
    pub queued: usize,
    /// Leases that may be out at once; more are refused.
    pub leases: usize,
}

impl Limits {
    /// A VM that was killed so often and still didn't exit is given up.
    pub const KILLS: u8 = 3;
    /// An engine that was asked so often and never answered is dead.
    pub const COUNTS: u8 = 3;
    /// So many crashes within [`Limits::crash_window`] put off the next try.
    pub const CRASHES: usize = 3;
    /// Pins that a session may have; more are ignored.
    pub const PINS: usize = 256;
    /// Weak holds that are listed; more are served but not listed.
    pub const WEAK: usize = 1024;
    /// Requests for sleep that may wait for one answer; more are told that there are too many.
    pub const REQUESTS: usize = 16;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(300),
            cancel: Duration::from_secs(10),
            hooks: Duration::from_secs(10),
            stop: Duration::from_secs(60),
            suspend: Duration::from_secs(60),
            seal: Duration::from_secs(30),
            kill: Duration::from_secs(10),
            count: Duration::from_secs(5),
            io_retry: Duration::from_secs(5),
            io_give_up: Duration::from_secs(300),
            crash_window: Duration::from_secs(300),
            queued: 1024,
            leases: 4096,
        }
    }
}
