//! What a session's host and a keeper say to each other, and the host's side of it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::share::Share;
use crate::watch::Changes;

/// Longest line, in bytes: a path has 4096 at most, which JSON may double.
pub(crate) const LINE_BYTES_MAX: u64 = 64 * 1024;

/// How long a keeper may take to answer: it mounts, which takes no time.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// The descriptors that a keeper inherits.
pub(crate) const CONTROL: i32 = 3;
pub(crate) const DEVICE: i32 = 4;
pub(crate) const VM: i32 = 5;

/// What a host asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ask {
    /// Share this.
    Share(Share),
    /// Share this no longer.
    TakeBack(Share),
    /// What is shared?
    List,
    /// What has changed? Answered when something has.
    Changes,
    /// End.
    Quit,
}

/// What a keeper answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Told {
    /// It is done.
    Done,
    /// This is shared.
    Shares(Vec<Share>),
    /// This has changed.
    Changes(Changes),
    /// It could not be done; or, unasked, the keeper ends, and this is why.
    Failed(String),
}

/// Why a keeper didn't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// It can't be started or reached, or has ended.
    #[error("folders of the host can't be shared: {0}")]
    Io(#[from] io::Error),
    /// It says why not.
    #[error("{0}")]
    Failed(String),
}

/// The process that shares folders with one VM, as its session's host holds it. It lives as long as the VM or virtiofsd.
#[derive(Debug)]
pub struct Keeper {
    stream: BufReader<UnixStream>,
}

/// What a keeper is started with.
#[derive(Debug, Clone, Copy)]
pub struct KeeperStart<'a> {
    /// The program that runs [`crate::keep`] as `keep-folders`.
    pub program: &'a Path,
    /// virtiofsd.
    pub virtiofsd: &'a Path,
    /// A folder over which it mounts; made if need be.
    pub folder: &'a Path,
    /// Where it listens.
    pub control: &'a Path,
    /// Where it listens for QEMU.
    pub device: &'a Path,
    /// QEMU.
    pub vm: u32,
}

impl Keeper {
    /// Starts a keeper, and waits until it shares nothing yet.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn start(start: KeeperStart<'_>) -> Result<Self, LinkError> {
        let KeeperStart { program, virtiofsd, folder, control, device, vm } = start;
        std::fs::create_dir_all(folder)?;
        let vm = i32::try_from(vm).ok().and_then(Pid::from_raw);
        let vm = vm.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let vm = pidfd_open(vm, PidfdFlags::empty()).map_err(io::Error::from)?;
        let listeners = [listen(control)?, listen(device)?];
        let [control_fd, device_fd] = listeners.map(OwnedFd::from);
        let mut command = Command::new(program);
        command
            .arg("keep-folders")
            .arg("--folder")
            .arg(folder)
            .arg("--virtiofsd")
            .arg(virtiofsd)
            .args([Path::new("--control"), control, Path::new("--device"), device])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // It outlives this process, and is ended together with its child.
            .process_group(0);
        let mappings = [(control_fd, CONTROL), (device_fd, DEVICE), (vm, VM)];
        let mappings = mappings.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        command.fd_mappings(mappings.into()).map_err(io::Error::other)?;
        let mut command = tokio::process::Command::from(command);
        let mut child = command.spawn()?;
        // The command holds the listeners until it is dropped: a keeper that ends must take them along.
        drop(command);
        // Reaped by a task, which this process may end without; a thread would have to be waited for.
        tokio::spawn(async move { child.wait().await });
        let mut keeper = Self::connect(control).await?;
        keeper.shares().await?;
        Ok(keeper)
    }

    /// Connects to a keeper that is there.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn connect(control: &Path) -> Result<Self, LinkError> {
        Ok(Self { stream: BufReader::new(UnixStream::connect(control).await?) })
    }

    /// Shares it.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn share(&mut self, share: &Share) -> Result<(), LinkError> {
        self.ask(&Ask::Share(share.clone())).await.map(drop)
    }

    /// Shares it no longer. What the guest had opened in it before may stay open.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn take_back(&mut self, share: &Share) -> Result<(), LinkError> {
        self.ask(&Ask::TakeBack(share.clone())).await.map(drop)
    }

    /// What is shared.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn shares(&mut self) -> Result<Vec<Share>, LinkError> {
        match self.ask(&Ask::List).await? {
            Told::Shares(shares) => Ok(shares),
            _ => Err(nonsense()),
        }
    }

    /// Waits until something has changed in what is shared for writing, by the host or by the guest. What changes while
    /// nobody asks is told to the next who does, within bounds. For a connection on which nothing else is asked.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn changes(&mut self) -> Result<Changes, LinkError> {
        self.send(&Ask::Changes).await?;
        match self.line().await? {
            Told::Changes(changes) => Ok(changes),
            Told::Failed(why) => Err(LinkError::Failed(why)),
            _ => Err(nonsense()),
        }
    }

    /// Has it end, with its virtiofsd.
    ///
    /// # Errors
    /// See [`LinkError`]; also when it has ended already.
    pub async fn quit(&mut self) -> Result<(), LinkError> {
        self.ask(&Ask::Quit).await.map(drop)
    }

    /// Waits until what is shared is lost, since virtiofsd or the keeper has died, and says why as far as it is known. For a
    /// connection on which nothing is asked.
    pub async fn ended(mut self) -> String {
        match self.line().await {
            Ok(Told::Failed(why)) => why,
            Ok(_) | Err(_) => "the process that shares folders has ended".to_owned(),
        }
    }

    async fn ask(&mut self, ask: &Ask) -> Result<Told, LinkError> {
        let asking = async {
            self.send(ask).await?;
            self.line().await
        };
        match timeout(ANSWER_WITHIN, asking).await.map_err(io::Error::from)?? {
            Told::Failed(why) => Err(LinkError::Failed(why)),
            told => Ok(told),
        }
    }

    async fn send(&mut self, ask: &Ask) -> io::Result<()> {
        let mut line = serde_json::to_vec(ask).map_err(io::Error::other)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).await
    }

    async fn line(&mut self) -> io::Result<Told> {
        let mut line = Vec::new();
        (&mut self.stream).take(4 * 1024 * LINE_BYTES_MAX).read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the process that shares them has ended",
            ));
        }
        serde_json::from_slice(&line).map_err(io::Error::other)
    }
}

fn nonsense() -> LinkError {
    LinkError::Failed("the answer makes no sense".to_owned())
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}
