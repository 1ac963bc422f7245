//! What may be typed: the tree of commands. Each group's own file has its options.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand, ValueEnum};
use dormouse_api::SessionName;

use crate::hold::HoldArguments;
use crate::session::Session;
use crate::template::Template;
use crate::version::VersionArguments;

#[derive(Parser)]
#[command(name = "dorm", version, about = "A container engine of your own, asleep while nobody needs it")]
#[command(disable_help_subcommand = true)]
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
    /// Make, look at and remove templates, which new sessions are copied from.
    #[command(subcommand)]
    Template(Template),
    /// Keep the session's VM awake for as long as a command runs.
    Hold(HoldArguments),
    /// Tell the versions of this program and of the service.
    Version(VersionArguments),
}

/// How a result is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    #[default]
    Table,
    Json,
}

/// Why a line could not be understood, or the help or version that it asked for.
#[derive(Debug)]
pub(crate) struct Usage(clap::Error);

impl Usage {
    /// Prints it where it belongs, and gives the process's status.
    pub(crate) fn exit(&self) -> ExitCode {
        // Nobody is left to be told of a closed pipe.
        let _ = self.0.print();
        match self.0.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }
    }
}

impl Arguments {
    /// Understands a command line, the program's name first.
    pub(crate) fn from_line(
        line: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, Usage> {
        Self::try_parse_from(line).map_err(Usage)
    }
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
    fn bad_values_are_refused_before_anything_is_started() {
        let long = "n".repeat(256);
        for line in [
            ["session", "create", "dorm-x"].as_slice(),
            &["session", "create", "a b"],
            &["session", "create", &long],
            &["session", "create", "a", "--memory", "much"],
            &["session", "create", "a", "--idle-timeout", "-1"],
            &["session", "create", "a", "--temporary", "--storage", "/x"],
            &["session", "wait", "--for", "ever"],
            &["hold"],
        ] {
            assert!(Arguments::from_line([&["dorm"], line].concat()).is_err(), "{line:?}");
        }
    }
}
