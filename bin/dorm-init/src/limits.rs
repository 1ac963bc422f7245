//! How many files the guest's processes may have open.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a service has on a host with systemd, and so a container of a host's engine: soft and hard. A kernel gives its first
/// process 4096 at most, with which many a database doesn't start.
const FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(512 * 1024) };

/// For this process and all that it starts.
pub(crate) fn set() -> io::Result<()> {
    Ok(setrlimit(Resource::Nofile, FILES)?)
}

/// For this process: each stream of the channel takes one file or more.
pub(crate) fn raise() -> io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

/// For what `command` starts, whatever this process has raised for itself.
pub(crate) fn lower_for(command: &mut Command) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = FILES.current.min(maximum.or(FILES.current));
    #[expect(unsafe_code, reason = "a limit can only be set between fork and exec by the child")]
    // SAFETY: setrlimit is async-signal-safe, allocates nothing and touches no memory but its argument.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(Resource::Nofile, Rlimit { current, maximum })?));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_limit_is_not_its_childrens() {
        raise().unwrap();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -n; ulimit -Hn"]);
        lower_for(&mut command);
        let output = command.output().unwrap();
        let hard = maximum.map_or("unlimited".to_owned(), |maximum| maximum.to_string());
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("1024\n{hard}\n"));
    }
}
