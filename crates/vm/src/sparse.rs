//! Copies of large, mostly empty files: a template's memory and disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// How a file was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyMethod {
    /// The file system shares the blocks until one side writes.
    Reflink,
    /// Every block that holds data was copied; holes stayed holes.
    Sparse,
}

/// Most that one system call copies.
const STEP_BYTES: u64 = 64 * 1024 * 1024;

/// Copies a file to a new one, with its holes. Not synced: a copy that a crash of the host cuts short belongs to a VM
/// that is gone as well. `copied` grows by the bytes of data that are there. Blocks; for use off the async threads.
///
/// # Errors
/// When the target exists, the disk is full, or either can't be accessed; then no target is left.
pub fn copy_sparse(from: &Path, to: &Path, copied: &AtomicU64) -> io::Result<CopyMethod> {
    let source = File::open(from)?;
    let target = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    let done = match rustix::fs::ioctl_ficlone(&target, &source) {
        Ok(()) => Ok(CopyMethod::Reflink),
        Err(_) => copy_data(&source, &target, copied).map(|()| CopyMethod::Sparse),
    };
    if done.is_err() {
        let _ = std::fs::remove_file(to);
    }
    done
}

fn copy_data(source: &File, target: &File, copied: &AtomicU64) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut position = 0;
    while position < length {
        let start = match rustix::fs::seek(source, SeekFrom::Data(position)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start))?;
        copy_range(source, target, start, end, copied)?;
        position = end;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, start: u64, end: u64, copied: &AtomicU64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let step = usize::try_from((end - read_at).min(STEP_BYTES)).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(source, Some(&mut read_at), target, Some(&mut write_at), step) {
            // The source was cut short meanwhile.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => drop(copied.fetch_add(bytes as u64, Ordering::Relaxed)),
            // Not between these file systems.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                return copy_through_memory(source, target, read_at, end, copied);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_through_memory(
    source: &File,
    target: &File,
    mut position: u64,
    end: u64,
    copied: &AtomicU64,
) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let mut buffer = vec![0; 1024 * 1024];
    while position < end {
        let step = usize::try_from(end - position).unwrap_or(usize::MAX).min(buffer.len());
        source.read_exact_at(&mut buffer[..step], position)?;
        target.write_all_at(&buffer[..step], position)?;
        position += step as u64;
        copied.fetch_add(step as u64, Ordering::Relaxed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{allocated_bytes, create_data_disk};
    use std::os::unix::fs::FileExt as _;

    /// 1 GiB with three islands of data, one of them at the very end.
    fn islands(path: &Path) {
        create_data_disk(path, 1 << 30).unwrap();
        let file = File::options().write(true).open(path).unwrap();
        for (at, byte) in [(0, b'a'), (300 << 20, b'b'), ((1 << 30) - 4096, b'c')] {
            file.write_all_at(&[byte; 4096], at).unwrap();
        }
    }

    fn check(copy: &Path) {
        let bytes = std::fs::read(copy).unwrap();
        assert_eq!(bytes.len(), 1 << 30);
        assert!(allocated_bytes(copy).unwrap() < 1 << 20);
        assert_eq!((bytes[4095], bytes[4096]), (b'a', 0));
        assert_eq!((bytes[300 << 20], bytes[(300 << 20) + 4096]), (b'b', 0));
        assert_eq!(bytes.last(), Some(&b'c'));
    }

    #[test]
    fn a_copy_has_the_data_and_the_holes() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        islands(&from);
        let copied = AtomicU64::new(0);
        let how = copy_sparse(&from, &to, &copied).unwrap();
        check(&to);
        assert!(how == CopyMethod::Reflink || copied.into_inner() == 3 * 4096);
    }

    #[test]
    fn a_copy_without_the_kernels_help_is_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        islands(&from);
        let target = File::create_new(&to).unwrap();
        target.set_len(1 << 30).unwrap();
        let source = File::open(&from).unwrap();
        for (start, length) in [(0, 4096), (300 << 20, 4096), ((1 << 30) - 4096, 4096)] {
            copy_through_memory(&source, &target, start, start + length, &AtomicU64::new(0)).unwrap();
        }
        check(&to);
    }

    #[test]
    fn an_existing_target_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        assert_eq!(
            copy_sparse(&from, &to, &AtomicU64::new(0)).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(std::fs::read(&to).unwrap(), b"old");
    }

    #[test]
    fn an_empty_file_and_one_that_is_all_hole_are_copied() {
        let directory = tempfile::tempdir().unwrap();
        for bytes in [0, 1 << 20] {
            let (from, to) =
                (directory.path().join(format!("f{bytes}")), directory.path().join(format!("t{bytes}")));
            create_data_disk(&from, bytes).unwrap();
            copy_sparse(&from, &to, &AtomicU64::new(0)).unwrap();
            assert_eq!(std::fs::metadata(&to).unwrap().len(), bytes);
        }
    }
}
