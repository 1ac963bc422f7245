//! `dorm container`, and its shortcuts at the root. One file per kind of command.

mod attach;
mod change;
pub(crate) mod copy;
mod create;
pub(crate) mod exec;
mod list;
mod logs;
mod mount;
mod options;
mod port;
pub(crate) mod prune;
mod run;
mod show;
mod state;
mod stats;
pub(crate) mod variables;

use clap::Subcommand;
use dormouse_client::{Engine, Target};
use serde_json::Value;

use crate::context::{Context, nearest};
use crate::error::{Done, Failure};

pub(crate) use list::{COLUMNS, row};

/// What can be done with containers; these are also commands of their own.
#[derive(Subcommand)]
pub(crate) enum Shortcut {
    /// Make a container and run it.
    #[command(disable_help_flag = true)]
    Run(Box<run::Run>),
    /// Make a container.
    #[command(disable_help_flag = true)]
    Create(Box<create::Create>),
    /// Start containers.
    Start(state::Start),
    /// Stop containers.
    Stop(state::Stop),
    /// Restart containers.
    Restart(state::Restart),
    /// Send a signal to containers' first processes.
    Kill(state::Kill),
    /// Halt all processes of containers.
    Pause(state::Names),
    /// Let all processes of containers go on.
    Unpause(state::Names),
    /// Wait until containers end, and print their exit codes.
    Wait(state::Names),
    /// Rename a container.
    Rename(change::Rename),
    /// Remove containers.
    #[command(visible_aliases = ["remove", "delete"])]
    Rm(state::Remove),
    /// Join a running container's streams.
    Attach(attach::Attach),
    /// Run a command in a running container.
    Exec(exec::Exec),
    /// Print what a container wrote.
    Logs(logs::Logs),
    /// Copy files to or from a container.
    Cp(copy::Copy),
    /// Write a container's files as a tar archive.
    Export(copy::Export),
    /// Make an image of a container.
    Commit(change::Commit),
    /// Tell what changed in a container's files.
    Diff(show::Diff),
    /// Tell where a container's ports are published.
    Port(show::Port),
    /// List a container's processes.
    Top(show::Top),
    /// Tell what containers use.
    Stats(stats::Stats),
    /// Change containers' limits.
    Update(change::Update),
}

/// `dorm container`.
#[derive(Subcommand)]
pub(crate) enum Container {
    #[command(flatten)]
    Shortcut(Shortcut),
    /// List containers.
    #[command(visible_aliases = ["list", "ps"])]
    Ls(List),
    /// Tell everything of containers.
    Inspect(crate::inspect::Names),
    /// Remove all stopped containers.
    Prune(prune::Prune),
}

pub(crate) use list::List;

/// Runs one of the commands about containers.
pub(crate) async fn run(context: &Context, command: Container) -> Done {
    match command {
        Container::Shortcut(shortcut) => self::shortcut(context, shortcut).await,
        Container::Ls(list) => list.run(context).await,
        Container::Inspect(names) => names.run(context, crate::inspect::Kind::Container).await,
        Container::Prune(prune) => prune.run(context).await,
    }
}

/// Runs one of the commands that are also at the root.
pub(crate) async fn shortcut(context: &Context, command: Shortcut) -> Done {
    match command {
        Shortcut::Run(run) => run.run(context).await,
        Shortcut::Create(create) => create.run(context).await,
        Shortcut::Start(start) => start.run(context).await,
        Shortcut::Stop(stop) => stop.run(context).await,
        Shortcut::Restart(restart) => restart.run(context).await,
        Shortcut::Kill(kill) => kill.run(context).await,
        Shortcut::Pause(names) => names.all(context, "pause").await,
        Shortcut::Unpause(names) => names.all(context, "unpause").await,
        Shortcut::Wait(names) => names.wait(context).await,
        Shortcut::Rename(rename) => rename.run(context).await,
        Shortcut::Rm(remove) => remove.run(context).await,
        Shortcut::Attach(attach) => attach.run(context).await,
        Shortcut::Exec(exec) => exec.run(context).await,
        Shortcut::Logs(logs) => logs.run(context).await,
        Shortcut::Cp(copy) => copy.run(context).await,
        Shortcut::Export(export) => export.run(context).await,
        Shortcut::Commit(commit) => commit.run(context).await,
        Shortcut::Diff(diff) => diff.run(context).await,
        Shortcut::Port(port) => port.run(context).await,
        Shortcut::Top(top) => top.run(context).await,
        Shortcut::Stats(stats) => stats.run(context).await,
        Shortcut::Update(update) => update.run(context).await,
    }
}

/// Everything that the engine says of a container; an unknown one is told with the name that was probably meant.
pub(crate) async fn inspect(engine: &Engine, name: &str) -> Result<Value, Failure> {
    match engine.get(&Target::of("containers", name, "/json").text()).await {
        Ok(value) => Ok(value),
        Err(error) if error.is_not_found() => Err(unknown(engine, name, error.into()).await),
        Err(error) => Err(error.into()),
    }
}

/// An error about a container that the engine doesn't know, with a hint.
pub(crate) async fn unknown(engine: &Engine, name: &str, failure: Failure) -> Failure {
    let target = Target::new("/containers/json").when("all", true).text();
    let Ok(known) = engine.get::<Vec<Value>>(&target).await else { return failure };
    let names: Vec<&str> = known
        .iter()
        .filter_map(|container| container["Names"].as_array())
        .flatten()
        .filter_map(|name| name.as_str()?.strip_prefix('/'))
        .collect();
    match nearest(name, names.into_iter()) {
        Some(near) => failure.hint(format!("did you mean {near:?}?")),
        None => failure.hint("`dorm ps --all` lists what there is"),
    }
}
