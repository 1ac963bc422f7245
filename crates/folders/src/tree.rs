//! The tree that a guest sees: what is shared now, by bind mounts in a mount namespace of this process.
//!
//! ```text
//! FOLDER          tmpfs, of this namespace alone
//!   names/        where places for shares are made
//!   tree/         names/ again, read-only and with its mounts propagating to virtiofsd's namespace
//!     dormouse-rw3/home/me/src      a share: bind mount of the host's, no devices, no set-user-id
//! ```
//!
//! The guest can change nothing of `tree` but what lies in a share for writing, so no name in it can be made to lead
//! elsewhere.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::share::{Access, Share};

/// File systems through which a guest would reach the host itself. A folder in which one is mounted isn't shared.
const KERNEL_FILE_SYSTEMS: &[&str] = &[
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "securityfs",
    "configfs",
    "bpf",
    "mqueue",
    "fusectl",
    "binfmt_misc",
    "efivarfs",
    "pstore",
];

/// What is shared.
#[derive(Debug)]
pub(crate) struct Tree {
    folder: PathBuf,
    shares: BTreeSet<Share>,
    is_closed: bool,
}

/// Namespaces of the user's own, in which that user alone is mapped.
#[derive(Debug)]
pub(crate) struct Namespaces {
    uid_map: String,
    gid_map: String,
}

impl Namespaces {
    /// For the user of this process.
    pub(crate) fn new() -> Self {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { uid_map: format!("0 {uid} 1"), gid_map: format!("0 {gid} 1") }
    }

    /// Makes this process root of them, with mounts of its own. The process has one thread. Makes system calls and nothing
    /// else, so that a process which was just forked can do it.
    pub(crate) fn enter(&self) -> io::Result<()> {
        // SAFETY: the table of descriptors isn't unshared, which is what this call is unsafe for.
        #[expect(unsafe_code, reason = "rustix has no other call for namespaces")]
        unsafe {
            unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)?;
        }
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", &self.uid_map)?;
        fs::write("/proc/self/gid_map", &self.gid_map)?;
        // What the host mounts later is seen here, and nothing of this is seen there.
        Ok(mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
    }
}

impl Tree {
    /// An empty one, over this folder.
    pub(crate) fn new(folder: &Path) -> io::Result<Self> {
        let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("tmpfs", folder, "tmpfs", safe, c"mode=0700,size=4m,nr_inodes=64k")?;
        let tree = Self { folder: folder.to_owned(), shares: BTreeSet::new(), is_closed: false };
        for path in [tree.names(), tree.root()] {
            fs::create_dir(path)?;
        }
        mount_bind(tree.names(), tree.root())?;
        mount_remount(tree.root(), MountFlags::BIND | MountFlags::RDONLY | safe, c"")?;
        mount_change(tree.root(), MountPropagationFlags::SHARED)?;
        Ok(tree)
    }

    /// What virtiofsd shares.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.join("tree")
    }

    fn names(&self) -> PathBuf {
        self.folder.join("names")
    }

    /// What is shared.
    pub(crate) fn shares(&self) -> impl Iterator<Item = &Share> {
        self.shares.iter()
    }

    /// Shares nothing any more.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        for share in self.shares.clone() {
            self.take_back(&share)?;
        }
        self.is_closed = true;
        Ok(())
    }

    /// Shares it. `false`: it is shared already.
    pub(crate) fn share(&mut self, share: &Share) -> io::Result<bool> {
        if self.is_closed {
            return Err(io::Error::other("its virtiofsd has died"));
        }
        if self.shares.contains(share) {
            return Ok(false);
        }
        let source = open(&share.path)?;
        let is_folder = match FileType::from_raw_mode(fstat(&source)?.st_mode) {
            FileType::Directory => true,
            FileType::RegularFile => false,
            _ => return Err(io::Error::other("neither a folder nor a file")),
        };
        check_mounts(&share.path)?;
        let copy = open_tree(
            &source,
            c"",
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH
                | OpenTreeFlags::AT_RECURSIVE,
        )?;
        restrict(&copy, share.access)?;
        let place = self.names().join(share.in_tree());
        if is_folder {
            fs::create_dir_all(&place)?;
        } else {
            fs::create_dir_all(place.parent().unwrap_or(&self.folder))?;
            File::create(&place)?;
        }
        move_mount(
            &copy,
            c"",
            CWD,
            self.root().join(share.in_tree()),
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )?;
        self.shares.insert(share.clone());
        Ok(true)
    }

    /// Shares it no longer.
    pub(crate) fn take_back(&mut self, share: &Share) -> io::Result<()> {
        if !self.shares.remove(share) {
            return Ok(());
        }
        unmount(self.root().join(share.in_tree()), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
        let place = self.names().join(share.in_tree());
        if fs::remove_dir(&place).or_else(|_| fs::remove_file(&place)).is_ok() {
            // Those that other shares need aren't empty.
            let above = place.ancestors().skip(1).take_while(|path| **path != self.names());
            for path in above {
                if fs::remove_dir(path).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Opens what was found, if no link has taken the place of any part of its path since.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS)?)
}

/// What is shared may neither lie in a kernel file system nor have one mounted in it.
fn check_mounts(path: &Path) -> io::Result<()> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    // Of mounts over each other the last is the one that is seen.
    let around = mounts(&mountinfo).filter(|(point, _)| path.starts_with(point));
    let around = around.max_by_key(|(point, _)| point.components().count());
    let within = mounts(&mountinfo).filter(|(point, _)| point.starts_with(path));
    for (point, kind) in around.into_iter().chain(within) {
        if KERNEL_FILE_SYSTEMS.contains(&kind) {
            return Err(io::Error::other(format!("{} is the host's {kind}", point.display())));
        }
    }
    Ok(())
}

/// Mount points and their kinds of file system, see proc_pid_mountinfo(5).
fn mounts(mountinfo: &str) -> impl Iterator<Item = (PathBuf, &str)> {
    mountinfo.lines().filter_map(|line| {
        let point = line.split(' ').nth(4)?;
        let kind = line.split_once(" - ")?.1.split(' ').next()?;
        // The only bytes that are escaped.
        let point = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
            .iter()
            .fold(point.to_owned(), |point, (escaped, byte)| point.replace(escaped, byte));
        Some((point.into(), kind))
    })
}

/// Takes from a copy of mounts what no share may have, before anybody sees it: devices, set-user-id programs, the
/// following of symbolic links on the host, and writing if it is shared for reading; and keeps from it what the host
/// mounts later, which would have none of this.
fn restrict(copy: &OwnedFd, access: Access) -> io::Result<()> {
    const EMPTY: &CStr = c"";
    let reading = match access {
        Access::Read => libc::MOUNT_ATTR_RDONLY,
        Access::Write => 0,
    };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSYMFOLLOW | reading,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    #[expect(unsafe_code, reason = "neither rustix nor libc has a function for mount_setattr(2)")]
    // SAFETY: the path ends with NUL, and the attributes are a whole `mount_attr` of the size that is told.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            copy.as_fd().as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_takes_the_place_of_any_part_of_a_path_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let real = folder.join("a/b");
        fs::create_dir_all(&real).unwrap();
        open(&real).unwrap();
        fs::rename(folder.join("a"), folder.join("c")).unwrap();
        std::os::unix::fs::symlink(folder.join("c"), folder.join("a")).unwrap();
        assert_eq!(open(&real).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        std::os::unix::fs::symlink("/etc", folder.join("c/d")).unwrap();
        assert_eq!(open(&folder.join("c/d/passwd")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert_eq!(open(&folder.join("c/d")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        open(Path::new("/proc/self/root/etc")).unwrap_err();
    }

    #[test]
    fn neither_a_part_of_a_kernel_file_system_nor_what_has_one_in_it_is_shared() {
        for path in ["/proc", "/proc/1", "/sys/kernel", "/"] {
            let refused = check_mounts(Path::new(path)).unwrap_err().to_string();
            assert!(refused.contains("is the host's"), "{path}: {refused}");
        }
        check_mounts(tempfile::tempdir().unwrap().path()).unwrap();
    }

    #[test]
    fn mount_points_are_read_with_their_kinds() {
        let text = "36 35 98:0 /mnt1 /home/me/a\\040b rw,noatime master:1 - proc proc rw\n\
                    37 35 0:5 / /dev rw - devtmpfs udev rw\nnonsense\n";
        let read: Vec<_> = mounts(text).collect();
        assert_eq!(read, [(PathBuf::from("/home/me/a b"), "proc"), (PathBuf::from("/dev"), "devtmpfs")]);
    }
}
