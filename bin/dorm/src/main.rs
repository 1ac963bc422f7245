//! `dorm`: sessions from the command line. Containers are any Docker client's business:
//! `DOCKER_HOST=$(dorm session docker-host)`.

mod arguments;
mod error;
mod session;

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::{Arguments, Command};
use crate::error::Failure;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let name = arguments.session;
    let done = match arguments.command {
        Command::Session(command) => session::run(name, command).await,
        Command::Hold { reason, command } => session::hold(name, reason, command).await,
        Command::Version => session::version().await,
    };
    match done {
        Ok(code) => code,
        // Whoever reads our output has read enough.
        Err(Failure::BrokenPipe) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}
