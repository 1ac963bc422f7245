//! The keeper: the process that shares folders with one VM.
//!
//! It ends with the VM or its device, and takes its virtiofsd along. When that dies first, another takes its place, which
//! shares nothing: the guest is to have errors instead of answers, and not to wait. One thread, which waits for all at once.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, kill_current_process_group, pidfd_open, set_parent_process_death_signal,
};

use crate::link::{Ask, CONTROL, DEVICE, LINE_BYTES_MAX, Told, VM};
use crate::proxy::{Proxy, Step};
use crate::share::{Access, Share};
use crate::tree::{Namespaces, Tree};
use crate::watch::Watcher;

/// Connections at a time; there are three, and three more while one host succeeds another.
const CONNECTIONS_MAX: usize = 8;

/// How much of virtiofsd's last words is kept, in bytes.
const WORDS_BYTES_MAX: usize = 1024;

/// How long a host may take to read an answer.
const WRITTEN_WITHIN: Duration = Duration::from_secs(5);

/// What a keeper is told on its command line.
#[derive(Debug, Clone)]
pub struct KeeperOptions {
    /// Over which folder it mounts.
    pub folder: PathBuf,
    /// virtiofsd.
    pub virtiofsd: PathBuf,
    /// Where it listens; removed in the end.
    pub control: PathBuf,
    /// Where it listens for QEMU; removed in the end.
    pub device: PathBuf,
}

/// The descriptors that a keeper inherits.
#[derive(Debug)]
pub struct Inherited {
    control: UnixListener,
    device: UnixListener,
    vm: OwnedFd,
}

impl Inherited {
    /// Takes them. Once, and before this process opens anything.
    #[must_use]
    #[expect(unsafe_code, reason = "inherited descriptors are known by number only")]
    pub fn take() -> Self {
        // SAFETY: whoever starts a keeper passes these descriptors, and nothing in this process has opened or taken them
        // before.
        let [control, device, vm] =
            unsafe { [CONTROL, DEVICE, VM].map(|descriptor| OwnedFd::from_raw_fd(descriptor)) };
        for descriptor in [&control, &device, &vm] {
            let _ = rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC);
        }
        Self { control: control.into(), device: device.into(), vm }
    }
}

/// Why a keeper could not begin, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// This host gives its users no namespaces.
    #[error(
        "this host lets no user have a namespace of their own, which keeps folders apart ({0}): its administrator can \
         allow it (kernel.unprivileged_userns_clone=1, or the AppArmor profile)"
    )]
    Namespaces(io::Error),
    /// The tree can't be made.
    #[error("can't make a place for shared folders: {0}")]
    Tree(io::Error),
    /// virtiofsd can't be run.
    #[error("can't run virtiofsd: {0}")]
    Virtiofsd(io::Error),
    /// It ended.
    #[error("virtiofsd ended ({status}) {words}")]
    Ended {
        /// How.
        status: String,
        /// Its last words.
        words: String,
    },
    /// The system refused something.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Shares folders until the VM or its device is gone. The process that calls this has one thread; it is killed in the end,
/// with all that it started.
pub fn keep(options: &KeeperOptions, inherited: Inherited) {
    let mut connections = Vec::new();
    let ended = begin(options, &inherited, &mut connections);
    if let Err(error) = &ended {
        tracing::warn!(%error, "folders are shared no longer");
        // Whoever has just started this asks how it is.
        if connections.is_empty()
            && let Ok((stream, _)) = inherited.control.accept()
        {
            connections.extend(Connection::new(stream));
        }
        tell_all(&mut connections, error);
    }
    for path in [&options.control, &options.device] {
        let _ = std::fs::remove_file(path);
    }
    let _ = kill_current_process_group(Signal::KILL);
}

fn begin(
    options: &KeeperOptions,
    inherited: &Inherited,
    connections: &mut Vec<Connection>,
) -> Result<(), KeeperError> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Namespaces::new().enter().map_err(KeeperError::Namespaces)?;
    let tree = Tree::new(&options.folder).map_err(KeeperError::Tree)?;
    let start = Start {
        program: options.virtiofsd.clone(),
        root: tree.root(),
        folder: options.folder.clone(),
        uid,
        gid,
    };
    let virtiofsd = start.virtiofsd().map_err(KeeperError::Virtiofsd)?;
    let watcher = Watcher::new(tree.root())
        .inspect_err(|error| tracing::warn!(%error, "watchers in containers aren't told of changes"));
    let watcher = watcher.ok();
    let mut serving = Serving { tree, watcher, start, virtiofsd, proxy: None, is_second: false };
    serving.run(inherited, connections)
}

fn tell_all(connections: &mut [Connection], error: &KeeperError) {
    for connection in connections {
        let _ = connection.tell(&Told::Failed(error.to_string()));
    }
}

/// How a virtiofsd is started.
#[derive(Debug)]
struct Start {
    program: PathBuf,
    /// What it shares.
    root: PathBuf,
    /// Where it listens, in a folder that nobody else sees.
    folder: PathBuf,
    /// Whose files the user's are in the guest.
    uid: u32,
    gid: u32,
}

/// virtiofsd, and what it said last.
#[derive(Debug)]
struct Virtiofsd {
    child: Child,
    pidfd: OwnedFd,
    path: PathBuf,
    stderr: ChildStderr,
    words: Vec<u8>,
}

impl Start {
    /// Starts one on a socket of its own. It makes a sandbox, in which nothing but what it shares exists. Files of the
    /// host's user are that user's in the guest too, and whoever writes there writes as them.
    fn virtiofsd(&self) -> io::Result<Virtiofsd> {
        let path = self.folder.join("virtiofsd");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        let mut command = Command::new(&self.program);
        command
            .args(["--fd", "3", "--shared-dir"])
            .arg(&self.root)
            .args(["--sandbox", "namespace", "--seccomp", "kill", "--inode-file-handles=never"])
            // What the host changes is seen at once, so nothing is kept in the guest; mmap(2) works all the same.
            .args(["--cache", "never", "--allow-mmap"])
            .args(["--no-announce-submounts", "--xattr", "--log-level", "error"]);
        for (option, id) in [("--translate-uid", self.uid), ("--translate-gid", self.gid)] {
            // In this user namespace the user is 0, and nobody else exists.
            command.args([option, "squash-guest:0:0:4294967295", option, &format!("host:0:{id}:1")]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let die_with_us = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
        // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe and allocates nothing.
        #[expect(unsafe_code, reason = "no safe way to have prctl(2) called in a child")]
        unsafe {
            command.pre_exec(die_with_us);
        }
        let mapping = FdMapping { parent_fd: listener.into(), child_fd: 3 };
        command.fd_mappings(vec![mapping]).map_err(io::Error::other)?;
        let mut child = command.spawn()?;
        // The command holds the listener until it is dropped: nobody would see virtiofsd go.
        drop(command);
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
        let stderr = child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
        rustix::io::ioctl_fionbio(&stderr, true)?;
        Ok(Virtiofsd { pidfd: pidfd_open(pid, PidfdFlags::empty())?, child, path, stderr, words: Vec::new() })
    }
}

impl Virtiofsd {
    fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.path)
    }

    fn hear(&mut self) {
        let mut buffer = [0; WORDS_BYTES_MAX];
        while let Ok(count @ 1..) = self.stderr.read(&mut buffer) {
            self.words.extend_from_slice(&buffer[..count]);
            let surplus = self.words.len().saturating_sub(WORDS_BYTES_MAX);
            self.words.drain(..surplus);
        }
    }

    /// One that is dead, or is from now on.
    fn last_words(&mut self) -> KeeperError {
        let _ = self.child.kill();
        self.hear();
        let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        KeeperError::Ended { status, words: String::from_utf8_lossy(&self.words).trim().to_owned() }
    }
}

/// What follows a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    GoOn,
    Quit,
}

/// One host's connection.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    line: Vec<u8>,
    waits: Waits,
}

/// What an answer is still due to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    Nothing,
    Changes,
}

impl Connection {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(WRITTEN_WITHIN))?;
        Ok(Self { stream, line: Vec::new(), waits: Waits::Nothing })
    }

    fn tell(&mut self, told: &Told) -> io::Result<()> {
        let mut line = serde_json::to_vec(told).map_err(io::Error::other)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }

    /// Takes what has come, and answers. An error ends the connection.
    fn serve(&mut self, tree: &mut Tree, watcher: &mut Option<Watcher>) -> io::Result<After> {
        let mut buffer = [0; 4096];
        let count = self.stream.read(&mut buffer)?;
        if count == 0 || self.line.len() as u64 > LINE_BYTES_MAX {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.line.extend_from_slice(&buffer[..count]);
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let ask = serde_json::from_slice(&line).map_err(io::Error::other)?;
            let done = match &ask {
                Ask::Share(share) => begin_sharing(share, tree, watcher.as_mut()).map(|()| Told::Done),
                Ask::TakeBack(share) => {
                    if let Some(watcher) = watcher {
                        watcher.end(&share.in_tree());
                    }
                    tree.take_back(share).map(|()| Told::Done)
                }
                Ask::Changes => {
                    self.waits = Waits::Changes;
                    continue;
                }
                // Whoever asked this waits for the end of the connection.
                Ask::Quit => return Ok(After::Quit),
                Ask::List => Ok(Told::Shares(tree.shares().cloned().collect())),
            };
            self.tell(&done.unwrap_or_else(|error| Told::Failed(error.to_string())))?;
        }
        Ok(After::GoOn)
    }
}

/// Shares it. Nothing can be told in the guest of a folder that it can't write to.
fn begin_sharing(share: &Share, tree: &mut Tree, watcher: Option<&mut Watcher>) -> io::Result<()> {
    if tree.share(share)?
        && share.access == Access::Write
        && let Some(watcher) = watcher
    {
        watcher.begin(share.in_tree());
    }
    Ok(())
}

/// A keeper at work.
#[derive(Debug)]
struct Serving {
    tree: Tree,
    /// What hears of changes, if the host has one left.
    watcher: Option<Watcher>,
    start: Start,
    virtiofsd: Virtiofsd,
    /// From QEMU's connection on.
    proxy: Option<Proxy>,
    /// The first virtiofsd has died.
    is_second: bool,
}

/// Who has something to say.
#[derive(Debug)]
struct Ready {
    ended: bool,
    vm_ended: bool,
    knocked: bool,
    said: bool,
    changed: bool,
    /// QEMU's first knock, or a message of it.
    qemu: bool,
    answered: bool,
    asked: Vec<bool>,
}

impl Serving {
    fn run(&mut self, inherited: &Inherited, connections: &mut Vec<Connection>) -> Result<(), KeeperError> {
        loop {
            let ready = self.wait(inherited, connections)?;
            if ready.vm_ended {
                return Ok(());
            }
            if ready.said {
                self.virtiofsd.hear();
            }
            let mut is_gone = ready.ended;
            if !is_gone
                && ready.answered
                && let Some(proxy) = &mut self.proxy
            {
                is_gone = proxy.hear_virtiofsd()? == Step::Gone;
            }
            if is_gone {
                self.replace(connections)?;
                continue;
            }
            if ready.qemu {
                match &mut self.proxy {
                    Some(proxy) => {
                        if proxy.hear_qemu()? == Step::Gone {
                            return Ok(());
                        }
                    }
                    None => {
                        let (qemu, _) = inherited.device.accept()?;
                        self.proxy = Some(Proxy::new(qemu, self.virtiofsd.connect()?));
                    }
                }
            }
            if self.answer(&ready.asked, connections) == After::Quit {
                return Ok(());
            }
            self.watch(ready.changed, connections);
            if ready.knocked {
                let (stream, _) = inherited.control.accept()?;
                if connections.len() < CONNECTIONS_MAX {
                    connections.push(Connection::new(stream)?);
                }
            }
        }
    }

    fn wait(&self, inherited: &Inherited, connections: &[Connection]) -> io::Result<Ready> {
        let qemu = self.proxy.as_ref().map_or(inherited.device.as_fd(), |proxy| proxy.qemu().as_fd());
        let mut fds = vec![
            self.virtiofsd.pidfd.as_fd(),
            inherited.vm.as_fd(),
            inherited.control.as_fd(),
            self.virtiofsd.stderr.as_fd(),
            qemu,
        ];
        let answers = self.proxy.as_ref().map(|proxy| proxy.virtiofsd().as_fd());
        fds.extend(answers);
        let changes = self.watcher.as_ref().map(Watcher::fd);
        fds.extend(changes);
        fds.extend(connections.iter().map(|one| one.stream.as_fd()));
        let mut fds: Vec<_> = fds.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let wait = self.longest_wait(connections).map(Timespec::try_from).transpose();
        poll(&mut fds, wait.map_err(io::Error::other)?.as_ref())?;
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let mut next = || ready.next().unwrap_or_default();
        let (ended, vm_ended, knocked, said, qemu) = (next(), next(), next(), next(), next());
        let answered = answers.is_some() && next();
        let changed = changes.is_some() && next();
        Ok(Ready { ended, vm_ended, knocked, said, changed, qemu, answered, asked: ready.collect() })
    }

    /// `None`: until somebody says something.
    fn longest_wait(&self, connections: &[Connection]) -> Option<Duration> {
        let watcher = self.watcher.as_ref()?;
        if watcher.is_behind() {
            return Some(Duration::ZERO);
        }
        let is_asked = connections.iter().any(|one| one.waits == Waits::Changes);
        let due = watcher.due().filter(|_| is_asked)?;
        Some(due.saturating_duration_since(Instant::now()))
    }

    /// Hears what has changed, looks into one more folder, and answers who has asked.
    fn watch(&mut self, changed: bool, connections: &mut Vec<Connection>) {
        let Some(watcher) = &mut self.watcher else { return };
        if changed {
            watcher.hear();
        }
        watcher.step();
        if watcher.due().is_none_or(|due| due > Instant::now()) {
            return;
        }
        let Some(at) = connections.iter().position(|one| one.waits == Waits::Changes) else { return };
        connections[at].waits = Waits::Nothing;
        if connections[at].tell(&Told::Changes(watcher.take())).is_err() {
            connections.remove(at);
        }
    }

    fn answer(&mut self, asked: &[bool], connections: &mut Vec<Connection>) -> After {
        let (mut asked, mut after) = (asked.iter(), After::GoOn);
        connections.retain_mut(|connection| {
            let is_asked = asked.next() == Some(&true);
            let served =
                if is_asked { connection.serve(&mut self.tree, &mut self.watcher) } else { Ok(After::GoOn) };
            if matches!(served, Ok(After::Quit)) {
                after = After::Quit;
            }
            served.is_ok()
        });
        after
    }

    /// virtiofsd is dead: the guest is answered by another, which shares nothing. One is enough to let the device go.
    fn replace(&mut self, connections: &mut [Connection]) -> Result<(), KeeperError> {
        let died = self.virtiofsd.last_words();
        let Some(proxy) = self.proxy.as_mut().filter(|_| !self.is_second) else { return Err(died) };
        tracing::warn!(error = %died, "what was shared answers with errors from now on");
        self.is_second = true;
        // What nobody can look at any more is nobody's to be told of.
        self.watcher = None;
        self.tree.close()?;
        self.virtiofsd = self.start.virtiofsd().map_err(KeeperError::Virtiofsd)?;
        proxy.replace(self.virtiofsd.connect()?)?;
        tell_all(connections, &died);
        Ok(())
    }
}
