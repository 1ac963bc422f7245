//! virtiofsd: where it is, and whether it would run here.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::keeper::KeeperError;
use crate::tree::Namespaces;

/// Where virtiofsd may be named.
const VARIABLE: &str = "DORM_VIRTIOFSD";

/// Where Debian's package has it; the one that comes with an older QEMU lies elsewhere.
const PACKAGED: &str = "/usr/libexec/virtiofsd";

/// What a user does who has none.
pub const GET_VIRTIOFSD: &str =
    "install the package virtiofsd, or put the one of scripts/install-virtiofsd beside dorm";

/// How long it may take to tell its version.
const TOLD_WITHIN: Duration = Duration::from_secs(10);

/// virtiofsd: as named in `DORM_VIRTIOFSD`, beside this program, or where the system has it.
#[must_use]
pub fn find_virtiofsd() -> Option<PathBuf> {
    let named = std::env::var_os(VARIABLE).map(PathBuf::from);
    let beside = std::env::current_exe().ok().map(|program| program.with_file_name("virtiofsd"));
    let packaged = PathBuf::from(PACKAGED);
    named.into_iter().chain(beside).chain([packaged]).find(|program| program.is_file())
}

/// What this virtiofsd calls itself, its name and its version, once it has run in namespaces like those that keepers make.
///
/// # Errors
/// When it can't be run, or this host lets its users have no namespaces.
pub async fn try_virtiofsd(program: &Path) -> Result<String, KeeperError> {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let output = run(&mut command).await.map_err(KeeperError::Virtiofsd)?;
    let first_line =
        |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().next().unwrap_or_default().trim().to_owned();
    if !output.status.success() {
        return Err(KeeperError::Ended {
            status: output.status.to_string(),
            words: first_line(&output.stderr),
        });
    }
    let namespaces = Namespaces::new();
    // SAFETY: between fork and exec only system calls are made, which are async-signal-safe, and nothing is allocated.
    #[expect(unsafe_code, reason = "a process with several threads can have only a child enter namespaces")]
    unsafe {
        command.pre_exec(move || namespaces.enter());
    }
    // It runs without them, so whatever fails now is their fault.
    run(&mut command).await.map_err(KeeperError::Namespaces)?;
    Ok(first_line(&output.stdout))
}

async fn run(command: &mut Command) -> io::Result<Output> {
    timeout(TOLD_WITHIN, command.output()).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_that_tells_its_version_would_run_if_there_are_namespaces() {
        match try_virtiofsd(Path::new("/bin/true")).await {
            Ok(version) => assert!(!version.contains('\n'), "{version:?}"),
            Err(error) => assert!(matches!(error, KeeperError::Namespaces(_)), "{error}"),
        }
    }

    #[tokio::test]
    async fn a_program_that_does_not_run_is_told_apart_from_namespaces_that_are_missing() {
        let missing = try_virtiofsd(Path::new("/no/such/virtiofsd")).await;
        assert!(matches!(missing, Err(KeeperError::Virtiofsd(_))), "{missing:?}");
        let failing = try_virtiofsd(Path::new("/bin/false")).await;
        assert!(matches!(failing, Err(KeeperError::Ended { .. })), "{failing:?}");
    }
}
