//! The checksum of a memory file, which is large and mostly empty.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

/// What is looked at at once. A block of zeros counts as a hole: which of the two it is is the file system's business.
const BLOCK_BYTES: usize = 64 * 1024;

/// How often it is asked whether to go on.
const ASK_EVERY_BYTES: u64 = 16 * 1024 * 1024;

/// SHA-256, in hex, of a file's length and of its blocks that aren't all zero, each with its place. Holes cost nothing.
/// Blocks; for use off the async threads. `None` as soon as `goes_on` says no, which is asked now and then.
///
/// # Errors
/// When the file can't be read.
pub fn memory_digest(path: &Path, goes_on: impl Fn() -> bool) -> io::Result<Option<String>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(length.to_le_bytes());
    let mut block = vec![0; BLOCK_BYTES];
    let (mut position, mut asked_at) = (0, 0);
    while position < length {
        position = match rustix::fs::seek(&file, SeekFrom::Data(position)) {
            // Blocks are counted from the file's start, wherever the data in them begins.
            Ok(data) => data - data % BLOCK_BYTES as u64,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        // The block may begin in a hole, before its data.
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(position))?.max(position + 1);
        while position < hole {
            if position >= asked_at {
                if !goes_on() {
                    return Ok(None);
                }
                asked_at = position + ASK_EVERY_BYTES;
            }
            let size = usize::try_from(length - position).unwrap_or(usize::MAX).min(BLOCK_BYTES);
            file.read_exact_at(&mut block[..size], position)?;
            if block[..size].iter().any(|byte| *byte != 0) {
                hash.update(position.to_le_bytes());
                hash.update(&block[..size]);
            }
            position += size as u64;
        }
    }
    Ok(Some(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_and_holes_are_the_same_and_every_bit_counts() {
        let folder = tempfile::tempdir().unwrap();
        let (sparse, full) = (folder.path().join("sparse"), folder.path().join("full"));
        let file = File::create_new(&sparse).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"here", 300_000).unwrap();
        let mut bytes = std::fs::read(&sparse).unwrap();
        std::fs::write(&full, &bytes).unwrap();
        let digest = memory_digest(&sparse, || true).unwrap();
        assert_eq!(memory_digest(&full, || true).unwrap(), digest);
        assert_eq!(memory_digest(&full, || false).unwrap(), None);
        bytes[300_001] ^= 1;
        std::fs::write(&full, &bytes).unwrap();
        assert_ne!(memory_digest(&full, || true).unwrap(), digest);
    }

    #[test]
    fn place_and_length_count() {
        let folder = tempfile::tempdir().unwrap();
        let digest = |length, at| {
            let path = folder.path().join(format!("{length}-{at}"));
            let file = File::create_new(&path).unwrap();
            file.set_len(length).unwrap();
            file.write_all_at(b"x", at).unwrap();
            memory_digest(&path, || true).unwrap()
        };
        let digests = [digest(1 << 20, 0), digest(1 << 20, 500_000), digest(2 << 20, 0)];
        assert_ne!(digests[0], digests[1]);
        assert_ne!(digests[0], digests[2]);
    }
}
