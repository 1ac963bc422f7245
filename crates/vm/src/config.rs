//! What a VM is made of.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything that the factory needs to know to make a VM. A request from a session host carries none of it: it was
/// settled when the session was created.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// The session's short id; names the VM for QEMU and in process lists.
    pub session: String,
    /// Which QEMU process of the session this is. Sockets carry it in their names, so that none is used twice.
    pub generation: u64,
    /// The guest's host name.
    pub hostname: String,
    /// What the guest boots.
    pub image: GuestFiles,
    /// The session's disk, a raw file, see [`crate::create_data_disk`].
    pub data_disk: PathBuf,
    /// The guest's RAM. A cold boot makes the file anew; an incoming start needs that of the snapshot or template.
    pub memory_file: PathBuf,
    /// Size of the RAM in MiB.
    pub memory_mib: u64,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// The way out.
    pub network: NetworkKind,
    /// The session's runtime directory, owner only; sockets and the [`crate::VmRecord`] go here.
    pub runtime_dir: PathBuf,
    /// How the VM comes up.
    pub start: Start,
    /// As whom QEMU and its network helper run; the caller itself when absent.
    pub owner: Option<Owner>,
    /// How much it yields to whatever else runs, see nice(2); 0 for as little as its maker does.
    pub niceness: i32,
    /// So long without a host, and the guest ends itself; its own ten minutes when absent.
    pub lonely_after: Option<std::time::Duration>,
}

/// The files of a guest image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFiles {
    /// The image's hash: part of what a snapshot fits.
    pub hash: String,
    /// An uncompressed kernel with a PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The read-only root file system.
    pub root: PathBuf,
}

/// How a VM comes up. Either way its vCPUs don't run before somebody says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// From the kernel up.
    Cold,
    /// From a memory file and a device state, which [`crate::Vm::load_state`] brings in: a clone or a resume.
    Incoming,
}

/// How a guest reaches the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// passt: the guest reaches what its owner can, but not the host's loopback.
    Passt,
    /// QEMU's user network. Unsafe: the guest reaches the host's loopback, and no switch forbids just that.
    UserUnsafe,
    /// A network card that leads nowhere.
    None,
}

/// A user to run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
}

/// What stands in the way of a VM, before anything was tried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No vCPU, or more than QEMU's machine has.
    #[error("{0} CPUs: a VM has between 1 and {CPUS_MAX}")]
    Cpus(u32),
    /// RAM that no guest can live in.
    #[error("{0} MiB of memory: a VM needs at least {MEMORY_MIB_MIN} MiB")]
    Memory(u64),
    /// QEMU is told paths as text.
    #[error("path is not UTF-8: {0}")]
    NotUtf8(PathBuf),
    /// A relative path would mean something else after a change of directory.
    #[error("path is not absolute: {0}")]
    Relative(PathBuf),
    /// A file that the VM needs isn't there or can't be read.
    #[error("cannot read {path}: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
}

/// Most vCPUs of a VM.
pub const CPUS_MAX: u32 = 64;
/// Least RAM: below it not even the tests' guests start.
pub const MEMORY_MIB_MIN: u64 = 32;

impl VmConfig {
    /// Checks what can be checked without starting anything.
    ///
    /// # Errors
    /// The first obstacle.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if self.memory_mib < MEMORY_MIB_MIN {
            return Err(ConfigError::Memory(self.memory_mib));
        }
        let GuestFiles { kernel, initramfs, root, hash: _ } = &self.image;
        for path in [kernel, initramfs, root, &self.data_disk, &self.memory_file, &self.runtime_dir] {
            if path.to_str().is_none() {
                return Err(ConfigError::NotUtf8(path.clone()));
            }
            if !path.is_absolute() {
                return Err(ConfigError::Relative(path.clone()));
            }
        }
        let needed = [kernel, initramfs, root, &self.data_disk];
        let memory = (self.start == Start::Incoming).then_some(&self.memory_file);
        for path in needed.into_iter().chain(memory) {
            std::fs::File::open(path)
                .map_err(|error| ConfigError::Unreadable { path: path.clone(), reason: error.to_string() })?;
        }
        Ok(())
    }

    /// Size of the RAM in bytes.
    #[must_use]
    pub const fn memory_bytes(&self) -> u64 {
        self.memory_mib * 1024 * 1024
    }
}
