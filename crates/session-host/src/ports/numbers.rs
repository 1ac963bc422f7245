//! Which numbers containers were given when they were created. A container keeps its numbers also while it is stopped: they
//! lie in the session's folder until it is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::by_container;

/// Name of the file in a session's folder.
const FILE: &str = "numbers.json";

/// Longest file that is read, in bytes.
const BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Numbers that are remembered; those of more containers may be given again.
const NUMBERS_MAX: usize = 16_384;

/// Longest id of a container, in bytes.
const ID_BYTES_MAX: usize = 64;

/// Numbers that are given.
#[derive(Debug)]
pub(super) struct Numbers {
    path: PathBuf,
    /// By the container's id.
    containers: BTreeMap<String, Vec<u16>>,
    /// Those of containers that are being created.
    promised: Vec<u16>,
}

impl Numbers {
    /// As they lie in the session's folder. A file that makes no sense is as good as none.
    pub(super) fn load(folder: &Path) -> Self {
        let path = folder.join(FILE);
        let containers = by_container::read(&path, BYTES_MAX);
        Self { path, containers, promised: Vec::new() }
    }

    /// All that are given.
    pub(super) fn all(&self) -> impl Iterator<Item = u16> {
        self.containers.values().flatten().chain(&self.promised).copied()
    }

    /// Containers that have some.
    pub(super) fn ids(&self) -> BTreeSet<String> {
        self.containers.keys().cloned().collect()
    }

    /// A container is being created that is to have this one.
    pub(super) fn promise(&mut self, number: u16) {
        self.promised.push(number);
    }

    /// The container that was to have these was not created.
    pub(super) fn take_back(&mut self, numbers: &[u16]) {
        for number in numbers {
            if let Some(index) = self.promised.iter().position(|promised| promised == number) {
                self.promised.swap_remove(index);
            }
        }
    }

    /// The container that was to have these was created.
    pub(super) fn give(&mut self, container: &str, numbers: Vec<u16>) {
        self.take_back(&numbers);
        if numbers.is_empty() {
            return;
        }
        let given: usize = self.containers.values().map(Vec::len).sum();
        if given + numbers.len() > NUMBERS_MAX || container.len() > ID_BYTES_MAX {
            tracing::warn!("too many published ports to remember whose they are");
            return;
        }
        self.containers.insert(container.to_owned(), numbers);
        self.write();
    }

    /// These containers are no more.
    pub(super) fn forget(&mut self, gone: &BTreeSet<String>) {
        let before = self.containers.len();
        self.containers.retain(|id, _| !gone.contains(id));
        if self.containers.len() < before {
            self.write();
        }
    }

    fn write(&self) {
        if let Err(error) = by_container::write(&self.path, &self.containers) {
            tracing::warn!(%error, "which ports containers have can't be written down");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn all(numbers: &Numbers) -> Vec<u16> {
        numbers.all().collect()
    }

    #[test]
    fn numbers_are_known_to_the_next_host_until_their_container_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let mut numbers = Numbers::load(folder.path());
        for number in [1, 2, 3, 4] {
            numbers.promise(number);
        }
        numbers.give("c1", vec![1, 2]);
        numbers.give("c2", vec![3]);
        assert_eq!(all(&numbers), [1, 2, 3, 4]);
        numbers.take_back(&[4]);
        numbers.forget(&["c2".to_owned()].into());
        assert_eq!(all(&numbers), [1, 2]);
        let next = Numbers::load(folder.path());
        assert_eq!((all(&next), next.ids()), (vec![1, 2], ["c1".to_owned()].into()));
        fs::write(folder.path().join(FILE), "{\"format\":9}").unwrap();
        assert!(Numbers::load(folder.path()).ids().is_empty());
    }

    #[test]
    fn what_a_guest_says_takes_no_more_room_than_is_meant_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut numbers = Numbers::load(folder.path());
        numbers.give(&"c".repeat(ID_BYTES_MAX + 1), vec![1]);
        numbers.give("c1", vec![2; NUMBERS_MAX + 1]);
        assert!(numbers.ids().is_empty());
    }
}
