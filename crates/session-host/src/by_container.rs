//! Files in a session's folder that tell what each container has, by its id.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of the files' format.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct File<C> {
    format: u32,
    containers: C,
}

/// Reads at most so many bytes. A file that isn't there, is longer, or makes no sense tells of no container.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, bytes_max: u64) -> BTreeMap<String, T> {
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(bytes_max).read_to_end(&mut bytes));
    let file = read.ok().and_then(|_| serde_json::from_slice::<File<_>>(&bytes).ok());
    file.filter(|file| file.format == FORMAT).map(|file| file.containers).unwrap_or_default()
}

/// Puts a whole file in the place of the one before.
pub(crate) fn write<T: Serialize>(path: &Path, containers: &BTreeMap<String, T>) -> io::Result<()> {
    let beside = path.with_extension("json.new");
    fs::write(&beside, serde_json::to_vec(&File { format: FORMAT, containers })?)?;
    fs::rename(&beside, path)
}
