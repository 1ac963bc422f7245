//! Making a VM: what the factory does.
//!
//! ```text
//! check ─► memory file, sockets ─► record without a process ─► passt, QEMU ─► record with the process ─► QMP answers
//! ```
//!
//! Whatever fails, or is given up by dropping the future, takes back everything that was made. A factory that is
//! killed leaves a record, by which the next one finds what there is: see [`crate::adopt()`].

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use command_fds::CommandFdExt as _;
use command_fds::FdMapping;
use dormouse_qmp::{Client, ConnectError};
use tokio::process::{Child, Command};

use crate::config::{ConfigError, NetworkKind, Owner, Start, VmConfig};
use crate::device::{self, ChildFd};
use crate::disk::{create_sparse, free_bytes};
use crate::key::SnapshotKey;
use crate::launch::{outliving_us, run_as, yielding};
use crate::network::Helpers;
use crate::probe::Qemu;
use crate::process::ProcessIdentity;
use crate::record::{RecordError, VmRecord};
use crate::socket::{SocketError, Sockets};
use crate::stderr::StderrTail;

/// How long QEMU may take from its start to its first answer. Some 50 ms are usual.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// Free space that the memory file's file system must have: a guest that meets a full one is killed by SIGBUS.
pub const FREE_BYTES_MIN: u64 = 256 * 1024 * 1024;
/// How long a killed process may take to go.
const KILL_WITHIN: Duration = Duration::from_secs(5);

/// Why a VM was not made. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The configuration is wrong, or a file that it names isn't there.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The sockets can't be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The record can't be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// There is no passt.
    #[error("passt not found: install passt, or choose another network for this session")]
    PasstMissing,
    /// The filter that keeps a guest from the host's loopback isn't installed.
    #[error("dorm-frames not found beside the running program: install Dormouse whole")]
    FilterMissing,
    /// passt, or the filter before it, ended at once.
    #[error("the network helper does not start: {0}")]
    Network(String),
    /// This host has too little RAM, or too little that is free.
    #[error(
        "the VM needs {needed_mib} MiB of memory, the host has {available_mib} MiB: give the session less memory"
    )]
    NoMemory {
        /// What the VM needs.
        needed_mib: u64,
        /// What there is.
        available_mib: u64,
    },
    /// The file system of the memory file is full.
    #[error("{path} has {free_mib} MiB free, at least {} MiB are needed: free some space", FREE_BYTES_MIN >> 20)]
    NoSpace {
        /// A directory on it.
        path: PathBuf,
        /// What is free.
        free_mib: u64,
    },
    /// The session has a VM, which no request can take from it.
    #[error("the session has a VM that is up, generation {0}")]
    Up(u64),
    /// The data disk is in use by another QEMU.
    #[error("the session's disk is in use by another VM")]
    DiskInUse,
    /// KVM was to be used and can't be.
    #[error("KVM cannot be used: {0}")]
    Kvm(String),
    /// QEMU can't be started.
    #[error("cannot start QEMU at {program}: install qemu-system-x86")]
    QemuMissing {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// QEMU ended before it answered.
    #[error("QEMU ended at once ({status}): {stderr}")]
    QemuEnded {
        /// How.
        status: ExitStatus,
        /// Its last words.
        stderr: String,
    },
    /// QEMU doesn't answer.
    #[error("QEMU does not answer: {stderr}")]
    NoAnswer {
        /// Its last words.
        stderr: String,
        /// What became of the connection.
        source: ConnectError,
    },
    /// Something else that the system refused.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> SpawnError {
    move |source| SpawnError::Io { what, source }
}

/// A VM that was made: QMP answers, the vCPUs don't run yet.
#[derive(Debug)]
pub struct Spawned {
    /// What is written down about it, also for the session host.
    pub record: VmRecord,
    /// QEMU's last words, as long as this process lives.
    pub stderr: StderrTail,
    qemu: Child,
    /// Reaped along with QEMU, at whose end they leave.
    helpers: Option<Helpers>,
}

impl Spawned {
    /// Waits for QEMU's end and reaps it. Only its parent learns the exit status; on why it ended the session host
    /// knows better, from QMP. Dropping a `Spawned` ends nothing.
    ///
    /// # Errors
    /// When the process can't be waited for.
    pub async fn ended(&mut self) -> io::Result<ExitStatus> {
        let status = self.qemu.wait().await?;
        if let Some(helpers) = &mut self.helpers {
            helpers.reap().await?;
        }
        Ok(status)
    }
}

/// Makes a VM.
///
/// # Errors
/// See [`SpawnError`].
pub async fn spawn(config: &VmConfig, qemu: &Qemu) -> Result<Spawned, SpawnError> {
    config.check()?;
    let sockets = Sockets::named(&config.runtime_dir, config.generation)?;
    check_host(config)?;
    if let Some(present) = up(&config.runtime_dir)? {
        return Err(SpawnError::Up(present));
    }
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(refused("make a UUID"))?;
    let record = VmRecord {
        format: VmRecord::FORMAT,
        session: config.session.clone(),
        generation: config.generation,
        name: format!("dorm-{}", config.session),
        uuid: uuid.trim().to_owned(),
        process: None,
        start: config.start,
        sockets,
        memory_file: config.memory_file.clone(),
        key: SnapshotKey::of(config, qemu),
    };
    let mut attempt = Attempt::new(config, record);
    attempt.prepare()?;
    attempt.launch(qemu)?;
    attempt.await_answer().await?;
    Ok(attempt.succeed())
}

/// Everything that was made so far; dropped before it succeeded, it takes all of it back.
#[derive(Debug)]
struct Attempt<'a> {
    config: &'a VmConfig,
    record: VmRecord,
    listeners: Vec<UnixListener>,
    made: Made,
    qemu: Option<(Child, StderrTail, tokio::task::JoinHandle<()>)>,
    helpers: Option<Helpers>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Made {
    Nothing,
    Sockets,
    /// The memory file too, if this start makes one.
    Memory,
    /// All of it, for good.
    Vm,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.made == Made::Vm {
            return;
        }
        // Reaped in the background by tokio, which keeps children that are dropped.
        if let Some((qemu, ..)) = &mut self.qemu {
            let _ = qemu.start_kill();
        }
        if let Some(helpers) = &mut self.helpers {
            helpers.kill();
        }
        if self.made >= Made::Sockets {
            self.record.remove(&self.config.runtime_dir);
        }
        if self.made >= Made::Memory && self.config.start == Start::Cold {
            let _ = std::fs::remove_file(&self.config.memory_file);
        }
    }
}

impl<'a> Attempt<'a> {
    const fn new(config: &'a VmConfig, record: VmRecord) -> Self {
        Self { config, record, listeners: Vec::new(), made: Made::Nothing, qemu: None, helpers: None }
    }

    /// Makes the files. Each is the owner's.
    fn prepare(&mut self) -> Result<(), SpawnError> {
        let VmConfig { runtime_dir, memory_file, owner, .. } = self.config;
        if !runtime_dir.is_dir() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(runtime_dir)
                .and_then(|()| give(runtime_dir, *owner))
                .map_err(refused("make the runtime directory"))?;
        }
        // Sockets of this very generation can only be left over from an attempt whose factory was killed.
        self.record.sockets.remove();
        self.made = Made::Sockets;
        self.listeners = self.record.sockets.listen()?.into();
        for path in self.record.sockets.paths() {
            give(path, *owner).map_err(refused("give a socket to its owner"))?;
        }
        self.made = Made::Memory;
        if self.config.start == Start::Cold {
            remove_if_present(memory_file).map_err(refused("remove the old memory file"))?;
            create_sparse(memory_file, self.config.memory_bytes())
                .and_then(|_| give(memory_file, *owner))
                .map_err(refused("make the memory file"))?;
        }
        self.record.write(runtime_dir)?;
        Ok(())
    }

    fn launch(&mut self, qemu: &Qemu) -> Result<(), SpawnError> {
        let sockets =
            [ChildFd::HostMonitor, ChildFd::ServiceMonitor, ChildFd::Console, ChildFd::Agent, ChildFd::Ports];
        let mut mappings: Vec<FdMapping> = std::mem::take(&mut self.listeners)
            .into_iter()
            .zip(sockets)
            .map(|(listener, fd)| FdMapping { parent_fd: OwnedFd::from(listener), child_fd: fd as i32 })
            .collect();
        if self.config.network == NetworkKind::Passt {
            let passt = qemu.passt.as_deref().ok_or(SpawnError::PasstMissing)?;
            let filter = qemu.frame_filter.as_deref().ok_or(SpawnError::FilterMissing)?;
            let (helpers, parent_fd) = Helpers::start(passt, filter, self.config.owner)
                .map_err(refused("start the network helpers"))?;
            mappings.push(FdMapping { parent_fd, child_fd: ChildFd::Network as i32 });
            self.helpers = Some(helpers);
        }
        let mut command = Command::new(&qemu.program);
        command.args(device::arguments(self.config, qemu, &self.record.uuid));
        if let Some(owner) = self.config.owner {
            run_as(&mut command, owner);
        }
        outliving_us(&mut command);
        yielding(&mut command, self.config.niceness);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
            .fd_mappings(mappings)
            .map_err(|error| refused("pass descriptors to QEMU")(io::Error::other(error.to_string())))?;
        let mut child = command
            .spawn()
            .map_err(|source| SpawnError::QemuMissing { program: qemu.program.clone(), source })?;
        // The command still holds the listening sockets: with it alive, they would outlive QEMU.
        drop(command);
        let (tail, drained) = StderrTail::of(&mut child);
        let pid = child.id();
        self.qemu = Some((child, tail, drained));
        // Our child isn't reaped yet, so its pid can't be another's.
        let identity = pid.map(ProcessIdentity::of).transpose().map_err(refused("look at QEMU"))?;
        self.record.process = identity;
        self.record.write(&self.config.runtime_dir)?;
        tracing::info!(
            session = self.config.session,
            generation = self.config.generation,
            pid,
            "QEMU started"
        );
        Ok(())
    }

    /// Waits for QEMU's greeting, or its end.
    async fn await_answer(&mut self) -> Result<(), SpawnError> {
        let Some((qemu, tail, drained)) = &mut self.qemu else { return Ok(()) };
        let monitor = Client::connect(&self.record.sockets.service_monitor, ANSWER_WITHIN);
        let status = tokio::select! {
            connected = monitor => match connected {
                Ok(_) => return check_network(self.helpers.as_mut()).await,
                Err(ConnectError::Closed | ConnectError::Io(_)) => qemu.wait().await.map_err(refused("wait for QEMU"))?,
                Err(source) => return Err(SpawnError::NoAnswer { stderr: tail.text(), source }),
            },
            status = qemu.wait() => status.map_err(refused("wait for QEMU"))?,
        };
        // QEMU has ended, so its stderr ends too.
        let _ = tokio::time::timeout(KILL_WITHIN, drained).await;
        Err(why_qemu_ended(status, tail.text(), self.config))
    }

    fn succeed(mut self) -> Spawned {
        self.made = Made::Vm;
        let (qemu, stderr, _) = self.qemu.take().expect("QEMU answered");
        Spawned { record: self.record.clone(), stderr, qemu, helpers: self.helpers.take() }
    }
}

/// passt says what it doesn't like right at its start, before QEMU is up.
async fn check_network(helpers: Option<&mut Helpers>) -> Result<(), SpawnError> {
    let Some(helpers) = helpers else { return Ok(()) };
    match helpers.ended().await.map_err(refused("look at the network helpers"))? {
        None => Ok(()),
        Some(words) => Err(SpawnError::Network(words)),
    }
}

fn why_qemu_ended(status: ExitStatus, stderr: String, config: &VmConfig) -> SpawnError {
    let said = |words: &str| stderr.contains(words);
    if said("Could not access KVM") || said("failed to initialize kvm") {
        SpawnError::Kvm(stderr)
    } else if said("Cannot allocate memory") || said("cannot set up guest memory") {
        SpawnError::NoMemory {
            needed_mib: config.memory_mib,
            available_mib: available_memory_mib().unwrap_or(0),
        }
    } else if said("Failed to get \"write\" lock") {
        SpawnError::DiskInUse
    } else {
        SpawnError::QemuEnded { status, stderr }
    }
}

/// The generation of the VM that the record in this directory tells of, if that VM is up. A record that can't be read is
/// in nobody's way.
fn up(runtime_dir: &Path) -> Result<Option<u64>, SpawnError> {
    let Ok(Some(record)) = VmRecord::read(runtime_dir) else { return Ok(None) };
    let alive = record.is_up().map_err(refused("look at the session's VM"))?;
    Ok(alive.then_some(record.generation))
}

/// Refuses what could only end badly later.
fn check_host(config: &VmConfig) -> Result<(), SpawnError> {
    if let Some(available_mib) = available_memory_mib()
        && available_mib < config.memory_mib / 2
    {
        return Err(SpawnError::NoMemory { needed_mib: config.memory_mib, available_mib });
    }
    let directory = config.memory_file.parent().unwrap_or(Path::new("/"));
    let free = free_bytes(directory).map_err(refused("look at free space"))?;
    if free < FREE_BYTES_MIN {
        return Err(SpawnError::NoSpace { path: directory.to_owned(), free_mib: free >> 20 });
    }
    Ok(())
}

fn available_memory_mib() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib / 1024)
}

fn remove_if_present(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn give(path: &Path, owner: Option<Owner>) -> io::Result<()> {
    owner.map_or(Ok(()), |owner| std::os::unix::fs::lchown(path, Some(owner.uid), Some(owner.gid)))
}
