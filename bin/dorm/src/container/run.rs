//! `dorm run`.

use std::io::{self, IsTerminal};

use clap::Args;
use dormouse_client::{Call, Engine, EngineError, Target};
use http::Method;
use serde::Deserialize;
use serde_json::Value;
use tokio_util::task::AbortOnDropHandle;

use super::create::Made;
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::operation::Operation;
use crate::output::{print, say};
use crate::stream::{Attached, Ended, Subject, resize};
use crate::terminal::{DetachKeys, Mode};

/// The status of a `run` that failed before the container's own program began.
const NOT_RUN: u8 = 125;
/// ... of a program that can't be run.
const NOT_EXECUTABLE: u8 = 126;
/// ... of one that isn't there.
const NO_PROGRAM: u8 = 127;

#[derive(Args)]
pub(crate) struct Run {
    /// Print its id, and let it run by itself.
    #[arg(short, long, conflicts_with = "attach")]
    detach: bool,
    /// The keys that leave it running.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", hide_default_value = true)]
    detach_keys: DetachKeys,
    /// Pass no signals on to it.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", hide_default_value = true, action = clap::ArgAction::Set)]
    sig_proxy: bool,
    #[command(flatten)]
    made: Made,
}

impl Run {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let body = self.made.body(!self.detach).map_err(|failure| failure.code(NOT_RUN))?;
        let options = &self.made.options;
        if options.tty && !self.detach && options.attaches("stdin") && !io::stdin().is_terminal() {
            return Err(no_terminal());
        }
        let reason = format!("dorm run {}", self.made.image());
        let operation =
            context.operation(reason, self.made.quiet).await.map_err(|failure| failure.code(NOT_RUN))?;
        operation.during(self.in_engine(&operation, body)).await
    }

    async fn in_engine(&self, operation: &Operation, body: Value) -> Done {
        let not_run = |failure: Failure| failure.code(NOT_RUN);
        let id = self.made.make(operation, body).await.map_err(not_run)?;
        let engine = &operation.engine;
        if self.detach {
            start(engine, &id).await.map_err(|error| failed_start(error.into()))?;
            return print(&id);
        }
        let options = &self.made.options;
        let streams = ["stdin", "stdout", "stderr"].map(|stream| options.attaches(stream));
        let stream = engine.hijack(&attach_target(&id, streams), Value::Null).await;
        let stream = stream.map_err(|error| not_run(error.into()))?;
        // Asked before the start: a container that is removed at its end could not be asked afterwards.
        let condition = if options.rm { "removed" } else { "next-exit" };
        let exit = Exit::of(engine, &id, condition).await.map_err(not_run)?;
        let raw = if options.tty && streams[0] { Some(Mode::raw()?) } else { None };
        if let Err(error) = start(engine, &id).await {
            drop(raw);
            return Err(failed_start(error.into()));
        }
        let subject = Subject { kind: "containers", id: id.clone() };
        let attached = Attached {
            stream,
            subject,
            tty: options.tty,
            input: streams[0],
            detach: self.detach_keys.clone(),
            proxy: self.sig_proxy,
        };
        let ended = attached.join(engine).await;
        drop(raw);
        exit.after(ended?).await
    }
}

pub(super) fn no_terminal() -> Failure {
    Failure::new("standard input is no terminal").hint("leave -t away to pipe into it")
}

/// Attach to these of standard input, output and error.
pub(super) fn attach_target(id: &str, [stdin, stdout, stderr]: [bool; 3]) -> String {
    Target::of("containers", id, "/attach")
        .when("stream", true)
        .when("stdin", stdin)
        .when("stdout", stdout)
        .when("stderr", stderr)
        .text()
}

/// Starts a container.
pub(super) async fn start(engine: &Engine, id: &str) -> Result<Value, EngineError> {
    engine.post(&Target::of("containers", id, "/start").text()).await
}

/// What the shell's rules call a program that could not be run.
pub(super) fn failed_start(failure: Failure) -> Failure {
    let said = failure.message().to_lowercase();
    let code = if said.contains("executable file not found") || said.contains("no such file or directory") {
        NO_PROGRAM
    } else if said.contains("permission denied")
        || said.contains("is a directory")
        || said.contains("not a directory")
    {
        NOT_EXECUTABLE
    } else {
        NOT_RUN
    };
    failure.code(code)
}

/// A container's end, being waited for.
pub(super) struct Exit {
    waiting: AbortOnDropHandle<Result<Status, EngineError>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Status {
    status_code: i64,
    #[serde(default)]
    error: Option<Value>,
}

impl Exit {
    /// Begins to wait; once this returns the engine has seen it.
    pub(super) async fn of(engine: &Engine, id: &str, condition: &str) -> Result<Self, Failure> {
        let target = Target::of("containers", id, "/wait").with("condition", condition);
        let reply = engine.send(Call::new(Method::POST, target.text())).await?;
        Ok(Self { waiting: AbortOnDropHandle::new(tokio::spawn(reply.json())) })
    }

    /// The exit code that a command has after its streams came apart so.
    pub(super) async fn after(self, ended: Ended) -> Done {
        match ended {
            Ended::Detached => Ok(SUCCESS),
            Ended::Signal(signal) => Ok(128_u8.saturating_add(signal)),
            Ended::Output => self.code().await,
        }
    }

    /// The container's own exit code.
    pub(super) async fn code(self) -> Done {
        let status = self.waiting.await.map_err(Failure::new)??;
        if let Some(message) = status.error.as_ref().and_then(|error| error["Message"].as_str()) {
            say(format_args!("error: waiting for the container: {message}"));
        }
        Ok(u8::try_from(status.status_code & 0xff).unwrap_or(1))
    }
}

/// Tells a terminal's size once; the container may have started with another.
pub(super) async fn size_up(engine: &Engine, id: &str) {
    resize(engine, &Subject { kind: "containers", id: id.to_owned() }).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_run_gives_the_codes_that_shells_give() {
        let code = |message: &str| match failed_start(Failure::new(message)) {
            Failure::Said(said) => said.code,
            _ => 0,
        };
        let exec = "OCI runtime create failed: exec: \"x\":";
        assert_eq!(code(&format!("{exec} executable file not found in $PATH: unknown")), 127);
        assert_eq!(code(&format!("{exec} stat /x: no such file or directory: unknown")), 127);
        assert_eq!(code(&format!("{exec} permission denied: unknown")), 126);
        assert_eq!(code("driver failed programming external connectivity"), 125);
    }
}
