//! What may be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use dormouse_api::{CreateSession, IdleTimeout, SessionName, WaitFor};

#[derive(Parser)]
#[command(name = "dorm", version, about = "A container engine of your own, asleep while nobody needs it")]
pub(crate) struct Arguments {
    /// The session.
    #[arg(long, global = true, env = "DORM_SESSION", default_value_t, value_name = "NAME")]
    pub(crate) session: SessionName,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make, look at and end sessions.
    #[command(subcommand)]
    Session(Session),
    /// Keep the session's VM awake for as long as a command runs.
    Hold {
        /// Why, for `session inspect`; the command when absent.
        #[arg(long)]
        reason: Option<String>,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Tell the versions of this program and of the service.
    Version,
}

#[derive(Subcommand)]
pub(crate) enum Session {
    /// Make a session.
    Create(Create),
    /// List the sessions.
    Ls {
        /// How.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Tell everything of a session as JSON, without waking it.
    Inspect {
        /// Which one.
        name: Option<SessionName>,
        /// How.
        #[arg(long, value_enum, default_value = "json")]
        format: Format,
    },
    /// Open a session again that was terminated.
    Start {
        /// Which one.
        name: Option<SessionName>,
    },
    /// End a session's life: its VM is shut down, requests are refused. Its storage stays.
    Terminate {
        /// Which one.
        name: Option<SessionName>,
    },
    /// Terminate a session, and remove it with its storage.
    Rm {
        /// Which one.
        name: SessionName,
    },
    /// Put a session's VM to sleep now, if nothing holds it awake.
    Sleep {
        /// Which one.
        name: Option<SessionName>,
    },
    /// Print the value for DOCKER_HOST.
    DockerHost {
        /// Which one.
        name: Option<SessionName>,
    },
    /// Print the console of a session's VM.
    Logs {
        /// Which one.
        name: Option<SessionName>,
        /// The serial console.
        #[arg(long, required = true)]
        console: bool,
        /// Go on until interrupted.
        #[arg(short, long)]
        follow: bool,
    },
    /// Print what a session's VM did so far: starts, sleeps, crashes.
    History {
        /// Which one.
        name: Option<SessionName>,
    },
    /// Wait for a state.
    Wait {
        /// Which one.
        name: Option<SessionName>,
        /// The state.
        #[arg(long, value_enum)]
        r#for: Wanted,
    },
}

#[derive(Args)]
pub(crate) struct Create {
    /// What to call it.
    name: SessionName,
    /// Where its disk lives.
    #[arg(long, value_name = "PATH")]
    storage: Option<PathBuf>,
    /// The storage must be there already.
    #[arg(long)]
    no_create: bool,
    /// Virtual CPUs.
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// RAM, e.g. 2G.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Size of the disk, e.g. 64G; it takes only what is used.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    storage_size: Option<u64>,
    /// Seconds from the last use to the sleep, or "never".
    #[arg(long, value_name = "SECONDS", default_value_t)]
    idle_timeout: IdleTimeout,
    /// Longest start of a VM, in seconds.
    #[arg(long, value_name = "SECONDS")]
    boot_timeout: Option<u64>,
}

impl From<Create> for CreateSession {
    fn from(create: Create) -> Self {
        Self {
            storage: create.storage,
            no_create: create.no_create,
            cpus: create.cpus,
            memory_mib: create.memory.map(|bytes| bytes >> 20),
            storage_bytes: create.storage_size,
            idle_timeout: create.idle_timeout,
            boot_timeout_seconds: create.boot_timeout,
            ..Self::named(create.name)
        }
    }
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub(crate) enum Format {
    #[default]
    Table,
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Wanted {
    Terminated,
    Absent,
    Running,
}

impl Wanted {
    /// The state's name in the API.
    pub(crate) fn as_str(self) -> &'static str {
        match WaitFor::from(self) {
            WaitFor::Terminated => "terminated",
            WaitFor::Absent => "absent",
            WaitFor::Running => "running",
        }
    }
}

impl From<Wanted> for WaitFor {
    fn from(wanted: Wanted) -> Self {
        match wanted {
            Wanted::Terminated => Self::Terminated,
            Wanted::Absent => Self::Absent,
            Wanted::Running => Self::Running,
        }
    }
}

/// A number of bytes with an optional binary unit, as docker has them: `512m`, `2G`, `1073741824`.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("{text:?} is no size: try 512M or 2G")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no size: try 512M or 2G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_as_docker_reads_them() {
        assert_eq!(size("512m"), Ok(512 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("7"), Ok(7));
        for bad in ["", "G", "-1", "1x", "1.5G", "99999999999999999999", "18446744073709551615k"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bad_values_are_refused_before_anything_is_started() {
        for line in [
            ["session", "create", "dorm-x"].as_slice(),
            &["session", "create", "a b"],
            &["session", "create", "a", "--memory", "much"],
            &["session", "create", "a", "--idle-timeout", "-1"],
            &["session", "wait", "--for", "ever"],
            &["hold"],
        ] {
            assert!(Arguments::try_parse_from([&["dorm"], line].concat()).is_err(), "{line:?}");
        }
    }
}
