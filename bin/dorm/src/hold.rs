//! `dorm hold`: keeps the VM awake while a command runs.

use std::os::unix::process::ExitStatusExt;

use clap::Args;

use crate::context::Context;
use crate::error::{Done, Failure};

#[derive(Args)]
pub(crate) struct HoldArguments {
    /// Why, for `session inspect`; the command when absent.
    #[arg(long)]
    reason: Option<String>,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

impl HoldArguments {
    /// Ends with the command's status.
    pub(crate) async fn run(self, context: &Context) -> Done {
        let info = context.serving(&context.pick(None)).await?;
        let reason = self.reason.unwrap_or_else(|| self.command.join(" "));
        let held = context.hold(&info, reason, false).await?;
        let (program, arguments) =
            self.command.split_first().ok_or_else(|| Failure::new("no command was given"))?;
        let status = tokio::process::Command::new(program)
            .args(arguments)
            .env("DOCKER_HOST", format!("unix://{}", info.docker_socket.display()))
            .status()
            .await
            .map_err(|error| Failure::new(format!("can't run {program:?}: {error}")))?;
        drop(held);
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
        Ok(u8::try_from(code).unwrap_or(1))
    }
}
