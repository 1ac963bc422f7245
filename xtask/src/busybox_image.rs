//! A container image made of Debian's `busybox-static` package alone, for the demo and the tests.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

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
    let work = out.with_extension("work");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    let root = work.join("root");
    fs::create_dir_all(root.join("bin"))?;
    run(Command::new("apt-get").current_dir(&work).args([
        "download",
        "--quiet=2",
        "--option=APT::Sandbox::User=root",
        "busybox-static",
    ]))?;
    let package = fs::read_dir(&work)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ending| ending == "deb"))
        .context("apt-get brought no package")?;
    run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(work.join("package")))?;
    let busybox = ["usr/bin/busybox", "bin/busybox"].map(|path| work.join("package").join(path));
    let busybox = busybox.iter().find(|path| path.exists()).context("the package has no busybox")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for program in PROGRAMS {
        symlink("busybox", root.join("bin").join(program))?;
    }
    for folder in ["dev", "etc", "proc", "sys", "tmp", "var", "root"] {
        fs::create_dir_all(root.join(folder))?;
    }
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
    tar(&image, out)?;
    fs::remove_dir_all(work)?;
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
