//! Giving a snapshot up for want of space: its session boots from the disk, and is told why.

use std::fs;
use std::io;
use std::path::Path;

use crate::seal::{discard, read_whole};

/// Free space that a store's file system must have for a suspend or a copy of a template, in bytes: the memory of a VM that
/// sleeps is to be written out there, and the guest's disk is to go on growing.
pub const FREE_BYTES_MIN: u64 = 256 * 1024 * 1024;

/// The word that is left for the next wake.
const GIVEN_UP: &str = "snapshot.given-up";

/// Removes a store's snapshot, and leaves word of it for the next wake. Only for who knows that no VM is being made of it.
///
/// # Errors
/// When the seal can't be removed; nothing else was then.
pub fn give_up(store: &Path, reason: &str) -> io::Result<()> {
    discard(store)?;
    // On a disk that is full even this may find no room.
    if let Err(error) = fs::write(store.join(GIVEN_UP), reason) {
        tracing::warn!(%error, "can't leave word of a snapshot that was given up");
    }
    Ok(())
}

/// Why the last snapshot was given up. Told once.
#[must_use]
pub fn given_up(store: &Path) -> Option<String> {
    let path = store.join(GIVEN_UP);
    let reason = read_whole(&path).ok()?;
    let _ = fs::remove_file(path);
    Some(String::from_utf8_lossy(&reason).into_owned())
}

/// Was the last snapshot given up, and has nobody been told yet?
#[must_use]
pub fn is_given_up(store: &Path) -> bool {
    store.join(GIVEN_UP).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::{DISK, Seal, tests::sealed};

    #[test]
    fn a_snapshot_that_is_given_up_leaves_its_disk_and_word_for_one_wake() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = sealed(folder.path());
        give_up(&store, "no room").unwrap();
        assert!(Seal::read(&store).unwrap().is_none() && store.join(DISK).exists());
        assert!(is_given_up(&store));
        assert_eq!(given_up(&store).as_deref(), Some("no room"));
        assert!(given_up(&store).is_none() && !is_given_up(&store));
    }
}
