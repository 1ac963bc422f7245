//! What a service that was killed leaves: sessions half made or half removed, VMs of sessions that are gone.
//!
//! A session's folder is made beside its place and renamed into it, and renamed out of it before anything of it goes.
//! So whatever bears a session's plain name is whole, and is never touched here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use dormouse_api::SessionId;
use dormouse_vm::{Adoption, Monitor, VmRecord, adopt, discard_record};

use crate::settings::Settings;
use crate::storage;

/// Endings of the folders of sessions on their way in and out.
const HALF_MADE: &str = "new";
const HALF_REMOVED: &str = "removed";

/// Where the session of `folder` is made.
pub(crate) fn half_made(folder: &Path) -> PathBuf {
    folder.with_extension(HALF_MADE)
}

/// Removes a session's folder and its storage.
pub(crate) fn remove(folder: &Path) -> io::Result<()> {
    let removed = folder.with_extension(HALF_REMOVED);
    fs::rename(folder, &removed)?;
    finish(&removed).map(drop)
}

/// Removes the folder of a session that is not to be after all. A store elsewhere, which was there before it, stays.
pub(crate) fn take_back(folder: &Path) -> io::Result<()> {
    let half = half_made(folder);
    fs::rename(folder, &half)?;
    finish(&half).map(drop)
}

/// Finishes what a service was doing to a session's folder when it was killed. `false`: nothing, the session is whole.
pub(crate) fn finish(folder: &Path) -> io::Result<bool> {
    match folder.extension().and_then(|ending| ending.to_str()) {
        Some(HALF_MADE) => {}
        Some(HALF_REMOVED) => {
            // Its storage, where that is another folder; the record goes last, so that this can be repeated. A temporary
            // session only visited the store that it was given.
            if let Ok(settings) = Settings::read(folder)
                && !settings.temporary
            {
                storage::remove(&settings.storage);
            }
        }
        _ => return Ok(false),
    }
    fs::remove_dir_all(folder)?;
    Ok(true)
}

/// Ends VMs whose sessions aren't known, and removes their runtime directories.
pub(crate) async fn end_vms(runtime: &Path, is_known: impl Fn(&SessionId) -> bool) -> io::Result<()> {
    for entry in fs::read_dir(runtime)? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<SessionId>().ok()) else {
            continue;
        };
        if is_known(&id) {
            continue;
        }
        let folder = entry.path();
        tracing::info!(session = %id, "found the remains of a session that is gone");
        match VmRecord::read(&folder) {
            Ok(Some(record)) => {
                if let Adoption::Adopted(adopted) = adopt(&record, &folder, Monitor::Service).await? {
                    adopted.process.kill();
                    adopted.process.ended().await;
                }
            }
            Ok(None) => {}
            Err(_) => discard_record(&folder)?,
        }
        fs::remove_dir_all(folder)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_on_its_way_in_or_out_goes_and_a_whole_one_stays() {
        let home = tempfile::tempdir().unwrap();
        let whole = home.path().join("0000000000000001");
        for folder in [&whole, &half_made(&whole), &whole.with_extension(HALF_REMOVED)] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("data.raw"), "precious").unwrap();
        }
        for entry in fs::read_dir(home.path()).unwrap() {
            finish(&entry.unwrap().path()).unwrap();
        }
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
        assert!(whole.join("data.raw").exists());
        remove(&whole).unwrap();
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_store_that_a_session_found_stays_if_the_session_is_not_to_be() {
        let home = tempfile::tempdir().unwrap();
        let (folder, store) = (home.path().join("0000000000000001"), home.path().join("store"));
        storage::make(&store, 1 << 30).unwrap();
        let settings = crate::settings::tests::of(&store);
        fs::create_dir(&folder).unwrap();
        settings.write(&folder).unwrap();
        take_back(&folder).unwrap();
        assert!(storage::check(&store, true).is_ok() && store.join("data.raw").exists());
        fs::create_dir(&folder).unwrap();
        settings.write(&folder).unwrap();
        remove(&folder).unwrap();
        assert!(!store.exists());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn the_runtime_directory_of_a_session_that_is_gone_is_removed_and_no_other() {
        let runtime = tempfile::tempdir().unwrap();
        for name in ["0000000000000001", "0000000000000002", "something-else"] {
            fs::create_dir(runtime.path().join(name)).unwrap();
            fs::write(runtime.path().join(name).join("vm.json"), "{").unwrap();
        }
        end_vms(runtime.path(), |id| id.as_str() == "0000000000000001").await.unwrap();
        assert!(runtime.path().join("0000000000000001").exists());
        assert!(!runtime.path().join("0000000000000002").exists());
        assert!(runtime.path().join("something-else").exists());
    }
}
