//! Which engine last wrote a session's disk, and from which guest image. An older one is kept away from it: no engine promises
//! to read what a newer one wrote.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use dormouse_api::ImageChoice;
use dormouse_guest_image::{GuestImage, ImageStore};
use serde::{Deserialize, Serialize};

use crate::settings::{read_json, write_json};

/// The file in a store that names it.
const FILE_NAME: &str = "engine.json";

#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct LastEngine {
    /// As its package calls it.
    version: String,
    /// The hash of the guest image that it came with.
    #[serde(default)]
    image: Option<String>,
}

/// What a VM with this disk is booted from.
///
/// # Errors
/// When there is no such image, in words.
pub(super) fn image_for(store: &Path, choice: ImageChoice, images: &ImageStore) -> Result<GuestImage> {
    let pinned = match choice {
        ImageChoice::Newest => None,
        ImageChoice::Pinned => last_image(store),
    };
    let Some(hash) = pinned else { return Ok(images.newest()?) };
    let hash = hash.parse().map_err(|()| anyhow!("the disk was written from no guest image"))?;
    images.open(&hash).context("the session is pinned to its guest image")
}

/// The hash of the guest image that a disk was last written from; `None` for one that was never written.
fn last_image(store: &Path) -> Option<String> {
    read_json::<LastEngine>(&store.join(FILE_NAME)).ok()?.image
}

/// Lets the engine of this guest image write the disk from now on.
///
/// # Errors
/// When a newer one has, in words.
pub(super) fn take_over(store: &Path, version: &str, image: &str) -> Result<()> {
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
    let next = LastEngine { version: version.to_owned(), image: Some(image.to_owned()) };
    if last.as_ref() == Some(&next) {
        return Ok(());
    }
    write_json(&path, &next).context("can't note which engine writes the disk")
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
pub(super) mod tests {
    use dormouse_guest_image::{MANIFEST_FORMAT, Manifest, hash_file};

    use super::*;

    #[test]
    fn an_older_engine_is_kept_away_from_a_disk_and_a_newer_one_takes_it_over() {
        let store = tempfile::tempdir().unwrap();
        for version in ["26.1.5+dfsg1-9", "26.1.5+dfsg1-9+deb13u1", "26.1.5", "27.0", "28.0.0", "100.0.0"] {
            take_over(store.path(), version, "image").unwrap();
            take_over(store.path(), version, "image").unwrap();
        }
        let refused = take_over(store.path(), "28.5.2+dfsg1-1", "older").unwrap_err().to_string();
        assert!(refused.contains("100.0.0") && refused.contains("28.5.2"), "{refused}");
        assert_eq!(last_image(store.path()).as_deref(), Some("image"), "a refusal changes nothing");
        take_over(store.path(), "100.0.0", "another").unwrap();
        assert_eq!(last_image(store.path()).as_deref(), Some("another"));
        forget(store.path());
        take_over(store.path(), "1.0", "image").expect("a new disk was written by nobody");
    }

    /// Publishes an image that differs from others by its engine, and gives its hash.
    pub(in super::super) fn publish(folder: &Path, images: &ImageStore, engine: &str) -> String {
        let built = folder.join(format!("built-{engine}"));
        std::fs::create_dir_all(&built).unwrap();
        let mut files = std::collections::BTreeMap::new();
        for name in ["vmlinux", "initramfs", "root.erofs"] {
            std::fs::write(built.join(name), name).unwrap();
            files.insert(name.to_owned(), hash_file(&built.join(name)).unwrap());
        }
        let (kernel, api, packages) = ("6".into(), "1.45".into(), std::collections::BTreeMap::new());
        let manifest =
            Manifest { format: MANIFEST_FORMAT, kernel, engine: engine.into(), api, files, packages };
        images.publish(&built, &manifest).unwrap().as_str().to_owned()
    }

    #[test]
    fn a_pinned_session_boots_the_image_that_it_was_first_booted_from() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path();
        std::fs::create_dir(store.join("images")).unwrap();
        let images = ImageStore::new(store.join("images"));
        let image = |choice| image_for(store, choice, &images).unwrap().hash().as_str().to_owned();
        let first = publish(store, &images, "26.1.5");
        assert_eq!(image(ImageChoice::Pinned), first, "a disk that was never written is pinned to nothing");
        take_over(store, "26.1.5", &first).unwrap();
        let second = publish(store, &images, "27.0.0");
        assert_eq!(image(ImageChoice::Pinned), first);
        assert_eq!(image(ImageChoice::Newest), second);
        take_over(store, "26.1.5", &"0".repeat(64)).unwrap();
        let refused = image_for(store, ImageChoice::Pinned, &images).unwrap_err();
        assert!(format!("{refused:#}").contains("pinned"), "{refused:#}");
    }

    #[test]
    fn a_note_that_makes_no_sense_is_no_leave() {
        let store = tempfile::tempdir().unwrap();
        std::fs::write(store.path().join(FILE_NAME), "{").unwrap();
        take_over(store.path(), "26.1.5", "image").unwrap_err();
    }
}
