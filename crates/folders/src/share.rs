//! What is shared, and what it is called in the guest.
//!
//! `/home/me/src`, for writing, is `/mnt/dormouse-rw3/home/me/src` there: behind the access and the number of its
//! components stands the path itself. So whatever is shared with the same access and depth lies side by side, never one
//! within another: shares that overlap on the host don't in the guest. And the host's path can be read off the name.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where the tree of what is shared is mounted in the guest. It lies in the read-only root: before something is
/// mounted there the engine can't make a folder of such a name.
pub const GUEST_ROOT: &str = "/mnt";

/// How each name in the guest begins below that.
const PREFIX: &str = "dormouse-";

/// What containers may do with a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Read it. The host refuses all else.
    Read,
    /// Read and write it.
    Write,
}

impl Access {
    const fn letters(self) -> &'static str {
        match self {
            Self::Read => "ro",
            Self::Write => "rw",
        }
    }
}

/// A folder or a file of the host that is shared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Share {
    /// Where it is on the host: absolute, and without symbolic links as [`crate::Policy`] found it.
    pub path: PathBuf,
    /// What may be done with it.
    pub access: Access,
}

impl Share {
    /// Its name below the tree's root.
    #[must_use]
    pub fn in_tree(&self) -> PathBuf {
        let depth = self.path.components().filter(|part| matches!(part, Component::Normal(_))).count();
        let top = format!("{PREFIX}{}{depth}", self.access.letters());
        Path::new(&top).join(self.path.strip_prefix("/").unwrap_or(&self.path))
    }

    /// Its path in the guest.
    #[must_use]
    pub fn in_guest(&self) -> PathBuf {
        Path::new(GUEST_ROOT).join(self.in_tree())
    }

    /// The share of this path in the guest; `None` if it is no such path.
    #[must_use]
    pub fn of_guest_path(path: &Path) -> Option<Self> {
        let (access, length) = marker(path.as_os_str().as_bytes())?;
        let share = Self { path: OsStr::from_bytes(&path.as_os_str().as_bytes()[length..]).into(), access };
        let is_plain = share.path.components().all(|part| !matches!(part, Component::ParentDir));
        (is_plain && share.in_guest().as_os_str() == path.as_os_str()).then_some(share)
    }
}

/// The access that a path in the guest begins with, and where the host's path begins in it.
fn marker(text: &[u8]) -> Option<(Access, usize)> {
    let rest =
        text.strip_prefix(GUEST_ROOT.as_bytes())?.strip_prefix(b"/")?.strip_prefix(PREFIX.as_bytes())?;
    let (access, rest) = if let Some(rest) = rest.strip_prefix(b"ro") {
        (Access::Read, rest)
    } else {
        (Access::Write, rest.strip_prefix(b"rw")?)
    };
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let is_marked = (1..=3).contains(&digits) && rest.get(digits) == Some(&b'/');
    is_marked.then_some((access, text.len() - rest.len() + digits))
}

/// An answer of the engine with the host's paths in place of the guest's. `None`: there are none in it.
#[must_use]
pub fn restore(answer: &[u8]) -> Option<Vec<u8>> {
    let mark = GUEST_ROOT.as_bytes();
    let mut restored = Vec::new();
    let (mut copied, mut at) = (0, 0);
    while let Some(found) = answer[at..].windows(mark.len()).position(|window| window == mark) {
        let start = at + found;
        at = start + mark.len();
        if let Some((_, length)) = marker(&answer[start..]) {
            restored.extend_from_slice(&answer[copied..start]);
            copied = start + length;
            at = copied;
        }
    }
    if copied == 0 {
        return None;
    }
    restored.extend_from_slice(&answer[copied..]);
    Some(restored)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(path: &str, access: Access) -> Share {
        Share { path: path.into(), access }
    }

    #[test]
    fn a_name_in_the_guest_tells_path_and_access() {
        for (path, access, name) in [
            ("/home/me/src", Access::Write, "/mnt/dormouse-rw3/home/me/src"),
            ("/tmp", Access::Read, "/mnt/dormouse-ro1/tmp"),
            ("/home/me/dormouse-rw2", Access::Read, "/mnt/dormouse-ro3/home/me/dormouse-rw2"),
        ] {
            let share = share(path, access);
            assert_eq!(share.in_guest(), Path::new(name));
            assert_eq!(Share::of_guest_path(Path::new(name)), Some(share));
        }
    }

    #[test]
    fn what_is_no_such_name_is_none() {
        for name in [
            "/home/me/src",
            "/mnt",
            "/mnt/dormouse-rw/home",
            "/mnt/dormouse-rx1/home",
            "/mnt/dormouse-rw1",
            "/mnt/dormouse-rw2/home",
            "/mnt/dormouse-rw2/home/../etc",
            "/mnt/dormouse-rw1//home",
            "/mnt/dormouse-rw1111/home",
            "/var/run/docker.sock",
        ] {
            assert_eq!(Share::of_guest_path(Path::new(name)), None, "{name}");
        }
    }

    #[test]
    fn answers_name_the_hosts_paths_and_are_otherwise_as_they_were() {
        for (answer, restored) in [
            (r#"{"Source":"/mnt/dormouse-rw3/home/me/src"}"#, Some(r#"{"Source":"/home/me/src"}"#)),
            (
                r#"["/mnt/dormouse-ro1/tmp:/x:ro","/mnt/dormouse-rw3/a/b/c:/mnt/y"]"#,
                Some(r#"["/tmp:/x:ro","/a/b/c:/mnt/y"]"#),
            ),
            (r#"{"Source":"/mnt/data","Target":"/mnt/dormouse"}"#, None),
            ("/mn", None),
            ("", None),
        ] {
            assert_eq!(restore(answer.as_bytes()).as_deref(), restored.map(str::as_bytes), "{answer}");
        }
    }
}
