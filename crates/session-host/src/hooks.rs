//! Hooks: programs of the session's owner and of the machine's administrator that are told what happens.
//!
//! ```text
//! owner ──► queue ──► runner: one event at a time, in order ──► programs, one after the other
//!                       └─ for each: docker.sock and control.sock of its own, which die with it
//! ```
//!
//! A program gets the event's name as its argument and the event as JSON on its standard input. It is run as the session's
//! user, under no lock, and all programs of one event have [`EVENT_WITHIN`] together. Its sockets serve by a VM that is
//! up, or not at all: a stopping hook that waited for a VM would wait for itself (H10, H11). What it asks for over them
//! runs no hooks, for the same reason.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use dormouse_api::{Fact, SessionEvent};
use dormouse_lifecycle::{Ask, Event};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use crate::gate::Gate;
use crate::host::Served;
use crate::owner::{Facts, Inbox, Message};

/// The time of all programs for one event. As long as the core waits for those that are told of a sleep.
const EVENT_WITHIN: Duration = Duration::from_secs(10);

/// Events that wait for their hooks. The guest makes events as well: those beyond are not told.
const QUEUE: usize = 256;

/// How much of a program's words is kept.
const WORDS_BYTES_MAX: u64 = 4096;

/// Where programs lie in the session's folder.
const FOLDER: &str = "hooks.d";

/// What the hooks said to something that they may forbid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing against it.
    Fine,
    /// No, in the hook's words.
    Veto(String),
}

/// Whom to tell that an event's hooks are done.
#[derive(Debug)]
pub(crate) enum Reply {
    /// Nobody waits.
    Nobody,
    /// The core waits, to put the VM to sleep.
    Sleep(Ask),
    /// Somebody asks whether he may.
    Verdict(oneshot::Sender<Verdict>),
}

/// An event whose hooks are to be run.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) event: SessionEvent,
    pub(crate) reply: Reply,
}

/// The way to the runner. Clones are the same runner.
#[derive(Debug, Clone)]
pub(crate) struct Hooks {
    queue: mpsc::Sender<Job>,
    /// Events whose hooks aren't done.
    pending: watch::Sender<usize>,
}

impl Hooks {
    /// The way, and what the runner needs at its other end.
    pub(crate) fn new() -> (Self, Jobs) {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let pending = watch::channel(0).0;
        (Self { queue, pending: pending.clone() }, Jobs { jobs, pending })
    }

    /// Has an event's hooks run after those of earlier events. Returns the job if too many wait already.
    pub(crate) fn tell(&self, job: Job) -> Result<(), Job> {
        self.pending.send_modify(|pending| *pending += 1);
        self.queue.try_send(job).map_err(|error| {
            self.pending.send_modify(|pending| *pending -= 1);
            error.into_inner()
        })
    }

    /// Waits until all hooks are done.
    pub(crate) async fn done(&self) {
        let _ = self.pending.subscribe().wait_for(|pending| *pending == 0).await;
    }
}

/// The events whose hooks are to be run, in order.
#[derive(Debug)]
pub(crate) struct Jobs {
    jobs: mpsc::Receiver<Job>,
    pending: watch::Sender<usize>,
}

impl Jobs {
    pub(crate) async fn next(&mut self) -> Option<Job> {
        self.jobs.recv().await
    }

    /// One event's hooks are done.
    pub(crate) fn done(&self) {
        self.pending.send_modify(|pending| *pending = pending.saturating_sub(1));
    }
}

/// Tells whoever waits what came of an event's hooks.
pub(crate) fn answer(inbox: &Inbox, reply: Reply, verdict: Verdict) {
    match reply {
        Reply::Nobody => {}
        Reply::Sleep(ask) => inbox.send(Message::Event(Event::HooksDone { ask })),
        Reply::Verdict(asker) => {
            let _ = asker.send(verdict);
        }
    }
}

/// What went wrong with a program.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("can't be run: {0}")]
    Spawn(std::io::Error),
    #[error("hung and was killed after {} s", .0.as_secs())]
    Hung(Duration),
    #[error("{}", said(.status, .words))]
    Failed { status: std::process::ExitStatus, words: String },
}

fn said(status: &std::process::ExitStatus, words: &str) -> String {
    if words.is_empty() { format!("ended with {status}") } else { words.to_owned() }
}

/// Runs hooks.
#[derive(Debug)]
pub(crate) struct Runner {
    machine: PathBuf,
    session: PathBuf,
    runtime_dir: PathBuf,
    served: Served,
    inbox: Inbox,
    within: Duration,
    gates: u64,
}

impl Runner {
    /// A runner of this session's hooks, which are served what `served` is, by a VM that is up.
    pub(crate) fn new(facts: &Facts, served: Served) -> Self {
        Self {
            machine: facts.settings.machine_hooks.clone(),
            session: facts.session_dir.join(FOLDER),
            runtime_dir: facts.runtime_dir.clone(),
            inbox: served.owner.inbox.clone(),
            served,
            within: EVENT_WITHIN,
            gates: 0,
        }
    }

    /// Gives all programs of an event so much time.
    #[cfg(test)]
    pub(crate) fn within(self, within: Duration) -> Self {
        Self { within, ..self }
    }

    /// Runs the hooks of one event after the other, until nobody can have any run.
    pub(crate) async fn run(mut self, mut jobs: Jobs) {
        while let Some(Job { event, reply }) = jobs.next().await {
            let verdict = self.tell_all(&event).await;
            answer(&self.inbox, reply, verdict);
            jobs.done();
        }
    }

    async fn tell_all(&mut self, event: &SessionEvent) -> Verdict {
        let deadline = Instant::now() + self.within;
        let programs = programs(&self.machine, Owners::Root).into_iter();
        for program in programs.chain(programs_of_session(&self.session)) {
            let Err(trouble) = self.tell(&program, event, deadline).await else { continue };
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let words = format!("{}: the hook {name} {}", event.fact.name(), Spoken(&trouble));
            tracing::warn!(hook = %program.display(), event = event.fact.name(), %trouble, "a hook failed");
            self.inbox.send(Message::HookFailed { generation: event.fact.generation(), words });
            if matches!(event.fact, Fact::SessionCreated { .. } | Fact::ContainerStarting { .. }) {
                return Verdict::Veto(trouble.to_string());
            }
        }
        Verdict::Fine
    }

    async fn tell(&mut self, program: &Path, event: &SessionEvent, deadline: Instant) -> Result<(), Trouble> {
        self.gates += 1;
        let folder = self.runtime_dir.join(format!("h{}", self.gates));
        let gate = Gate::open(folder, &self.served).map_err(Trouble::Spawn)?;
        let mut child = Command::new(program)
            .arg(event.fact.name())
            .current_dir("/")
            .env("DOCKER_HOST", format!("unix://{}", gate.docker().display()))
            .env("DORM_SOCKET", gate.control())
            .env("DORM_SESSION", event.session.as_str())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(Trouble::Spawn)?;
        let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let ended = timeout_at(deadline, converse(&mut child, event)).await;
        // Its children end with it, whether or not it did so in time.
        if let Some(group) = group {
            let _ = kill_process_group(group, Signal::KILL);
        }
        match ended {
            Ok(Ok((status, _))) if status.success() => Ok(()),
            Ok(Ok((status, words))) => Err(Trouble::Failed { status, words }),
            Ok(Err(error)) => Err(Trouble::Spawn(error)),
            Err(_) => Err(Trouble::Hung(self.within)),
        }
    }
}

/// Gives a program its event, and returns how it ended and the last line that it said.
async fn converse(
    child: &mut Child,
    event: &SessionEvent,
) -> std::io::Result<(std::process::ExitStatus, String)> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    if let Some(mut stdin) = child.stdin.take() {
        // Many programs don't care to read it.
        let _ = stdin.write_all(&line).await;
    }
    let mut words = Vec::new();
    let stderr = child.stderr.take();
    let (status, ()) = tokio::join!(child.wait(), async {
        if let Some(stderr) = stderr {
            // What says more than is kept is cut off. A grandchild that keeps the pipe open is given up with the event.
            let _ = timeout(EVENT_WITHIN, stderr.take(WORDS_BYTES_MAX).read_to_end(&mut words)).await;
        }
    });
    let words = String::from_utf8_lossy(&words);
    let last = words.lines().rev().find(|line| !line.trim().is_empty());
    Ok((status?, last.unwrap_or_default().trim().to_owned()))
}

/// A trouble as a part of a sentence.
struct Spoken<'a>(&'a Trouble);

impl fmt::Display for Spoken<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Trouble::Failed { .. } => write!(f, "failed: {}", self.0),
            Trouble::Spawn(_) | Trouble::Hung(_) => self.0.fmt(f),
        }
    }
}

/// Who may have written the programs of a folder.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owners {
    Root,
    Anybody,
}

fn programs_of_session(folder: &Path) -> Vec<PathBuf> {
    programs(folder, Owners::Anybody)
}

/// The programs of a folder, by name. What anybody but root can write is none of the machine's.
fn programs(folder: &Path, owners: Owners) -> Vec<PathBuf> {
    let trusted = |path: &Path| match fs::metadata(path) {
        Ok(metadata) if owners == Owners::Root && (metadata.uid() != 0 || metadata.mode() & 0o022 != 0) => {
            tracing::warn!(path = %path.display(), "not root's alone: its hooks are not run");
            None
        }
        Ok(metadata) => Some(metadata),
        Err(_) => None,
    };
    if trusted(folder).is_none() {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut programs: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| trusted(path).is_some_and(|file| file.is_file() && file.mode() & 0o111 != 0))
        .collect();
    programs.sort();
    programs
}
