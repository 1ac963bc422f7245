//! The initramfs: `dorm-init`, and the modules that mounting the root takes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType, trailer};

use super::EPOCH_SECONDS;
use crate::shell::run;

/// Writes the archive, packed. `modules` are absolute paths in the guest, found below `tree` here.
pub(super) fn write(initramfs: &Path, dorm_init: &Path, tree: &Path, modules: &[PathBuf]) -> Result<()> {
    let archive = initramfs.with_extension("cpio");
    write_archive(&archive, dorm_init, tree, modules)?;
    // One thread, since the number of threads shows in the bytes.
    run(Command::new("zstd")
        .args(["-19", "--single-thread", "--quiet", "--rm", "-o"])
        .arg(initramfs)
        .arg(archive))
}

fn write_archive(archive: &Path, dorm_init: &Path, tree: &Path, modules: &[PathBuf]) -> Result<()> {
    let mut out = Archive { out: BufWriter::new(File::create(archive)?), inode: 0, folders: BTreeSet::new() };
    // Mount points, and the console that the kernel gives to PID 1.
    for folder in ["dev", "proc", "sys", "root"] {
        out.folder(Path::new(folder))?;
    }
    out.console()?;
    out.file(Path::new("init"), 0o755, &fs::read(dorm_init)?)?;
    let mut list = String::new();
    for module in modules {
        let inside = module.strip_prefix("/").context("modules have absolute paths")?;
        let bytes =
            fs::read(tree.join(inside)).with_context(|| format!("can't read {}", inside.display()))?;
        out.file(inside, 0o644, &bytes)?;
        list.push_str(&format!("{}\n", module.display()));
    }
    out.file(Path::new("modules"), 0o644, list.as_bytes())?;
    trailer(out.out)?.flush()?;
    Ok(())
}

struct Archive<W: Write> {
    out: W,
    inode: u32,
    folders: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    fn entry(&mut self, name: &str, mode: u32, kind: ModeFileType) -> Builder {
        self.inode += 1;
        Builder::new(name).ino(self.inode).mode(mode).mtime(EPOCH_SECONDS).set_mode_file_type(kind)
    }

    fn folder(&mut self, path: &Path) -> Result<()> {
        if path.as_os_str().is_empty() || !self.folders.insert(path.to_owned()) {
            return Ok(());
        }
        self.folder(path.parent().unwrap_or(Path::new("")))?;
        let name = path.to_str().context("paths are UTF-8")?;
        self.entry(name, 0o755, ModeFileType::Directory).nlink(2).write(&mut self.out, 0).finish()?;
        Ok(())
    }

    fn file(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        self.folder(path.parent().unwrap_or(Path::new("")))?;
        let name = path.to_str().context("paths are UTF-8")?;
        let size = u32::try_from(bytes.len()).context("the file is too large for an initramfs")?;
        let mut writer = self.entry(name, mode, ModeFileType::Regular).write(&mut self.out, size);
        writer.write_all(bytes)?;
        writer.finish()?;
        Ok(())
    }

    fn console(&mut self) -> Result<()> {
        let entry = self.entry("dev/console", 0o600, ModeFileType::Char).rdev_major(5).rdev_minor(1);
        entry.write(&mut self.out, 0).finish()?;
        Ok(())
    }
}
