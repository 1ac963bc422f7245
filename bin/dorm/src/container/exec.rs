//! `dorm exec`.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use clap::Args;
use dormouse_client::Target;
use serde::Deserialize;
use serde_json::{Value, json};

use super::run::no_terminal;
use super::unknown;
use super::variables::environment;
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::operation::Operation;
use crate::stream::{Attached, Ended, Subject};
use crate::terminal::{DetachKeys, Mode, size};

#[derive(Args)]
pub(crate) struct Exec {
    /// Let it run by itself.
    #[arg(short, long)]
    detach: bool,
    /// Keep standard input open.
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Set a variable; without a value, take ours.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Set the variables of a file.
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Start in this folder.
    #[arg(short, long, value_name = "PATH")]
    workdir: Option<String>,
    /// Run as this user.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Give it every right that the VM's root has.
    #[arg(long)]
    privileged: bool,
    /// The keys that leave it running.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", hide_default_value = true)]
    detach_keys: DetachKeys,
    /// Where, and what to run. What follows the container is the command's, options included.
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, value_name = "CONTAINER COMMAND")]
    line: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Created {
    id: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Ran {
    exit_code: Option<i64>,
}

impl Exec {
    fn container(&self) -> &str {
        &self.line[0]
    }

    pub(crate) async fn run(self, context: &Context) -> Done {
        let variables = environment(&self.env_file, &self.env).map_err(Failure::new)?;
        if self.tty && self.interactive && !self.detach && !io::stdin().is_terminal() {
            return Err(no_terminal());
        }
        let reason = format!("dorm exec {} {}", self.container(), self.line[1]);
        let operation = context.operation(reason, false).await?;
        operation.during(self.in_engine(&operation, variables)).await
    }

    async fn in_engine(&self, operation: &Operation, variables: Vec<String>) -> Done {
        let engine = &operation.engine;
        let console = size().filter(|_| self.tty).map(|(rows, columns)| json!([rows, columns]));
        let body = json!({
            "AttachStdin": self.interactive && !self.detach,
            "AttachStdout": !self.detach,
            "AttachStderr": !self.detach,
            "Tty": self.tty,
            "Privileged": self.privileged,
            "User": self.user.as_deref().unwrap_or_default(),
            "WorkingDir": self.workdir.as_deref().unwrap_or_default(),
            "Env": variables,
            "Cmd": self.line[1..],
            "ConsoleSize": console,
        });
        let target = Target::of("containers", self.container(), "/exec").text();
        let id = match engine.post_json::<Created>(&target, body).await {
            Ok(created) => created.id,
            Err(error) if error.is_not_found() => {
                return Err(unknown(engine, self.container(), error.into()).await);
            }
            Err(error) => return Err(error.into()),
        };
        let start = Target::of("exec", &id, "/start").text();
        if self.detach {
            engine.post_json::<Value>(&start, json!({ "Detach": true, "Tty": self.tty })).await?;
            return Ok(SUCCESS);
        }
        let raw = if self.tty && self.interactive { Some(Mode::raw()?) } else { None };
        let body = json!({ "Detach": false, "Tty": self.tty, "ConsoleSize": console });
        let stream = engine.hijack(&start, body).await?;
        let attached = Attached {
            stream,
            subject: Subject { kind: "exec", id: id.clone() },
            tty: self.tty,
            input: self.interactive,
            detach: self.detach_keys.clone(),
            proxy: false,
        };
        let ended = attached.join(engine).await;
        drop(raw);
        match ended? {
            Ended::Detached => Ok(SUCCESS),
            Ended::Signal(signal) => Ok(128_u8.saturating_add(signal)),
            Ended::Output => {
                let ran: Ran = engine.get(&Target::of("exec", &id, "/json").text()).await?;
                Ok(u8::try_from(ran.exit_code.unwrap_or(0) & 0xff).unwrap_or(1))
            }
        }
    }
}
