//! A session's storage: checked and made when the session is created, before any VM exists.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use dormouse_api::{ApiError, ErrorCode};
use rustix::fs::{FlockOperation, flock};

use dormouse_snapshot::DISK;

/// By this file a folder is known as a store.
const MARKER: &str = "store.json";

fn error(message: String, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::Storage, message).hint(hint)
}

/// Checks the folder that a user named for a session, and gives its true path. It isn't changed.
pub(crate) fn check(path: &Path, no_create: bool) -> Result<PathBuf, ApiError> {
    let shown = path.display();
    if path.is_relative() {
        return Err(error(format!("the storage path {shown} is relative"), "give an absolute path"));
    }
    match fs::read_dir(path) {
        Ok(mut entries) => {
            let is_store = is_store(path);
            if no_create && !is_store {
                return Err(error(
                    format!("there is no store in {shown}"),
                    "leave --no-create away to make one",
                ));
            }
            if !is_store && entries.next().is_some() {
                return Err(error(
                    format!("{shown} is not empty and no store"),
                    "name an empty folder, or one that a session left",
                ));
            }
            path.canonicalize()
                .map_err(|cause| error(format!("can't use {shown}: {cause}"), "name another folder"))
        }
        Err(cause) if cause.kind() == io::ErrorKind::NotFound && !no_create => {
            let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
            let (Some(parent), Some(name)) = (parent, path.file_name()) else {
                return Err(error(format!("the folder around {shown} doesn't exist"), "make it first"));
            };
            Ok(parent.join(name))
        }
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            Err(error(format!("there is no store in {shown}"), "leave --no-create away to make one"))
        }
        Err(cause) => Err(error(format!("can't read {shown}: {cause}"), "name a folder of your own")),
    }
}

/// Is a store there already?
pub(crate) fn is_store(folder: &Path) -> bool {
    folder.join(MARKER).exists()
}

/// Makes the store in a checked folder, or takes the one that is there.
pub(crate) fn make(folder: &Path, bytes: u64) -> Result<(), ApiError> {
    let failed = |cause: io::Error| {
        error(format!("can't make a store in {}: {cause}", folder.display()), "name another folder")
    };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    let disk = folder.join(DISK);
    if !disk.exists() {
        dormouse_vm::create_data_disk(&disk, bytes).map_err(failed)?;
    }
    let marker = folder.join(MARKER);
    // One that is there may be locked, and a lock is on the file, not on its name.
    if is_store(folder) {
        return Ok(());
    }
    crate::settings::write_json(&marker, &serde_json::json!({ "format": 1 })).map_err(failed)
}

/// A store that is in use by one session of this service, as long as this lives.
#[derive(Debug)]
pub(crate) struct Lock {
    _marker: File,
}

/// Takes a store for one session. Services of other homes are kept out; a VM that outlived its service has a lock of its
/// own, QEMU's on the disk.
pub(crate) fn lock(folder: &Path) -> Result<Lock, ApiError> {
    let marker = File::open(folder.join(MARKER)).map_err(|cause| {
        error(format!("can't use the store in {}: {cause}", folder.display()), "name another folder")
    })?;
    match flock(&marker, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock { _marker: marker }),
        Err(_) => Err(error(
            format!("the store {} is used by a session of another home", folder.display()),
            "a store has one session at a time",
        )),
    }
}

/// Removes a store, and the folder if nothing else is in it.
pub(crate) fn remove(folder: &Path) {
    let _ = dormouse_snapshot::discard(folder);
    let _ = dormouse_snapshot::given_up(folder);
    crate::factory::forget_engine(folder);
    for name in [DISK, MARKER] {
        let _ = fs::remove_file(folder.join(name));
    }
    let _ = fs::remove_dir(folder);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_folder_that_can_be_no_store_is_refused_with_its_reason() {
        let home = tempfile::tempdir().unwrap();
        let refused = |path: &Path, no_create| check(path, no_create).unwrap_err().message;
        assert!(refused(Path::new("x"), false).contains("relative"));
        assert!(refused(&home.path().join("no"), true).contains("no store"));
        assert!(refused(&home.path().join("no/such"), false).contains("doesn't exist"));
        fs::write(home.path().join("file"), "").unwrap();
        assert!(refused(&home.path().join("file"), false).contains("can't read"));
        assert!(refused(home.path(), false).contains("not empty"));
        assert!(refused(home.path(), true).contains("no store"));
    }

    #[test]
    fn a_store_is_one_sessions_at_a_time() {
        let home = tempfile::tempdir().unwrap();
        make(home.path(), 1 << 30).unwrap();
        let first = lock(home.path()).unwrap();
        make(home.path(), 1 << 30).unwrap();
        assert!(lock(home.path()).unwrap_err().message.contains("is used by"));
        drop(first);
        lock(home.path()).unwrap();
    }

    #[test]
    fn a_store_can_be_made_found_again_and_removed() {
        let home = tempfile::tempdir().unwrap();
        let folder = check(&home.path().join("store"), false).unwrap();
        make(&folder, 1 << 30).unwrap();
        assert_eq!(check(&folder, true).unwrap(), folder);
        remove(&folder);
        assert!(!folder.exists());
    }
}
