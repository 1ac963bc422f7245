//! The checksum of a sealed memory: made in the background, compared after a restart of the host and on request.
//!
//! A memory that was found to be another one is *condemned*: its checksum says so from then on, and no wake takes it.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::compressed::Compressed;
use crate::digest::memory_digest;
use crate::seal::{GONE, MEMORY, Seal, SealError, Unfit, cannot, read_whole};

/// The file with the checksum of the memory.
pub(crate) const SUM: &str = "memory.sum";

/// What is said of a memory whose checksum differs.
pub(crate) const OTHER_SUM: &str = "its checksum is another one";

#[derive(Debug, Serialize, Deserialize)]
struct Sum {
    /// The id of the seal that it was made for.
    seal: String,
    sha256: String,
    /// The memory was compared with it, and is another one.
    #[serde(default)]
    condemned: bool,
}

impl Seal {
    /// The checksum that was made for this seal.
    fn sum(&self, store: &Path) -> Result<Option<Sum>, Unfit> {
        let sum: Sum = match read_whole(&store.join(SUM)) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|_| Unfit::Seal)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(sum).filter(|sum| sum.seal == self.id))
    }

    /// Is the memory's checksum there, so that the seal holds over a restart of the host?
    pub(crate) fn has_sum(&self, store: &Path) -> bool {
        matches!(self.sum(store), Ok(Some(_)))
    }

    /// Was the memory found to be another one?
    pub(crate) fn is_condemned(&self, store: &Path) -> bool {
        matches!(self.sum(store), Ok(Some(Sum { condemned: true, .. })))
    }

    /// Compares device state and whole memory with their checksums; what differs is condemned. Blocks; for use off the
    /// async threads.
    ///
    /// # Errors
    /// [`Unfit::Unsafe`] when there is no checksum (yet), [`Unfit::Woken`] when the VM was let run meanwhile.
    pub fn verify(&self, store: &Path) -> Result<(), Unfit> {
        let sum = self.sum(store)?.ok_or(Unfit::Unsafe)?;
        if sum.condemned {
            return Err(Unfit::Memory(OTHER_SUM));
        }
        self.check_state(store)?;
        let found = self.open_memory(store)?.digest();
        self.compare(store, sum, found)
    }

    /// Takes over the checksum of a memory that was read whole, or compares it with the one that there is.
    pub(crate) fn settle_sum(&self, store: &Path, sha256: String) -> Result<(), Unfit> {
        match self.sum(store)? {
            None if self.is_of_an_earlier_host() => Err(Unfit::Unsafe),
            None => Ok(write(store, &Sum { seal: self.id.clone(), sha256, condemned: false })?),
            Some(sum) => self.compare(store, sum, Ok(sha256)),
        }
    }

    /// Condemns a memory that was found to be another one.
    fn compare(&self, store: &Path, sum: Sum, found: Result<String, Unfit>) -> Result<(), Unfit> {
        let unfit = match found {
            Ok(sha256) if sha256 == sum.sha256 => return Ok(()),
            Ok(_) => Unfit::Memory(OTHER_SUM),
            Err(unfit @ Unfit::Memory(_)) => unfit,
            Err(unreadable) => return Err(unreadable),
        };
        // A guest that runs on changes its memory, rightly.
        if !self.is_whole(store) {
            return Err(Unfit::Woken);
        }
        write(store, &Sum { condemned: true, ..sum })?;
        Err(unfit)
    }

    fn open_memory(&self, store: &Path) -> Result<Memory, Unfit> {
        let compressed = || Ok::<_, Unfit>(Compressed::open(store, self)?.map(Memory::Compressed));
        if let Some(memory) = compressed()? {
            return Ok(memory);
        }
        match File::open(store.join(MEMORY)) {
            Ok(file) => Ok(Memory::Plain(file)),
            // It may have been compressed just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => compressed()?.ok_or(Unfit::Memory(GONE)),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes the memory out and makes its checksum, so that the seal holds over a restart of the host. Takes seconds, and
    /// belongs into the background; it is given up when the store is woken meanwhile. Blocks; for use off the async
    /// threads.
    ///
    /// # Errors
    /// See [`SealError`].
    pub fn make_sum(&self, store: &Path) -> Result<(), SealError> {
        // The memory of a VM that runs on isn't written out for nothing.
        if !self.is_whole(store) {
            return Ok(());
        }
        let memory = match File::open(store.join(MEMORY)) {
            // Who compressed it has made one.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.has_sum(store) => return Ok(()),
            opened => opened.map_err(cannot("open the memory file"))?,
        };
        memory.sync_all().map_err(cannot("write the memory out"))?;
        let sha256 =
            memory_digest(&memory, || self.is_whole(store)).map_err(cannot("read the memory file"))?;
        match sha256 {
            Some(sha256) if self.is_whole(store) => {
                let sum = Sum { seal: self.id.clone(), sha256, condemned: false };
                write(store, &sum).map_err(cannot("write the memory's checksum"))
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// A memory that is read.
enum Memory {
    Plain(File),
    Compressed(Compressed),
}

impl Memory {
    fn digest(self) -> Result<String, Unfit> {
        match self {
            Self::Plain(file) => Ok(memory_digest(&file, || true)?.unwrap_or_default()),
            Self::Compressed(compressed) => compressed.digest(),
        }
    }
}

/// Beside, under a name of its own: whoever verifies may have made one at the same time.
fn write(store: &Path, sum: &Sum) -> io::Result<()> {
    let mut beside = tempfile::Builder::new().prefix(SUM).tempfile_in(store)?;
    beside.write_all(&serde_json::to_vec(sum)?)?;
    beside.persist(store.join(SUM))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::seal::tests::{key, sealed};

    #[test]
    fn a_bit_that_flipped_in_the_memory_is_found_by_its_checksum_and_never_woken() {
        let folder = tempfile::tempdir().unwrap();
        let (store, seal) = sealed(folder.path());
        assert!(matches!(seal.verify(&store), Err(Unfit::Unsafe)));
        assert!(!seal.has_sum(&store));
        seal.make_sum(&store).unwrap();
        seal.verify(&store).unwrap();
        seal.check(&store, &key()).unwrap();
        // In place: the same file, of the same size.
        let memory = File::options().write(true).open(store.join(MEMORY)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&memory, b"n", 0).unwrap();
        seal.check(&store, &key()).expect("it isn't read whole at each wake");
        for _ in 0..2 {
            assert!(matches!(seal.verify(&store), Err(Unfit::Memory(_))));
            let refused = seal.check(&store, &key()).unwrap_err();
            assert!(refused.to_string().contains(OTHER_SUM), "{refused}");
        }
    }

    #[test]
    fn a_memory_that_a_wake_changes_is_not_condemned() {
        let folder = tempfile::tempdir().unwrap();
        let (store, seal) = sealed(folder.path());
        seal.make_sum(&store).unwrap();
        seal.clone().break_it(&store).unwrap();
        fs::write(store.join(MEMORY), "runs on").unwrap();
        assert!(matches!(seal.verify(&store), Err(Unfit::Woken)));
        assert!(!seal.is_condemned(&store));
        fs::remove_file(store.join(SUM)).unwrap();
        seal.make_sum(&store).unwrap();
        assert!(!store.join(SUM).exists(), "a checksum of a memory that runs on is worth nothing");
    }

    #[test]
    fn after_a_restart_of_the_host_only_a_memory_with_a_checksum_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let (store, seal) = sealed(folder.path());
        let seal = seal.of_an_earlier_host();
        assert!(matches!(seal.check(&store, &key()), Err(Unfit::Unsafe)));
        // Written and read again, as it is after a restart.
        seal.make_sum(&store).unwrap();
        seal.check(&store, &key()).unwrap();
    }
}
