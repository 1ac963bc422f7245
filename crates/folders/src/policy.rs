//! Which of the host's files may be shared.
//!
//! Only what lies in an allowed folder: the owner's home and the folder for temporary files, unless the machine's
//! administrator says otherwise. The system's own symbolic links on the way there are followed (`/home` may be one). In
//! an allowed folder none is: whoever shares a folder lets containers put links there, and what a link leads to was
//! asked for by nobody. And so that there is no time between looking and sharing in which one could be put there, the
//! keeper opens what was found here in a way that follows none at all.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::{Component, Path, PathBuf};

/// Symbolic links of the system on the way to a path; Linux follows as many.
const LINKS_MAX: usize = 40;

/// Longest file of rules, in bytes, that is read.
const RULES_BYTES_MAX: usize = 64 * 1024;

/// What may be shared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    allowed: Vec<PathBuf>,
    hidden: Vec<PathBuf>,
}

/// What becomes of a path that isn't there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// It is made, a folder: as Docker does for `--volume`.
    Make,
    /// It is an error: as Docker has it for `--mount`.
    Refuse,
}

/// Why a path isn't shared.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It lies in no allowed folder.
    #[error("it is outside of the folders that may be shared ({})", in_words(.0))]
    Outside(Vec<PathBuf>),
    /// Dormouse's own files are there: disks, memories and sockets of sessions, settings, hooks.
    #[error("{0} is Dormouse's own: share a folder without it")]
    Own(PathBuf),
    /// A symbolic link in an allowed folder.
    #[error("{link} is a symbolic link, which isn't followed: name what it leads to ({target})")]
    Link {
        /// The link.
        link: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// Too many links of the system.
    #[error("too many symbolic links")]
    Links,
    /// It is neither a folder nor a file.
    #[error("it is {0}: only folders and files can be shared")]
    Kind(&'static str),
    /// It isn't absolute, or no text.
    #[error("it is no absolute path in UTF-8")]
    Path,
    /// It isn't there. Docker's words.
    #[error("bind source path does not exist: {0}")]
    Missing(PathBuf),
    /// The system refused something.
    #[error("{path}: {source}")]
    Io {
        /// What was looked at.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

fn in_words(folders: &[PathBuf]) -> String {
    let folders: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
    if folders.is_empty() { "none".to_owned() } else { folders.join(", ") }
}

/// The folders that these rules name: one a line, `~` for the home; `#` begins a comment.
#[must_use]
pub fn rules(text: &str, home: Option<&Path>) -> Vec<PathBuf> {
    let text = text.get(..RULES_BYTES_MAX).unwrap_or(text);
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let folder = |line: &str| match line.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            home.map(|home| home.join(rest.trim_start_matches('/')))
        }
        _ => Some(PathBuf::from(line)),
    };
    lines.filter(|line| !line.is_empty()).filter_map(folder).collect()
}

impl Policy {
    /// Folders that may be shared, with all that is in them, and those in which or around which nothing may. An allowed
    /// folder that isn't there, or is the root, allows nothing.
    #[must_use]
    pub fn new(allowed: &[PathBuf], hidden: &[PathBuf]) -> Self {
        let real = |folders: &[PathBuf]| {
            let real = folders.iter().filter_map(|folder| fs::canonicalize(folder).ok());
            real.filter(|folder| folder.parent().is_some()).collect()
        };
        Self { allowed: real(allowed), hidden: real(hidden) }
    }

    /// Where a path of the host really is, if it may be shared.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn find(&self, path: &Path, missing: Missing) -> Result<PathBuf, Refused> {
        let text = path.to_str().filter(|_| path.is_absolute()).ok_or(Refused::Path)?;
        let (found, rest) = self.walk(clean(Path::new(text)))?;
        let whole = rest.iter().fold(found.clone(), |path, name| path.join(name));
        self.check(&whole)?;
        if rest.is_empty() {
            return self.kind(found);
        }
        if missing == Missing::Refuse {
            return Err(Refused::Missing(path.to_owned()));
        }
        // Each by itself, so that what appears meanwhile is met, whatever it is.
        let mut made = found;
        for name in rest {
            made.push(name);
            DirBuilder::new().mode(0o755).create(&made).map_err(|source| failed(&made, source))?;
        }
        Ok(made)
    }

    /// Follows the system's links. Gives what is there, and what of the path isn't.
    fn walk(&self, path: PathBuf) -> Result<(PathBuf, Vec<String>), Refused> {
        let mut links = 0;
        let mut found = PathBuf::from("/");
        let mut rest = names(&path);
        while let Some(name) = rest.pop() {
            let next = found.join(&name);
            let kind = match fs::symlink_metadata(&next) {
                Ok(metadata) => metadata.file_type(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    rest.push(name);
                    rest.reverse();
                    return Ok((found, rest));
                }
                Err(source) => return Err(failed(&next, source)),
            };
            if !kind.is_symlink() {
                found = next;
                continue;
            }
            let target = fs::read_link(&next).map_err(|source| failed(&next, source))?;
            if self.allowed.iter().any(|allowed| found.starts_with(allowed)) {
                return Err(Refused::Link { link: next, target });
            }
            links += 1;
            if links > LINKS_MAX {
                return Err(Refused::Links);
            }
            // What is allowed is checked where this ends, so a `..` in a link of the system may mean what it says.
            rest.extend(names(&clean(&found.join(target))));
            found = PathBuf::from("/");
        }
        Ok((found, Vec::new()))
    }

    fn check(&self, path: &Path) -> Result<(), Refused> {
        if !self.allowed.iter().any(|allowed| path.starts_with(allowed)) {
            return Err(Refused::Outside(self.allowed.clone()));
        }
        match self.hidden.iter().find(|hidden| path.starts_with(hidden) || hidden.starts_with(path)) {
            Some(hidden) => Err(Refused::Own(hidden.clone())),
            None => Ok(()),
        }
    }

    fn kind(&self, path: PathBuf) -> Result<PathBuf, Refused> {
        let kind = fs::symlink_metadata(&path).map_err(|source| failed(&path, source))?.file_type();
        let other = match kind {
            kind if kind.is_dir() || kind.is_file() => return Ok(path),
            kind if kind.is_socket() => "a socket",
            kind if kind.is_fifo() => "a pipe",
            kind if kind.is_symlink() => "a symbolic link",
            _ => "a device",
        };
        Err(Refused::Kind(other))
    }
}

fn failed(path: &Path, source: io::Error) -> Refused {
    Refused::Io { path: path.to_owned(), source }
}

/// The path without `.` and `..`, by its text alone, as Docker reads it.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// A path's names, the first one last.
fn names(path: &Path) -> Vec<String> {
    let names = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        _ => None,
    });
    names.rev().collect()
}

#[cfg(test)]
mod tests;
