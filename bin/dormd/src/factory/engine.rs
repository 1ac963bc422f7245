//! Which engine last wrote a session's disk. An older one is kept away from it: no engine promises to read what a newer one
//! wrote.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::settings::{read_json, write_json};

/// The file in a store that names it.
const FILE_NAME: &str = "engine.json";

#[derive(Serialize, Deserialize)]
struct LastEngine {
    /// As its package calls it.
    version: String,
}

/// Lets this engine write the disk from now on.
///
/// # Errors
/// When a newer one has, in words.
pub(super) fn take_over(store: &Path, version: &str) -> Result<()> {
    let path = store.join(FILE_NAME);
    let last = match path.exists() {
        true => Some(read_json::<LastEngine>(&path).context("can't tell which engine last wrote the disk")?),
        false => None,
    };
    if let Some(last) = &last {
        ensure!(
            numbers(version) >= numbers(&last.version),
            "the disk was last written by the engine {}, and the guest image has {version}, which is older and may not \
             understand it: install a guest image with the newer engine",
            last.version
        );
    }
    if last.is_some_and(|last| last.version == version) {
        return Ok(());
    }
    write_json(&path, &LastEngine { version: version.to_owned() })
        .context("can't note which engine writes the disk")
}

/// The file goes with its store.
pub(crate) fn forget(store: &Path) {
    let _ = std::fs::remove_file(store.join(FILE_NAME));
}

/// The numbers of a version of the engine's own, without what its package adds: `26.1.5` of `26.1.5+dfsg1-9`.
fn numbers(version: &str) -> Vec<u64> {
    let own = version.split(['+', '-', '~']).next().unwrap_or_default();
    own.split('.').map(|number| number.parse().unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_engine_is_kept_away_from_a_disk_and_a_newer_one_takes_it_over() {
        let store = tempfile::tempdir().unwrap();
        for version in ["26.1.5+dfsg1-9", "26.1.5+dfsg1-9+deb13u1", "26.1.5", "27.0", "28.0.0", "100.0.0"] {
            take_over(store.path(), version).unwrap();
            take_over(store.path(), version).unwrap();
        }
        let refused = take_over(store.path(), "28.5.2+dfsg1-1").unwrap_err().to_string();
        assert!(refused.contains("100.0.0") && refused.contains("28.5.2"), "{refused}");
        take_over(store.path(), "100.0.0").expect("a refusal changes nothing");
        forget(store.path());
        take_over(store.path(), "1.0").expect("a new disk was written by nobody");
    }

    #[test]
    fn a_note_that_makes_no_sense_is_no_leave() {
        let store = tempfile::tempdir().unwrap();
        std::fs::write(store.path().join(FILE_NAME), "{").unwrap();
        take_over(store.path(), "26.1.5").unwrap_err();
    }
}
