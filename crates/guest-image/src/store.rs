//! A folder of guest images.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::manifest::{MANIFEST_FORMAT, Manifest, hash_file};

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
    folder: PathBuf,
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
/// can't set, so equal stamps mean equal bytes, short of damage below the file system.
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
}

impl ImageStore {
    /// The store in this folder, which needn't exist yet.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Opens the image that new VMs boot.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn newest(&self) -> Result<GuestImage, ImageError> {
        let path = self.folder.join(NEWEST);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::Missing(self.folder.clone()));
            }
            Err(error) => return Err(ImageError::Io(path, error)),
        };
        let hash = text.trim().parse().map_err(|()| ImageError::Damaged {
            folder: self.folder.clone(),
            file: NEWEST.to_owned(),
            fault: "names no image",
        })?;
        self.open(&hash)
    }

    /// Opens an image and verifies it. Files that haven't changed since they were last hashed aren't hashed again.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(&self, hash: &ImageHash) -> Result<GuestImage, ImageError> {
        let folder = self.folder.join(hash.as_str());
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
        let image = GuestImage { folder, hash: hash.clone(), manifest };
        image.verify()?;
        Ok(image)
    }

    /// Moves the image in `built` into the store, and makes it the newest.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn publish(&self, built: &Path, manifest: &Manifest) -> Result<ImageHash, ImageError> {
        let io = |error: io::Error| ImageError::Io(self.folder.clone(), error);
        let bytes = manifest.to_bytes().map_err(|error| io(error.into()))?;
        let hash = ImageHash(Manifest::hash(&bytes));
        fs::write(built.join(MANIFEST), &bytes).map_err(io)?;
        fs::create_dir_all(&self.folder).map_err(io)?;
        match fs::rename(built, self.folder.join(hash.as_str())) {
            Ok(()) => {}
            // The same content is there already.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                fs::remove_dir_all(built).map_err(io)?
            }
            Err(error) => return Err(io(error)),
        }
        write_beside(&self.folder.join(NEWEST), hash.as_str().as_bytes()).map_err(io)?;
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
        // A store that can't be written (a system-wide one) is hashed at each start of a VM instead.
        if let Ok(bytes) = serde_json::to_vec(&now) {
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
            files,
            packages: BTreeMap::new(),
        };
        store.publish(&built, &manifest).unwrap()
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
    fn damage_is_found_before_and_after_the_first_verification() {
        for verified_first in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let store = ImageStore::new(folder.path().join("images"));
            let hash = publish(&store, folder.path());
            if verified_first {
                store.open(&hash).unwrap();
            }
            fs::write(folder.path().join("images").join(hash.as_str()).join(ROOT), "root.erofX").unwrap();
            let error = store.open(&hash).unwrap_err();
            assert!(matches!(&error, ImageError::Damaged { file, .. } if file == ROOT), "{error}");
        }
    }

    #[test]
    fn a_changed_manifest_and_a_missing_file_are_damage() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::new(folder.path().join("images"));
        let hash = publish(&store, folder.path());
        let image = folder.path().join("images").join(hash.as_str());
        fs::remove_file(image.join(KERNEL)).unwrap();
        assert!(matches!(store.open(&hash), Err(ImageError::Damaged { file, .. }) if file == KERNEL));
        fs::write(image.join(MANIFEST), "{}").unwrap();
        assert!(matches!(store.open(&hash), Err(ImageError::Damaged { file, .. }) if file == MANIFEST));
    }
}
