//! Does KVM work? `/dev/kvm` can be there, open, make a VM, and still hang every ordinary guest: so one is run, with a
//! deadline.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use command_fds::CommandFdExt as _;
use command_fds::FdMapping;
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::time::timeout;

use super::test_guest::{EXIT_PORT, EXIT_STATUS, kernel_file};

/// How long the test guest may take; a working one needs some 0.3 s.
pub const KVM_PROBE_WITHIN: Duration = Duration::from_secs(3);

/// How long a killed QEMU may take to go.
const KILL_WITHIN: Duration = Duration::from_secs(1);

/// What runs the guest's instructions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Acceleration {
    /// The processor. A security boundary.
    Kvm,
    /// QEMU's TCG: about ten times slower, and no security boundary in QEMU's own words.
    Emulation {
        /// Why not KVM, for people.
        why: String,
    },
}

impl Acceleration {
    /// Is it KVM?
    #[must_use]
    pub const fn is_kvm(&self) -> bool {
        matches!(self, Self::Kvm)
    }

    /// `kvm` or `emulation`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Emulation { .. } => "emulation",
        }
    }
}

/// What stands in the way of KVM before any guest is run.
pub(super) fn obstacle() -> Option<String> {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => None,
        Err(error) => Some(match error.kind() {
            std::io::ErrorKind::NotFound => "this host has no /dev/kvm".to_owned(),
            std::io::ErrorKind::PermissionDenied => {
                "no permission for /dev/kvm: ask for membership of the group kvm".to_owned()
            }
            _ => format!("/dev/kvm cannot be opened: {error}"),
        }),
    }
}

/// Where QEMU finds the test guest.
const KERNEL_FD: i32 = 10;

/// Runs a guest on KVM that ends by itself.
pub(super) async fn test_kvm(program: &Path) -> Acceleration {
    match run_test_guest(program, "kvm", "host", KVM_PROBE_WITHIN).await {
        Ok(()) => Acceleration::Kvm,
        Err(why) => {
            tracing::warn!(why, "KVM does not work, guests are emulated");
            Acceleration::Emulation { why }
        }
    }
}

async fn run_test_guest(
    program: &Path,
    accelerator: &str,
    cpu: &str,
    within: Duration,
) -> Result<(), String> {
    let cannot = |error: std::io::Error| format!("the test guest cannot be run: {error}");
    let mut command = Command::new(program);
    command
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-net", "none", "-m", "32"])
        .args(["-machine", "q35,usb=off,sata=off,smbus=off", "-accel", accelerator, "-cpu", cpu])
        .args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"])
        .arg("-device")
        .arg(format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"))
        .arg("-kernel")
        .arg(format!("/proc/self/fd/{KERNEL_FD}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let kernel = kernel_file().map_err(cannot)?;
    command
        .fd_mappings(vec![FdMapping { parent_fd: kernel, child_fd: KERNEL_FD }])
        .map_err(|error| error.to_string())?;
    let mut child = command.spawn().map_err(cannot)?;
    match timeout(within, child.wait()).await {
        Ok(Ok(status)) if status.code() == Some(EXIT_STATUS) => Ok(()),
        Ok(Ok(status)) => Err(format!("/dev/kvm is there, but a test guest ended with {status}")),
        Ok(Err(error)) => Err(cannot(error)),
        Err(_) => {
            // Reaped in the background if even SIGKILL takes its time.
            let _ = child.start_kill();
            let _ = timeout(KILL_WITHIN, child.wait()).await;
            Err(format!("/dev/kvm is there, but a test guest hangs on it (no end within {within:?})"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu() -> std::path::PathBuf {
        super::super::in_path("qemu-system-x86_64").unwrap()
    }

    #[tokio::test]
    async fn the_test_guest_ends_by_itself_where_guests_run() {
        run_test_guest(&qemu(), "tcg", "max", Duration::from_secs(30)).await.unwrap();
    }

    #[tokio::test]
    async fn a_test_guest_that_hangs_is_given_up_at_its_deadline() {
        let started = std::time::Instant::now();
        let why = run_test_guest(&qemu(), "tcg", "max", Duration::from_millis(1)).await.unwrap_err();
        assert!(why.contains("hangs"), "{why}");
        assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn an_accelerator_that_fails_at_once_is_told_from_one_that_hangs() {
        let why = run_test_guest(&qemu(), "xen", "max", Duration::from_secs(30)).await.unwrap_err();
        assert!(why.contains("ended with"), "{why}");
    }
}
