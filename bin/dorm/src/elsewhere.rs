//! Commands of docker's that make no sense here: each says so in one line, and what to use instead.

use clap::{Args, Subcommand};

use crate::error::{Done, Failure};

/// What is typed after it is of no consequence.
#[derive(Args)]
pub(crate) struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _words: Vec<String>,
}

/// Docker's commands that `dorm` leaves to others.
#[derive(Subcommand)]
pub(crate) enum Elsewhere {
    /// Compose is a program of its own.
    #[command(hide = true)]
    Compose(Anything),
    /// Buildx is a program of its own.
    #[command(hide = true)]
    Buildx(Anything),
    /// Contexts are docker's client's.
    #[command(hide = true)]
    Context(Anything),
    /// Manifests are the registries'.
    #[command(hide = true)]
    Manifest(Anything),
    /// An engine in a VM has no plugins of the host's.
    #[command(hide = true)]
    Plugin(Anything),
    /// Signatures are docker's client's.
    #[command(hide = true)]
    Trust(Anything),
    /// Checkpoints are an experiment of docker's.
    #[command(hide = true)]
    Checkpoint(Anything),
    /// There is no swarm.
    #[command(hide = true, aliases = ["node", "service", "stack", "secret", "config"])]
    Swarm(Anything),
}

impl Elsewhere {
    pub(crate) fn run(self) -> Done {
        let (why, instead) = match self {
            Self::Compose(_) => (
                "compose is a program of its own, and works on a session",
                "eval \"$(dorm docker-env)\", then `docker compose` as ever",
            ),
            Self::Buildx(_) => (
                "buildx is a program of its own, and works on a session; `dorm build` uses BuildKit as well",
                "eval \"$(dorm docker-env)\", then `docker buildx` as ever",
            ),
            Self::Context(_) => (
                "contexts are docker's client's",
                "`dorm docker-context install` makes one that leads to the session; `dorm --session NAME` chooses without one",
            ),
            Self::Manifest(_) => (
                "`manifest` asks registries without an engine, which docker's client does by itself",
                "`docker manifest` needs no session; `dorm image inspect` tells of an image that is here",
            ),
            Self::Plugin(_) => (
                "plugins run beside an engine on the host, and this one is in a VM",
                "volumes of the driver `local` and folders of the host: `dorm help folders`",
            ),
            Self::Trust(_) => {
                ("signatures are made and checked by docker's client", "`docker trust` needs no session")
            }
            Self::Checkpoint(_) => (
                "single containers aren't checkpointed: the whole VM is, whenever it sleeps",
                "`dorm session suspend`, and `dorm help sleep`",
            ),
            Self::Swarm(_) => (
                "a session is one machine: there is no swarm",
                "`docker compose` runs several services; `dorm docker-env` leads it here",
            ),
        };
        Err(Failure::new(why).hint(instead))
    }
}
