//! The session's disk: a raw sparse file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Makes a disk of `bytes` that takes no space yet. The guest formats it at its first boot.
///
/// # Errors
/// When the file exists or can't be made; then nothing is left behind.
pub fn create_data_disk(path: &Path, bytes: u64) -> io::Result<()> {
    create_sparse(path, bytes).map(drop)
}

/// Makes a disk larger. A running guest is told with [`crate::Vm::resize_data_disk`].
///
/// # Errors
/// When the disk is larger already, or the file can't be changed.
pub fn grow_data_disk(path: &Path, bytes: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let present = file.metadata()?.len();
    if bytes < present {
        let message = format!("the disk has {present} bytes and can't shrink to {bytes}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    file.set_len(bytes)?;
    file.sync_all()
}

/// What a sparse file really takes, in bytes.
///
/// # Errors
/// When the file can't be looked at.
pub fn allocated_bytes(path: &Path) -> io::Result<u64> {
    // st_blocks counts units of 512 bytes, whatever the block size (stat(2)).
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// What is free on the file system of a file or folder for a user without privileges, in bytes.
///
/// # Errors
/// When it can't be asked.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let space = rustix::fs::statvfs(path)?;
    Ok(space.f_bavail * space.f_frsize)
}

/// How large the file system of a file or folder is, in bytes.
///
/// # Errors
/// When it can't be asked.
pub fn size_bytes(path: &Path) -> io::Result<u64> {
    let space = rustix::fs::statvfs(path)?;
    Ok(space.f_blocks * space.f_frsize)
}

pub(crate) fn create_sparse(path: &Path, bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    if let Err(error) = file.set_len(bytes) {
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_disk_is_large_and_takes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.raw");
        create_data_disk(&path, 64 << 30).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 << 30);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(allocated_bytes(&path).unwrap() < 1 << 20);
    }

    #[test]
    fn an_existing_disk_is_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.raw");
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(create_data_disk(&path, 1 << 20).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_disk_grows_and_never_shrinks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.raw");
        create_data_disk(&path, 1 << 20).unwrap();
        grow_data_disk(&path, 2 << 20).unwrap();
        assert!(grow_data_disk(&path, 1 << 20).is_err());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 2 << 20);
    }
}
