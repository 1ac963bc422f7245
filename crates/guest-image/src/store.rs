//! A folder of guest images.

use std::env;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::manifest::{MANIFEST_FORMAT, Manifest, hash_file};

/// The environment variable that names the one store to be used, instead of the user's and the system's.
pub const STORE_VARIABLE: &str = "DORM_IMAGES";

/// The store of a whole machine, which a package may bring. It is only read.
pub const SYSTEM_STORE: &str = "/usr/share/dormouse/images";

/// A file that was changed less than this before it was hashed may change again without a new time: file systems
/// count time in ticks, the coarsest (FAT's) of two seconds. Its hash isn't remembered.
const SETTLED: Duration = Duration::from_secs(2);

const MANIFEST: &str = "manifest.json";
const NEWEST: &str = "newest";
const VERIFIED: &str = "verified";
const KERNEL: &str = "vmlinux";
const INITRAMFS: &str = "initramfs";
const ROOT: &str = "root.erofs";

/// The name of an image: 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ImageHash(String);

impl ImageHash {
    /// The hash as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ImageHash {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() == 64 && text.bytes().all(hex) { Ok(Self(text.to_owned())) } else { Err(()) }
    }
}

/// Where images lie.
#[derive(Debug, Clone)]
pub struct ImageStore {
    /// Images are published here, and looked for here first.
    folder: PathBuf,
    /// Images are looked for here if `folder` hasn't got them.
    fallback: Option<PathBuf>,
}

/// An image whose files were checked against its manifest.
#[derive(Debug, Clone)]
pub struct GuestImage {
    folder: PathBuf,
    hash: ImageHash,
    manifest: Manifest,
}

/// Why there is no image to boot from.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The store is empty.
    #[error("there is no guest image in {0:?}: make one with `make guest-image`")]
    Missing(PathBuf),
    /// It was there, and is no longer.
    #[error("the guest image {hash} isn't in {folder:?} any more: make it again with `make guest-image`")]
    Gone {
        /// The store.
        folder: PathBuf,
        /// The image.
        hash: String,
    },
    /// A file isn't what was built.
    #[error(
        "the guest image is damaged: {file:?} {fault}; remove {folder:?} and make it again with `make guest-image`"
    )]
    Damaged {
        /// The image's folder.
        folder: PathBuf,
        /// The file.
        file: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// It was made by another version of Dormouse.
    #[error(
        "the guest image has format {found}, this version reads {MANIFEST_FORMAT}: make it again with `make guest-image`"
    )]
    Format {
        /// The manifest's format.
        found: u32,
    },
    /// It can't be read or written.
    #[error("can't use the guest image at {0:?}: {1}")]
    Io(PathBuf, #[source] io::Error),
}

/// What a file looked like when it was hashed. Any write changes the time of the inode's last change, which a user
/// can't set, so equal stamps of a settled file mean equal bytes, short of damage below the file system.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    name: String,
    device: u64,
    inode: u64,
    size: u64,
    changed_nanos: i128,
}

impl Stamp {
    fn new(name: &str, metadata: &Metadata) -> Self {
        Self {
            name: name.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            changed_nanos: i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec()),
        }
    }

    /// Would a write from `now` on show in the stamp? See [`SETTLED`].
    fn is_settled(&self, now: SystemTime) -> bool {
        let nanos = |duration: Duration| i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX);
        let now = now.duration_since(UNIX_EPOCH).map_or(0, nanos);
        self.changed_nanos.saturating_add(nanos(SETTLED)) < now
    }
}

impl ImageStore {
    /// The store in this folder, which needn't exist yet.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), fallback: None }
    }

    /// The store that this process's environment names in [`STORE_VARIABLE`]; without it the user's own, which is
    /// `folder`, and behind that the machine's, [`SYSTEM_STORE`].
    #[must_use]
    pub fn for_user(folder: impl Into<PathBuf>) -> Self {
        match env::var_os(STORE_VARIABLE).filter(|value| !value.is_empty()) {
            Some(named) => Self::new(named),
            None => Self::new(folder).or(SYSTEM_STORE),
        }
    }

    /// This store, and another for the images that it hasn't got.
    #[must_use]
    fn or(self, fallback: impl Into<PathBuf>) -> Self {
        Self { fallback: Some(fallback.into()), ..self }
    }

    /// The folder that has an entry of this name, or the first one.
    fn folder_with(&self, name: &str) -> &Path {
        match &self.fallback {
            Some(fallback) if !self.folder.join(name).exists() && fallback.join(name).exists() => fallback,
            _ => &self.folder,
        }
    }

    /// Opens the image that new VMs boot.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn newest(&self) -> Result<GuestImage, ImageError> {
        self.open(&self.newest_hash()?)
    }

    /// What the image that new VMs boot is made of. Its files aren't looked at: this is to tell of it, not to boot it.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn newest_manifest(&self) -> Result<Manifest, ImageError> {
        Ok(self.manifest(&self.newest_hash()?)?.1)
    }

    fn newest_hash(&self) -> Result<ImageHash, ImageError> {
        let path = self.folder_with(NEWEST).join(NEWEST);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::Missing(self.folder.clone()));
            }
            Err(error) => return Err(ImageError::Io(path, error)),
        };
        text.trim().parse().map_err(|()| ImageError::Damaged {
            folder: self.folder.clone(),
            file: NEWEST.to_owned(),
            fault: "names no image",
        })
    }

    /// Opens an image and verifies it. Files that haven't changed since they were last hashed aren't hashed again.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(&self, hash: &ImageHash) -> Result<GuestImage, ImageError> {
        let (folder, manifest) = self.manifest(hash)?;
        let image = GuestImage { folder, hash: hash.clone(), manifest };
        image.verify()?;
        Ok(image)
    }

    /// An image's folder and its verified manifest.
    fn manifest(&self, hash: &ImageHash) -> Result<(PathBuf, Manifest), ImageError> {
        let folder = self.folder_with(hash.as_str()).join(hash.as_str());
        let path = folder.join(MANIFEST);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::Gone { folder: self.folder.clone(), hash: hash.as_str().to_owned() });
            }
            Err(error) => return Err(ImageError::Io(path, error)),
        };
        let damaged =
            |fault| ImageError::Damaged { folder: folder.clone(), file: MANIFEST.to_owned(), fault };
        if Manifest::hash(&bytes) != hash.as_str() {
            return Err(damaged("isn't what was built"));
        }
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|_| damaged("can't be read"))?;
        if manifest.format != MANIFEST_FORMAT {
            return Err(ImageError::Format { found: manifest.format });
        }
        Ok((folder, manifest))
    }

    /// Moves the image in `built`, which is on the store's file system, into the store, and makes it the newest. An
    /// image of the same content that is there already stays, unless it is damaged.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn publish(&self, built: &Path, manifest: &Manifest) -> Result<ImageHash, ImageError> {
        let io = |error: io::Error| ImageError::Io(self.folder.clone(), error);
        let bytes = manifest.to_bytes().map_err(|error| io(error.into()))?;
        let hash = ImageHash(Manifest::hash(&bytes));
        let place = self.folder.join(hash.as_str());
        if place.exists() {
            match Self::new(&self.folder).open(&hash) {
                Ok(_) => {
                    fs::remove_dir_all(built).map_err(io)?;
                    return self.set_newest(hash);
                }
                // A VM that runs from it keeps its files, which are only unlinked.
                Err(ImageError::Damaged { .. } | ImageError::Gone { .. }) => {
                    fs::remove_dir_all(&place).map_err(io)?;
                }
                Err(error) => return Err(error),
            }
        }
        fs::write(built.join(MANIFEST), &bytes).map_err(io)?;
        for name in manifest.files.keys().map(String::as_str).chain([MANIFEST]) {
            File::open(built.join(name)).and_then(|file| file.sync_all()).map_err(io)?;
        }
        fs::rename(built, place).map_err(io)?;
        self.set_newest(hash)
    }

    fn set_newest(&self, hash: ImageHash) -> Result<ImageHash, ImageError> {
        let path = self.folder.join(NEWEST);
        write_beside(&path, hash.as_str().as_bytes()).map_err(|error| ImageError::Io(path, error))?;
        Ok(hash)
    }
}

impl GuestImage {
    /// The name of the image.
    #[must_use]
    pub fn hash(&self) -> &ImageHash {
        &self.hash
    }

    /// What it is made of.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The uncompressed kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.folder.join(KERNEL)
    }

    /// The initial RAM file system.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.folder.join(INITRAMFS)
    }

    /// The read-only root file system.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.folder.join(ROOT)
    }

    fn verify(&self) -> Result<(), ImageError> {
        let damaged = |file: &str, fault| ImageError::Damaged {
            folder: self.folder.clone(),
            file: file.to_owned(),
            fault,
        };
        for name in [KERNEL, INITRAMFS, ROOT] {
            if !self.manifest.files.contains_key(name) {
                return Err(damaged(name, "isn't in the manifest"));
            }
        }
        let began = SystemTime::now();
        let now = self.stamps(damaged)?;
        let path = self.folder.join(VERIFIED);
        let before = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Vec<Stamp>>(&bytes).ok());
        if before.as_ref() == Some(&now) {
            return Ok(());
        }
        for (name, entry) in &self.manifest.files {
            let path = self.folder.join(name);
            let found = hash_file(&path).map_err(|error| ImageError::Io(path, error))?;
            if found != *entry {
                return Err(damaged(name, "isn't what was built"));
            }
        }
        let settled = now.iter().all(|stamp| stamp.is_settled(began));
        // A store that can't be written (a system-wide one) is hashed at each start of a VM instead.
        if let (true, Ok(bytes)) = (settled, serde_json::to_vec(&now)) {
            let _ = write_beside(&path, &bytes);
        }
        Ok(())
    }

    fn stamps(&self, damaged: impl Fn(&str, &'static str) -> ImageError) -> Result<Vec<Stamp>, ImageError> {
        let stamp = |name: &String| match fs::metadata(self.folder.join(name)) {
            Ok(metadata) => Ok(Stamp::new(name, &metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged(name, "is missing")),
            Err(error) => Err(ImageError::Io(self.folder.join(name), error)),
        };
        self.manifest.files.keys().map(stamp).collect()
    }
}

/// Writes a file beside its place and moves it there, so that no reader sees half of it.
fn write_beside(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&beside, bytes)?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn publish(store: &ImageStore, folder: &Path) -> ImageHash {
        let built = folder.join("built");
        fs::create_dir_all(&store.folder).unwrap();
        fs::create_dir(&built).unwrap();
        let mut files = BTreeMap::new();
        for name in [KERNEL, INITRAMFS, ROOT] {
            fs::write(built.join(name), name).unwrap();
            files.insert(name.to_owned(), hash_file(&built.join(name)).unwrap());
        }
        let manifest = Manifest {
            format: MANIFEST_FORMAT,
            kernel: "6".into(),
            engine: "26".into(),
            api: "1.45".into(),
            files,
            packages: BTreeMap::new(),
        };
        store.publish(&built, &manifest).unwrap()
    }

    /// A store with one image, and that image's folder.
    fn store_with_image(folder: &Path) -> (ImageStore, ImageHash, PathBuf) {
        let store = ImageStore::new(folder.join("images"));
        let hash = publish(&store, folder);
        let image = store.folder.join(hash.as_str());
        (store, hash, image)
    }

    fn damaged_file(result: Result<GuestImage, ImageError>) -> String {
        match result {
            Err(ImageError::Damaged { file, .. }) => file,
            other => panic!("expected damage, got {other:?}"),
        }
    }

    #[test]
    fn a_published_image_is_the_newest_and_opens() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::new(folder.path().join("images"));
        assert!(matches!(store.newest(), Err(ImageError::Missing(_))));
        let hash = publish(&store, folder.path());
        assert_eq!(publish(&store, folder.path()), hash, "the same content has the same name");
        let image = store.newest().unwrap();
        assert_eq!(image.hash(), &hash);
        assert_eq!(fs::read_to_string(image.kernel()).unwrap(), KERNEL);
    }

    #[test]
    fn damage_is_found_at_the_first_opening_and_after_it() {
        for opened_before in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let (store, hash, image) = store_with_image(folder.path());
            if opened_before {
                store.open(&hash).unwrap();
            }
            // Of the same length, and within the same tick of the file system's clock.
            fs::write(image.join(ROOT), "root.erofX").unwrap();
            assert_eq!(damaged_file(store.open(&hash)), ROOT);
        }
    }

    #[test]
    fn a_changed_manifest_and_a_missing_file_are_damage() {
        let folder = tempfile::tempdir().unwrap();
        let (store, hash, image) = store_with_image(folder.path());
        fs::remove_file(image.join(KERNEL)).unwrap();
        assert_eq!(damaged_file(store.open(&hash)), KERNEL);
        fs::write(image.join(MANIFEST), "{}").unwrap();
        assert_eq!(damaged_file(store.open(&hash)), MANIFEST);
    }

    #[test]
    fn a_stamp_is_trusted_only_when_any_later_write_would_change_it() {
        let folder = tempfile::tempdir().unwrap();
        let (store, hash, image) = store_with_image(folder.path());
        store.open(&hash).unwrap();
        assert!(!image.join(VERIFIED).exists(), "the files are too young");
        let stamp = Stamp::new(ROOT, &fs::metadata(image.join(ROOT)).unwrap());
        let now = SystemTime::now();
        assert!(!stamp.is_settled(now));
        assert!(stamp.is_settled(now + SETTLED + Duration::from_secs(1)));
    }

    #[test]
    fn an_image_with_the_stamps_of_its_last_hashing_is_not_hashed_again() {
        let folder = tempfile::tempdir().unwrap();
        let (store, hash, image) = store_with_image(folder.path());
        fs::write(image.join(ROOT), "root.erofX").unwrap();
        let stamps: Vec<Stamp> = [INITRAMFS, ROOT, KERNEL]
            .iter()
            .map(|name| Stamp::new(name, &fs::metadata(image.join(name)).unwrap()))
            .collect();
        fs::write(image.join(VERIFIED), serde_json::to_vec(&stamps).unwrap()).unwrap();
        store.open(&hash).unwrap();
        fs::write(image.join(VERIFIED), "[]").unwrap();
        assert_eq!(damaged_file(store.open(&hash)), ROOT);
    }

    #[test]
    fn making_a_damaged_image_again_repairs_it() {
        let folder = tempfile::tempdir().unwrap();
        let (store, hash, image) = store_with_image(folder.path());
        for name in [ROOT, MANIFEST] {
            fs::write(image.join(name), "rubbish").unwrap();
            assert_eq!(damaged_file(store.newest()), name);
            assert_eq!(publish(&store, folder.path()), hash);
            store.newest().unwrap();
        }
    }

    #[test]
    fn the_fallback_serves_what_the_first_store_has_not() {
        let folder = tempfile::tempdir().unwrap();
        let (system, hash, _) = store_with_image(folder.path());
        let own = folder.path().join("own");
        let store = ImageStore::new(&own).or(&system.folder);
        assert_eq!(store.newest().unwrap().hash(), &hash);
        assert!(store.open(&hash).unwrap().kernel().starts_with(&system.folder));
        publish(&store, folder.path());
        assert!(store.newest().unwrap().kernel().starts_with(&own));
    }

    #[test]
    fn an_image_that_is_no_longer_there_is_told_from_an_empty_store() {
        let folder = tempfile::tempdir().unwrap();
        let (store, hash, image) = store_with_image(folder.path());
        fs::remove_dir_all(image).unwrap();
        assert!(matches!(store.open(&hash), Err(ImageError::Gone { .. })));
        fs::write(store.folder.join(NEWEST), "../../etc").unwrap();
        assert_eq!(damaged_file(store.newest()), NEWEST);
    }
}
