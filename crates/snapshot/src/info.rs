//! What is told of a session's snapshot, and whether it is whole.

use std::path::Path;

use dormouse_api::{Checksum, MemoryForm, SnapshotInfo, VerifyAnswer};
use dormouse_vm::{SnapshotKey, allocated_bytes};

use crate::compressed::{COMPRESSED, Compressed};
use crate::seal::{MEMORY, Origin, STATE, Seal, Unfit};

/// What is told of the snapshot in a store; `None` where there is none. `needed` is what a VM that is started now would
/// have to fit, where that is known. Reads no more than its description.
#[must_use]
pub fn info(store: &Path, needed: Option<&SnapshotKey>) -> Option<SnapshotInfo> {
    let seal = match Seal::read(store) {
        Ok(seal) => seal?,
        Err(Unfit::Seal) => return Some(SnapshotInfo::damaged()),
        Err(_) => return None,
    };
    let Origin::Session { generation } = seal.origin else { return None };
    let checksum = match (seal.is_condemned(store), seal.has_sum(store)) {
        (true, _) => Checksum::Wrong,
        (false, true) => Checksum::Made,
        (false, false) => Checksum::Pending,
    };
    let (memory, unreadable) = match Compressed::open(store, &seal) {
        Ok(None) => (MemoryForm::Plain, None),
        Ok(Some(_)) => (MemoryForm::Compressed, None),
        Err(unfit) => (MemoryForm::Compressed, Some(unfit.to_string())),
    };
    let unfit = match (checksum, needed.map(|needed| seal.key.fits(needed))) {
        (_, Some(Err(mismatch))) => Some(mismatch.to_string()),
        (Checksum::Wrong, _) => Some("its memory is damaged".to_owned()),
        (Checksum::Pending, _) if seal.is_of_an_earlier_host() => Some(Unfit::Unsafe.to_string()),
        (Checksum::Pending | Checksum::Made, _) => unreadable,
    };
    let mut voided_by = vec!["the next wake, which uses it up".to_owned()];
    voided_by.extend(seal.key.parts().map(|(what, has)| format!("another {what} than {has}")));
    if checksum == Checksum::Pending {
        voided_by.push("a restart of the host before its checksum is made".to_owned());
    }
    Some(SnapshotInfo {
        made_at: seal.sealed_at,
        generation,
        used_bytes: [MEMORY, COMPRESSED, STATE]
            .iter()
            .filter_map(|name| allocated_bytes(&store.join(name)).ok())
            .sum(),
        memory,
        checksum,
        key: seal.key.parts().map(|(what, has)| (what.to_owned(), has)).into(),
        unfit,
        voided_by,
    })
}

/// Compares the snapshot in a store with its checksums. One that differs is refused from now on. Without a checksum there
/// is nothing to compare with: it is made. Blocks; for use off the async threads.
#[must_use]
pub fn verify(store: &Path) -> VerifyAnswer {
    let damaged = |unfit: Unfit| VerifyAnswer::Damaged { reason: unfit.to_string() };
    let seal = match Seal::read(store) {
        Ok(Some(seal)) => seal,
        Ok(None) => return VerifyAnswer::NoSnapshot,
        Err(unfit) => return damaged(unfit),
    };
    match seal.verify(store) {
        Ok(()) => VerifyAnswer::Intact,
        Err(Unfit::Woken) => VerifyAnswer::NoSnapshot,
        Err(Unfit::Unsafe) if !seal.is_of_an_earlier_host() => match seal.make_sum(store) {
            Ok(()) if seal.has_sum(store) => VerifyAnswer::SumMade,
            Ok(()) => VerifyAnswer::NoSnapshot,
            Err(error) => VerifyAnswer::Damaged { reason: error.to_string() },
        },
        Err(unfit) => damaged(unfit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::tests::{key, sealed, store};

    #[test]
    fn a_snapshot_is_told_of_with_what_would_void_it() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(info(folder.path(), None), None);
        let (store, seal) = sealed(folder.path());
        let told = info(&store, Some(&key())).unwrap();
        assert_eq!((told.generation, told.checksum, told.unfit), (3, Checksum::Pending, None));
        assert_eq!(told.key["memory (MiB)"], "1024");
        assert!(
            told.used_bytes > 0 && told.voided_by.iter().any(|words| words.contains("restart of the host"))
        );
        seal.make_sum(&store).unwrap();
        assert_eq!(info(&store, None).unwrap().checksum, Checksum::Made);
        let other = SnapshotKey { qemu_build: "newer".into(), ..key() };
        assert!(info(&store, Some(&other)).unwrap().unfit.unwrap().contains("QEMU build"));
        std::fs::write(store.join("snapshot.json"), "{").unwrap();
        assert_eq!(info(&store, None), Some(SnapshotInfo::damaged()));
    }

    #[test]
    fn verify_says_what_there_is() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(verify(folder.path()), VerifyAnswer::NoSnapshot);
        let (store, _) = sealed(folder.path());
        assert_eq!(verify(&store), VerifyAnswer::SumMade);
        assert_eq!(verify(&store), VerifyAnswer::Intact);
        let memory = std::fs::File::options().write(true).open(store.join(MEMORY)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&memory, b"n", 0).unwrap();
        assert!(matches!(verify(&store), VerifyAnswer::Damaged { reason } if reason.contains("checksum")));
        let told = info(&store, None).unwrap();
        assert_eq!((told.checksum, told.unfit.is_some()), (Checksum::Wrong, true));
    }

    #[test]
    fn a_copy_of_a_template_is_no_snapshot_of_the_sessions() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path());
        Seal::make(&store, Origin::Template, key(), "boot".into(), None).unwrap();
        assert_eq!(info(&store, None), None);
    }
}
