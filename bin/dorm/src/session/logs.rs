//! `dorm session logs` and `history`: what happened.

use std::io::{self, Write};

use clap::Args;
use dormouse_api::{HistoryEntry, SessionName};

use crate::arguments::Format;
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::output::print_json;

#[derive(Args)]
pub(crate) struct Logs {
    /// Which one.
    name: Option<SessionName>,
    /// The VM's serial console instead of the host's log.
    #[arg(long)]
    console: bool,
    /// Go on until interrupted.
    #[arg(short, long, requires = "console")]
    follow: bool,
}

#[derive(Args)]
pub(crate) struct History {
    /// Which one.
    name: Option<SessionName>,
    /// How.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Logs {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let name = context.pick(self.name);
        if !self.console {
            return host_log(&context.inspect(&name).await?.control_socket);
        }
        let control = context.control(&name).await?;
        let mut lines = control.lines(&format!("/v1/console?follow={}", self.follow)).await?;
        while let Some(bytes) = lines.bytes().await? {
            let mut out = io::stdout().lock();
            out.write_all(&bytes)?;
            out.flush()?;
        }
        Ok(SUCCESS)
    }
}

/// It lies beside the host's sockets; a session that never had a host has none.
fn host_log(control_socket: &std::path::Path) -> Done {
    let path = control_socket.with_file_name("host.log");
    let mut file = match std::fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(SUCCESS),
        Err(error) => return Err(Failure::new(format!("can't read {}: {error}", path.display()))),
    };
    io::copy(&mut file, &mut io::stdout().lock())?;
    Ok(SUCCESS)
}

impl History {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let control = context.control(&context.pick(self.name)).await?;
        let entries: Vec<HistoryEntry> = control.get("/v1/history").await?;
        if self.format == Format::Json {
            return print_json(&entries);
        }
        let mut out = io::stdout().lock();
        for entry in entries {
            let HistoryEntry { at, what, generation, how, duration_ms, reason } = entry;
            writeln!(out, "{at:.0}  {what:<12} {generation:>4}  {how:<8} {duration_ms:>7} ms  {reason}")?;
        }
        Ok(SUCCESS)
    }
}
