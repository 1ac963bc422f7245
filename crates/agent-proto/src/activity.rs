//! What goes on in a guest's containers.

use serde::{Deserialize, Serialize};

/// Folder in the guest that containers can mount: a file in it says that somebody is busy, though nothing shows.
pub const BUSY_DIR: &str = "/run/dormouse/busy";

/// Containers that a guest tells of at most. It runs more, but those are as good as busy: nobody looked at them.
pub const CONTAINERS_MAX: usize = 256;

/// A look at the containers that run. CPU time is counted from each container's start: two looks make a rate.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// When it was taken, in nanoseconds since the guest's kernel started.
    pub uptime_nanos: u64,
    /// The containers, [`CONTAINERS_MAX`] at most.
    pub containers: Vec<ContainerActivity>,
    /// A file in [`BUSY_DIR`].
    pub mark: Option<String>,
}

/// What goes on in one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerActivity {
    /// The engine's id of it.
    pub id: String,
    /// CPU time of all its processes, in microseconds.
    pub cpu_micros: u64,
    /// The far end of a TCP connection that it has opened to somewhere outside of the guest.
    pub connection: Option<String>,
}
