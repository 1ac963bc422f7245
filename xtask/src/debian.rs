//! Packages of Debian, unpacked and not installed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::guest_image::EPOCH_SECONDS;
use crate::shell::run;

/// The Debian release that guests and their containers' demo image are made of.
pub(crate) const SUITE: &str = "trixie";

/// Fetches these packages and what they depend on, and writes them, unpacked, into the tar file `archive`. `list` gets a
/// line for each package: its SHA-256 and its file's name, in order.
pub(crate) fn fetch(suite: &str, packages: &[&str], archive: &Path, list: &Path) -> Result<()> {
    let list = std::path::absolute(list)?;
    let list = list.to_str().context("the work folder's path isn't UTF-8")?;
    ensure!(!list.contains('\''), "the work folder's path has a quote in it: {list}");
    let hook = format!("cd \"$1\"/var/cache/apt/archives && LC_ALL=C sha256sum *.deb > '{list}'");
    run(Command::new("mmdebstrap")
        .env("SOURCE_DATE_EPOCH", EPOCH_SECONDS.to_string())
        .args(["--quiet", "--variant=extract", "--format=tar", "--components=main"])
        .arg(format!("--mode={}", mode()?))
        .arg(format!("--include={}", packages.join(",")))
        .arg(format!("--extract-hook={hook}"))
        .arg(suite)
        .arg(archive))
}

/// How packages are unpacked. No script of theirs runs and owners don't matter, so a user needs neither root nor a range
/// of subordinate ids; as root, mmdebstrap refuses this mode.
fn mode() -> Result<&'static str> {
    let user = fs::metadata("/proc/self").context("can't tell who runs this")?.uid();
    Ok(if user == 0 { "root" } else { "chrootless" })
}
