//! Answers of earlier probes.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Acceleration, Basics};

/// What the answers hold for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key {
    /// Format of these answers; a new one when the probe asks for more.
    format: u32,
    program: PathBuf,
    bytes: u64,
    modified_nanos: i128,
    inode: u64,
    /// KVM may work again after a reboot, or no more.
    host_boot: String,
    kernel: String,
    /// What one user may, another may not.
    uid: u32,
}

impl Key {
    pub(super) fn of(program: &Path) -> io::Result<Self> {
        let program = program.canonicalize()?;
        let metadata = std::fs::metadata(&program)?;
        Ok(Self {
            format: 1,
            program,
            bytes: metadata.len(),
            modified_nanos: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
            inode: metadata.ino(),
            host_boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            uid: rustix::process::geteuid().as_raw(),
        })
    }
}

/// What is remembered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Remembered {
    pub(super) basics: Option<Basics>,
    pub(super) acceleration: Option<Acceleration>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    key: Key,
    remembered: Remembered,
}

const FILE_NAME: &str = "qemu-probe.json";

/// What is remembered for this key; a file that can't be read or is about another key is as good as none.
pub(super) fn read(directory: &Path, key: &Key) -> Option<Remembered> {
    let entry: Entry = serde_json::from_slice(&std::fs::read(directory.join(FILE_NAME)).ok()?).ok()?;
    (entry.key == *key).then_some(entry.remembered)
}

/// Remembers; only time is lost when that fails.
pub(super) fn write(directory: &Path, key: &Key, remembered: &Remembered) {
    let entry = Entry { key: key.clone(), remembered: remembered.clone() };
    let beside = directory.join(format!("{FILE_NAME}.{}", std::process::id()));
    let written = std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::write(&beside, serde_json::to_vec_pretty(&entry)?))
        .and_then(|()| std::fs::rename(&beside, directory.join(FILE_NAME)));
    if let Err(error) = written {
        tracing::debug!(%error, directory = %directory.display(), "cannot remember the probe");
    }
}
