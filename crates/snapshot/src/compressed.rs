//! A snapshot that nobody wakes for long: its memory in less space.
//!
//! ```text
//!   a line of JSON: the seal that it belongs to, how long the memory is
//!   for each frame: how long it is (u32), then a zstd frame with a checksum of
//!       how many blocks (u32), the place of each (u64), the blocks
//!   a zero in place of the next frame's length
//! ```
//!
//! Numbers are little-endian. Blocks that are all zero are left out; frames stand alone, so several threads decompress them.
//!
//! ```text
//!   memory ─── compress: beside ─► synced ─► publish: renamed into its place, memory removed ───► memory.compressed
//!     ▲                                                                                            │
//!     └── memory.compressed removed ◄─ seal told of the new file ◄─ renamed into its place ◄─ decompress: beside
//! ```
//!
//! So there is one rule, at every moment: *a compressed memory that bears the seal's id is the memory*, and what lies beside
//! it is a leftover. A seal is used once, so one that bears another id is nobody's.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

use crate::digest::{BLOCK_BYTES, MemoryDigest, block_bytes, each_block, is_empty};
use crate::progress::Progress;
use crate::seal::{MEMORY, Seal, Unfit, remove};

/// A memory in less space.
pub(crate) const COMPRESSED: &str = "memory.compressed";

/// What is being made, under its name for now.
const COMPRESSING: &str = "memory.compressing";
const DECOMPRESSING: &str = "memory.decompressing";

/// All that may lie in a store for the sake of this.
pub(crate) const FILES: [&str; 3] = [COMPRESSED, COMPRESSING, DECOMPRESSING];

/// How much zstd tries: more makes it hardly smaller and takes a multiple of the time (docs/design/001-asleep-on-disk.md).
const LEVEL: i32 = 1;

/// Blocks in a frame: enough to compress well, few enough for each thread to have many frames.
const FRAME_BLOCKS: usize = 64;

/// Longest frame, in bytes, before it is compressed.
const FRAME_BYTES_MAX: usize = 4 + FRAME_BLOCKS * (8 + BLOCK_BYTES);

/// Longest description, in bytes.
const DESCRIPTION_BYTES_MAX: u64 = 4096;

/// Most threads that decompress: a wake isn't to take all of a large machine.
const THREADS_MAX: usize = 4;

/// Parts of a block that are all zero become holes.
const PAGE_BYTES: usize = 4096;

/// What is wrong with a compressed memory.
const CUT_SHORT: &str = "it was cut short";
const DAMAGED: &str = "it can't be decompressed";

#[derive(Debug, Serialize, Deserialize)]
struct Description {
    /// The id of the seal that it belongs to.
    seal: String,
    /// Length of the memory.
    bytes: u64,
}

/// A memory that was compressed, and isn't in its place yet. Dropped before that it is gone.
#[derive(Debug)]
pub struct Beside {
    store: PathBuf,
    seal: Seal,
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.store.join(COMPRESSING));
    }
}

impl Beside {
    /// Puts it into its place, and removes the memory. Only for who knows that no VM is being made of it. `false`: the store
    /// isn't as it was sealed any more.
    ///
    /// # Errors
    /// When that fails; the snapshot is as it was then.
    pub fn publish(self) -> io::Result<bool> {
        if !self.seal.is_whole(&self.store) {
            return Ok(false);
        }
        fs::rename(self.store.join(COMPRESSING), self.store.join(COMPRESSED))?;
        File::open(&self.store)?.sync_all()?;
        remove(&self.store.join(MEMORY))?;
        Ok(true)
    }
}

impl Seal {
    /// Compresses the memory, beside it. Takes seconds, and belongs into the background. `None`: called off by `goes_on`,
    /// which is asked now and then, or because the store was woken meanwhile. Blocks; for use off the async threads.
    ///
    /// # Errors
    /// See [`Unfit`]. A memory that isn't what was put to sleep is condemned, see [`Seal::verify`].
    pub fn compress(&self, store: &Path, goes_on: impl Fn() -> bool) -> Result<Option<Beside>, Unfit> {
        let memory = File::open(store.join(MEMORY))?;
        self.check_memory_file(store)?;
        let goes_on = || goes_on() && self.is_whole(store);
        let path = store.join(COMPRESSING);
        remove(&path)?;
        let target = File::options().write(true).create_new(true).mode(0o600).open(path)?;
        let beside = Beside { store: store.to_owned(), seal: self.clone() };
        let mut target = BufWriter::new(target);
        let bytes = memory.metadata()?.len();
        serde_json::to_writer(&mut target, &Description { seal: self.id.clone(), bytes })
            .map_err(io::Error::from)?;
        target.write_all(b"\n")?;
        let (mut digest, mut frame) = (MemoryDigest::new(bytes), Frame::new()?);
        let is_done = each_block(&memory, goes_on, |position, block| {
            digest.add(position, block);
            frame.add(position, block);
            if frame.positions.len() == FRAME_BLOCKS { frame.write(&mut target) } else { Ok(()) }
        })?;
        if !is_done {
            return Ok(None);
        }
        frame.write(&mut target)?;
        target.write_all(&0_u32.to_le_bytes())?;
        target.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        // Of one that runs on, nothing is said.
        if !goes_on() {
            return Ok(None);
        }
        self.settle_sum(store, digest.finish())?;
        Ok(Some(beside))
    }

    /// Makes a memory that was compressed what it was, so that a VM can be made of it. Does nothing to one that is.
    /// Blocks; for use off the async threads.
    ///
    /// # Errors
    /// See [`Unfit`]; the store is as it was then.
    pub fn decompress(&mut self, store: &Path, progress: &Progress) -> Result<(), Unfit> {
        let Some(compressed) = Compressed::open(store, self)? else { return Ok(()) };
        progress.begin("decompressing the snapshot", fs::metadata(store.join(COMPRESSED))?.len());
        let beside = store.join(DECOMPRESSING);
        remove(&beside)?;
        let file = File::options().write(true).create_new(true).mode(0o600).open(&beside)?;
        // Not synced: up to a restart of the host the page cache has it, and then its checksum is compared.
        let written = compressed
            .write_to(&file, &progress.done)
            .and_then(|()| Ok(fs::rename(&beside, store.join(MEMORY))?));
        if let Err(unfit) = written {
            let _ = fs::remove_file(&beside);
            return Err(unfit);
        }
        self.is_now(&file)?;
        self.write(store)?;
        Ok(remove(&store.join(COMPRESSED))?)
    }
}

/// Removes what is left of a compression or decompression by a process that was killed. Only for who knows that there is
/// neither a VM nor one being made, and that nobody compresses.
///
/// # Errors
/// When it can't be removed.
pub fn tidy(store: &Path, seal: &Seal) -> io::Result<()> {
    [COMPRESSING, DECOMPRESSING].iter().try_for_each(|name| remove(&store.join(name)))?;
    match Compressed::open(store, seal) {
        Ok(Some(_)) => remove(&store.join(MEMORY)),
        // One of another seal, if any. One that is damaged is told of by whoever wakes it.
        Ok(None) => remove(&store.join(COMPRESSED)),
        Err(_) => Ok(()),
    }
}

/// Blocks on their way into a file.
struct Frame {
    compressor: Compressor<'static>,
    positions: Vec<u64>,
    blocks: Vec<u8>,
}

impl Frame {
    fn new() -> io::Result<Self> {
        let mut compressor = Compressor::new(LEVEL)?;
        compressor.set_parameter(CParameter::ChecksumFlag(true))?;
        Ok(Self { compressor, positions: Vec::new(), blocks: Vec::new() })
    }

    fn add(&mut self, position: u64, block: &[u8]) {
        self.positions.push(position);
        self.blocks.extend_from_slice(block);
    }

    fn write(&mut self, target: &mut impl Write) -> io::Result<()> {
        if self.positions.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(self.positions.len()).map_err(io::Error::other)?;
        let mut text = count.to_le_bytes().to_vec();
        self.positions.iter().for_each(|position| text.extend_from_slice(&position.to_le_bytes()));
        text.append(&mut self.blocks);
        self.positions.clear();
        let packed = self.compressor.compress(&text)?;
        target.write_all(&u32::try_from(packed.len()).map_err(io::Error::other)?.to_le_bytes())?;
        target.write_all(&packed)
    }
}

/// A compressed memory that is being read.
#[derive(Debug)]
pub(crate) struct Compressed {
    /// `None` after the last frame, or the first that makes no sense.
    frames: Option<BufReader<File>>,
    /// Length of the memory.
    bytes: u64,
}

impl Compressed {
    /// The compressed memory of this seal, if there is one.
    pub(crate) fn open(store: &Path, seal: &Seal) -> Result<Option<Self>, Unfit> {
        let file = match File::open(store.join(COMPRESSED)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut frames = BufReader::new(file);
        let mut line = Vec::new();
        (&mut frames).take(DESCRIPTION_BYTES_MAX).read_until(b'\n', &mut line)?;
        let Description { seal: id, bytes } =
            serde_json::from_slice(&line).map_err(|_| Unfit::Memory(DAMAGED))?;
        if id != seal.id {
            return Ok(None);
        }
        Ok(Some(Self { frames: Some(frames), bytes }))
    }

    /// Length of the memory.
    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next frame as it lies in the file.
    fn next(&mut self) -> Result<Option<Vec<u8>>, Unfit> {
        let Some(mut frames) = self.frames.take() else { return Ok(None) };
        let cut_short = |_| Unfit::Memory(CUT_SHORT);
        let mut length = [0; 4];
        frames.read_exact(&mut length).map_err(cut_short)?;
        let length = u32::from_le_bytes(length) as usize;
        if length == 0 {
            return Ok(None);
        }
        if length > zstd::zstd_safe::compress_bound(FRAME_BYTES_MAX) {
            return Err(Unfit::Memory(DAMAGED));
        }
        let mut packed = vec![0; length];
        frames.read_exact(&mut packed).map_err(cut_short)?;
        self.frames = Some(frames);
        Ok(Some(packed))
    }

    /// The memory's checksum, as [`crate::digest::memory_digest`] makes it.
    pub(crate) fn digest(mut self) -> Result<String, Unfit> {
        let (mut digest, mut reader) = (MemoryDigest::new(self.bytes), Reader::new(self.bytes)?);
        while let Some(packed) = self.next()? {
            reader.each_block(&packed, |position, block| {
                digest.add(position, block);
                Ok(())
            })?;
        }
        Ok(digest.finish())
    }

    /// Writes the memory into an empty file, with its holes.
    /// `read` grows by what was read for it.
    fn write_to(self, file: &File, read: &AtomicU64) -> Result<(), Unfit> {
        file.set_len(self.bytes)?;
        let bytes = self.bytes;
        let source = Mutex::new(self);
        let work = || -> Result<(), Unfit> {
            let mut reader = Reader::new(bytes)?;
            loop {
                let next = source.lock().unwrap_or_else(PoisonError::into_inner).next()?;
                let Some(packed) = next else { return Ok(()) };
                read.fetch_add(packed.len() as u64, Ordering::Relaxed);
                reader.each_block(&packed, |position, block| write_data(file, position, block))?;
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let panicked = |_| Err(Unfit::Memory(DAMAGED));
            others.into_iter().fold(work(), |all, other| all.and(other.join().unwrap_or_else(panicked)))
        })
    }
}

/// Makes frames what they were.
struct Reader {
    decompressor: Decompressor<'static>,
    /// Length of the memory.
    bytes: u64,
    text: Vec<u8>,
}

impl Reader {
    fn new(bytes: u64) -> io::Result<Self> {
        Ok(Self { decompressor: Decompressor::new()?, bytes, text: vec![0; FRAME_BYTES_MAX] })
    }

    fn each_block(
        &mut self,
        packed: &[u8],
        mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), Unfit> {
        let damaged = || Unfit::Memory(DAMAGED);
        let length =
            self.decompressor.decompress_to_buffer(packed, &mut self.text[..]).map_err(|_| damaged())?;
        let (count, rest) = self.text[..length].split_first_chunk().ok_or_else(damaged)?;
        let places = u32::from_le_bytes(*count) as usize * 8;
        let (places, mut blocks) = rest.split_at_checked(places).ok_or_else(damaged)?;
        for place in places.as_chunks().0 {
            let position = u64::from_le_bytes(*place);
            if position % BLOCK_BYTES as u64 != 0 || position >= self.bytes {
                return Err(damaged());
            }
            let size = block_bytes(self.bytes, position);
            let (block, rest) = blocks.split_at_checked(size).ok_or_else(damaged)?;
            take(position, block)?;
            blocks = rest;
        }
        Ok(())
    }
}

/// Writes what isn't zero of a block to its place.
fn write_data(file: &File, position: u64, block: &[u8]) -> io::Result<()> {
    let mut at = 0;
    for run in
        block.chunks(PAGE_BYTES).collect::<Vec<_>>().chunk_by(|one, next| is_empty(one) == is_empty(next))
    {
        let length = run.iter().map(|page| page.len()).sum::<usize>();
        if !is_empty(run[0]) {
            file.write_all_at(&block[at..at + length], position + at as u64)?;
        }
        at += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
