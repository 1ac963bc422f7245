//! What may be typed: the tree of commands. Each group's own file has its options.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use dormouse_api::SessionName;

use crate::autostart::Autostart;
use crate::builder::Builder;
use crate::clients::{DockerContext, DockerEnv};
use crate::completion::{self, Completion};
use crate::container::{self, Container};
use crate::docker_listen::DockerListen;
use crate::doctor::Doctor;
use crate::elsewhere::Elsewhere;
use crate::error::{FAILED, SUCCESS};
use crate::help::Help;
use crate::hold::HoldArguments;
use crate::image::{self, Image};
use crate::import_docker::ImportDocker;
use crate::inspect::Inspect;
use crate::monitor::Monitor;
use crate::network::Network;
use crate::registry::{Login, Logout, Registry};
use crate::search::Search;
use crate::session::Session;
use crate::settings::SettingsArguments;
use crate::system::{Events, Info, System};
use crate::template::Template;
use crate::version::VersionArguments;
use crate::volume::Volume;
use crate::why::WhyArguments;

/// The status of a bad option where docker has it so.
const BAD_OPTION: u8 = 125;

#[derive(Parser)]
#[command(name = "dorm", version, about = "A container engine of your own, asleep while nobody needs it")]
#[command(disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// The session.
    #[arg(
        long,
        global = true,
        env = "DORM_SESSION",
        hide_env_values = true,
        default_value_t,
        value_name = "NAME"
    )]
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
    #[command(flatten)]
    Containers(container::Shortcut),
    /// List containers.
    Ps(container::List),
    #[command(flatten)]
    Images(image::Shortcut),
    /// List images.
    #[command(name = "images")]
    ImageList(image::List),
    /// Remove images.
    Rmi(image::Remove),
    /// Log in to a registry.
    Login(Login),
    /// Log out of a registry.
    Logout(Logout),
    /// Tell everything of containers, images, networks or volumes.
    Inspect(Inspect),
    /// Tell what happens in the engine.
    Events(Events),
    /// Tell everything of the engine.
    Info(Info),
    /// Look for images on Docker Hub.
    Search(Search),
    /// Everything about containers.
    #[command(subcommand)]
    Container(Container),
    /// Everything about images.
    #[command(subcommand)]
    Image(Image),
    /// Everything about networks.
    #[command(subcommand)]
    Network(Network),
    /// Everything about volumes.
    #[command(subcommand)]
    Volume(Volume),
    /// Everything about registries.
    #[command(subcommand)]
    Registry(Registry),
    /// Everything about the engine.
    #[command(subcommand)]
    System(System),
    /// Everything about builds.
    #[command(subcommand)]
    Builder(Builder),
    /// Explain a topic or a command. Without one: list the topics.
    Help(Help),
    #[command(flatten)]
    Elsewhere(Elsewhere),
    /// Print what makes a shell complete commands and names.
    Completion(Completion),
    /// Look at what this machine has, and what is missing.
    Doctor(Doctor),
    /// Print what leads docker's client to the session, for a shell.
    DockerEnv(DockerEnv),
    /// Make or remove contexts of docker's client that lead to sessions.
    #[command(subcommand)]
    DockerContext(DockerContext),
    /// Take over the images and volumes of another engine of this machine, a dockerd or podman.
    ImportDocker(ImportDocker),
    /// Serve the session's Docker socket over TCP, to who has a client certificate.
    DockerListen(DockerListen),
    /// Join standard input and output with the session's Docker socket.
    DialStdio,
    /// Tell or change what new sessions get where nothing is asked for.
    Settings(SettingsArguments),
    /// Have the service started at login, so that sessions are there before the first command.
    #[command(subcommand)]
    Autostart(Autostart),
    /// Keep the session's VM awake for as long as a command runs.
    Hold(HoldArguments),
    /// Watch all sessions on a screen; keys put them to sleep, wake, pin and terminate them.
    Monitor(Monitor),
    /// Tell why a session's VM is awake or asleep, without waking it.
    Why(WhyArguments),
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

/// Commands that docker doesn't have: their bad options end with 1, those of the others with 125, as docker's do.
const OURS: &[&str] = &[
    "autostart",
    "completion",
    "dial-stdio",
    "docker-context",
    "docker-env",
    "docker-listen",
    "doctor",
    "help",
    "hold",
    "import-docker",
    "monitor",
    "session",
    "settings",
    "template",
    "version",
    "why",
];

/// Why a line could not be understood, or the help or version that it asked for.
#[derive(Debug)]
pub(crate) struct Usage {
    error: clap::Error,
    /// The status that it ends with.
    code: u8,
}

impl Usage {
    fn new(error: clap::Error, line: &[OsString]) -> Self {
        let bad_option = match error.kind() {
            ErrorKind::InvalidValue
            | ErrorKind::ValueValidation
            | ErrorKind::NoEquals
            | ErrorKind::ArgumentConflict
            | ErrorKind::WrongNumberOfValues => true,
            // A word too many is no bad option.
            ErrorKind::UnknownArgument => {
                let word = error.get(ContextKind::InvalidArg);
                matches!(word, Some(ContextValue::String(word)) if word.starts_with('-'))
            }
            _ => false,
        };
        let ours = line.iter().skip(1).any(|word| OURS.iter().any(|name| word == name));
        let code = match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => SUCCESS,
            _ if bad_option && !ours => BAD_OPTION,
            _ => FAILED,
        };
        Self { error, code }
    }

    /// Prints it where it belongs, and gives the process's status.
    pub(crate) fn exit(&self) -> ExitCode {
        // Nobody is left to be told of a closed pipe.
        let _ = self.error.print();
        ExitCode::from(self.code)
    }
}

/// The tree of all commands.
#[must_use]
pub fn command() -> clap::Command {
    completion::with_names(Arguments::command())
}

impl Arguments {
    /// Understands a command line, the program's name first.
    pub(crate) fn from_line(line: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Self, Usage> {
        let line: Vec<OsString> = line.into_iter().map(Into::into).collect();
        Self::try_parse_from(&line).map_err(|error| Usage::new(error, &line))
    }
}

#[cfg(test)]
mod tests {
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
            &["session", "set", "a"],
            &["session", "pin", "--for", "2"],
            &["session", "wait", "--for", "ever"],
            &["hold"],
        ] {
            assert!(Arguments::from_line([&["dorm"], line].concat()).is_err(), "{line:?}");
        }
    }

    #[test]
    fn what_follows_the_image_is_the_containers() {
        for line in [
            ["run", "-it", "--rm", "-e", "A=1", "busybox", "-it", "--rm", "--help", "-h"].as_slice(),
            &["exec", "-i", "c", "ls", "-la", "--help"],
            &["create", "--name=x", "busybox", "sh", "-c", "exit 7"],
            &["container", "run", "-h", "name", "-p", "80:80", "busybox"],
        ] {
            if let Err(usage) = Arguments::from_line([&["dorm"], line].concat()) {
                panic!("{line:?}: {}", usage.error);
            }
        }
    }

    #[test]
    fn bad_options_have_the_status_that_docker_gives_them() {
        let code =
            |line: &[&str]| Arguments::from_line([&["dorm"], line].concat()).err().map(|usage| usage.code);
        assert_eq!(code(&["ps", "--bogus"]), Some(125));
        assert_eq!(code(&["run", "--cpus", "x", "busybox"]), Some(125));
        assert_eq!(code(&["ps", "extra"]), Some(1));
        assert_eq!(code(&["run"]), Some(1));
        assert_eq!(code(&["nonsense"]), Some(1));
        assert_eq!(code(&["session", "create", "--bogus"]), Some(1));
        assert_eq!(code(&["run", "--help"]), Some(0));
        assert_eq!(code(&["ps"]), None);
    }
}
