//! Completion in shells: of commands and options, and of the names that there are.

use std::ffi::OsStr;
use std::time::Duration;

use clap::{Args, Command, ValueEnum};
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{Bash, CompleteEnv, EnvCompleter, Fish, Zsh};
use dormouse_api::{Phase, SessionName};
use dormouse_client::{Endpoint, Engine, Home};
use serde_json::Value;

use crate::error::{Done, Failure, SUCCESS};

/// Shells call this program back with this variable set.
const VARIABLE: &str = "DORM_COMPLETE";

/// Longest wait for names while somebody's fingers are on the keys.
const NAMES_WITHIN: Duration = Duration::from_millis(500);

#[derive(Args)]
pub(crate) struct Completion {
    /// For which shell.
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl Completion {
    /// Prints what a shell has to read, e.g. `eval "$(dorm completion bash)"`.
    pub(crate) fn run(self) -> Done {
        let shell: &dyn EnvCompleter = match self.shell {
            Shell::Bash => &Bash,
            Shell::Zsh => &Zsh,
            Shell::Fish => &Fish,
        };
        let mut script = Vec::new();
        shell.write_registration(VARIABLE, "dorm", "dorm", "dorm", &mut script).map_err(Failure::new)?;
        std::io::Write::write_all(&mut std::io::stdout(), &script)?;
        Ok(SUCCESS)
    }
}

/// Answers a shell that asks, and ends the process then.
pub(crate) fn answer_shells(command: fn() -> Command) {
    if std::env::var_os(VARIABLE).is_some() {
        CompleteEnv::with_factory(command).var(VARIABLE).complete();
    }
}

/// The tree of commands with completion of names, which are known by what a value is called.
pub(crate) fn with_names(command: Command) -> Command {
    let command = command.mut_args(|argument| {
        let called =
            argument.get_value_names().and_then(<[_]>::first).map(ToString::to_string).unwrap_or_default();
        let kind = match (called.split(' ').next().unwrap_or_default(), argument.get_id().as_str()) {
            (_, "session") => Kind::Session,
            ("CONTAINER", _) | (_, "container") => Kind::Container,
            ("IMAGE", _) | (_, "image") => Kind::Image,
            ("NETWORK", _) => Kind::Network,
            ("VOLUME", _) => Kind::Volume,
            _ => return argument,
        };
        argument.add(ArgValueCompleter::new(move |typed: &OsStr| names(kind, typed)))
    });
    command.mut_subcommands(with_names)
}

/// What there are names of.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Session,
    Container,
    Image,
    Network,
    Volume,
}

/// The names that begin so. Nothing is started for this: whoever is not there knows none.
fn names(kind: Kind, typed: &OsStr) -> Vec<CompletionCandidate> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    let known = runtime.block_on(async { tokio::time::timeout(NAMES_WITHIN, known(kind)).await });
    let typed = typed.to_string_lossy();
    known
        .ok()
        .flatten()
        .unwrap_or_default()
        .into_iter()
        .filter(|name| name.starts_with(&*typed))
        .map(CompletionCandidate::new)
        .collect()
}

async fn known(kind: Kind) -> Option<Vec<String>> {
    let service = Endpoint::new(Home::from_env().ok()?.service_socket());
    let sessions: Vec<dormouse_api::SessionInfo> = service.get("/v1/sessions").await.ok()?;
    if let Kind::Session = kind {
        return Some(sessions.into_iter().map(|info| info.name.to_string()).collect());
    }
    let wanted: SessionName = match std::env::var("DORM_SESSION") {
        Ok(name) => name.parse().ok()?,
        Err(_) => SessionName::default(),
    };
    let info = sessions.into_iter().find(|info| info.name == wanted)?;
    // Nobody's VM is woken by a tabulator, not even from a doze.
    if !matches!(info.vm.phase, Phase::Running | Phase::Counting) {
        return None;
    }
    let engine = Engine::new(info.docker_socket);
    let (path, field) = match kind {
        Kind::Session => return None,
        Kind::Container => ("/containers/json?all=1", "Names"),
        Kind::Image => ("/images/json", "RepoTags"),
        Kind::Network => ("/networks", "Name"),
        Kind::Volume => ("/volumes", "Name"),
    };
    let answer: Value = engine.get(path).await.ok()?;
    let things = answer.as_array().or_else(|| answer["Volumes"].as_array())?;
    let names = things.iter().flat_map(|thing| match &thing[field] {
        Value::Array(names) => names.clone(),
        name => vec![name.clone()],
    });
    Some(names.filter_map(|name| Some(name.as_str()?.trim_start_matches('/').to_owned())).collect())
}
