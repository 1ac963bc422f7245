use std::fs;

use dormouse_api::{Checksum, MemoryForm, VerifyAnswer};
use dormouse_vm::allocated_bytes;

use super::*;
use crate::seal::tests::{key, sealed_with};
use crate::{discard, info, verify};

/// 64 MiB with islands: full blocks, single pages, one at the very end. More frames than one.
fn islands(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(64 << 20).unwrap();
    for number in 0..150_u64 {
        let bytes = [number.to_le_bytes(), (!number).to_le_bytes()].concat().repeat(BLOCK_BYTES / 16);
        file.write_all_at(&bytes, number * 3 * BLOCK_BYTES as u64).unwrap();
    }
    for page in [50 << 20, (60 << 20) + 3 * PAGE_BYTES as u64, (64 << 20) - PAGE_BYTES as u64] {
        file.write_all_at(&[7; PAGE_BYTES], page).unwrap();
    }
}

struct Sleeping {
    folder: tempfile::TempDir,
    seal: Seal,
    memory: Vec<u8>,
    allocated: u64,
}

impl Sleeping {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (store, seal) = sealed_with(folder.path(), islands);
        let memory = fs::read(store.join(MEMORY)).unwrap();
        let allocated = allocated_bytes(&store.join(MEMORY)).unwrap();
        Self { folder, seal, memory, allocated }
    }

    fn compressed() -> Self {
        let sleeping = Self::new();
        assert!(sleeping.beside().publish().unwrap());
        sleeping
    }

    fn store(&self) -> &Path {
        self.folder.path()
    }

    fn beside(&self) -> Beside {
        self.seal.compress(self.store(), || true).unwrap().expect("nobody calls it off")
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.store()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// What the next wake and the next sleep do; nothing may be left of any of it.
    fn wakes_whole(&self) {
        let mut seal = Seal::read(self.store()).unwrap().expect("it is sealed");
        seal.check(self.store(), &key()).unwrap();
        seal.decompress(self.store(), &Progress::default()).unwrap();
        let read = Seal::read(self.store()).unwrap().unwrap();
        assert_eq!(read, seal);
        read.check(self.store(), &key()).unwrap();
        read.verify(self.store()).unwrap();
        assert!(fs::read(self.store().join(MEMORY)).unwrap() == self.memory, "it is another memory");
        assert_eq!(
            self.names(),
            ["data.raw", "memory", "memory.state", "memory.sum", "snapshot.json"],
            "something is left"
        );
        let allocated = allocated_bytes(&self.store().join(MEMORY)).unwrap();
        assert!(allocated <= self.allocated, "{allocated} bytes, and were {}", self.allocated);
    }

    fn refused(&self) -> String {
        let mut seal = Seal::read(self.store()).unwrap().expect("it is sealed");
        let refused = seal
            .check(self.store(), &key())
            .and_then(|()| seal.decompress(self.store(), &Progress::default()));
        assert!(!self.store().join(MEMORY).exists() && !self.store().join(DECOMPRESSING).exists());
        refused.unwrap_err().to_string()
    }

    fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.store().join(COMPRESSED);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn a_compressed_memory_is_small_told_of_verified_and_wakes_as_it_was_with_its_holes() {
    let sleeping = Sleeping::compressed();
    assert!(!sleeping.store().join(MEMORY).exists());
    let told = info(sleeping.store(), Some(&key())).unwrap();
    assert_eq!((told.memory, told.checksum, told.unfit), (MemoryForm::Compressed, Checksum::Made, None));
    assert!(0 < told.used_bytes && told.used_bytes < sleeping.allocated / 10, "{}", told.used_bytes);
    assert_eq!(verify(sleeping.store()), VerifyAnswer::Intact);
    sleeping.wakes_whole();
    assert_eq!(info(sleeping.store(), None).unwrap().memory, MemoryForm::Plain);
}

#[test]
fn whoever_is_killed_at_any_step_leaves_a_whole_snapshot_and_nothing_else_in_the_end() {
    // Each is what lies in the store at one moment of a compression or a decompression.
    let moments: [fn(&Sleeping); 5] = [
        // Being compressed: one that is dropped would be removed.
        |sleeping| {
            let beside = sleeping.beside();
            fs::write(sleeping.store().join(COMPRESSING), "half of it").unwrap();
            std::mem::forget(beside);
        },
        // In its place, and the memory not removed.
        |sleeping| {
            fs::copy(sleeping.store().join(MEMORY), sleeping.store().join("kept")).unwrap();
            assert!(sleeping.beside().publish().unwrap());
            fs::rename(sleeping.store().join("kept"), sleeping.store().join(MEMORY)).unwrap();
        },
        // Being decompressed.
        |sleeping| {
            assert!(sleeping.beside().publish().unwrap());
            fs::write(sleeping.store().join(DECOMPRESSING), "half of it").unwrap();
        },
        // Decompressed, and the seal not told of it; a crash of the host can have cut it short.
        |sleeping| {
            assert!(sleeping.beside().publish().unwrap());
            fs::write(sleeping.store().join(MEMORY), "half of it").unwrap();
        },
        // The seal told of it, and the compressed one not removed.
        |sleeping| {
            assert!(sleeping.beside().publish().unwrap());
            fs::copy(sleeping.store().join(COMPRESSED), sleeping.store().join("kept")).unwrap();
            sleeping.seal.clone().decompress(sleeping.store(), &Progress::default()).unwrap();
            fs::rename(sleeping.store().join("kept"), sleeping.store().join(COMPRESSED)).unwrap();
        },
    ];
    for (number, moment) in moments.iter().enumerate() {
        for is_tidied in [false, true] {
            println!("moment {number}, tidied: {is_tidied}");
            let sleeping = Sleeping::new();
            moment(&sleeping);
            let seal = Seal::read(sleeping.store()).unwrap().unwrap();
            if is_tidied {
                tidy(sleeping.store(), &seal).unwrap();
                assert_eq!(sleeping.names().len(), 5, "{:?}", sleeping.names());
            } else if number == 0 {
                // It is in nobody's way, and goes with what else the next sleep clears away.
                fs::remove_file(sleeping.store().join(COMPRESSING)).unwrap();
            }
            sleeping.wakes_whole();
        }
        let sleeping = Sleeping::new();
        moment(&sleeping);
        discard(sleeping.store()).unwrap();
        assert_eq!(sleeping.names(), ["data.raw"], "moment {number}");
    }
}

#[test]
fn a_compression_that_is_called_off_or_overtaken_by_a_wake_leaves_the_snapshot_alone() {
    let sleeping = Sleeping::new();
    let before = sleeping.names();
    assert!(sleeping.seal.compress(sleeping.store(), || false).unwrap().is_none());
    drop(sleeping.beside());
    let with_sum = [&before[..3], &["memory.sum".to_owned()], &before[3..]].concat();
    assert_eq!(sleeping.names(), with_sum);
    let beside = sleeping.beside();
    sleeping.seal.clone().break_it(sleeping.store()).unwrap();
    assert!(!beside.publish().unwrap(), "its VM runs on");
    assert!(sleeping.store().join(MEMORY).exists() && !sleeping.store().join(COMPRESSED).exists());
    assert!(sleeping.seal.compress(sleeping.store(), || true).unwrap().is_none());
}

#[test]
fn a_compressed_memory_that_is_damaged_is_refused_with_the_reason() {
    for (what, words) in
        [("cut", CUT_SHORT), ("flipped", DAMAGED), ("described", DAMAGED), ("end", CUT_SHORT)]
    {
        let sleeping = Sleeping::compressed();
        sleeping.change(|bytes| match what {
            "cut" => bytes.truncate(bytes.len() / 2),
            "flipped" => *bytes.iter_mut().rev().nth(20).unwrap() ^= 1,
            "described" => bytes[0] = b'x',
            _ => bytes.truncate(bytes.len() - 4),
        });
        let refused = sleeping.refused();
        assert!(refused.contains(words), "{what}: {refused}");
        assert!(matches!(verify(sleeping.store()), VerifyAnswer::Damaged { .. }), "{what}");
        assert!(info(sleeping.store(), None).unwrap().unfit.is_some(), "{what}: it isn't told of");
    }
}

#[test]
fn a_compressed_memory_of_another_snapshot_is_none() {
    let (other, sleeping) = (Sleeping::compressed(), Sleeping::compressed());
    fs::copy(other.store().join(COMPRESSED), sleeping.store().join(COMPRESSED)).unwrap();
    let refused = sleeping.refused();
    assert!(refused.contains("its memory is damaged: it is gone"), "{refused}");
    // Beside a memory it is a leftover.
    let sleeping = Sleeping::new();
    fs::copy(other.store().join(COMPRESSED), sleeping.store().join(COMPRESSED)).unwrap();
    sleeping.seal.make_sum(sleeping.store()).unwrap();
    tidy(sleeping.store(), &sleeping.seal).unwrap();
    sleeping.wakes_whole();
}

#[test]
fn a_memory_that_is_not_what_was_put_to_sleep_is_condemned_and_not_compressed() {
    let sleeping = Sleeping::new();
    sleeping.seal.make_sum(sleeping.store()).unwrap();
    let memory = File::options().write(true).open(sleeping.store().join(MEMORY)).unwrap();
    memory.write_all_at(b"n", 1).unwrap();
    let refused = sleeping.seal.compress(sleeping.store(), || true).unwrap_err().to_string();
    assert!(refused.contains("its checksum is another one"), "{refused}");
    assert!(!sleeping.store().join(COMPRESSING).exists());
    assert_eq!(info(sleeping.store(), None).unwrap().checksum, Checksum::Wrong);
}

#[test]
fn what_is_compressed_outlives_a_restart_of_the_host() {
    let sleeping = Sleeping::compressed();
    sleeping.seal.clone().of_an_earlier_host().written(sleeping.store());
    sleeping.wakes_whole();
    assert!(!Seal::read(sleeping.store()).unwrap().unwrap().is_of_an_earlier_host());
    // Without a checksum nobody knows what a memory is that an earlier start of the host left.
    let sleeping = Sleeping::new();
    let seal = sleeping.seal.clone().of_an_earlier_host();
    seal.written(sleeping.store());
    assert!(matches!(seal.compress(sleeping.store(), || true), Err(Unfit::Unsafe)));
}
