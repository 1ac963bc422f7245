//! Which containers were given which folders, by those who created them from the host.
//!
//! The engine is the guest's, and says what the guest likes: it is never asked which folders a container is to have. What
//! counts is written down here when a container is created through the session's socket, before its client hears of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use dormouse_folders::{Missing, Share};
use serde::{Deserialize, Serialize};

use crate::by_container;

/// Name of the file in a session's folder.
const FILE: &str = "folders.json";

/// Longest file that is read, in bytes.
const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Containers that have folders; of more, they are refused at their start.
const CONTAINERS_MAX: usize = 4096;

/// A folder that was given to a container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Gift {
    #[serde(flatten)]
    pub(super) share: Share,
    /// It is made if it is missing.
    pub(super) make: bool,
}

impl Gift {
    /// The folder that this is in the guest. `None`: it is none of the host's.
    pub(super) fn named(given: &dormouse_docker_proxy::Given) -> Option<Self> {
        Some(Self { share: Share::of_guest_path(Path::new(&given.path))?, make: given.make })
    }

    /// What it is in the guest.
    pub(super) fn in_guest(&self) -> Option<dormouse_docker_proxy::Given> {
        let path = self.share.in_guest().into_os_string().into_string().ok()?;
        Some(dormouse_docker_proxy::Given { path, make: self.make })
    }

    pub(super) const fn missing(&self) -> Missing {
        if self.make { Missing::Make } else { Missing::Refuse }
    }
}

/// What each container was given, by its id.
#[derive(Debug)]
pub(super) struct Given {
    path: PathBuf,
    containers: Mutex<BTreeMap<String, Vec<Gift>>>,
}

impl Given {
    /// As it lies in the session's folder. A file that makes no sense gives nobody anything.
    pub(super) fn load(folder: &Path) -> Self {
        let path = folder.join(FILE);
        let containers = by_container::read(&path, BYTES_MAX);
        Self { path, containers: Mutex::new(containers) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    pub(super) fn ids(&self) -> BTreeSet<String> {
        self.containers().keys().cloned().collect()
    }

    /// What this container was given.
    pub(super) fn of(&self, container: &str) -> Vec<Gift> {
        self.containers().get(container).cloned().unwrap_or_default()
    }

    pub(super) fn give(&self, container: &str, gifts: Vec<Gift>) {
        let mut containers = self.containers();
        if containers.len() >= CONTAINERS_MAX {
            tracing::warn!(container, "too many containers have folders of the host");
            return;
        }
        containers.insert(container.to_owned(), gifts);
        self.write(&containers);
    }

    /// These are no more.
    pub(super) fn forget(&self, gone: &BTreeSet<String>) {
        if !gone.is_empty() {
            let mut containers = self.containers();
            containers.retain(|id, _| !gone.contains(id));
            self.write(&containers);
        }
    }

    fn write(&self, containers: &BTreeMap<String, Vec<Gift>>) {
        if let Err(error) = by_container::write(&self.path, containers) {
            tracing::error!(%error, "which folders containers have can't be written down");
        }
    }

    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Gift>>> {
        self.containers.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use dormouse_folders::Access;

    use super::*;

    #[test]
    fn what_was_given_is_known_to_the_next_host_until_the_container_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let gift = Gift { share: Share { path: "/home/me/src".into(), access: Access::Read }, make: true };
        let given = Given::load(folder.path());
        assert!(given.is_empty() && given.of("c1").is_empty());
        given.give("c1", vec![gift.clone()]);
        given.give("c2", vec![gift.clone()]);
        given.forget(&["c2".to_owned()].into());
        let next = Given::load(folder.path());
        assert_eq!((next.of("c1"), next.ids().len()), (vec![gift], 1));
        fs::write(folder.path().join(FILE), "{\"format\":9}").unwrap();
        assert!(Given::load(folder.path()).is_empty());
    }
}
