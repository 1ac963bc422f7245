//! `dorm attach`.

use std::io::{self, IsTerminal};

use clap::Args;
use serde_json::Value;

use super::inspect;
use super::run::{Exit, attach_target, no_terminal, size_up};
use crate::context::Context;
use crate::error::{Done, Failure};
use crate::operation::Operation;
use crate::stream::{Attached, Subject};
use crate::terminal::{DetachKeys, Mode};

#[derive(Args)]
pub(crate) struct Attach {
    /// Which one.
    container: String,
    /// Send it no input.
    #[arg(long)]
    no_stdin: bool,
    /// The keys that leave it running.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", hide_default_value = true)]
    detach_keys: DetachKeys,
    /// Pass signals on to it; a terminal's never are.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", hide_default_value = true, action = clap::ArgAction::Set)]
    sig_proxy: bool,
}

impl Attach {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let operation = context.operation(format!("dorm attach {}", self.container), false).await?;
        operation.during(self.in_engine(&operation)).await
    }

    async fn in_engine(&self, operation: &Operation) -> Done {
        let engine = &operation.engine;
        let container = inspect(engine, &self.container).await?;
        let is = |state: &str| container["State"][state].as_bool() == Some(true);
        let refused =
            |why: &str, what: &str| Err(Failure::new(format!("{:?} {why}", self.container)).hint(what));
        if !is("Running") {
            return refused("is not running", "`dorm start --attach` starts it and joins its streams");
        }
        if is("Paused") {
            return refused("is paused", "`dorm unpause` lets it go on");
        }
        if is("Restarting") {
            return refused("is restarting", "wait until it runs");
        }
        let config = &container["Config"];
        let tty = config["Tty"].as_bool() == Some(true);
        let input = !self.no_stdin && config["OpenStdin"].as_bool() == Some(true);
        if tty && input && !io::stdin().is_terminal() {
            return Err(no_terminal());
        }
        let id = container["Id"].as_str().unwrap_or(&self.container).to_owned();
        let exit = Exit::of(engine, &id, "not-running").await?;
        let stream = engine.hijack(&attach_target(&id, [input, true, true]), Value::Null).await?;
        let raw = if tty && input { Some(Mode::raw()?) } else { None };
        size_up(engine, &id).await;
        let subject = Subject { kind: "containers", id };
        let proxy = self.sig_proxy && !tty;
        let attached = Attached { stream, subject, tty, input, detach: self.detach_keys.clone(), proxy };
        let ended = attached.join(engine).await;
        drop(raw);
        exit.after(ended?).await
    }
}
