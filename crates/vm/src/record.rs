//! What is written down about a running VM, so that another process can find it again.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::adopt::find_by_uuid;
use crate::config::Start;
use crate::key::SnapshotKey;
use crate::process::{Process, ProcessIdentity};
use crate::socket::Sockets;

/// Version of the record's format.
const FORMAT: u32 = 2;
/// Name of the record in a session's runtime directory: a session has one VM at most.
const FILE_NAME: &str = "vm.json";
/// No record is longer.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

/// The facts about one generation of a session's VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Version of this format.
    pub format: u32,
    /// The session's short id.
    pub session: String,
    /// Which QEMU process of the session.
    pub generation: u64,
    /// QEMU's `-name`.
    pub name: String,
    /// QEMU's `-uuid`, random for each generation: by it the process is known beyond doubt.
    pub uuid: String,
    /// The QEMU process. Absent while it is being started: whoever finds such a record looks for the UUID.
    pub process: Option<ProcessIdentity>,
    /// How it came up.
    pub start: Start,
    /// Where to connect.
    pub sockets: Sockets,
    /// The guest's RAM.
    pub memory_file: PathBuf,
    /// What a snapshot of it will fit: among other things the network, the acceleration and the build of QEMU.
    pub key: SnapshotKey,
}

/// Why a record can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It can't be read or written.
    #[error("cannot access the VM's record {path}")]
    Io {
        /// The record.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It makes no sense.
    #[error("the VM's record {path} is damaged")]
    Damaged {
        /// The record.
        path: PathBuf,
        /// What doesn't fit.
        source: serde_json::Error,
    },
    /// Another version of Dormouse wrote it.
    #[error("the VM's record {path} has format {format}, this version reads {FORMAT}")]
    Format {
        /// The record.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
}

impl VmRecord {
    pub(crate) const FORMAT: u32 = FORMAT;

    /// Reads the record in a session's runtime directory; `None` when there is none.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn read(runtime_dir: &Path) -> Result<Option<Self>, RecordError> {
        let path = runtime_dir.join(FILE_NAME);
        let mut bytes = Vec::new();
        let read = File::open(&path)
            .and_then(|file| io::Read::read_to_end(&mut io::Read::take(file, RECORD_BYTES_MAX), &mut bytes));
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(RecordError::Io { path, source }),
        }
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let damaged = |source| RecordError::Damaged { path: path.clone(), source };
        let Head { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
        if format != FORMAT {
            return Err(RecordError::Format { path, format });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    /// Writes it, in one step as seen by readers. Not synced: no VM outlives the host's own crash.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn write(&self, runtime_dir: &Path) -> Result<(), RecordError> {
        let path = runtime_dir.join(FILE_NAME);
        let beside = runtime_dir.join(format!("{FILE_NAME}.new"));
        let write = || {
            let mut options = File::options();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            std::fs::rename(&beside, &path)
        };
        write().map_err(|source| RecordError::Io { path: path.clone(), source })
    }

    /// Is there a process of this VM? It may be on its way out.
    ///
    /// # Errors
    /// When the system refuses to tell about processes.
    pub fn is_up(&self) -> io::Result<bool> {
        let identity = match self.process {
            Some(identity) => Some(identity),
            None => find_by_uuid(&self.uuid)?,
        };
        Ok(identity.map(Process::open).transpose()?.flatten().is_some())
    }

    /// Removes what is left of a VM that is gone: its sockets and this record, unless a later generation has put its
    /// own in that place.
    pub fn remove(&self, runtime_dir: &Path) {
        self.sockets.remove();
        let is_ours = match Self::read(runtime_dir) {
            Ok(Some(present)) => present.uuid == self.uuid,
            Ok(None) => false,
            Err(_) => true,
        };
        if is_ours && let Err(error) = std::fs::remove_file(runtime_dir.join(FILE_NAME)) {
            tracing::warn!(%error, "cannot remove a VM's record");
        }
    }
}

/// Removes a record that nobody can read, so that it stands in nobody's way.
///
/// # Errors
/// When it can't be removed.
pub fn discard_record(runtime_dir: &Path) -> io::Result<()> {
    match std::fs::remove_file(runtime_dir.join(FILE_NAME)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(directory: &Path, generation: u64) -> VmRecord {
        VmRecord {
            format: FORMAT,
            session: "k3v9".into(),
            generation,
            name: "dorm-k3v9".into(),
            uuid: format!("00000000-0000-4000-8000-{generation:012}"),
            process: Some(ProcessIdentity { pid: 7, start_time: 8 }),
            start: Start::Cold,
            sockets: Sockets::named(directory, generation).unwrap(),
            memory_file: "/x/memory".into(),
            key: SnapshotKey {
                guest_image: "i".into(),
                qemu_build: "b".into(),
                machine: "q35".into(),
                acceleration: "emulation".into(),
                cpu: "max".into(),
                memory_mib: 64,
                cpus: 1,
                device_list: 1,
                network: crate::NetworkKind::Passt,
            },
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_its_absence_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        assert!(VmRecord::read(directory.path()).unwrap().is_none());
        let written = record(directory.path(), 1);
        written.write(directory.path()).unwrap();
        assert_eq!(VmRecord::read(directory.path()).unwrap(), Some(written));
    }

    #[test]
    fn removing_an_old_generation_leaves_the_new_ones_record() {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (record(directory.path(), 1), record(directory.path(), 2));
        new.write(directory.path()).unwrap();
        old.remove(directory.path());
        assert_eq!(VmRecord::read(directory.path()).unwrap(), Some(new.clone()));
        new.remove(directory.path());
        assert!(VmRecord::read(directory.path()).unwrap().is_none());
    }

    #[test]
    fn a_damaged_record_and_one_of_another_version_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(FILE_NAME), "{\"format\": 1").unwrap();
        assert!(matches!(VmRecord::read(directory.path()), Err(RecordError::Damaged { .. })));
        std::fs::write(directory.path().join(FILE_NAME), "{\"format\": 9}").unwrap();
        assert!(matches!(VmRecord::read(directory.path()), Err(RecordError::Format { format: 9, .. })));
        discard_record(directory.path()).unwrap();
        assert!(VmRecord::read(directory.path()).unwrap().is_none());
    }
}
