//! `dorm session ls` and `inspect`.

use std::io::{self, Write};

use clap::Args;
use dormouse_api::{Phase, SessionInfo, SessionName};

use crate::arguments::Format;
use crate::context::Context;
use crate::error::{Done, SUCCESS};
use crate::output::{print, print_json, say};
use crate::session::state::{phase, state};

#[derive(Args)]
pub(crate) struct List {
    /// How.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Names only.
    #[arg(short, long)]
    quiet: bool,
    /// Count them as well, on standard error.
    #[arg(short, long)]
    verbose: bool,
}

#[derive(Args)]
pub(crate) struct Inspect {
    /// Which one.
    name: Option<SessionName>,
    /// How.
    #[arg(long, value_enum, default_value = "json")]
    format: Format,
}

impl List {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let sessions = context.service().await?.sessions().await?;
        if self.verbose {
            let up = sessions.iter().filter(|info| info.vm.phase != Phase::Absent).count();
            say(format_args!("{} sessions, {up} with a VM", sessions.len()));
        }
        if self.format == Format::Json && !self.quiet {
            return print_json(&sessions);
        }
        let mut out = io::stdout().lock();
        if !self.quiet {
            writeln!(out, "{:<20} {:<12} {:<10} {:>6}  STORAGE", "NAME", "STATE", "VM", "STARTS")?;
        }
        for info in sessions {
            let (name, starts) = (info.name.as_str(), info.vm.start_count);
            let storage = info.storage.path.display();
            if self.quiet {
                writeln!(out, "{name}")?;
            } else {
                writeln!(out, "{name:<20} {:<12} {:<10} {starts:>6}  {storage}", state(&info), phase(&info))?;
            }
        }
        Ok(SUCCESS)
    }
}

impl Inspect {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let info = context.inspect(&context.pick(self.name)).await?;
        match self.format {
            Format::Json => print_json(&info),
            Format::Table => print(in_one_line(&info)),
        }
    }
}

fn in_one_line(info: &SessionInfo) -> String {
    let holds: Vec<_> = info.holds.iter().map(|hold| format!("{} ({})", hold.owner, hold.reason)).collect();
    let holds = if holds.is_empty() { "nothing".to_owned() } else { holds.join(", ") };
    format!("{}: {}, VM {}; held by: {holds}", info.name, state(info), phase(info))
}
