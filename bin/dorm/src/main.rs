//! `dorm`: the command line. One file per group of commands; what they share is in [`context`], [`output`] and [`error`].

mod arguments;
mod context;
mod error;
mod hold;
mod output;
mod session;
mod template;
mod value;
mod version;

use std::process::ExitCode;

use crate::arguments::{Arguments, Command};
use crate::context::Context;
use crate::error::{Done, Failure};

fn main() -> ExitCode {
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
        Command::Hold(hold) => hold.run(&context).await,
        Command::Version(version) => version.run(&context).await,
    }
}
