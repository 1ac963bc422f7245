//! `dorm session run` and `shell`: processes in the VM's root namespace, beside the engine.

use std::io::{self, IsTerminal};

use clap::Args;
use dormouse_agent_proto::{ProcessFrame, RunProcess, TerminalSize};
use dormouse_client::{Endpoint, Upgraded};
use http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::container::variables::environment;
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::output::warn;
use crate::stream::input;
use crate::terminal::{Mode, size};

/// Frames that wait to be sent.
const QUEUE: usize = 8;

/// What a shell's programs take the terminal for.
const TERM: &str = "TERM=xterm-256color";

#[derive(Args)]
pub(crate) struct Run {
    /// Let it run by itself; it keeps the VM awake until it ends.
    #[arg(short, long, conflicts_with = "tty")]
    detach: bool,
    /// Give it a terminal.
    #[arg(short, long)]
    tty: bool,
    #[command(flatten)]
    place: Place,
    /// What to run.
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Args)]
pub(crate) struct Shell {
    #[command(flatten)]
    place: Place,
}

/// Where and as whom a process runs.
#[derive(Args)]
pub(super) struct Place {
    /// Set a variable; without a value, take ours.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Start in this folder of the VM.
    #[arg(short, long, value_name = "PATH")]
    workdir: Option<String>,
    /// Run as this user of the VM; root when absent.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
}

impl Run {
    pub(crate) async fn run(self, context: &Context) -> Done {
        self.place.start(context, self.command, self.tty, self.detach).await
    }
}

impl Shell {
    pub(crate) async fn run(self, context: &Context) -> Done {
        needs_terminal("`dorm session run sh` reads a script from a pipe")?;
        self.place.shell(context).await
    }
}

/// A shell is for somebody who types.
pub(super) fn needs_terminal(otherwise: &str) -> Result<(), Failure> {
    if io::stdin().is_terminal() {
        return Ok(());
    }
    Err(Failure::new("a shell needs a terminal").hint(otherwise))
}

impl Place {
    /// A login shell on our terminal.
    pub(super) async fn shell(mut self, context: &Context) -> Done {
        self.env.insert(0, TERM.to_owned());
        self.start(context, vec!["/bin/sh".to_owned(), "-l".to_owned()], true, false).await
    }

    async fn start(self, context: &Context, argv: Vec<String>, tty: bool, detach: bool) -> Done {
        if tty && !io::stdin().is_terminal() {
            return Err(Failure::new("standard input is no terminal").hint("leave -t away to pipe into it"));
        }
        let (rows, columns) = size().unwrap_or((24, 80));
        let process = RunProcess {
            argv,
            env: environment(&[], &self.env).map_err(Failure::new)?,
            cwd: self.workdir,
            user: self.user,
            tty: tty.then_some(TerminalSize { rows, columns }),
            detach,
        };
        let operation = context.reading().await?;
        let info = context.open(&context.pick(None)).await?;
        let control = Endpoint::new(&info.control_socket).warning(warn);
        operation
            .during(async {
                let stream = control.upgrade(Method::POST, "/v1/run", &process, "dorm-process").await?;
                if detach { Ok(SUCCESS) } else { join(stream, tty).await }
            })
            .await
    }
}

/// Joins the process's streams with ours until it ends.
async fn join(stream: Upgraded, tty: bool) -> Done {
    let (from, to) = tokio::io::split(stream);
    let raw = if tty { Some(Mode::raw()?) } else { None };
    let (frames, queue) = mpsc::channel(QUEUE);
    // Nothing that is sent is of use once the process has ended.
    let _sending = [
        AbortOnDropHandle::new(tokio::spawn(send(to, queue))),
        AbortOnDropHandle::new(tokio::spawn(send_input(frames.clone()))),
        AbortOnDropHandle::new(tokio::spawn(send_changes(frames, tty))),
    ];
    let done = show(from).await;
    drop(raw);
    done
}

async fn send(mut to: WriteHalf<Upgraded>, mut frames: mpsc::Receiver<ProcessFrame>) {
    while let Some(frame) = frames.recv().await {
        if to.write_all(&frame.encode()).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
}

async fn send_input(frames: mpsc::Sender<ProcessFrame>) {
    let mut typed = input();
    while let Some(bytes) = typed.recv().await {
        if frames.send(ProcessFrame::Stdin(bytes)).await.is_err() {
            return;
        }
    }
    // An empty one closes it.
    let _ = frames.send(ProcessFrame::Stdin(Vec::new())).await;
}

/// A terminal's size as it changes; without a terminal, the signals that we get.
async fn send_changes(frames: mpsc::Sender<ProcessFrame>, tty: bool) {
    let (Ok(mut resized), Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::window_change()),
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return;
    };
    loop {
        let frame = tokio::select! {
            _ = resized.recv() => match size().filter(|_| tty) {
                Some((rows, columns)) => ProcessFrame::Resize(rows, columns),
                None => continue,
            },
            _ = interrupt.recv() => ProcessFrame::Signal(SignalKind::interrupt().as_raw_value()),
            _ = terminate.recv() => ProcessFrame::Signal(SignalKind::terminate().as_raw_value()),
        };
        if frames.send(frame).await.is_err() {
            return;
        }
    }
}

/// Shows what it writes, up to its end.
async fn show(mut from: ReadHalf<Upgraded>) -> Done {
    let (mut out, mut err) = (tokio::io::stdout(), tokio::io::stderr());
    let mut buffer = Vec::new();
    loop {
        while let Some((frame, length)) = ProcessFrame::decode(&buffer).map_err(Failure::new)? {
            buffer.drain(..length);
            match frame {
                ProcessFrame::Stdout(bytes) => {
                    out.write_all(&bytes).await?;
                    out.flush().await?;
                }
                ProcessFrame::Stderr(bytes) => {
                    err.write_all(&bytes).await?;
                    err.flush().await?;
                }
                ProcessFrame::Exit(status) => return Ok(u8::try_from(status & 0xff).unwrap_or(1)),
                // Not for us.
                ProcessFrame::Stdin(_) | ProcessFrame::Resize(..) | ProcessFrame::Signal(_) => {}
            }
        }
        match from.read_buf(&mut buffer).await {
            Ok(1..) => {}
            Ok(0) => return Err(Failure::Lost("the process's stream ended before the process".to_owned())),
            Err(error) => return Err(Failure::Lost(format!("the process's stream broke: {error}"))),
        }
    }
}
