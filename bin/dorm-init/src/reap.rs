//! PID 1 proper.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

use crate::{console, limits, mounts};

/// Mounts the root, starts the process that serves, and reaps orphans until it ends. Returns only on failure.
pub(crate) fn run() -> Result<()> {
    let outcome = start().and_then(|server| {
        reap_until(server)?;
        Ok(())
    });
    if let Err(error) = &outcome {
        console::say(&format!("failed: {error:#}"));
    }
    rustix::fs::sync();
    // Without power management the kernel halts instead; then the panic that PID 1's end causes ends the VM.
    reboot(RebootCommand::PowerOff).context("can't power off")?;
    outcome
}

fn start() -> Result<Pid> {
    limits::set().context("can't set limits")?;
    mounts::mount_kernel()?;
    mounts::load_modules("/modules")?;
    mounts::switch_root()?;
    // The link still leads to the file in the initramfs, which no path leads to any more.
    let server = Command::new("/proc/self/exe")
        .arg0("dorm-init")
        .arg("serve")
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .spawn()
        .context("can't start the second process")?;
    Pid::from_raw(server.id().cast_signed()).context("a process id can't be 0")
}

fn reap_until(server: Pid) -> Result<()> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == server => {
                if status.exit_status() != Some(0) {
                    console::say(&format!("the serving process ended: {status:?}"));
                }
                return Ok(());
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("can't wait for children"),
        }
    }
}
