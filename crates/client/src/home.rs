//! Where sessions, images, caches and sockets lie (ARCHITECTURE.md, "Storage").

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use dormouse_api::SessionId;

/// Longest path of a unix socket, in bytes (`sun_path` without its final zero).
pub const SOCKET_PATH_MAX: usize = 107;

/// The longest name of a socket within a session's runtime directory, with its slash.
const SOCKET_NAME_MAX: usize = "/vm-1234567-control.qmp".len();

/// The machine's settings.
const SETTINGS: &str = "/etc/dormouse";

/// The roots of everything that Dormouse keeps for one user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    config: PathBuf,
    data: PathBuf,
    cache: PathBuf,
    runtime: PathBuf,
    settings: PathBuf,
}

/// Why no home could be found.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HomeError {
    /// None of the variables that could name one is set.
    #[error("can't tell where to keep sessions: set HOME, or DORM_HOME to a folder of your own")]
    NoHome,
    /// Sockets under this runtime directory couldn't be bound.
    #[error("the path {0:?} is too long for sockets: set DORM_HOME or XDG_RUNTIME_DIR to a shorter one")]
    TooLong(PathBuf),
    /// A relative path would mean another place to each process.
    #[error("{0} is a relative path: give an absolute one")]
    Relative(&'static str),
}

impl Home {
    /// The home that this process's environment names: `DORM_HOME` for all of it, else the XDG directories.
    ///
    /// # Errors
    /// See [`HomeError`].
    pub fn from_env() -> Result<Self, HomeError> {
        Self::from_variables(|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: impl Fn(&'static str) -> Option<OsString>) -> Result<Self, HomeError> {
        let path = |name: &'static str| match variable(name).map(PathBuf::from) {
            Some(path) if path.is_relative() => Err(HomeError::Relative(name)),
            path => Ok(path),
        };
        if let Some(home) = path("DORM_HOME")? {
            let [data, cache, runtime, settings] =
                ["data", "cache", "run", "etc"].map(|folder| home.join(folder));
            return Self { config: home, data, cache, runtime, settings }.checked();
        }
        let under_home = |folder: &str| Ok(path("HOME")?.ok_or(HomeError::NoHome)?.join(folder));
        let config = path("XDG_CONFIG_HOME")?.map_or_else(|| under_home(".config"), Ok)?;
        let data = path("XDG_DATA_HOME")?.map_or_else(|| under_home(".local/share"), Ok)?;
        let cache = path("XDG_CACHE_HOME")?.map_or_else(|| under_home(".cache"), Ok)?;
        // Without a login session there is no runtime directory: the cache's file system is the user's own at least.
        let runtime = path("XDG_RUNTIME_DIR")?.unwrap_or_else(|| cache.join("run"));
        let [config, data, cache, runtime] = [config, data, cache, runtime].map(|root| root.join("dormouse"));
        Self { config, data, cache, runtime, settings: SETTINGS.into() }.checked()
    }

    fn checked(self) -> Result<Self, HomeError> {
        let longest = self.runtime.as_os_str().len() + 1 + 16 + SOCKET_NAME_MAX;
        if longest > SOCKET_PATH_MAX { Err(HomeError::TooLong(self.runtime)) } else { Ok(self) }
    }

    /// What new sessions get where nothing is asked for.
    #[must_use]
    pub fn settings(&self) -> PathBuf {
        self.config.join("settings.toml")
    }

    /// The folders of all sessions.
    #[must_use]
    pub fn sessions(&self) -> PathBuf {
        self.data.join("sessions")
    }

    /// One session's own folder: its record, and its storage unless that was put elsewhere.
    #[must_use]
    pub fn session(&self, id: &SessionId) -> PathBuf {
        self.sessions().join(id.as_str())
    }

    /// Guest images, by content.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// What can be made again.
    #[must_use]
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Sockets, records of running VMs, locks.
    #[must_use]
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// One session's sockets.
    #[must_use]
    pub fn session_runtime(&self, id: &SessionId) -> PathBuf {
        self.runtime.join(id.as_str())
    }

    /// The hooks of the machine's administrator. They count only where root alone can write.
    #[must_use]
    pub fn machine_hooks(&self) -> PathBuf {
        self.settings.join("hooks.d")
    }

    /// What the machine's administrator lets sessions share of the host's folders.
    #[must_use]
    pub fn folder_rules(&self) -> PathBuf {
        self.settings.join("folders")
    }

    /// All folders in which Dormouse keeps anything of this user's.
    #[must_use]
    pub fn own_folders(&self) -> Vec<PathBuf> {
        let Self { config, data, cache, runtime, settings } = self;
        [config, data, cache, runtime, settings].map(Clone::clone).into()
    }

    /// The service's socket.
    #[must_use]
    pub fn service_socket(&self) -> PathBuf {
        self.runtime.join("dormd.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(variables: &[(&str, &str)]) -> Result<Home, HomeError> {
        Home::from_variables(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn dorm_home_moves_everything() {
        let home = home(&[("DORM_HOME", "/x"), ("XDG_DATA_HOME", "/data"), ("HOME", "/home/u")]).unwrap();
        assert_eq!(home.sessions(), Path::new("/x/data/sessions"));
        assert_eq!(home.cache(), Path::new("/x/cache"));
        assert_eq!(home.machine_hooks(), Path::new("/x/etc/hooks.d"));
        assert_eq!(home.service_socket(), Path::new("/x/run/dormd.sock"));
    }

    #[test]
    fn xdg_directories_lead_and_home_is_the_fallback() {
        let home = home(&[("HOME", "/home/u"), ("XDG_RUNTIME_DIR", "/run/user/7")]).unwrap();
        assert_eq!(home.images(), Path::new("/home/u/.local/share/dormouse/images"));
        assert_eq!(home.runtime(), Path::new("/run/user/7/dormouse"));
    }

    #[test]
    fn what_cannot_work_is_refused_with_a_reason() {
        assert_eq!(home(&[]), Err(HomeError::NoHome));
        assert_eq!(home(&[("DORM_HOME", "x")]), Err(HomeError::Relative("DORM_HOME")));
        let long = format!("/{}", "x".repeat(90));
        assert!(matches!(home(&[("DORM_HOME", &long)]), Err(HomeError::TooLong(_))));
    }
}
