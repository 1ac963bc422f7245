//! The checksum of a memory file, which is large and mostly empty.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

/// What is looked at at once. A block of zeros counts as a hole: which of the two it is is the file system's business.
pub(crate) const BLOCK_BYTES: usize = 64 * 1024;

/// How often it is asked whether to go on.
const ASK_EVERY_BYTES: u64 = 16 * 1024 * 1024;

/// A block without anything in it.
static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// SHA-256 of a memory's length and of its blocks that aren't all zero, each with its place.
pub(crate) struct MemoryDigest(Sha256);

impl MemoryDigest {
    /// Of a memory of so many bytes, which is empty so far.
    pub(crate) fn new(bytes: u64) -> Self {
        let mut hash = Sha256::new();
        hash.update(bytes.to_le_bytes());
        Self(hash)
    }

    /// Adds the next block that isn't all zero.
    pub(crate) fn add(&mut self, position: u64, block: &[u8]) {
        self.0.update(position.to_le_bytes());
        self.0.update(block);
    }

    /// In hex.
    pub(crate) fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Is there nothing in this part of a block?
pub(crate) fn is_empty(part: &[u8]) -> bool {
    *part == ZEROS[..part.len()]
}

/// Takes each block of a file that isn't all zero, in order, with its place. Holes cost nothing. `false` as soon as
/// `goes_on` says no, which is asked now and then. Blocks; for use off the async threads.
///
/// # Errors
/// When the file can't be read, and what `take` fails with.
pub(crate) fn each_block(
    file: &File,
    goes_on: impl Fn() -> bool,
    mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<bool> {
    let length = file.metadata()?.len();
    let mut block = vec![0; BLOCK_BYTES];
    let (mut position, mut asked_at) = (0, 0);
    while position < length {
        position = match rustix::fs::seek(file, SeekFrom::Data(position)) {
            // Blocks are counted from the file's start, wherever the data in them begins.
            Ok(data) => data - data % BLOCK_BYTES as u64,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        // The block may begin in a hole, before its data.
        let hole = rustix::fs::seek(file, SeekFrom::Hole(position))?.max(position + 1);
        while position < hole {
            if position >= asked_at {
                if !goes_on() {
                    return Ok(false);
                }
                asked_at = position + ASK_EVERY_BYTES;
            }
            let size = block_bytes(length, position);
            file.read_exact_at(&mut block[..size], position)?;
            if !is_empty(&block[..size]) {
                take(position, &block[..size])?;
            }
            position += size as u64;
        }
    }
    Ok(true)
}

/// How long the block at this place is in a memory of this length: the last may be shorter than the others.
pub(crate) fn block_bytes(length: u64, position: u64) -> usize {
    usize::try_from(length.saturating_sub(position)).unwrap_or(usize::MAX).min(BLOCK_BYTES)
}

/// The digest of a memory file, in hex. `None` as soon as `goes_on` says no. Blocks; for use off the async threads.
///
/// # Errors
/// When the file can't be read.
pub(crate) fn memory_digest(file: &File, goes_on: impl Fn() -> bool) -> io::Result<Option<String>> {
    let mut digest = MemoryDigest::new(file.metadata()?.len());
    let is_done = each_block(file, goes_on, |position, block| {
        digest.add(position, block);
        Ok(())
    })?;
    Ok(is_done.then(|| digest.finish()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn digest_of(path: &Path, goes_on: bool) -> Option<String> {
        memory_digest(&File::open(path).unwrap(), || goes_on).unwrap()
    }

    #[test]
    fn zeros_and_holes_are_the_same_and_every_bit_counts() {
        let folder = tempfile::tempdir().unwrap();
        let (sparse, full) = (folder.path().join("sparse"), folder.path().join("full"));
        let file = File::create_new(&sparse).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"here", 300_000).unwrap();
        let mut bytes = std::fs::read(&sparse).unwrap();
        std::fs::write(&full, &bytes).unwrap();
        let digest = digest_of(&sparse, true);
        assert_eq!(digest_of(&full, true), digest);
        assert_eq!(digest_of(&full, false), None);
        bytes[300_001] ^= 1;
        std::fs::write(&full, &bytes).unwrap();
        assert_ne!(digest_of(&full, true), digest);
    }

    #[test]
    fn place_and_length_count() {
        let folder = tempfile::tempdir().unwrap();
        let digest = |length, at| {
            let path = folder.path().join(format!("{length}-{at}"));
            let file = File::create_new(&path).unwrap();
            file.set_len(length).unwrap();
            file.write_all_at(b"x", at).unwrap();
            digest_of(&path, true)
        };
        let digests = [digest(1 << 20, 0), digest(1 << 20, 500_000), digest(2 << 20, 0)];
        assert_ne!(digests[0], digests[1]);
        assert_ne!(digests[0], digests[2]);
    }
}
