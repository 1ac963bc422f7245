//! What the host changes in folders that are shared for writing, as inotify(7) tells it.
//!
//! Changes of attributes alone aren't heard: a change is told in the guest by one of them, which comes back here. Folders
//! are looked into breadth first, one at a time, so that whoever drives this can do other things in between, and so that
//! those which stay unwatched at a limit are the deepest.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init, remove_watch};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Folders that are watched for one VM. The kernel takes about 1 KiB for each.
const WATCHES_MAX: usize = 8192;

/// Changes that wait to be told; more are dropped, as a watcher that hears of these has enough to do.
const CHANGES_MAX: usize = 1024;

/// Changes in one answer.
const ANSWER_MAX: usize = 128;

/// How long what belongs together is waited for: saving a file is several changes.
const SETTLES_WITHIN: Duration = Duration::from_millis(50);

/// Bytes of events that are read at once.
const EVENTS_BYTES: usize = 16 * 1024;

/// What is heard of.
const HEARD: WatchFlags = WatchFlags::MODIFY
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::EXCL_UNLINK)
    .union(WatchFlags::DONT_FOLLOW);

/// What has changed. Paths are below the tree's root, see [`crate::Share::in_tree`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// What is shared since the last answer.
    pub shared: Vec<PathBuf>,
    /// What has changed, or is no more.
    pub changed: Vec<PathBuf>,
    /// Why not all that is shared is watched.
    pub unwatched: Option<String>,
}

/// Watches what is shared.
#[derive(Debug)]
pub(crate) struct Watcher {
    inotify: OwnedFd,
    root: PathBuf,
    max: usize,
    /// By watch, where that folder is in the tree: shares may overlap on the host.
    watched: HashMap<i32, BTreeSet<PathBuf>>,
    /// Folders that weren't looked into yet.
    ahead: VecDeque<PathBuf>,
    shared: Vec<PathBuf>,
    changed: BTreeSet<PathBuf>,
    /// When the first of them changed.
    since: Option<Instant>,
    unwatched: Limit,
}

/// Whether there are more folders than can be watched.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Limit {
    Unmet,
    Met(String),
    Told,
}

impl Watcher {
    /// One that watches nothing yet of what lies below this root.
    pub(crate) fn new(root: PathBuf) -> io::Result<Self> {
        Ok(Self {
            inotify: init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?,
            root,
            max: WATCHES_MAX,
            watched: HashMap::new(),
            ahead: VecDeque::new(),
            shared: Vec::new(),
            changed: BTreeSet::new(),
            since: None,
            unwatched: Limit::Unmet,
        })
    }

    /// Readable when something has changed.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// Watches this and what is below it, from the next steps on.
    pub(crate) fn begin(&mut self, place: PathBuf) {
        self.shared.push(place.clone());
        self.ahead.push_back(place);
    }

    /// Watches it no longer.
    pub(crate) fn end(&mut self, place: &Path) {
        self.forget(place);
        self.shared.retain(|path| path != place);
        self.changed.retain(|path| !path.starts_with(place));
    }

    /// Whether [`Watcher::step`] has something to do.
    pub(crate) fn is_behind(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Looks into one more folder.
    pub(crate) fn step(&mut self) {
        let Some(place) = self.ahead.pop_front() else { return };
        let path = self.root.join(&place);
        if self.watched.len() >= self.max {
            self.give_up(format!("watchers in containers are told of changes in {} folders only", self.max));
            return;
        }
        match add_watch(&self.inotify, &path, HEARD) {
            Ok(watch) => drop(self.watched.entry(watch).or_default().insert(place.clone())),
            Err(Errno::NOSPC) => {
                let what = "this host's limit, fs.inotify.max_user_watches, keeps watchers in containers from changes in some \
                            folders";
                self.give_up(what.to_owned());
                return;
            }
            // It is gone, or its user can't read it.
            Err(_) => return,
        }
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        self.ahead.extend(folders.map(|entry| place.join(entry.file_name())));
        // More could not be watched anyhow.
        self.ahead.truncate(self.max.saturating_sub(self.watched.len()) + 1);
    }

    fn give_up(&mut self, why: String) {
        self.ahead.clear();
        if self.unwatched == Limit::Unmet {
            tracing::warn!(why, "not all that is shared is watched");
            self.unwatched = Limit::Met(why);
            self.since.get_or_insert_with(Instant::now);
        }
    }

    /// Takes in what the kernel has to tell.
    pub(crate) fn hear(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); EVENTS_BYTES];
        let mut heard = Vec::new();
        let mut reader = Reader::new(&self.inotify, &mut buffer);
        // What comes meanwhile is for the next time.
        while let Ok(event) = reader.next() {
            let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()).to_owned());
            heard.push((event.wd(), event.events(), name));
            if reader.is_buffer_empty() {
                break;
            }
        }
        for (watch, what, name) in heard {
            if what.contains(ReadFlags::IGNORED) {
                self.watched.remove(&watch);
                continue;
            }
            for folder in self.watched.get(&watch).cloned().unwrap_or_default() {
                // A file that is shared for itself has no name here.
                let path = name.as_ref().map_or_else(|| folder.clone(), |name| folder.join(name));
                if what.contains(ReadFlags::ISDIR) {
                    self.moved(&path, what);
                }
                self.note(path);
            }
        }
    }

    /// A folder came or went: what is known of it by its path no longer holds.
    fn moved(&mut self, path: &Path, what: ReadFlags) {
        if what.intersects(ReadFlags::MOVED_FROM | ReadFlags::DELETE) {
            self.forget(path);
        }
        if what.intersects(ReadFlags::MOVED_TO | ReadFlags::CREATE) && self.ahead.len() < self.max {
            self.ahead.push_back(path.to_owned());
        }
    }

    fn note(&mut self, path: PathBuf) {
        // Lines to the host are JSON, which has no other names.
        if path.to_str().is_some() && self.changed.len() < CHANGES_MAX {
            self.changed.insert(path);
            self.since.get_or_insert_with(Instant::now);
        }
    }

    fn forget(&mut self, place: &Path) {
        self.ahead.retain(|path| !path.starts_with(place));
        let inotify = &self.inotify;
        self.watched.retain(|watch, places| {
            places.retain(|path| !path.starts_with(place));
            if places.is_empty() {
                let _ = remove_watch(inotify, *watch);
            }
            !places.is_empty()
        });
    }

    /// When there is something to tell.
    pub(crate) fn due(&self) -> Option<Instant> {
        if self.shared.is_empty() {
            self.since.map(|since| since + SETTLES_WITHIN)
        } else {
            Some(Instant::now())
        }
    }

    /// What is to be told now.
    pub(crate) fn take(&mut self) -> Changes {
        let mut changed = std::mem::take(&mut self.changed);
        if let Some(later) = changed.iter().nth(ANSWER_MAX).cloned() {
            self.changed = changed.split_off(&later);
        }
        self.since = (!self.changed.is_empty()).then(Instant::now);
        let unwatched = match &self.unwatched {
            Limit::Met(why) => Some(why.clone()),
            Limit::Unmet | Limit::Told => None,
        };
        if unwatched.is_some() {
            self.unwatched = Limit::Told;
        }
        Changes {
            shared: std::mem::take(&mut self.shared),
            changed: changed.into_iter().collect(),
            unwatched,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    /// A folder with folders in it, and who watches it.
    fn watcher(folders: &[&str]) -> (tempfile::TempDir, Watcher) {
        let root = tempfile::tempdir().unwrap();
        for folder in folders {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let mut watcher = Watcher::new(root.path().to_owned()).unwrap();
        watcher.begin("share".into());
        walk(&mut watcher);
        assert_eq!(watcher.take().shared, [PathBuf::from("share")]);
        (root, watcher)
    }

    fn walk(watcher: &mut Watcher) {
        while watcher.is_behind() {
            watcher.step();
        }
    }

    /// All that is known by now, without a wait: inotify(7) tells of what is done when it is done.
    fn changed(watcher: &mut Watcher) -> Vec<String> {
        let is_told = |watcher: &Watcher| {
            let mut fds = [PollFd::new(&watcher.inotify, PollFlags::IN)];
            poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
        };
        while is_told(watcher) {
            watcher.hear();
            walk(watcher);
        }
        watcher.take().changed.iter().map(|path| path.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn what_is_written_made_moved_and_removed_is_told_and_what_changes_attributes_alone_is_not() {
        let (root, mut watcher) = watcher(&["share/a/b"]);
        let at = |path: &str| root.path().join("share").join(path);
        fs::write(at("a/b/file"), "one").unwrap();
        assert_eq!(changed(&mut watcher), ["share/a/b/file"]);
        fs::write(at("a/b/file"), "two").unwrap();
        fs::write(at("top"), "").unwrap();
        assert_eq!(changed(&mut watcher), ["share/a/b/file", "share/top"]);
        // As a change is told in the guest.
        fs::set_permissions(at("a/b/file"), Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(at("a/b"), Permissions::from_mode(0o700)).unwrap();
        assert!(changed(&mut watcher).is_empty() && watcher.due().is_none());
        fs::rename(at("a/b/file"), at("moved")).unwrap();
        assert_eq!(changed(&mut watcher), ["share/a/b/file", "share/moved"]);
        fs::remove_file(at("moved")).unwrap();
        assert_eq!(changed(&mut watcher), ["share/moved"]);
    }

    #[test]
    fn folders_that_come_are_watched_and_those_that_moved_are_known_by_their_new_names() {
        let (root, mut watcher) = watcher(&["share/old/deep"]);
        let at = |path: &str| root.path().join("share").join(path);
        fs::create_dir(at("new")).unwrap();
        assert_eq!(changed(&mut watcher), ["share/new"]);
        fs::write(at("new/file"), "").unwrap();
        assert_eq!(changed(&mut watcher), ["share/new/file"]);
        fs::rename(at("old"), at("other")).unwrap();
        assert_eq!(changed(&mut watcher), ["share/old", "share/other"]);
        fs::write(at("other/deep/file"), "").unwrap();
        assert_eq!(changed(&mut watcher), ["share/other/deep/file"]);
        fs::remove_dir_all(at("other")).unwrap();
        changed(&mut watcher);
        assert_eq!(watcher.watched.len(), 2, "the share and `new`: {:?}", watcher.watched);
    }

    #[test]
    fn shares_that_overlap_are_told_of_by_each_of_their_names_until_they_are_taken_back() {
        let (root, mut watcher) = watcher(&["share/sub"]);
        // The same folder by another path, as a bind mount is.
        let same = add_watch(&watcher.inotify, root.path().join("share/sub"), HEARD).unwrap();
        watcher.watched.get_mut(&same).unwrap().insert("other".into());
        fs::write(root.path().join("share/sub/file"), "").unwrap();
        assert_eq!(changed(&mut watcher), ["other/file", "share/sub/file"]);
        watcher.end(Path::new("share"));
        fs::write(root.path().join("share/sub/file"), "more").unwrap();
        assert_eq!(changed(&mut watcher), ["other/file"]);
        watcher.end(Path::new("other"));
        fs::write(root.path().join("share/sub/file"), "").unwrap();
        assert!(changed(&mut watcher).is_empty() && watcher.watched.is_empty());
    }

    #[test]
    fn more_folders_than_can_be_watched_are_told_of_once_and_the_deepest_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        for folder in ["share/a/deep", "share/b/deep", "share/c"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let mut watcher = Watcher::new(root.path().to_owned()).unwrap();
        watcher.max = 4;
        watcher.begin("share".into());
        walk(&mut watcher);
        let told = watcher.take();
        assert!(told.unwatched.is_some_and(|why| why.contains("4 folders only")));
        fs::write(root.path().join("share/a/deep/file"), "").unwrap();
        fs::write(root.path().join("share/c/file"), "").unwrap();
        assert_eq!(changed(&mut watcher), ["share/c/file"]);
        fs::create_dir(root.path().join("share/d")).unwrap();
        changed(&mut watcher);
        assert_eq!(watcher.take(), Changes::default(), "it is told once");
    }

    #[test]
    fn a_flood_of_changes_is_told_in_bounded_answers_and_what_is_over_the_bound_is_dropped() {
        let (root, mut watcher) = watcher(&["share"]);
        for number in 0..=CHANGES_MAX {
            fs::write(root.path().join("share").join(number.to_string()), "").unwrap();
            watcher.hear();
        }
        let mut told = 0;
        loop {
            watcher.hear();
            match watcher.take().changed.len() {
                0 => break,
                count => {
                    assert!(count <= ANSWER_MAX);
                    told += count;
                }
            }
        }
        assert!((CHANGES_MAX..=CHANGES_MAX + 1).contains(&told), "{told}");
    }
}
