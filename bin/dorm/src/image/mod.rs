//! `dorm image`, and its shortcuts at the root. One file per kind of command.

mod build;
mod buildkit;
mod change;
mod files;
mod history;
mod ignore;
mod list;
mod prune;
pub(crate) mod pull;
pub(crate) mod reference;

use clap::Subcommand;

use crate::context::Context;
use crate::error::Done;

pub(crate) use build::Build;
pub(crate) use change::{Remove, unknown};
pub(crate) use list::{COLUMNS, List, names, row};
pub(crate) use prune::images as prune_images;

/// What can be done with images; these are also commands of their own.
#[derive(Subcommand)]
pub(crate) enum Shortcut {
    /// Get an image from a registry.
    Pull(pull::Pull),
    /// Send an image to a registry.
    Push(pull::Push),
    /// Build an image from a Containerfile or Dockerfile, by BuildKit.
    Build(Box<build::Build>),
    /// Load images from a tar archive.
    Load(files::Load),
    /// Write images as a tar archive.
    Save(files::Save),
    /// Make an image of an archive of files.
    Import(files::Import),
    /// Give an image one more name.
    Tag(change::Tag),
    /// Tell how an image was made.
    History(history::History),
}

/// `dorm image`.
#[derive(Subcommand)]
pub(crate) enum Image {
    #[command(flatten)]
    Shortcut(Shortcut),
    /// List images.
    #[command(visible_alias = "list")]
    Ls(List),
    /// Remove images.
    #[command(visible_aliases = ["remove", "delete"])]
    Rm(Remove),
    /// Tell everything of images.
    Inspect(crate::inspect::Names),
    /// Remove images that nobody uses.
    Prune(prune::Prune),
}

/// Runs one of the commands about images.
pub(crate) async fn run(context: &Context, command: Image) -> Done {
    match command {
        Image::Shortcut(shortcut) => self::shortcut(context, shortcut).await,
        Image::Ls(list) => list.run(context).await,
        Image::Rm(remove) => remove.run(context).await,
        Image::Inspect(names) => names.run(context, crate::inspect::Kind::Image).await,
        Image::Prune(prune) => prune.run(context).await,
    }
}

/// Runs one of the commands that are also at the root.
pub(crate) async fn shortcut(context: &Context, command: Shortcut) -> Done {
    match command {
        Shortcut::Pull(pull) => pull.run(context).await,
        Shortcut::Push(push) => push.run(context).await,
        Shortcut::Build(build) => build.run(context).await,
        Shortcut::Load(load) => load.run(context).await,
        Shortcut::Save(save) => save.run(context).await,
        Shortcut::Import(import) => import.run(context).await,
        Shortcut::Tag(tag) => tag.run(context).await,
        Shortcut::History(history) => history.run(context).await,
    }
}
