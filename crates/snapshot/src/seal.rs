//! The seal of a store: that its memory, device state and disk belong together, and what they fit.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use dormouse_vm::{KeyMismatch, SnapshotKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::compressed::{self, Compressed};
use crate::sum::{OTHER_SUM, SUM};

/// Version of the seal, and of the layout that it describes.
const FORMAT: u32 = 1;

/// The data disk.
pub const DISK: &str = "data.raw";
/// The guest's RAM.
pub const MEMORY: &str = "memory";
/// The state of the devices.
pub const STATE: &str = "memory.state";
/// The seal, and what is left of one that was broken.
const SEAL: &str = "snapshot.json";
const BROKEN: &str = "snapshot.used";

/// What is wrong with a memory that isn't there.
pub(crate) const GONE: &str = "it is gone";

/// Longest file that is read whole, in bytes: a seal, a checksum, a device state.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A store's seal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    format: u32,
    /// Random: tells this seal from every other of the same store.
    pub(crate) id: String,
    /// Whose memory it is.
    pub origin: Origin,
    /// What it fits.
    pub key: SnapshotKey,
    /// The guest's boot id. Whoever wakes it has to hear it from the guest.
    pub boot: String,
    /// The checksum of what the guest was told of whom its host trusts: a copy needs to be told only if that has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub told: Option<String>,
    /// When it was put to sleep.
    pub sealed_at: jiff::Timestamp,
    memory: MemoryFile,
    /// SHA-256 of the device state.
    state_sha256: String,
}

/// Whose memory a store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The session's own, of this generation.
    Session {
        /// Which VM was put to sleep.
        generation: u64,
    },
    /// A template's: who wakes it must renew what may not be the same in two guests.
    Template,
}

/// Whether the host was started again since the memory was sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Since {
    SameHost,
    EarlierHost,
}

/// By this a memory file is known again without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MemoryFile {
    bytes: u64,
    inode: u64,
    /// The host's boot id: over a reboot, pages that were never written out may be lost.
    host_boot: String,
}

/// As it lies on the disk.
#[derive(Debug, Serialize, Deserialize)]
struct Sealed {
    seal: Seal,
    /// SHA-256 of `seal`, serialised.
    sha256: String,
}

/// Why a store wasn't sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The system refused something.
    #[error("can't {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

pub(crate) fn cannot(what: &'static str) -> impl FnOnce(io::Error) -> SealError {
    move |source| SealError::Io { what, source }
}

/// Why a sealed store can't be woken.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// The VM would be another one.
    #[error("{0}")]
    Key(#[from] KeyMismatch),
    /// The seal makes no sense, or was changed.
    #[error("its description is damaged")]
    Seal,
    /// The device state isn't the one that was sealed.
    #[error("its device state is damaged")]
    State,
    /// The memory file isn't the one that was sealed.
    #[error("its memory is damaged: {0}")]
    Memory(&'static str),
    /// The host was started again before the memory's checksum was made.
    #[error("the host was started again before its memory was safe")]
    Unsafe,
    /// It can't be told, because a wake came in between.
    #[error("it was woken meanwhile")]
    Woken,
    /// A file can't be read.
    #[error("it can't be read: {0}")]
    Io(#[from] io::Error),
}

impl Seal {
    /// Seals a store whose VM has just been saved and is gone. What this names is on the disk afterwards, but for the
    /// memory: see [`Seal::make_sum`].
    ///
    /// # Errors
    /// See [`SealError`]; the store is unsealed then.
    pub fn make(
        store: &Path,
        origin: Origin,
        key: SnapshotKey,
        boot: String,
        told: Option<String>,
    ) -> Result<Self, SealError> {
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| cannot("draw a random number")(error.into()))?;
        let seal = Self {
            format: FORMAT,
            id: hex(&id),
            origin,
            key,
            boot,
            told,
            sealed_at: jiff::Timestamp::now(),
            memory: MemoryFile::in_store(store).map_err(cannot("look at the memory file"))?,
            state_sha256: state_digest(store).map_err(cannot("read the device state"))?,
        };
        seal.write(store).map_err(cannot("write the seal"))?;
        Ok(seal)
    }

    /// The same seal, for a memory that was found whole after a restart of the host: it needn't be read again before the
    /// next one.
    ///
    /// # Errors
    /// See [`SealError`]; the seal is as it was then.
    pub(crate) fn renew(&mut self, store: &Path) -> Result<(), SealError> {
        self.memory.host_boot = host_boot().map_err(cannot("tell which start of the host this is"))?;
        self.write(store).map_err(cannot("write the seal"))
    }

    /// The same seal for a copy of its store.
    ///
    /// # Errors
    /// See [`SealError`].
    pub(crate) fn make_for_copy(&self, copy: &Path) -> Result<Self, SealError> {
        let memory = MemoryFile::in_store(copy).map_err(cannot("look at the memory file"))?;
        let seal = Self { memory, ..self.clone() };
        seal.write(copy).map_err(cannot("write the seal"))?;
        Ok(seal)
    }

    /// From now on the memory is in this file.
    pub(crate) fn is_now(&mut self, memory: &File) -> io::Result<()> {
        self.memory = MemoryFile::look(&memory.metadata()?)?;
        Ok(())
    }

    pub(crate) fn write(&self, store: &Path) -> io::Result<()> {
        let sealed = Sealed { seal: self.clone(), sha256: self.digest() };
        // Under a name of its own: a template's is renewed by whoever comes first.
        let mut beside = tempfile::Builder::new().prefix(SEAL).tempfile_in(store)?;
        beside.write_all(&serde_json::to_vec_pretty(&sealed)?)?;
        beside.as_file().sync_all()?;
        beside.persist(store.join(SEAL))?;
        File::open(store)?.sync_all()
    }

    /// The seal of a store; `None` when it is unsealed.
    ///
    /// # Errors
    /// [`Unfit::Seal`] for one that was damaged, [`Unfit::Io`].
    pub fn read(store: &Path) -> Result<Option<Self>, Unfit> {
        let bytes = match read_whole(&store.join(SEAL)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let Sealed { seal, sha256 } = serde_json::from_slice(&bytes).map_err(|_| Unfit::Seal)?;
        if seal.format != FORMAT || seal.digest() != sha256 {
            return Err(Unfit::Seal);
        }
        Ok(Some(seal))
    }

    /// Can the store be woken as the VM that `needed` tells of? Reads the device state, and the memory only if the host
    /// was started again since.
    ///
    /// # Errors
    /// See [`Unfit`].
    pub fn check(&self, store: &Path, needed: &SnapshotKey) -> Result<(), Unfit> {
        self.key.fits(needed)?;
        self.check_state(store)?;
        match Compressed::open(store, self)? {
            // On the disk before it was in its place, and each part of it has a checksum of its own, which is compared when
            // it is decompressed.
            Some(compressed) => self.check_known(store, compressed.bytes()),
            None => match self.check_memory_file(store)? {
                Since::SameHost => Ok(()),
                Since::EarlierHost => self.verify(store),
            },
        }
    }

    /// Is the memory file the one that was sealed, as far as can be told without reading it?
    pub(crate) fn check_memory_file(&self, store: &Path) -> Result<Since, Unfit> {
        let found = match MemoryFile::in_store(store) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Unfit::Memory(GONE)),
            found => found?,
        };
        self.check_known(store, found.bytes)?;
        if found.inode != self.memory.inode {
            return Err(Unfit::Memory("it is another file"));
        }
        let is_same = found.host_boot == self.memory.host_boot;
        Ok(if is_same { Since::SameHost } else { Since::EarlierHost })
    }

    /// Has it the right size, and was nothing found wrong with it?
    fn check_known(&self, store: &Path, bytes: u64) -> Result<(), Unfit> {
        if bytes != self.memory.bytes {
            return Err(Unfit::Memory("it has another size"));
        }
        if self.is_condemned(store) { Err(Unfit::Memory(OTHER_SUM)) } else { Ok(()) }
    }

    /// Is the device state the one that was sealed?
    pub(crate) fn check_state(&self, store: &Path) -> Result<(), Unfit> {
        if state_digest(store)? == self.state_sha256 { Ok(()) } else { Err(Unfit::State) }
    }

    /// Was the host started again since?
    pub(crate) fn is_of_an_earlier_host(&self) -> bool {
        host_boot().is_ok_and(|boot| boot != self.memory.host_boot)
    }

    /// Is it still the seal of this store? Not any more once its VM is about to run on.
    pub(crate) fn is_whole(&self, store: &Path) -> bool {
        matches!(Self::read(store), Ok(Some(seal)) if seal.id == self.id)
    }

    /// Breaks the seal, for good: the VM is about to run on.
    ///
    /// # Errors
    /// See [`SealError`]; the VM must not run then.
    pub fn break_it(self, store: &Path) -> Result<(), SealError> {
        fs::rename(store.join(SEAL), store.join(BROKEN))
            .and_then(|()| File::open(store)?.sync_all())
            .map_err(cannot("break the seal"))
    }

    fn digest(&self) -> String {
        checksum(&serde_json::to_vec(self).expect("strings and numbers always serialise"))
    }
}

impl MemoryFile {
    fn in_store(store: &Path) -> io::Result<Self> {
        Self::look(&fs::metadata(store.join(MEMORY))?)
    }

    fn look(found: &fs::Metadata) -> io::Result<Self> {
        Ok(Self { bytes: found.len(), inode: found.ino(), host_boot: host_boot()? })
    }
}

/// The host's boot id: random, another after each start.
fn host_boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Removes a store's seal, memory and device state, whatever there is of them. The disk stays.
///
/// # Errors
/// When the seal can't be removed; nothing else was then.
pub fn discard(store: &Path) -> io::Result<()> {
    remove(&store.join(SEAL))?;
    for name in [BROKEN, SUM, STATE, MEMORY].iter().chain(&compressed::FILES) {
        if let Err(error) = remove(&store.join(name)) {
            tracing::warn!(name, %error, "can't remove what is left of a snapshot");
        }
    }
    Ok(())
}

/// Removes what an earlier snapshot left beside the memory of a VM that runs, so that the next can be made.
///
/// # Errors
/// When that can't be removed.
pub fn clear(store: &Path) -> io::Result<()> {
    [BROKEN, SUM, STATE].iter().chain(&compressed::FILES).try_for_each(|name| remove(&store.join(name)))
}

pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn read_whole(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn state_digest(store: &Path) -> io::Result<String> {
    Ok(hex(&Sha256::digest(read_whole(&store.join(STATE))?)))
}

/// SHA-256, in hexadecimal digits.
#[must_use]
pub fn checksum(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use dormouse_vm::NetworkKind;

    use super::*;

    pub(crate) fn key() -> SnapshotKey {
        SnapshotKey {
            guest_image: "image".into(),
            qemu_build: "qemu".into(),
            machine: "q35".into(),
            acceleration: "emulation".into(),
            cpu: "max".into(),
            memory_mib: 1024,
            cpus: 2,
            device_list: 1,
            network: NetworkKind::None,
        }
    }

    pub(crate) fn store(folder: &Path) -> PathBuf {
        for (name, content) in [(DISK, "disk"), (MEMORY, "memory"), (STATE, "state")] {
            fs::write(folder.join(name), content).unwrap();
        }
        folder.to_owned()
    }

    impl Seal {
        /// As if the host had been started again since.
        pub(crate) fn of_an_earlier_host(mut self) -> Self {
            self.memory.host_boot = "an earlier one".into();
            self
        }

        pub(crate) fn written(&self, store: &Path) {
            self.write(store).unwrap();
        }
    }

    pub(crate) fn sealed(folder: &Path) -> (PathBuf, Seal) {
        sealed_with(folder, |_| {})
    }

    /// The same, with the memory changed before.
    pub(crate) fn sealed_with(folder: &Path, change: impl FnOnce(&Path)) -> (PathBuf, Seal) {
        let store = store(folder);
        change(&store.join(MEMORY));
        let seal = Seal::make(&store, Origin::Session { generation: 3 }, key(), "boot".into(), None).unwrap();
        (store, seal)
    }

    #[test]
    fn a_seal_is_read_as_it_was_made_and_used_once() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Seal::read(folder.path()).unwrap().is_none());
        let (store, seal) = sealed(folder.path());
        assert_eq!(Seal::read(&store).unwrap().as_ref(), Some(&seal));
        seal.check(&store, &key()).unwrap();
        seal.clone().break_it(&store).unwrap();
        assert!(Seal::read(&store).unwrap().is_none());
        assert!(seal.break_it(&store).is_err());
        discard(&store).unwrap();
        assert_eq!(fs::read_dir(&store).unwrap().count(), 1, "only the disk stays");
    }

    #[test]
    fn a_seal_of_a_guest_that_was_told_nothing_is_what_it_was_before_guests_were_told() {
        let folder = tempfile::tempdir().unwrap();
        let (store, seal) = sealed(folder.path());
        assert!(!fs::read_to_string(store.join(SEAL)).unwrap().contains("told"));
        Seal { told: Some(checksum(b"authorities")), ..seal }.write(&store).unwrap();
        let told = Seal::read(&store).unwrap().unwrap().told.unwrap();
        assert_eq!((told.len(), &told[..8]), (64, &checksum(b"authorities")[..8]));
    }

    #[test]
    fn another_vm_is_refused_with_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let (store, seal) = sealed(folder.path());
        for (what, needed) in [
            ("QEMU build", SnapshotKey { qemu_build: "newer".into(), ..key() }),
            ("memory (MiB)", SnapshotKey { memory_mib: 2048, ..key() }),
            ("guest image", SnapshotKey { guest_image: "newer".into(), ..key() }),
        ] {
            let refused = seal.check(&store, &needed).unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
        }
    }

    #[test]
    fn damage_to_each_part_is_found() {
        let damage = |change: fn(&Path)| {
            let folder = tempfile::tempdir().unwrap();
            let (store, _) = sealed(folder.path());
            change(&store);
            match Seal::read(&store) {
                Ok(seal) => seal.unwrap().check(&store, &key()).unwrap_err(),
                Err(error) => error,
            }
        };
        let state = damage(|store| fs::write(store.join(STATE), "stat").unwrap());
        assert!(matches!(state, Unfit::State), "{state}");
        let cut = damage(|store| fs::write(store.join(MEMORY), "memor").unwrap());
        assert!(matches!(cut, Unfit::Memory("it has another size")), "{cut}");
        let other = damage(|store| {
            fs::write(store.join("other"), "memory").unwrap();
            fs::rename(store.join("other"), store.join(MEMORY)).unwrap();
        });
        assert!(matches!(other, Unfit::Memory("it is another file")), "{other}");
        let seal = damage(|store| {
            let text = fs::read_to_string(store.join(SEAL)).unwrap();
            fs::write(store.join(SEAL), text.replace("1024", "2048")).unwrap();
        });
        assert!(matches!(seal, Unfit::Seal), "{seal}");
        let short = damage(|store| fs::write(store.join(SEAL), "{").unwrap());
        assert!(matches!(short, Unfit::Seal), "{short}");
    }
}
