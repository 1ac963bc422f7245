//! The root file system: what the packages' scripts would have done, and no more.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::{CONTAINERD, DROP, EPOCH_SECONDS, MODULES_BOOT, MODULES_DROP, MODULES_ENGINE, lines, modules};
use crate::shell::run;

/// What the engine tells of its system.
const OS_RELEASE: &str = "NAME=\"Dormouse guest\"\nPRETTY_NAME=\"Dormouse guest (Debian 13)\"\nID=dormouse\nID_LIKE=debian\nVERSION_ID=13\n";

/// What a module can do without. Its signature lies behind all sections, and is never copied.
const STRIP: [&str; 3] = ["strip", "--strip-debug", "--remove-section=.BTF"];

/// Unpacks the packages into `tree` and makes a root file system of them. The kernel goes beside it, into `boot`.
pub(super) fn arrange(archive: &Path, tree: &Path) -> Result<()> {
    let boot = tree.with_file_name("boot");
    for folder in [tree, boot.as_path()] {
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
    }
    fs::create_dir_all(tree)?;
    run(Command::new("tar")
        .args(["--extract", "--no-same-owner", "--preserve-permissions", "--exclude=./dev/*", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(tree))?;
    // Everybody in the guest is root, and who makes an image without being root gets no such bits.
    run(Command::new("chmod").args(["--recursive", "ug-s"]).arg(tree))?;
    fs::rename(tree.join("boot"), &boot).context("the packages brought no kernel")?;
    for path in lines(DROP) {
        drop_path(tree, path)?;
    }
    link_programs(tree)?;
    write_accounts(tree)?;
    write_certificates(tree)?;
    fs::create_dir_all(tree.join("etc/containerd"))?;
    fs::write(tree.join("etc/containerd/config.toml"), CONTAINERD)?;
    fs::write(tree.join("usr/lib/os-release"), OS_RELEASE)?;
    for folder in
        ["dev", "proc", "sys", "run", "tmp", "root", "mnt", "var/lib/docker", "var/log", "var/tmp", "opt"]
    {
        fs::create_dir_all(tree.join(folder))?;
    }
    unpack_modules(tree)
}

/// Packs the tree. Compressed with lz4, which a guest under emulation unpacks fastest; in clusters of 16 KiB, because whoever
/// reads a page keeps its whole cluster: with 64 KiB a guest that has booted has touched 35 MB more, and the image is smaller by 6.
pub(super) fn pack(tree: &Path, image: &Path) -> Result<()> {
    run(Command::new("mkfs.erofs")
        .args(["--quiet", "-zlz4hc,12", "-C16384", "--all-root", "-x-1"])
        .arg(format!("-T{EPOCH_SECONDS}"))
        .arg("-U00000000-0000-4000-8000-000000000001")
        .arg(image)
        .arg(tree))
}

/// Removes a path, or all whose name begins as `path` does where it ends in `*`.
fn drop_path(tree: &Path, path: &str) -> Result<()> {
    let full = tree.join(path);
    let (folder, name) =
        (full.parent().context("a path to drop is no name")?, full.file_name().unwrap_or_default());
    let name = name.to_str().context("paths are UTF-8")?;
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        let found = entry.file_name();
        let found = found.to_string_lossy();
        let matches = match name.strip_suffix('*') {
            Some(start) => found.starts_with(start),
            None => found == name,
        };
        if !matches {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The links that `base-files` and `update-alternatives` make.
fn link_programs(tree: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        if fs::symlink_metadata(tree.join(name)).is_err() {
            symlink(format!("usr/{name}"), tree.join(name))?;
        }
    }
    for name in ["iptables", "ip6tables"] {
        for ending in ["", "-save", "-restore"] {
            let link = tree.join("usr/sbin").join(format!("{name}{ending}"));
            if fs::symlink_metadata(&link).is_err() {
                symlink("xtables-nft-multi", link)?;
            }
        }
    }
    if fs::symlink_metadata(tree.join("usr/bin/sh")).is_err() && tree.join("usr/bin/dash").exists() {
        symlink("dash", tree.join("usr/bin/sh"))?;
    }
    if fs::symlink_metadata(tree.join("var/run")).is_err() {
        symlink("/run", tree.join("var/run"))?;
    }
    Ok(())
}

fn write_accounts(tree: &Path) -> Result<()> {
    let masters = tree.join("usr/share/base-passwd");
    for name in ["passwd", "group"] {
        fs::copy(masters.join(format!("{name}.master")), tree.join("etc").join(name))
            .with_context(|| format!("the packages brought no {name}"))?;
    }
    // dockerd gives its socket to this group, and warns without it.
    let group = tree.join("etc/group");
    let groups = fs::read_to_string(&group)?;
    fs::write(group, format!("{groups}docker:x:999:\n"))?;
    fs::write(tree.join("etc/hostname"), "dormouse\n")?;
    fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost dormouse\n::1 localhost dormouse\n")?;
    fs::write(tree.join("etc/resolv.conf"), "")?;
    fs::write(tree.join("etc/machine-id"), "")?;
    Ok(())
}

/// What `update-ca-certificates` makes: all certificates in one file, in the order of their names.
fn write_certificates(tree: &Path) -> Result<()> {
    let mut files: Vec<_> = fs::read_dir(tree.join("usr/share/ca-certificates/mozilla"))
        .context("the packages brought no CA certificates")?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    let mut bundle = String::new();
    for file in files {
        bundle.push_str(&fs::read_to_string(file)?);
    }
    let folder = tree.join("etc/ssl/certs");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("ca-certificates.crt"), bundle)?;
    Ok(())
}

/// Unpacks the modules, since unpacking them at each boot takes longer than reading more, and lists what loads at boot.
/// They are stripped of what the kernel would check and index as it loads them: their signatures, since the host has verified
/// the image that they are a part of, and their types for debuggers.
fn unpack_modules(tree: &Path) -> Result<()> {
    let release = modules::release(tree)?;
    let folder = tree.join("usr/lib/modules").join(&release);
    for path in lines(MODULES_DROP) {
        drop_path(&folder.join("kernel"), path)?;
    }
    run(Command::new("find").arg(&folder).args(["-name", "*.ko.xz", "-exec", "xz", "-d", "-q", "{}", "+"]))?;
    run(Command::new("find").arg(&folder).args(["-name", "*.ko", "-exec"]).args(STRIP).args(["{}", "+"]))?;
    run(Command::new("depmod").arg("-b").arg(tree.join("usr")).arg(&release))?;
    modules::load_order(tree, &release, lines(MODULES_ENGINE)).context("the engine needs all its modules")?;
    let order = modules::load_order(tree, &release, lines(MODULES_BOOT))?;
    let list: String = order.iter().map(|file| format!("{}\n", file.display())).collect();
    fs::create_dir_all(tree.join("usr/lib/dormouse"))?;
    fs::write(tree.join("usr/lib/dormouse/modules"), list)?;
    Ok(())
}
