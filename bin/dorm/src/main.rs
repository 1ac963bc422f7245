//! See [`dorm`].

use std::process::ExitCode;

fn main() -> ExitCode {
    dorm::main()
}
