//! What doors are for, left to the next host in the session's folder as soon as it changes: a machine that loses its power
//! tells nobody.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use dormouse_api::link::DOORS_FILE;
use serde::{Deserialize, Serialize};

use super::Open;
use super::published::{Behind, Door};

/// Version of the file's format.
const FORMAT: u32 = 1;

/// Longest file that is read, in bytes.
const BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Where it lies.
#[derive(Debug)]
pub(super) struct Left {
    path: PathBuf,
    /// What was written last.
    written: Option<File>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct File {
    format: u32,
    doors: Vec<(Door, Behind)>,
}

impl Left {
    pub(super) fn new(folder: &Path) -> Self {
        Self { path: folder.join(DOORS_FILE), written: None }
    }

    /// What was left. A file that makes no sense is as good as none.
    pub(super) fn read(&self) -> Vec<(Door, Behind)> {
        let mut bytes = Vec::new();
        let read = fs::File::open(&self.path).and_then(|file| file.take(BYTES_MAX).read_to_end(&mut bytes));
        let file = read.ok().and_then(|_| serde_json::from_slice::<File>(&bytes).ok());
        file.filter(|file| file.format == FORMAT).map(|file| file.doors).unwrap_or_default()
    }

    /// Leaves these, if they aren't what was left last; no file where there are none, so that nobody starts a host for it.
    pub(super) fn write(&mut self, doors: &BTreeMap<Door, Open>) {
        let doors = doors.iter().map(|(door, open)| (*door, open.behind.borrow().clone())).collect();
        let file = File { format: FORMAT, doors };
        if self.written.as_ref() == Some(&file) {
            return;
        }
        match self.try_write(&file) {
            Ok(()) => self.written = Some(file),
            Err(error) => tracing::warn!(%error, "published ports can't be left to the next host"),
        }
    }

    fn try_write(&self, file: &File) -> io::Result<()> {
        if file.doors.is_empty() {
            return match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let beside = self.path.with_extension("json.new");
        fs::write(&beside, serde_json::to_vec(file)?)?;
        fs::rename(&beside, &self.path)
    }
}
