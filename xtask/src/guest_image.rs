//! The guest image: see guest/README.md.

mod initramfs;
mod kernel;
mod modules;
mod root;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dormouse_guest_image::{ImageStore, MANIFEST_FORMAT, Manifest, hash_file};

use crate::shell::run;

/// The Debian release that the guest is made of.
const SUITE: &str = "trixie";

/// Every time in the image: equal inputs must give equal bytes.
const EPOCH_SECONDS: u32 = 1_700_000_000;

/// The recipe, compiled in so that the image belongs to the program that made it.
const PACKAGES: &str = include_str!("../../guest/packages");
const CONTAINERD: &str = include_str!("../../guest/containerd.toml");
const DROP: &str = include_str!("../../guest/drop");
const MODULES_INITRAMFS: &str = include_str!("../../guest/modules-initramfs");
const MODULES_DROP: &str = include_str!("../../guest/modules-drop");
const MODULES_BOOT: &str = include_str!("../../guest/modules-boot");

/// The lines of a recipe file, without comments.
fn lines(recipe: &str) -> impl Iterator<Item = &str> {
    recipe.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Makes an image and publishes it in the store `out`.
pub(crate) fn build(out: &Path, work: &Path, update: bool) -> Result<()> {
    fs::create_dir_all(work)?;
    let archive = work.join("packages.tar");
    let list = work.join("packages.sha256");
    if update || !is_current(&list)? {
        fetch_packages(&archive, &list)?;
    }
    let tree = work.join("root");
    root::arrange(&archive, &tree)?;
    let release = modules::release(&tree)?;

    let built = work.join("image");
    if built.exists() {
        fs::remove_dir_all(&built)?;
    }
    fs::create_dir(&built)?;
    kernel::unpack(&work.join("boot").join(format!("vmlinuz-{release}")), &built.join("vmlinux"))?;
    let early = modules::load_order(&tree, &release, lines(MODULES_INITRAMFS))?;
    initramfs::write(&built.join("initramfs"), &dorm_init()?, &tree, &early)?;
    root::pack(&tree, &built.join("root.erofs"))?;

    let manifest = manifest(&built, release, &fs::read_to_string(&list)?)?;
    let hash = ImageStore::new(out).publish(&built, &manifest)?;
    for (name, entry) in &manifest.files {
        eprintln!("{name}: {:.1} MB", entry.size as f64 / 1e6);
    }
    println!("{}", hash.as_str());
    Ok(())
}

/// Were these packages fetched for this recipe?
fn is_current(list: &Path) -> Result<bool> {
    let recipe = list.with_extension("recipe");
    Ok(list.exists() && recipe.exists() && fs::read_to_string(recipe)? == PACKAGES)
}

/// Fetches and unpacks the packages into one archive, and lists them with their hashes.
fn fetch_packages(archive: &Path, list: &Path) -> Result<()> {
    let fresh = list.with_extension("new");
    let fresh = fresh.to_str().context("the work folder's path isn't UTF-8")?;
    ensure!(!fresh.contains(['\'', ' ']), "the work folder's path has blanks or quotes in it: {fresh}");
    let fresh = std::path::absolute(fresh)?;
    let packages = lines(PACKAGES).collect::<Vec<_>>().join(",");
    let hook = format!("cd \"$1\"/var/cache/apt/archives && sha256sum *.deb > {}", fresh.display());
    run(Command::new("mmdebstrap")
        .env("SOURCE_DATE_EPOCH", EPOCH_SECONDS.to_string())
        .args(["--quiet", "--variant=extract", "--format=tar", "--components=main"])
        .arg(format!("--include={packages}"))
        .arg(format!("--extract-hook={hook}"))
        .arg(SUITE)
        .arg(archive))?;
    fs::rename(fresh, list)?;
    fs::write(list.with_extension("recipe"), PACKAGES)?;
    Ok(())
}

/// Builds PID 1 of the guest, and makes sure that it needs no library.
fn dorm_init() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = Path::new("target");
    run(Command::new(cargo)
        .env("CARGO_TARGET_DIR", target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args([
            "build",
            "--locked",
            "--quiet",
            "--profile",
            "guest",
            "--target",
            TARGET,
            "--package",
            "dorm-init",
        ]))?;
    let program = target.join(TARGET).join("guest/dorm-init");
    kernel::ensure_static(&fs::read(&program)?)?;
    Ok(program)
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
    Ok(Manifest { format: MANIFEST_FORMAT, kernel, engine, files, packages })
}
