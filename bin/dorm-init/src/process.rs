//! Root processes: a program in the guest whose input and output are a stream of the agent channel.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use dormouse_agent_proto::{
    Answer, Failure, FailureCode, PROCESS_PAYLOAD_MAX, ProcessFrame, RUNNING_MAX, Reply, RunProcess,
    RunningProcess, TerminalSize,
};
use dormouse_mux::{Stream, read_process_frame, write_json};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use crate::limits;

/// How long a process whose client is gone has between SIGHUP and SIGKILL.
const HANG_UP_WITHIN: Duration = Duration::from_secs(10);

/// Frames of output that wait for the client to read.
const OUTPUT_QUEUE: usize = 16;

/// How long more output of a process that is gone is waited for, in all.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(1);

/// Bytes that are still read of each output of a process that is gone. A pipe holds no more (`fs.pipe-max-size`), so all that
/// the process itself wrote is among them.
const LAST_WORDS_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of a process's command line that are told.
const COMMAND_BYTES_MAX: usize = 100;

/// The root processes that run: a host that didn't start them has to know of them.
#[derive(Debug, Default)]
pub(crate) struct Processes(watch::Sender<BTreeMap<u32, String>>);

impl Processes {
    pub(crate) fn watch(&self) -> watch::Receiver<BTreeMap<u32, String>> {
        self.0.subscribe()
    }

    /// As they are told.
    pub(crate) fn list(processes: &BTreeMap<u32, String>) -> Vec<RunningProcess> {
        let told = |(pid, command): (&u32, &String)| RunningProcess { pid: *pid, command: command.clone() };
        processes.iter().take(RUNNING_MAX).map(told).collect()
    }

    /// One more, until what this returns is dropped.
    fn enter(&self, pid: u32, argv: &[String]) -> Running {
        let mut command = argv.join(" ");
        command.truncate(command.floor_char_boundary(COMMAND_BYTES_MAX));
        self.0.send_modify(|processes| drop(processes.insert(pid, command)));
        Running { pid, processes: self.0.clone() }
    }
}

/// A process in the list.
struct Running {
    pid: u32,
    processes: watch::Sender<BTreeMap<u32, String>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.processes.send_modify(|processes| drop(processes.remove(&self.pid)));
    }
}

/// Starts the process, answers, and relays until it ends.
pub(crate) async fn run(
    mut stream: Stream,
    wish: RunProcess,
    processes: &Processes,
) -> Result<(), dormouse_mux::JsonError> {
    let started = match start(&wish) {
        Ok(started) => started,
        Err(failure) => return write_json(&mut stream, &Reply::Err(failure)).await,
    };
    let pid = started.child.id().unwrap_or_default();
    let running = processes.enter(pid, &wish.argv);
    // A host that is gone by now is one whose process goes on, or is hung up on, like any other.
    let _ = write_json(&mut stream, &Reply::Ok(Answer::Running { pid })).await;
    let (reader, writer) = tokio::io::split(stream);
    relay(started, wish.detach, running, reader, writer).await;
    Ok(())
}

type Input = Box<dyn AsyncWrite + Send + Unpin>;
type Output = Box<dyn AsyncRead + Send + Unpin>;

/// Makes a frame of a piece of output.
type Frame = fn(Vec<u8>) -> ProcessFrame;

struct Started {
    child: Child,
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    terminal: Option<OwnedFd>,
}

fn start(wish: &RunProcess) -> Result<Started, Failure> {
    let invalid = |message: String| Failure { code: FailureCode::Invalid, message };
    let (program, arguments) =
        wish.argv.split_first().ok_or_else(|| invalid("no program was named".to_owned()))?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(wish.cwd.as_deref().unwrap_or("/"));
    for pair in &wish.env {
        let (name, value) =
            pair.split_once('=').ok_or_else(|| invalid(format!("{pair:?} is no NAME=VALUE")))?;
        command.env(name, value);
    }
    if let Some(user) = &wish.user {
        let (uid, gid) = look_up(user).ok_or_else(|| Failure {
            code: FailureCode::NotFound,
            message: format!("the guest has no user {user:?}"),
        })?;
        command.uid(uid).gid(gid);
    }
    limits::lower_for(command.as_std_mut());
    let failed = |error: std::io::Error| Failure {
        code: if error.kind() == std::io::ErrorKind::NotFound {
            FailureCode::NotFound
        } else {
            FailureCode::Io
        },
        message: format!("can't run {program:?} in the guest: {error}"),
    };
    match wish.tty {
        Some(size) => with_terminal(command, size).map_err(failed),
        None => with_pipes(command).map_err(failed),
    }
}

fn with_pipes(mut command: Command) -> std::io::Result<Started> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let stdin = child.stdin.take().map(|pipe| Box::new(pipe) as Input);
    let stdout = child.stdout.take().map(|pipe| Box::new(pipe) as Output);
    let stderr = child.stderr.take().map(|pipe| Box::new(pipe) as Output);
    Ok(Started { child, stdin, stdout, stderr, terminal: None })
}

fn with_terminal(mut command: Command, size: TerminalSize) -> std::io::Result<Started> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    resize(&master, size)?;
    let path = ptsname(&master, Vec::new())?.into_string().map_err(std::io::Error::other)?;
    let slave = fs::File::options().read(true).write(true).open(path)?;
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    #[expect(unsafe_code, reason = "a terminal can only be made the child's own by the child")]
    // SAFETY: between fork and exec only async-signal-safe calls are made: setsid and an ioctl.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?)
        });
    }
    let child = command.spawn()?;
    let file =
        |fd: &OwnedFd| Ok::<_, std::io::Error>(tokio::fs::File::from_std(fs::File::from(fd.try_clone()?)));
    let (stdin, stdout) = (file(&master)?, file(&master)?);
    Ok(Started {
        child,
        stdin: Some(Box::new(stdin)),
        stdout: Some(Box::new(stdout)),
        stderr: None,
        terminal: Some(master),
    })
}

fn resize(terminal: &OwnedFd, size: TerminalSize) -> std::io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Numbers are taken as they are; names from the guest's own list.
fn look_up(user: &str) -> Option<(u32, u32)> {
    let (user, group) = user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
    let (uid, gid) = match user.parse() {
        Ok(uid) => (uid, None),
        Err(_) => {
            let accounts = fs::read_to_string("/etc/passwd").ok()?;
            let fields = accounts.lines().map(|line| line.split(':').collect::<Vec<_>>());
            let found = fields.into_iter().find(|fields| fields.first() == Some(&user))?;
            (found.get(2)?.parse().ok()?, found.get(3)?.parse().ok())
        }
    };
    let gid = match group {
        Some(group) => group.parse().ok()?,
        None => gid.unwrap_or(uid),
    };
    Some((uid, gid))
}

async fn relay(
    started: Started,
    detach: bool,
    running: Running,
    reader: impl AsyncRead + Send + Unpin + 'static,
    writer: impl AsyncWrite + Send + Unpin + 'static,
) {
    let Started { mut child, stdin, stdout, stderr, terminal } = started;
    let group = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    let (frames, queue) = mpsc::channel(OUTPUT_QUEUE);
    let sending = tokio::spawn(send(queue, writer));
    let (alive, is_alive) = watch::channel(());
    let read = |output: Output, frame: Frame| {
        tokio::spawn(read_output(output, frame, frames.clone(), is_alive.clone()))
    };
    let outputs = [
        stdout.map(|output| read(output, ProcessFrame::Stdout)),
        stderr.map(|output| read(output, ProcessFrame::Stderr)),
    ];
    let receiving = tokio::spawn(receive(reader, stdin, terminal, group));
    let status = tokio::select! {
        status = child.wait() => status,
        _ = receiving_ended(receiving), if !detach => hang_up(&mut child, group).await,
    };
    drop(running);
    drop(alive);
    // What was written before the end comes before the end, however long the client takes for it. For one that is gone `send`
    // takes all at once.
    for output in outputs.into_iter().flatten() {
        let _ = output.await;
    }
    let _ = frames.send(ProcessFrame::Exit(status.map_or(-1, exit_code))).await;
    drop(frames);
    let _ = timeout(HANG_UP_WITHIN, sending).await;
}

/// The client may close only its sending side: then there is no more input, and no hang-up.
async fn receiving_ended(receiving: tokio::task::JoinHandle<ClientEnd>) {
    if !matches!(receiving.await, Ok(ClientEnd::Gone)) {
        std::future::pending::<()>().await;
    }
}

/// How a client stopped sending.
enum ClientEnd {
    /// In order.
    Quiet,
    /// The channel broke, or it spoke nonsense.
    Gone,
}

async fn hang_up(child: &mut Child, group: Option<Pid>) -> std::io::Result<ExitStatus> {
    if let Some(group) = group {
        let _ = kill_process_group(group, Signal::HUP);
    }
    match timeout(HANG_UP_WITHIN, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            if let Some(group) = group {
                let _ = kill_process_group(group, Signal::KILL);
            }
            child.wait().await
        }
    }
}

/// As shells have it: 128 and the signal.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

async fn send(mut queue: mpsc::Receiver<ProcessFrame>, mut writer: impl AsyncWrite + Unpin) {
    while let Some(frame) = queue.recv().await {
        if writer.write_all(&frame.encode()).await.is_err() || writer.flush().await.is_err() {
            // A process that goes on without a host must not find its output closed.
            while queue.recv().await.is_some() {}
            return;
        }
    }
    let _ = writer.shutdown().await;
}

/// Passes an output on until it is over. `is_alive` is closed when its process is gone.
async fn read_output(
    mut output: Output,
    frame: Frame,
    frames: mpsc::Sender<ProcessFrame>,
    mut is_alive: watch::Receiver<()>,
) {
    let mut buffer = vec![0; PROCESS_PAYLOAD_MAX];
    let mut last_words = LastWords { within: LAST_WORDS_WITHIN, bytes: LAST_WORDS_BYTES_MAX };
    loop {
        // A terminal whose last program ended reads as an error.
        let count = tokio::select! {
            biased;
            _ = is_alive.changed() => last_words.read(&mut output, &mut buffer).await,
            count = output.read(&mut buffer) => count.ok(),
        };
        let Some(count @ 1..) = count else { return };
        if frames.send(frame(buffer[..count].to_vec())).await.is_err() {
            return;
        }
    }
}

/// What is still read of an output whose process is gone. A grandchild may keep it open, and write on: not for ever. The time
/// that the client takes doesn't count.
struct LastWords {
    within: Duration,
    bytes: usize,
}

impl LastWords {
    /// Reads once. `None`: no more of it.
    async fn read(&mut self, output: &mut Output, buffer: &mut [u8]) -> Option<usize> {
        let room = buffer.len().min(self.bytes);
        if room == 0 {
            return None;
        }
        let begin = Instant::now();
        let count = timeout(self.within, output.read(&mut buffer[..room])).await.ok()?.ok()?;
        self.within = self.within.saturating_sub(begin.elapsed());
        self.bytes -= count;
        Some(count)
    }
}

async fn receive(
    mut reader: impl AsyncRead + Unpin,
    mut stdin: Option<Input>,
    terminal: Option<OwnedFd>,
    group: Option<Pid>,
) -> ClientEnd {
    let mut buffer = Vec::new();
    loop {
        match read_process_frame(&mut reader, &mut buffer).await {
            Ok(Some(ProcessFrame::Stdin(bytes))) if bytes.is_empty() => stdin = None,
            Ok(Some(ProcessFrame::Stdin(bytes))) => {
                if let Some(pipe) = &mut stdin
                    && (pipe.write_all(&bytes).await.is_err() || pipe.flush().await.is_err())
                {
                    stdin = None;
                }
            }
            Ok(Some(ProcessFrame::Resize(rows, columns))) => {
                if let Some(terminal) = &terminal {
                    let _ = resize(terminal, TerminalSize { rows, columns });
                }
            }
            Ok(Some(ProcessFrame::Signal(number))) => {
                if let (Some(group), Some(signal)) = (group, Signal::from_named_raw(number)) {
                    let _ = kill_process_group(group, signal);
                }
            }
            Ok(None) => return ClientEnd::Quiet,
            Ok(Some(_)) | Err(_) => return ClientEnd::Gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex, repeat};
    use tokio::task::JoinHandle;
    use tokio::time::sleep;

    use super::*;

    /// Longest that anything may take here.
    const WITHIN: Duration = Duration::from_secs(60);

    /// More pieces than wait for a client that doesn't read: the last ones stay in the pipe.
    const PIECES: usize = 60;

    /// A script that writes each of them when the one before was read.
    fn write_pieces() -> String {
        format!(
            "i=0; while [ $i -lt {PIECES} ]; do i=$((i+1)); echo $i; sleep 0.01; done; echo end >&2; exit 7"
        )
    }

    /// A shell's script that runs, and its client.
    struct Script {
        client: DuplexStream,
        processes: Processes,
        relaying: JoinHandle<()>,
    }

    /// What a client was sent, and the status.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Heard {
        stdout: Vec<u8>,
        stderr: Vec<u8>,
        status: i32,
    }

    impl Script {
        fn start(script: &str) -> Self {
            let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
            let wish = RunProcess { argv, ..RunProcess::default() };
            let started = start(&wish).unwrap();
            let processes = Processes::default();
            let running = processes.enter(started.child.id().unwrap(), &wish.argv);
            // No more than a frame: so one that waits is sent when one was read, and none overtakes another.
            let (client, guest) = duplex(8);
            let (reader, writer) = tokio::io::split(guest);
            let relaying = tokio::spawn(relay(started, false, running, reader, writer));
            Self { client, processes, relaying }
        }

        /// Waits until the process is gone, whatever is still to be read of it.
        async fn is_gone(&self) {
            let mut running = self.processes.watch();
            timeout(WITHIN, running.wait_for(BTreeMap::is_empty)).await.expect("it hangs").unwrap();
        }

        /// Reads all, up to the status.
        async fn heard(&mut self) -> Heard {
            let (mut heard, mut buffer) = (Heard::default(), Vec::new());
            loop {
                let reading = timeout(WITHIN, read_process_frame(&mut self.client, &mut buffer));
                match reading.await.expect("it hangs").unwrap() {
                    Some(ProcessFrame::Stdout(bytes)) => heard.stdout.extend(bytes),
                    Some(ProcessFrame::Stderr(bytes)) => heard.stderr.extend(bytes),
                    Some(ProcessFrame::Exit(status)) => return Heard { status, ..heard },
                    other => panic!("{other:?} came"),
                }
            }
        }
    }

    #[tokio::test]
    async fn all_output_comes_before_the_status_however_long_the_client_pauses() {
        let mut script = Script::start(&write_pieces());
        script.is_gone().await;
        // Longer than both outputs are waited for, one after the other.
        sleep(LAST_WORDS_WITHIN * 4).await;
        let stdout = (1..=PIECES).flat_map(|piece| format!("{piece}\n").into_bytes()).collect();
        assert_eq!(script.heard().await, Heard { stdout, stderr: b"end\n".to_vec(), status: 7 });
    }

    #[tokio::test]
    async fn a_client_that_goes_before_it_has_read_all_holds_nothing() {
        let script = Script::start(&write_pieces());
        script.is_gone().await;
        drop(script.client);
        timeout(WITHIN, script.relaying).await.expect("it hangs").unwrap();
    }

    #[tokio::test]
    async fn a_status_comes_though_a_grandchild_writes_on() {
        let mut script = Script::start("yes & exit 3");
        assert_eq!(script.heard().await.status, 3);
        timeout(WITHIN, script.relaying).await.expect("it hangs").unwrap();
    }

    /// How many bytes are passed on of an output whose process is gone.
    async fn last_words(output: impl AsyncRead + Send + Unpin + 'static) -> usize {
        let (frames, mut queue) = mpsc::channel(1);
        let (alive, is_alive) = watch::channel(());
        drop(alive);
        tokio::spawn(read_output(Box::new(output), ProcessFrame::Stdout, frames, is_alive));
        let mut count = 0;
        while let Some(frame) = timeout(WITHIN, queue.recv()).await.expect("it hangs") {
            let ProcessFrame::Stdout(bytes) = frame else { panic!("{frame:?} came") };
            count += bytes.len();
        }
        count
    }

    #[tokio::test]
    async fn of_a_process_that_is_gone_no_more_is_read_than_it_can_have_left() {
        assert_eq!(last_words(repeat(b'y')).await, LAST_WORDS_BYTES_MAX);
        let (mut grandchild, output) = duplex(64);
        tokio::spawn(async move {
            while grandchild.write_all(b"y").await.is_ok() {
                sleep(LAST_WORDS_WITHIN / 10).await;
            }
        });
        assert!((1..64).contains(&last_words(output).await));
    }
}
