//! A container image made of Debian's `busybox-static` package alone, for the demo and the tests.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::debian::{self, SUITE};
use crate::shell::run;

/// Programs that the image has; each is a link to busybox.
const PROGRAMS: &[&str] = &[
    "[",
    "ash",
    "awk",
    "basename",
    "cat",
    "chmod",
    "chown",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "dirname",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "grep",
    "head",
    "hostname",
    "httpd",
    "id",
    "ifconfig",
    "ip",
    "kill",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mkfifo",
    "mount",
    "mv",
    "nc",
    "netstat",
    "nslookup",
    "ping",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tar",
    "tee",
    "test",
    "top",
    "touch",
    "tr",
    "true",
    "uname",
    "uniq",
    "vi",
    "wc",
    "wget",
    "which",
    "whoami",
    "xargs",
    "yes",
];

/// Makes the archive.
pub(crate) fn build(out: &Path) -> Result<()> {
    let folder = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder)?;
    let work = tempfile::Builder::new().prefix("busybox-").tempdir_in(folder)?;
    let work = work.path();
    let (packages, tree) = (work.join("packages.tar"), work.join("packages"));
    debian::fetch(SUITE, &["busybox-static"], &packages, &work.join("packages.sha256"))?;
    fs::create_dir(&tree)?;
    run(Command::new("tar")
        .args(["--extract", "--no-same-owner", "--preserve-permissions", "--exclude=./dev/*", "--file"])
        .arg(&packages)
        .arg("--directory")
        .arg(&tree))?;
    let root = work.join("root");
    fs::create_dir_all(root.join("bin"))?;
    let busybox = ["usr/bin/busybox", "bin/busybox"].map(|path| tree.join(path));
    let busybox = busybox.iter().find(|path| path.exists()).context("the package has no busybox")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for program in PROGRAMS {
        symlink("busybox", root.join("bin").join(program))?;
    }
    for folder in ["dev", "etc", "proc", "sys", "tmp", "var", "root"] {
        fs::create_dir_all(root.join(folder))?;
    }
    // For processes of every user.
    fs::set_permissions(root.join("tmp"), Permissions::from_mode(0o1777))?;
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;

    let image = work.join("image");
    fs::create_dir_all(image.join("layer"))?;
    tar(&root, &image.join("layer/layer.tar"))?;
    let layer: String = Sha256::digest(fs::read(image.join("layer/layer.tar"))?)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    fs::write(
        image.join("config.json"),
        format!(
            r#"{{"architecture":"amd64","os":"linux","created":"2023-11-14T22:13:20Z","config":{{"Env":["PATH=/bin"],"Cmd":["sh"]}},"rootfs":{{"type":"layers","diff_ids":["sha256:{layer}"]}},"history":[{{"created":"2023-11-14T22:13:20Z","created_by":"busybox-static"}}]}}"#
        ),
    )?;
    fs::write(
        image.join("manifest.json"),
        r#"[{"Config":"config.json","RepoTags":["busybox:latest"],"Layers":["layer/layer.tar"]}]"#,
    )?;
    let fresh = work.join("image.tar");
    tar(&image, &fresh)?;
    fs::rename(fresh, out)?;
    Ok(())
}

/// An archive whose bytes depend on the files' names, modes and contents only.
fn tar(folder: &Path, archive: &Path) -> Result<()> {
    run(Command::new("tar")
        .args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@1700000000"])
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(folder)
        .arg("."))
}
