//! containerd and dockerd: started, watched, restarted once, stopped.
//!
//! ```text
//! Starting ── containers and images can be listed ──► Ready
//!    │ died                                             │ died
//!    ▼                                                  ▼
//! Restarting ── listed ──► Ready            Restarting, or Dead if it died within the last 60 s too
//! ```
//!
//! dockerd runs with `live-restore`: its containers live on while it is restarted.

use std::collections::VecDeque;
use std::fs;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_agent_proto::EngineState;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::steps::Steps;
use crate::{console, fixed, limits};

/// The engine's API socket.
pub(crate) const SOCKET: &str = "/run/docker.sock";

const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// Two deaths within this time are one too many (ARCHITECTURE.md, "Engine death").
const CALM: Duration = Duration::from_secs(60);

/// How often a starting engine is asked whether it can list.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Longest wait for one answer of the engine. Under emulation the first ones take seconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// How long programs and containers have between SIGTERM and SIGKILL.
const STOP_WITHIN: Duration = Duration::from_secs(8);

/// A program's last words are this many lines of it.
const LAST_WORDS: usize = 20;

/// Longest line that is kept of a program's.
const LINE_BYTES_MAX: u64 = 4096;

/// The engine, as long as this is held.
#[derive(Debug)]
pub(crate) struct Engine {
    state: watch::Receiver<EngineState>,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Engine {
    /// Starts containerd and dockerd, and tells how far they are.
    pub(crate) fn start(steps: Steps) -> Self {
        let (sender, state) = watch::channel(EngineState::Starting);
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(supervise(sender, stopped, steps));
        Self { state, stop, task }
    }

    /// The engine's state, and its changes.
    pub(crate) fn state(&self) -> watch::Receiver<EngineState> {
        self.state.clone()
    }

    /// Stops the engine and everything that it started.
    pub(crate) async fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.task.await;
        end_everything().await;
    }
}

async fn supervise(state: watch::Sender<EngineState>, mut stop: oneshot::Receiver<()>, steps: Steps) {
    let mut last_death: Option<Instant> = None;
    loop {
        // Only the first life is a part of the bring-up.
        let steps = last_death.is_none().then_some(&steps);
        let end = tokio::select! {
            end = live(&state, steps) => end,
            _ = &mut stop => return,
        };
        let details = end.unwrap_or_else(|error| format!("{error:#}"));
        console::say(&format!("the engine ended: {details}"));
        if last_death.is_some_and(|death| death.elapsed() < CALM) {
            state.send_replace(EngineState::Dead { details });
            return;
        }
        last_death = Some(Instant::now());
        state.send_replace(EngineState::Restarting { details });
    }
}

/// One life of the engine. Dropping this future sends SIGTERM to what it started; a death of either takes the other
/// along, because dockerd doesn't get over a containerd that was replaced.
async fn live(state: &watch::Sender<EngineState>, steps: Option<&Steps>) -> Result<String> {
    let _ = fs::remove_file("/run/docker.pid");
    let mut containerd = Program::start(Command::new("containerd").args([
        "--root=/var/lib/docker/containerd",
        "--state=/run/containerd",
        &format!("--address={CONTAINERD_SOCKET}"),
        "--log-level=warn",
    ]))?;
    let mut dockerd = Program::start(Command::new("dockerd").env("PATH", fixed::path()?).args([
        &format!("--host=unix://{SOCKET}"),
        "--data-root=/var/lib/docker",
        "--exec-root=/run/docker",
        "--pidfile=/run/docker.pid",
        &format!("--containerd={CONTAINERD_SOCKET}"),
        "--live-restore",
        "--log-level=warn",
    ]))?;
    let step = |name| steps.iter().for_each(|steps| steps.begin(name));
    let ready = async {
        step("containerd");
        until_accepting(CONTAINERD_SOCKET).await;
        step("dockerd");
        until_accepting(SOCKET).await;
        step("listing");
        until_ready().await;
        state.send_replace(EngineState::Ready);
        std::future::pending::<()>().await;
    };
    let death = tokio::select! {
        death = containerd.death() => death,
        death = dockerd.death() => death,
        () = ready => unreachable!("this future never ends"),
    };
    // Their successors take the same sockets, which an old one would remove on its way out.
    dockerd.end().await;
    containerd.end().await;
    Ok(death)
}

async fn until_accepting(socket: &str) {
    while UnixStream::connect(socket).await.is_err() {
        sleep(ASK_EVERY).await;
    }
}

/// The engine is ready when containers and images can be listed: a socket that accepts proves nothing.
async fn until_ready() {
    loop {
        let mut listed = true;
        for path in ["/containers/json?all=1", "/images/json"] {
            listed = listed
                && timeout(ANSWER_WITHIN, get(path)).await.is_ok_and(|status| status.is_ok_and(|ok| ok));
        }
        if listed {
            return;
        }
        sleep(ASK_EVERY).await;
    }
}

/// Asks the engine, and says whether it answered with 200.
async fn get(path: &str) -> Result<bool> {
    const STATUS_LINE: usize = "HTTP/1.0 200".len();
    let mut stream = UnixStream::connect(SOCKET).await?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n").as_bytes()).await?;
    let mut line = [0; STATUS_LINE];
    stream.read_exact(&mut line).await?;
    // To the end, so that an answer that breaks off doesn't count.
    tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    Ok(line.ends_with(b" 200"))
}

/// A child, and its last words.
#[derive(Debug)]
struct Program {
    name: String,
    child: Child,
    last_words: Arc<Mutex<VecDeque<String>>>,
}

impl Program {
    fn start(command: &mut Command) -> Result<Self> {
        let name = command.as_std().get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        limits::lower_for(command.as_std_mut());
        let mut child = command.spawn().with_context(|| format!("can't start {name}"))?;
        let last_words = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(stderr) = child.stderr.take() {
            let (last_words, name) = (Arc::clone(&last_words), name.clone());
            tokio::spawn(async move {
                let mut lines = BufReader::new(stderr);
                let mut line = Vec::new();
                while (&mut lines)
                    .take(LINE_BYTES_MAX)
                    .read_until(b'\n', &mut line)
                    .await
                    .is_ok_and(|count| count > 0)
                {
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    line.clear();
                    console::say(&format!("{name}: {text}"));
                    let mut kept = last_words.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    if kept.len() == LAST_WORDS {
                        kept.pop_front();
                    }
                    kept.push_back(text);
                }
            });
        }
        Ok(Self { name, child, last_words })
    }

    async fn death(&mut self) -> String {
        let status = match self.child.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let kept = self.last_words.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let words: Vec<_> = kept.iter().map(String::as_str).collect();
        format!("{} ended with {status}: {}", self.name, words.join("\n"))
    }
}

impl Program {
    /// Ends it, if it hasn't ended, and waits until it is gone.
    async fn end(&mut self) {
        self.terminate();
        if timeout(STOP_WITHIN, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }

    /// Nothing happens to one that was waited for.
    fn terminate(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.terminate();
    }
}

/// Ends every process but PID 1 and this one: first politely. Containers that are running are not told to the engine
/// as stopped by a user, so that their restart policies hold at the next boot.
async fn end_everything() {
    let deadline = Instant::now() + STOP_WITHIN;
    signal_everything(Signal::TERM);
    while signal_everything(Signal::CONT) > 0 && Instant::now() < deadline {
        sleep(Duration::from_millis(20)).await;
    }
    signal_everything(Signal::KILL);
}

/// Sends a signal to all, and says to how many.
fn signal_everything(signal: Signal) -> usize {
    let Ok(entries) = fs::read_dir("/proc") else { return 0 };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let others = pids
        .filter(|pid| *pid > 1 && pid.cast_unsigned() != std::process::id())
        .filter(|pid| is_program(*pid));
    others.filter_map(Pid::from_raw).filter(|pid| kill_process(*pid, signal).is_ok()).count()
}

/// Kernel threads and zombies have no command line.
fn is_program(pid: i32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}
