//! The sockets of a VM. They listen, are made by the factory and inherited by QEMU: so they can be connected to from
//! the start, need no rights of QEMU's on their directory, and outlive whoever is connected.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Longest path of a unix socket: `sun_path` has 108 bytes, one is the final NUL.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Why a VM has no sockets.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The runtime directory lies too deep.
    #[error(
        "socket path has {} bytes, {SOCKET_PATH_BYTES_MAX} are possible: {}; set DORM_HOME to a shorter path",
        .0.as_os_str().len(), .0.display()
    )]
    TooLong(PathBuf),
    /// The socket can't be made.
    #[error("cannot listen on {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Paths of the sockets of one generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sockets {
    /// QMP, for the session host.
    pub host_monitor: PathBuf,
    /// QMP, for `dormd`.
    pub service_monitor: PathBuf,
    /// The guest's serial console.
    pub console: PathBuf,
    /// virtio-serial port `agent`.
    pub agent: PathBuf,
    /// virtio-serial port `ports`.
    pub ports: PathBuf,
}

impl Sockets {
    /// Names the sockets of `generation` in `directory`.
    ///
    /// # Errors
    /// [`SocketError::TooLong`].
    pub fn named(directory: &Path, generation: u64) -> Result<Self, SocketError> {
        let path = |name: &str| {
            let path = directory.join(format!("{generation}-{name}"));
            match path.as_os_str().len() {
                0..=SOCKET_PATH_BYTES_MAX => Ok(path),
                _ => Err(SocketError::TooLong(path)),
            }
        };
        Ok(Self {
            host_monitor: path("host.qmp")?,
            service_monitor: path("dormd.qmp")?,
            console: path("console")?,
            agent: path("agent")?,
            ports: path("ports")?,
        })
    }

    pub(crate) fn paths(&self) -> [&Path; 5] {
        [&self.host_monitor, &self.service_monitor, &self.console, &self.agent, &self.ports]
    }

    /// Removes what is left of them.
    pub fn remove(&self) {
        for path in self.paths() {
            if let Err(error) = std::fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "cannot remove a socket");
            }
        }
    }

    /// Makes them listen, for their owner only.
    pub(crate) fn listen(&self) -> Result<[UnixListener; 5], SocketError> {
        let listen = |path: &Path| {
            let listening = || {
                let listener = UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                Ok(listener)
            };
            listening().map_err(|source| SocketError::Listen { path: path.to_owned(), source })
        };
        Ok([
            listen(&self.host_monitor)?,
            listen(&self.service_monitor)?,
            listen(&self.console)?,
            listen(&self.agent)?,
            listen(&self.ports)?,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_107_bytes_is_taken_and_one_of_108_refused() {
        let longest_name = "/18446744073709551615-dormd.qmp".len();
        let directory = |length: usize| PathBuf::from(format!("/{}", "d".repeat(length - 1)));
        assert!(Sockets::named(&directory(107 - longest_name), u64::MAX).is_ok());
        let error = Sockets::named(&directory(108 - longest_name), u64::MAX).unwrap_err();
        assert!(matches!(&error, SocketError::TooLong(_)));
        assert!(error.to_string().contains("DORM_HOME"));
    }
}
