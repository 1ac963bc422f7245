//! A process that isn't necessarily ours: known by pid and start time, held by a pidfd.

use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Which process: a pid alone may mean another one tomorrow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: u32,
    /// Clock ticks from the host's boot to the process's start (`/proc/PID/stat`, field 22).
    pub start_time: u64,
}

impl ProcessIdentity {
    /// The process that has this pid now.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { pid, start_time: start_time(pid)? })
    }
}

fn start_time(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in brackets and may hold anything; fields are counted from its end.
    stat.rsplit_once(')')
        .and_then(|(_, fields)| fields.split_whitespace().nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time in /proc/PID/stat"))
}

/// A hold on a process: it can be waited for and killed without ever meaning another one.
#[derive(Debug)]
pub struct Process {
    identity: ProcessIdentity,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Takes hold of a process; `None` when it is gone, also when its pid belongs to another one now.
    ///
    /// # Errors
    /// When pidfds can't be made.
    pub fn open(identity: ProcessIdentity) -> io::Result<Option<Self>> {
        let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Read after the pidfd is held: from now on the pid can't change its meaning unnoticed.
        match start_time(identity.pid) {
            Ok(start_time) if start_time == identity.start_time => {}
            Ok(_) | Err(_) => return Ok(None),
        }
        // A pidfd becomes readable when the process has ended, and stays so.
        // SAFETY: an `OwnedFd` is its descriptor for as long as it lives, and the `AsyncFd` owns it from here on.
        #[expect(unsafe_code, reason = "the deprecated safe constructor is the same call")]
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Some(Self { identity, pidfd }))
    }

    /// Which process this is.
    #[must_use]
    pub const fn identity(&self) -> ProcessIdentity {
        self.identity
    }

    /// Sends SIGKILL. Nothing happens to a process that has ended.
    pub fn kill(&self) {
        if let Err(error) = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL)
            && error != rustix::io::Errno::SRCH
        {
            tracing::warn!(pid = self.identity.pid, %error, "cannot kill");
        }
    }

    /// Waits until the process has ended. Cancel-safe.
    pub async fn ended(&self) {
        if let Err(error) = self.pidfd.readable().await {
            tracing::warn!(pid = self.identity.pid, %error, "cannot wait for a process");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_process_is_held_killed_and_its_end_noticed() {
        let mut child = tokio::process::Command::new("sleep").arg("60").spawn().unwrap();
        let identity = ProcessIdentity::of(child.id().unwrap()).unwrap();
        let process = Process::open(identity).unwrap().unwrap();
        process.kill();
        tokio::time::timeout(Duration::from_secs(60), process.ended()).await.unwrap();
        assert!(!child.wait().await.unwrap().success());
        assert!(Process::open(identity).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_pid_that_belongs_to_another_process_now_is_nobody() {
        let ours = ProcessIdentity::of(std::process::id()).unwrap();
        assert!(Process::open(ours).unwrap().is_some());
        let earlier = ProcessIdentity { start_time: ours.start_time - 1, ..ours };
        assert!(Process::open(earlier).unwrap().is_none());
    }
}
