//! `dorm builder`: what builds keep for the next ones.

use clap::{Args, Subcommand};
use dormouse_client::Target;
use serde_json::Value;

use crate::container::prune::{PruneOptions, Pruned};
use crate::context::Context;
use crate::error::{Done, SUCCESS};
use crate::value::{filters, size};

/// `dorm builder`.
#[derive(Subcommand)]
pub(crate) enum Builder {
    /// The same as `dorm build`.
    Build(Box<crate::image::Build>),
    /// Remove what builds keep for the next ones.
    Prune(Prune),
}

#[derive(Args)]
pub(crate) struct Prune {
    /// Also what some image is made of.
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    options: PruneOptions,
    /// Keep so much of what was used last.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    keep_storage: Option<u64>,
}

/// Runs one of the commands under `dorm builder`.
pub(crate) async fn run(context: &Context, command: Builder) -> Done {
    match command {
        Builder::Build(build) => build.run(context).await,
        Builder::Prune(prune) => prune.run(context).await,
    }
}

impl Prune {
    async fn run(self, context: &Context) -> Done {
        let what = if self.all { "all build cache." } else { "all dangling build cache." };
        if !self.options.agreed(&format!("This will remove {what}"))? {
            return Ok(SUCCESS);
        }
        let target = Target::new("/build/prune")
            .when("all", self.all)
            .maybe("filters", filters(&self.options.filter)?)
            .maybe("keep-storage", self.keep_storage.map(|bytes| bytes.to_string()))
            .text();
        let operation = context.operation("dorm builder prune", false).await?;
        let answer: Value = operation.during(async { Ok(operation.engine.post(&target).await?) }).await?;
        Pruned::of(&answer, "CachesDeleted", "Deleted build cache objects:").print()
    }
}
