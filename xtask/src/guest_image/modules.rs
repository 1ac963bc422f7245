//! Which kernel modules load, and in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const MODULES: &str = "usr/lib/modules";

/// The kernel's release: the one folder of modules.
pub(super) fn release(tree: &Path) -> Result<String> {
    let mut folders = fs::read_dir(tree.join(MODULES)).context("the packages brought no kernel modules")?;
    let folder = folders.next().context("the packages brought no kernel modules")??;
    folder.file_name().into_string().ok().context("the kernel's release isn't UTF-8")
}

/// The files of these modules and of all that they depend on, dependencies first, as absolute paths in the guest.
pub(super) fn load_order<'a>(
    tree: &Path,
    release: &str,
    wanted: impl Iterator<Item = &'a str>,
) -> Result<Vec<PathBuf>> {
    let folder = Path::new(MODULES).join(release);
    let table = fs::read_to_string(tree.join(&folder).join("modules.dep"))?;
    let builtin = fs::read_to_string(tree.join(&folder).join("modules.builtin"))?;
    let files = order(&table, &builtin, wanted)?;
    Ok(files.into_iter().map(|file| Path::new("/").join(&folder).join(file)).collect())
}

fn order<'a>(table: &str, builtin: &str, wanted: impl Iterator<Item = &'a str>) -> Result<Vec<String>> {
    let needs: BTreeMap<&str, Vec<&str>> = table
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (file, needs.split_whitespace().collect()))
        .collect();
    let by_name: BTreeMap<String, &str> = needs.keys().map(|file| (name(file), *file)).collect();
    let builtin: BTreeSet<String> = builtin.lines().map(name).collect();
    let mut order = Vec::new();
    for module in wanted {
        match by_name.get(module) {
            Some(file) => visit(file, &needs, &mut order),
            None if builtin.contains(module) => {}
            None => anyhow::bail!("the kernel has no module named {module}"),
        }
    }
    Ok(order)
}

fn visit(file: &str, needs: &BTreeMap<&str, Vec<&str>>, order: &mut Vec<String>) {
    if order.iter().any(|placed| placed == file) {
        return;
    }
    // The kernel's build refuses cycles, so this ends.
    for needed in needs.get(file).into_iter().flatten() {
        visit(needed, needs, order);
    }
    order.push(file.to_owned());
}

/// A module's name, from its file's.
fn name(file: &str) -> String {
    let file = file.rsplit('/').next().unwrap_or(file);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str =
        "fs/ext4.ko: fs/jbd2.ko lib/crc16.ko\nfs/jbd2.ko: lib/crc16.ko\nlib/crc16.ko:\nnet/a-b.ko:\n";

    #[test]
    fn dependencies_come_first_and_once() {
        let order = order(TABLE, "kernel/lib/x.ko\n", ["ext4", "crc16", "x", "a_b"].into_iter()).unwrap();
        assert_eq!(order, ["lib/crc16.ko", "fs/jbd2.ko", "fs/ext4.ko", "net/a-b.ko"]);
    }

    #[test]
    fn a_module_that_is_not_there_is_an_error() {
        assert!(order(TABLE, "", ["btrfs"].into_iter()).is_err());
    }
}
