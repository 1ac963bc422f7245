//! `dorm`: the command line. One file per group of commands; what they share is in `context`, `output` and `error`.
//!
//! A library, so that the manual is made from the same tree of commands that is parsed.

mod archive;
mod arguments;
mod autostart;
mod builder;
mod clients;
mod completion;
mod container;
mod context;
mod docker_listen;
mod doctor;
mod elsewhere;
mod error;
mod format;
mod help;
mod hold;
mod image;
mod import_docker;
mod inspect;
mod message;
mod monitor;
mod network;
mod operation;
mod output;
mod progress;
mod registry;
mod room;
mod search;
mod session;
mod settings;
mod stream;
mod system;
mod template;
mod terminal;
mod usage;
mod value;
mod version;
mod volume;
mod why;

use std::process::ExitCode;

pub use crate::arguments::command;

use crate::arguments::{Arguments, Command};
use crate::context::Context;
use crate::error::{Done, Failure};

/// Runs the program, and gives its exit status.
#[must_use]
pub fn main() -> ExitCode {
    completion::answer_shells(command);
    // Help and version are answered here, before there is anything else.
    let arguments = match Arguments::from_line(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(usage) => return usage.exit(),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::from(error).exit(),
    };
    let done = runtime.block_on(run(arguments));
    // A thread may still wait for input that nobody will type.
    runtime.shutdown_background();
    match done {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.exit(),
    }
}

async fn run(arguments: Arguments) -> Done {
    let context = Context::new(arguments.session);
    match arguments.command {
        Command::Session(command) => session::run(&context, command).await,
        Command::Template(template) => template.run(&context).await,
        Command::Containers(shortcut) => container::shortcut(&context, shortcut).await,
        Command::Ps(list) => list.run(&context).await,
        Command::Images(shortcut) => image::shortcut(&context, shortcut).await,
        Command::ImageList(list) => list.run(&context).await,
        Command::Rmi(remove) => remove.run(&context).await,
        Command::Login(login) => login.run(&context).await,
        Command::Logout(logout) => logout.run(),
        Command::Inspect(inspect) => inspect.run(&context).await,
        Command::Events(events) => events.run(&context).await,
        Command::Info(info) => info.run(&context).await,
        Command::Search(search) => search.run(&context).await,
        Command::Container(command) => container::run(&context, command).await,
        Command::Image(command) => image::run(&context, command).await,
        Command::Network(command) => network::run(&context, command).await,
        Command::Volume(command) => volume::run(&context, command).await,
        Command::Registry(command) => registry::run(&context, command).await,
        Command::System(command) => system::run(&context, command).await,
        Command::Builder(command) => builder::run(&context, command).await,
        Command::Help(help) => help.run(),
        Command::Elsewhere(elsewhere) => elsewhere.run(),
        Command::Completion(completion) => completion.run(),
        Command::Doctor(doctor) => doctor.run().await,
        Command::Why(why) => why.run(&context).await,
        Command::DockerEnv(env) => env.run(&context).await,
        Command::DockerContext(command) => command.run(&context).await,
        Command::ImportDocker(import) => import.run(&context).await,
        Command::DockerListen(listen) => listen.run(&context).await,
        Command::DialStdio => clients::dial_stdio(&context).await,
        Command::Settings(settings) => settings.run(),
        Command::Autostart(command) => command.run(),
        Command::Monitor(monitor) => monitor.run(&context).await,
        Command::Hold(hold) => hold.run(&context).await,
        Command::Version(version) => version.run(&context).await,
    }
}
