//! Sockets of a hook's own: they serve by a VM that is up, and die with the hook.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use dormouse_lifecycle::Policy;
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::host::{Door, Served};

/// Connections of one hook at a time, to each of its sockets.
const CONNECTIONS_MAX: usize = 32;

/// The sockets, and all that is served over them.
#[derive(Debug)]
pub(crate) struct Gate {
    folder: PathBuf,
    doors: JoinSet<()>,
    _end: DropGuard,
}

impl Gate {
    /// Opens sockets in a folder of their own.
    pub(crate) fn open(folder: PathBuf, served: &Served) -> io::Result<Self> {
        // One that was left by a host that died.
        let _ = fs::remove_dir_all(&folder);
        DirBuilder::new().mode(0o700).create(&folder)?;
        let end = CancellationToken::new();
        let served = Served {
            policy: Policy::ExistingOnly,
            client: "a hook".into(),
            end: end.clone(),
            ..served.clone()
        };
        let mut gate = Self { folder, doors: JoinSet::new(), _end: end.drop_guard() };
        for (path, door) in [(gate.docker(), Door::Docker), (gate.control(), Door::Control)] {
            gate.doors.spawn(accept(UnixListener::bind(path)?, door, served.clone()));
        }
        Ok(gate)
    }

    /// The hook's Docker socket.
    pub(crate) fn docker(&self) -> PathBuf {
        self.folder.join("docker.sock")
    }

    /// The hook's control socket.
    pub(crate) fn control(&self) -> PathBuf {
        self.folder.join("control.sock")
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The connections end with the task.
async fn accept(listener: UnixListener, door: Door, served: Served) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) => drop(connections.spawn(served.clone().serve(stream, door))),
                Err(error) => {
                    tracing::warn!(%error, "can't accept");
                    return;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}
