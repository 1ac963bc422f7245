//! What an ephemeral session's VM has in place of files: memory of the host, which goes with QEMU.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use dormouse_vm::VmConfig;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::settings::Settings;

/// A file system in memory, on every Linux.
const MEMORY: &str = "/dev/shm";

/// The disk and the RAM of a VM that is being made. Both have no name any more when this is dropped; then they live as
/// long as the QEMU that has opened them.
#[derive(Debug)]
pub(super) struct Volatile {
    disk: OwnedFd,
    ram: PathBuf,
}

impl Volatile {
    pub(super) fn new(settings: &Settings, generation: u64) -> io::Result<Self> {
        let disk = memfd_create("dormouse-data", MemfdFlags::CLOEXEC)?;
        let disk = File::from(disk);
        disk.set_len(settings.storage_bytes)?;
        let ram = Path::new(MEMORY).join(format!("dormouse-{}-{generation}", settings.id));
        Ok(Self { disk: disk.into(), ram })
    }

    /// Points a VM at them.
    pub(super) fn put_into(&self, config: &mut VmConfig) {
        config.data_disk = format!("/proc/{}/fd/{}", std::process::id(), self.disk.as_raw_fd()).into();
        config.memory_file.clone_from(&self.ram);
    }
}

impl Drop for Volatile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.ram);
    }
}
