//! Saving and loading the state of a VM without its memory, which is in a file of its own already: some 400 KiB, in
//! some 20 ms.
//!
//! QEMU gets an open file, never a path or a command: its sandbox forbids it to start any.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use dormouse_qmp::{
    ExecuteError, GetFd, Migrate, MigrateCancel, MigrateIncoming, MigrateSetCapabilities,
    MigrationCapability, MigrationStatus, QueryMigrate,
};

use crate::vm::{COMMAND_WITHIN, Vm};

/// How long saving or loading may take.
pub const STATE_WITHIN: Duration = Duration::from_secs(20);
/// How often QEMU is asked how far it is: its progress can only be polled.
const POLL_EVERY: Duration = Duration::from_millis(3);
/// Under what name QEMU knows the file.
const FD_NAME: &str = "state";

/// Why the state of a VM was not saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// QEMU refused, or is gone.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    /// The file can't be made, read or synced.
    #[error("cannot access the device state")]
    Io(#[from] io::Error),
    /// QEMU tried and failed.
    #[error("the device state was not transferred: {0}")]
    Failed(String),
    /// It takes too long.
    #[error("the device state was not transferred within {STATE_WITHIN:?}")]
    Deadline,
}

impl Vm {
    /// Stops the vCPUs and writes the device state to a new file, synced. Then [`Vm::quit`], and the memory file and
    /// this one are the VM.
    ///
    /// # Errors
    /// See [`StateError`]. The file is removed, the vCPUs are left stopped: [`Vm::cont`] lets the VM run on.
    pub async fn save_state(&self, path: &Path) -> Result<(), StateError> {
        self.stop().await?;
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
        let saved = self.save_to(file).await;
        if saved.is_err() {
            let _ = self.execute(MigrateCancel {}).await;
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove an unfinished device state");
            }
        }
        saved
    }

    async fn save_to(&self, file: File) -> Result<(), StateError> {
        self.leave_memory_in_its_file().await?;
        self.pass(OwnedFd::from(file.try_clone()?)).await?;
        self.execute(Migrate { uri: format!("fd:{FD_NAME}") }).await?;
        self.until_transferred().await?;
        tokio::task::spawn_blocking(move || file.sync_all()).await.map_err(io::Error::other)??;
        Ok(())
    }

    /// Reads the device state into a VM that was made with [`crate::Start::Incoming`]. Its vCPUs are stopped then.
    ///
    /// # Errors
    /// See [`StateError`]. The VM can't be used then: QEMU ends by itself, or is to be killed.
    pub async fn load_state(&self, path: &Path) -> Result<(), StateError> {
        let file = File::open(path)?;
        self.leave_memory_in_its_file().await?;
        self.pass(OwnedFd::from(file)).await?;
        self.execute(MigrateIncoming { uri: format!("fd:{FD_NAME}") }).await?;
        self.until_transferred().await
    }

    async fn leave_memory_in_its_file(&self) -> Result<(), ExecuteError> {
        let capability = MigrationCapability { capability: "x-ignore-shared".to_owned(), state: true };
        self.execute(MigrateSetCapabilities { capabilities: vec![capability] }).await.map(drop)
    }

    async fn pass(&self, fd: OwnedFd) -> Result<(), ExecuteError> {
        let command = GetFd { fdname: FD_NAME.to_owned() };
        self.client().execute_with_fd(command, fd, COMMAND_WITHIN).await.map(drop)
    }

    async fn until_transferred(&self) -> Result<(), StateError> {
        let transferred = async {
            let mut poll = tokio::time::interval(POLL_EVERY);
            loop {
                poll.tick().await;
                let state = self.execute(QueryMigrate {}).await?;
                match state.status {
                    Some(MigrationStatus::Completed) => return Ok(()),
                    Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                        let reason = state.error_desc.unwrap_or_else(|| "QEMU does not say why".to_owned());
                        return Err(StateError::Failed(reason));
                    }
                    Some(MigrationStatus::Ongoing) | None => {}
                }
            }
        };
        tokio::time::timeout(STATE_WITHIN, transferred).await.map_err(|_| StateError::Deadline)?
    }
}
