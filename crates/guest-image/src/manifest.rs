//! What an image is made of.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Version of the manifest and of the layout that it describes.
pub const MANIFEST_FORMAT: u32 = 1;

/// One image: its files, and where they come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// The kernel's release, as `uname -r` tells it.
    pub kernel: String,
    /// The engine's package version.
    pub engine: String,
    /// The newest version of the Docker API that the engine speaks.
    pub api: String,
    /// Each file's size and hash, by name.
    pub files: BTreeMap<String, FileEntry>,
    /// Hash of each Debian package, by the name of its file.
    pub packages: BTreeMap<String, String>,
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// In bytes.
    pub size: u64,
    /// Lower-case hex.
    pub sha256: String,
}

impl Manifest {
    /// The manifest as it is stored: equal manifests give equal bytes.
    ///
    /// # Errors
    /// None that a manifest can cause; serialisation is fallible by type.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec_pretty(self)
    }

    /// The hash by which the image of these manifest bytes is known.
    #[must_use]
    pub fn hash(bytes: &[u8]) -> String {
        hex(&Sha256::digest(bytes))
    }
}

/// Size and SHA-256 of a file.
///
/// # Errors
/// When it can't be read.
pub fn hash_file(path: &Path) -> io::Result<FileEntry> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut size = 0;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(FileEntry { size, sha256: hex(&hasher.finalize()) });
        }
        size += count as u64;
        hasher.update(&buffer[..count]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
