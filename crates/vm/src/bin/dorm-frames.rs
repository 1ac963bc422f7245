//! Stands between a guest's QEMU (its stdin) and the guest's passt (its stdout), and ends with either. Started by the
//! VM factory; what it does, and why it is there, is told in `dormouse_vm::frames`.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

fn main() -> ExitCode {
    let sockets = || {
        let guest = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
        let helper = UnixStream::from(std::io::stdout().as_fd().try_clone_to_owned()?);
        dormouse_vm::frames::relay(guest, helper)
    };
    match sockets() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dorm-frames: {error}");
            ExitCode::FAILURE
        }
    }
}
