//! iptables at the same addresses each time it runs, in a guest whose CPU is emulated.
//!
//! dockerd runs it some 70 times before it lists its first container, and again for each container. QEMU translates
//! code for the addresses that it runs at; as programs and their libraries lie at random ones, each run was translated
//! as if it were the first. So dockerd finds links of these names before the programs themselves, all of them to this very
//! program, which lies at fixed addresses itself, gives its randomness up and becomes the program that was meant.
//! What runs in containers is left alone, and so is everything else that a guest runs.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow};

/// Where dockerd finds the links first.
const FOLDER: &str = "/run/dormouse/fixed";

/// What runs so, and where it really is.
const PROGRAMS: [&str; 2] = ["iptables", "ip6tables"];
const PROGRAMS_FOLDER: &str = "/usr/sbin";

/// The program of PID 1: no path leads to it any more, since it came from the initramfs.
const THIS_PROGRAM: &str = "/proc/1/exe";

/// Makes the links, if this guest's CPU is emulated, and returns the `PATH` by which they are found.
pub(crate) fn path() -> Result<OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !is_emulated(&fs::read_to_string("/proc/cpuinfo")?) {
        return Ok(path);
    }
    fs::create_dir_all(FOLDER).context("can't make a folder for programs")?;
    for name in PROGRAMS {
        match symlink(THIS_PROGRAM, Path::new(FOLDER).join(name)) {
            // The engine was started before.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("can't link {name}"));
            }
            _ => {}
        }
    }
    Ok(before(FOLDER, &path))
}

fn before(folder: &str, path: &OsStr) -> OsString {
    let mut longer = OsString::from(folder);
    if !path.is_empty() {
        longer.push(":");
        longer.push(path);
    }
    longer
}

/// QEMU names a CPU that it emulates so, whatever its model.
fn is_emulated(cpuinfo: &str) -> bool {
    cpuinfo.lines().any(|line| line.starts_with("model name") && line.contains("QEMU TCG CPU"))
}

/// Which program is meant by the name that this one was started by, if any.
pub(crate) fn meant(started_as: &OsStr) -> Option<&'static str> {
    let name = Path::new(started_as).file_name()?;
    PROGRAMS.into_iter().find(|program| name == *program)
}

/// Becomes the program, with this one's arguments. Returns only if that fails.
pub(crate) fn become_program(name: &'static str) -> Result<()> {
    lie_still().context("can't give up random addresses")?;
    let program = Path::new(PROGRAMS_FOLDER).join(name);
    let failed = Command::new(&program).arg0(name).args(std::env::args_os().skip(1)).exec();
    Err(anyhow!(failed).context(format!("can't run {}", program.display())))
}

/// Has whatever this process becomes lie at fixed addresses.
fn lie_still() -> io::Result<()> {
    #[expect(unsafe_code, reason = "no safe call sets a personality")]
    // SAFETY: personality(2) takes a number and touches no memory of ours.
    let before = unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) };
    if before < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_emulated_cpu_is_taken_for_one() {
        assert!(is_emulated("processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+\n"));
        assert!(!is_emulated("processor\t: 0\nmodel name\t: AMD EPYC 7763 64-Core Processor\n"));
        assert!(!is_emulated(""));
    }

    #[test]
    fn the_links_are_found_before_the_programs() {
        assert_eq!(before("/run/x", OsStr::new("/usr/sbin:/usr/bin")), "/run/x:/usr/sbin:/usr/bin");
        // An empty entry would be the current folder.
        assert_eq!(before("/run/x", OsStr::new("")), "/run/x");
    }

    #[test]
    fn what_is_meant_is_told_by_the_last_part_of_the_name() {
        assert_eq!(meant(OsStr::new("/run/dormouse/fixed/ip6tables")), Some("ip6tables"));
        assert_eq!(meant(OsStr::new("iptables")), Some("iptables"));
        for other in ["/init", "dorm-init", "/usr/sbin/iptables-save", "", "/"] {
            assert_eq!(meant(OsStr::new(other)), None, "{other}");
        }
    }

    #[test]
    fn what_lies_still_lies_where_it_did() {
        let stack = || {
            let output = Command::new("sh").args(["-c", "exec cat /proc/self/maps"]).output().unwrap();
            let maps = String::from_utf8(output.stdout).unwrap();
            maps.lines()
                .filter_map(|line| line.split_once(' '))
                .map(|(range, _)| range.to_owned())
                .collect::<Vec<_>>()
        };
        // A thread's own, and what it starts.
        std::thread::spawn(move || {
            lie_still().unwrap();
            assert_eq!(stack(), stack());
        })
        .join()
        .unwrap();
        assert_ne!(stack(), stack());
    }
}
