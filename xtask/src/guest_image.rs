//! The guest image: see guest/README.md.

mod initramfs;
mod kernel;
mod modules;
mod root;

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use dormouse_guest_image::{ImageStore, MANIFEST_FORMAT, Manifest, hash_file};
use sha2::{Digest, Sha256};

use crate::debian::{self, SUITE};
use crate::shell::run;

/// Every time in the image: equal inputs must give equal bytes.
pub(crate) const EPOCH_SECONDS: u32 = 1_700_000_000;

/// The recipe, compiled in so that the image belongs to the program that made it.
const PACKAGES: &str = include_str!("../../guest/packages");
const CONTAINERD: &str = include_str!("../../guest/containerd.toml");
const DROP: &str = include_str!("../../guest/drop");
const MODULES_ENGINE: &str = include_str!("../../guest/modules-engine");
const MODULES_INITRAMFS: &str = include_str!("../../guest/modules-initramfs");
const MODULES_DROP: &str = include_str!("../../guest/modules-drop");
const MODULES_BOOT: &str = include_str!("../../guest/modules-boot");

/// The lines of a recipe file, without comments.
fn lines(recipe: &str) -> impl Iterator<Item = &str> {
    recipe.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// What the root is made of beside the packages. The code that arranges it is a part of its recipe.
const ROOT_RECIPE: &[&str] = &[
    CONTAINERD,
    DROP,
    MODULES_ENGINE,
    MODULES_INITRAMFS,
    MODULES_DROP,
    MODULES_BOOT,
    include_str!("guest_image/kernel.rs"),
    include_str!("guest_image/modules.rs"),
    include_str!("guest_image/root.rs"),
];

/// Makes an image and publishes it in the store `out`.
pub(crate) fn build(out: &Path, work: &Path, update: bool, dorm_init: Option<PathBuf>) -> Result<()> {
    fs::create_dir_all(work)?;
    let lock = File::create(work.join("lock"))?;
    lock.lock().context("can't lock the work folder")?;
    let list = fetch_packages(work, update)?;
    let tree = make_root(work, &list)?;
    let release = modules::release(&tree)?;

    // In the store, so that publishing is a rename within one file system.
    fs::create_dir_all(out)?;
    let built = tempfile::Builder::new().prefix("new-").tempdir_in(out)?;
    for name in ["vmlinux", "root.erofs"] {
        fs::copy(work.join(name), built.path().join(name))?;
    }
    let early = modules::load_order(&tree, &release, lines(MODULES_INITRAMFS))?;
    let dorm_init = dorm_init.map_or_else(build_dorm_init, Ok)?;
    kernel::ensure_static(&fs::read(&dorm_init)?)?;
    initramfs::write(&built.path().join("initramfs"), &dorm_init, &tree, &early)?;

    let manifest = manifest(built.path(), release, &list)?;
    fs::set_permissions(built.path(), Permissions::from_mode(0o755))?;
    let hash = ImageStore::new(out).publish(built.path(), &manifest)?;
    for (name, entry) in &manifest.files {
        eprintln!("{name}: {:.1} MB", entry.size as f64 / 1e6);
    }
    println!("{}", hash.as_str());
    Ok(())
}

/// Makes the packages' archive, `packages.tar`, and returns the list of the packages with their hashes. Packages that
/// were fetched for the same recipe are taken again, unless `update` asks for the archive's newest.
fn fetch_packages(work: &Path, update: bool) -> Result<String> {
    let list = work.join("packages.sha256");
    let recipe = work.join("packages.recipe");
    let wanted = format!("{SUITE}\n{PACKAGES}");
    if update || fs::read_to_string(&recipe).ok().as_ref() != Some(&wanted) {
        // Written again when all else is there, so that an interrupted run leaves nothing that looks whole.
        remove_if_there(&recipe)?;
        debian::fetch(SUITE, &lines(PACKAGES).collect::<Vec<_>>(), &work.join("packages.tar"), &list)?;
        fs::write(&recipe, wanted)?;
    }
    Ok(fs::read_to_string(list)?)
}

/// Makes `root.erofs` and `vmlinux`, unless they are there already from the same packages and recipe. Returns the tree
/// that the root was packed from.
fn make_root(work: &Path, list: &str) -> Result<PathBuf> {
    let tree = work.join("root");
    let stamp = work.join("root.sha256");
    let wanted = ROOT_RECIPE
        .iter()
        .chain([&list])
        .fold(Sha256::new(), |hash, part| hash.chain_update(part.len().to_le_bytes()).chain_update(part));
    let wanted: String = wanted.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if fs::read_to_string(&stamp).ok().as_ref() == Some(&wanted) {
        return Ok(tree);
    }
    remove_if_there(&stamp)?;
    root::arrange(&work.join("packages.tar"), &tree)?;
    let release = modules::release(&tree)?;
    kernel::unpack(&work.join("boot").join(format!("vmlinuz-{release}")), &work.join("vmlinux"))?;
    root::pack(&tree, &work.join("root.erofs"))?;
    fs::write(stamp, wanted)?;
    Ok(tree)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Builds PID 1 of the guest.
fn build_dorm_init() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    run(Command::new(cargo)
        .env("CARGO_TARGET_DIR", &target)
        .env("CARGO_ENCODED_RUSTFLAGS", rustc_flags()?)
        .args(["build", "--locked", "--quiet", "--profile", "guest"])
        .args(["--target", TARGET, "--package", "dorm-init"]))?;
    Ok(target.join(TARGET).join("guest/dorm-init"))
}

/// Flags for a static program that doesn't tell where it was built, and that lies at fixed addresses, so that QEMU needs
/// not translate it anew each time it is run by the name of another (`bin/dorm-init/src/fixed.rs`).
fn rustc_flags() -> Result<String> {
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cargo"));
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home);
    let project = env::current_dir().context("can't tell where the project is")?;
    let places = [(Some(project), "/dormouse"), (cargo_home, "/cargo")];
    let remaps = places
        .into_iter()
        .filter_map(|(from, to)| Some(format!("--remap-path-prefix={}={to}", from?.to_str()?)));
    let flags = ["-Ctarget-feature=+crt-static", "-Crelocation-model=static"].map(str::to_owned);
    let flags: Vec<_> = flags.into_iter().chain(remaps).collect();
    Ok(flags.join("\x1f"))
}

fn manifest(built: &Path, kernel: String, list: &str) -> Result<Manifest> {
    let packages: BTreeMap<_, _> = list
        .lines()
        .filter_map(|line| line.split_once("  "))
        .map(|(hash, file)| (file.to_owned(), hash.to_owned()))
        .collect();
    let engine = packages.keys().find_map(|file| file.strip_prefix("docker.io_")?.split('_').next());
    let engine = engine.context("docker.io isn't among the packages")?.to_owned();
    let mut files = BTreeMap::new();
    for name in ["vmlinux", "initramfs", "root.erofs"] {
        files.insert(name.to_owned(), hash_file(&built.join(name))?);
    }
    let api = api_version(&engine)?.to_owned();
    Ok(Manifest { format: MANIFEST_FORMAT, kernel, engine, api, files, packages })
}

/// The newest version of the Docker API that an engine speaks (Docker's documentation, "API version matrix").
fn api_version(engine: &str) -> Result<&'static str> {
    let release: Vec<_> = engine.splitn(3, '.').take(2).collect();
    Ok(match release.join(".").as_str() {
        "26.0" | "26.1" => "1.45",
        "27.0" | "27.1" => "1.46",
        "27.2" | "27.3" | "27.4" | "27.5" => "1.47",
        _ => bail!("it isn't known here which API the engine {engine} speaks"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_of_the_engine_is_known_by_its_release() {
        assert_eq!(api_version("26.1.5+dfsg1-9+b1").unwrap(), "1.45");
        assert!(api_version("2.6").is_err());
    }

    #[test]
    fn comments_and_empty_lines_of_a_recipe_are_left_out() {
        assert!(lines("# a\n\n  b  \nc\n").eq(["b", "c"]));
    }
}
