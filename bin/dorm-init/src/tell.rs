//! `dorm-init tell-changes`: tells watchers in containers what the host has changed in shared folders.
//!
//! Linux tells watchers of what the guest does to a file system, not of what its server does. So each change is told by an
//! attribute that is set to what it is already: the mode. What the guest has changed itself is not told again: that is known
//! by watching the folders in which there were changes.
//!
//! Standard input: a letter and a path each, ended by NUL. `s`, a folder or a file that is shared from now on; `c`, one that
//! has changed. It ends with its input.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::fs;
use std::io::Read as _;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init, remove_watch};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, chmod, fstat, openat2};
use rustix::io::Errno;

/// Longest path in the input, in bytes, with its letter.
const PATH_BYTES_MAX: usize = 4097;

/// Folders whose changes by the guest are known; the one that was looked at first makes room. Each costs about 1 KiB, here
/// and on the host.
const WATCHES_MAX: usize = 1024;

/// Changes by the guest that are remembered.
const OWN_MAX: usize = 4096;

/// What is looked at in folders that the guest has just made, and in those in them.
const MADE_MAX: usize = 1024;

/// A change that comes so soon after one by the guest is the guest's, however often it is told.
const OWN_WITHIN: Duration = Duration::from_secs(1);

/// So late the host may tell of a change by the guest for the first time.
const OWN_TOLD_WITHIN: Duration = Duration::from_secs(10);

/// Bytes of events that are read at once.
const EVENTS_BYTES: usize = 16 * 1024;

/// All that the host hears of.
const HEARD: WatchFlags = WatchFlags::MODIFY
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DONT_FOLLOW);

/// Tells until its input ends.
pub(crate) fn run() -> Result<()> {
    let (mut teller, mut stdin) = (Teller::new()?, std::io::stdin().lock());
    let (mut buffer, mut waiting) = ([0; 16 * 1024], Vec::new());
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(rustix::stdio::stdin(), PollFlags::IN),
            PollFd::from_borrowed_fd(teller.own.inotify.as_fd(), PollFlags::IN),
        ];
        poll(&mut fds, None)?;
        let has_input = !fds[0].revents().is_empty();
        teller.own.hear();
        if !has_input {
            continue;
        }
        let count = stdin.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        waiting.extend_from_slice(&buffer[..count]);
        while let Some(end) = waiting.iter().position(|byte| *byte == 0) {
            let told: Vec<u8> = waiting.drain(..=end).collect();
            let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
            match told.split_first() {
                Some((b's', rest)) => teller.own.watch(path(&rest[..rest.len() - 1])),
                Some((b'c', rest)) => teller.changed(&path(&rest[..rest.len() - 1])),
                _ => anyhow::bail!("the host tells nonsense"),
            }
        }
        ensure!(waiting.len() < PATH_BYTES_MAX, "the host tells of a path that is too long");
    }
}

#[derive(Debug)]
struct Teller {
    own: Own,
}

impl Teller {
    fn new() -> Result<Self> {
        Ok(Self { own: Own::new()? })
    }

    /// The host tells that this has changed.
    fn changed(&mut self, path: &Path) {
        self.own.hear();
        if !self.own.is_own(path, Instant::now()) {
            touch(path);
        }
        if let Some(folder) = path.parent() {
            self.own.watch(folder.to_owned());
        }
    }
}

/// Sets the mode of a file to what it is: or of its folder, if it is gone or is a symbolic link, which has no mode.
fn touch(path: &Path) {
    let is_told = open(path).and_then(|file| set_mode_again(&file));
    let folder = path.parent().filter(|_| matches!(is_told, Ok(false) | Err(Errno::NOENT | Errno::LOOP)));
    if let Some(folder) = folder {
        let _ = open(folder).and_then(|folder| set_mode_again(&folder));
    }
}

/// Containers may put links anywhere meanwhile: none is followed.
fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
}

/// `false`: it is a symbolic link.
fn set_mode_again(file: &OwnedFd) -> rustix::io::Result<bool> {
    let mode = fstat(file)?.st_mode;
    let is_link = FileType::from_raw_mode(mode) == FileType::Symlink;
    let mode = Mode::from_raw_mode(mode);
    // The kernel may take these away from a file that a user changes.
    if !is_link && !mode.intersects(Mode::SUID | Mode::SGID) {
        chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), mode)?;
    }
    Ok(!is_link)
}

/// What the guest has changed itself.
#[derive(Debug)]
struct Own {
    inotify: OwnedFd,
    folders: HashMap<i32, PathBuf>,
    /// In the order in which they were watched first.
    order: VecDeque<i32>,
    changes: HashMap<PathBuf, Change>,
}

#[derive(Debug, Clone, Copy)]
struct Change {
    at: Instant,
    told: Told,
}

/// Whether the host has told of it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Not,
    Already,
}

impl Own {
    fn new() -> Result<Self> {
        Ok(Self {
            inotify: init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?,
            folders: HashMap::new(),
            order: VecDeque::new(),
            changes: HashMap::new(),
        })
    }

    fn watch(&mut self, folder: PathBuf) {
        let Ok(watch) = add_watch(&self.inotify, &folder, HEARD) else { return };
        if self.folders.insert(watch, folder).is_none() {
            self.order.push_back(watch);
        }
        while self.folders.len() > WATCHES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.folders.remove(&oldest);
            let _ = remove_watch(&self.inotify, oldest);
        }
    }

    /// Takes in what the guest has done.
    fn hear(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); EVENTS_BYTES];
        let mut heard = Vec::new();
        let mut reader = Reader::new(&self.inotify, &mut buffer);
        while let Ok(event) = reader.next() {
            let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()).to_owned());
            heard.push((event.wd(), event.events(), name));
        }
        for (watch, what, name) in heard {
            if what.contains(ReadFlags::IGNORED) {
                self.folders.remove(&watch);
                self.order.retain(|other| *other != watch);
                continue;
            }
            let Some(folder) = self.folders.get(&watch) else { continue };
            let path = name.map_or_else(|| folder.clone(), |name| folder.join(name));
            if what.contains(ReadFlags::ISDIR | ReadFlags::CREATE) {
                self.made(path.clone());
            } else if what.contains(ReadFlags::ISDIR | ReadFlags::MOVED_TO) {
                self.watch(path.clone());
            }
            self.remember(path, Instant::now());
        }
    }

    /// The guest has just made this folder: what is in it by the time that it is watched is the guest's as well.
    fn made(&mut self, folder: PathBuf) {
        let mut folders = vec![folder];
        let mut left = MADE_MAX;
        while let Some(folder) = folders.pop() {
            self.watch(folder.clone());
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten().take(left) {
                left -= 1;
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(entry.path());
                }
                self.remember(entry.path(), Instant::now());
            }
        }
    }

    fn remember(&mut self, path: PathBuf, now: Instant) {
        if self.changes.len() >= OWN_MAX {
            self.changes.retain(|_, change| now < change.at + OWN_TOLD_WITHIN);
        }
        if self.changes.len() < OWN_MAX || self.changes.contains_key(&path) {
            self.changes.insert(path, Change { at: now, told: Told::Not });
        }
    }

    /// Whether what the host tells of is a change by the guest.
    fn is_own(&mut self, path: &Path, now: Instant) -> bool {
        let Some(change) = self.changes.get_mut(path) else { return false };
        let within = if change.told == Told::Not { OWN_TOLD_WITHIN } else { OWN_WITHIN };
        change.told = Told::Already;
        now < change.at + within
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// What a watcher of this folder is told while that is done: the names, and whether all of it was attributes.
    fn told(folder: &Path, act: impl FnOnce()) -> Vec<(String, bool)> {
        let inotify = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        add_watch(&inotify, folder, WatchFlags::ALL_EVENTS).unwrap();
        act();
        let mut buffer = [MaybeUninit::uninit(); EVENTS_BYTES];
        let mut reader = Reader::new(&inotify, &mut buffer);
        let mut heard = Vec::new();
        while let Ok(event) = reader.next() {
            let name = event.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            heard.push((name, event.events().contains(ReadFlags::ATTRIB)));
        }
        heard
    }

    #[test]
    fn a_change_by_the_host_is_told_by_an_attribute_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "text").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let before = fs::metadata(&file).unwrap();
        let mut teller = Teller::new().unwrap();
        assert_eq!(told(folder.path(), || teller.changed(&file)), [("file".to_owned(), true)]);
        let after = fs::metadata(&file).unwrap();
        assert_eq!(after.permissions(), before.permissions());
        assert_eq!(after.modified().unwrap(), before.modified().unwrap());
    }

    #[test]
    fn what_is_gone_and_what_is_a_link_is_told_of_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        fs::write(&outside, "").unwrap();
        let inside = folder.path().join("inside");
        fs::create_dir(&inside).unwrap();
        symlink(&outside, inside.join("link")).unwrap();
        let mut teller = Teller::new().unwrap();
        for name in ["gone", "link"] {
            let heard = told(&inside, || teller.changed(&inside.join(name)));
            assert_eq!(heard, [(String::new(), true)], "{name}");
        }
        assert!(told(&outside, || teller.changed(&inside.join("link"))).is_empty());
        symlink(&inside, folder.path().join("way")).unwrap();
        assert!(told(&inside, || teller.changed(&folder.path().join("way/link"))).is_empty());
    }

    #[test]
    fn a_set_group_id_is_never_put_at_risk() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o2755)).unwrap();
        let mut teller = Teller::new().unwrap();
        assert!(told(folder.path(), || teller.changed(&file)).is_empty());
    }

    #[test]
    fn what_the_guest_did_itself_is_not_told_again_also_in_folders_that_it_made() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        let mut teller = Teller::new().unwrap();
        teller.own.watch(folder.path().to_owned());
        fs::write(at("own"), "").unwrap();
        fs::create_dir_all(at("new/deep")).unwrap();
        // Before anything in them is watched.
        fs::write(at("new/early"), "").unwrap();
        fs::write(at("new/deep/early"), "").unwrap();
        teller.own.hear();
        fs::write(at("new/own"), "").unwrap();
        for path in ["own", "new", "new/own", "new/early", "new/deep", "new/deep/early"] {
            assert!(told(at(path).parent().unwrap(), || teller.changed(&at(path))).is_empty(), "{path}");
        }
        // The same file, by the host and later.
        let later = Instant::now() + OWN_WITHIN;
        assert!(!teller.own.is_own(&at("own"), later));
    }

    #[test]
    fn a_change_that_is_told_late_is_still_the_guests_once() {
        let mut own = Own::new().unwrap();
        let now = Instant::now();
        own.remember("/a".into(), now);
        let late = now + Duration::from_secs(5);
        assert!(own.is_own(Path::new("/a"), late) && !own.is_own(Path::new("/a"), late));
        own.remember("/b".into(), now);
        assert!(!own.is_own(Path::new("/b"), now + OWN_TOLD_WITHIN));
    }

    #[test]
    fn neither_folders_nor_changes_are_kept_without_bound() {
        let folder = tempfile::tempdir().unwrap();
        let mut own = Own::new().unwrap();
        for number in 0..WATCHES_MAX + 10 {
            let path = folder.path().join(number.to_string());
            fs::create_dir(&path).unwrap();
            own.watch(path);
        }
        own.hear();
        assert_eq!((own.folders.len(), own.order.len()), (WATCHES_MAX, WATCHES_MAX));
        let now = Instant::now();
        for number in 0..OWN_MAX + 10 {
            own.remember(number.to_string().into(), now);
        }
        assert_eq!(own.changes.len(), OWN_MAX);
    }
}
