//! `dorm session`: make, look at and end sessions. One file per kind of command.

mod create;
mod enter;
mod list;
mod logs;
mod process;
pub(crate) mod settings;
mod sleep;
mod state;
mod told;
mod wake;

pub(crate) use state::phase;

use clap::Subcommand;
use dormouse_api::IdleAction;

use crate::context::Context;
use crate::error::Done;

#[derive(Subcommand)]
pub(crate) enum Session {
    /// Make a session.
    Create(create::Create),
    /// List the sessions.
    #[command(visible_alias = "list")]
    Ls(list::List),
    /// Tell everything of a session as JSON, without waking it.
    Inspect(list::Inspect),
    /// Open a session again that was terminated.
    Start(state::Named),
    /// End a session's life: its VM is shut down, requests are refused. Its storage stays.
    Terminate(state::Named),
    /// Terminate sessions, and remove them with their storage.
    #[command(visible_alias = "remove")]
    Rm(state::Remove),
    /// Wait for a session's VM to fall asleep, and tell what came of it.
    Sleep(sleep::Sleep),
    /// Put a session's VM to sleep now, with everything in memory, if nothing holds it awake.
    Suspend(state::Named),
    /// Put a session's VM to sleep now by shutting it down, if nothing runs in it.
    Stop(state::Named),
    /// Wake a session's VM, and give it no work.
    Resume(state::Named),
    /// Wake a session's VM now, at a time, or again and again.
    Wake(wake::WakeArguments),
    /// Read the whole snapshot of a sleeping session, and refuse it from now on if it isn't what was put to sleep.
    Verify(state::Named),
    /// Print the value for DOCKER_HOST.
    DockerHost(state::Named),
    /// Print the log of a session's host, or the console of its VM.
    Logs(logs::Logs),
    /// Print what a session's VM did so far: starts, sleeps, crashes.
    History(logs::History),
    /// Change settings of a session, also while its VM is up.
    Set(settings::Set),
    /// Keep a session's VM awake while it is up. Starts nothing.
    Pin(settings::PinArguments),
    /// Take the pin away.
    Unpin(state::Named),
    /// Print what hooks are told, as JSON lines.
    Events(told::Events),
    /// Print the last steps of a session's lifecycle, to be looked at with `cargo xtask replay`.
    Trace(told::Trace),
    /// Run a command in the VM, beside the engine.
    Run(process::Run),
    /// A root shell in the VM.
    Shell(process::Shell),
    /// A root shell in a VM over a store that no session has now. The session ends with it, the store stays.
    Enter(enter::Enter),
    /// Wait for a state.
    Wait(state::Wait),
}

/// Runs one of the commands under `dorm session`.
pub(crate) async fn run(context: &Context, command: Session) -> Done {
    match command {
        Session::Create(create) => create.run(context).await,
        Session::Ls(list) => list.run(context).await,
        Session::Inspect(inspect) => inspect.run(context).await,
        Session::Start(named) => state::start(context, named).await,
        Session::Terminate(named) => state::terminate(context, named).await,
        Session::Rm(remove) => remove.run(context).await,
        Session::Sleep(sleep) => sleep.run(context).await,
        Session::Suspend(named) => sleep::now(context, named, Some(IdleAction::Suspend)).await,
        Session::Stop(named) => sleep::now(context, named, Some(IdleAction::Stop)).await,
        Session::Resume(named) => state::resume(context, named).await,
        Session::Wake(wake) => wake.run(context).await,
        Session::Verify(named) => state::verify(context, named).await,
        Session::DockerHost(named) => state::docker_host(context, named).await,
        Session::Logs(logs) => logs.run(context).await,
        Session::History(history) => history.run(context).await,
        Session::Set(set) => set.run(context).await,
        Session::Pin(pin) => pin.run(context).await,
        Session::Unpin(named) => settings::unpin(context, named.name).await,
        Session::Events(events) => events.run(context).await,
        Session::Trace(trace) => trace.run(context).await,
        Session::Run(run) => run.run(context).await,
        Session::Shell(shell) => shell.run(context).await,
        Session::Enter(enter) => enter.run(context).await,
        Session::Wait(wait) => wait.run(context).await,
    }
}
