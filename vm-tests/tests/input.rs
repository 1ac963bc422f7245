//! Bad input gets a clear error, and nothing is lost: what a user sees of each, and that nothing of it stays. No engine
//! is needed for that, so guests are of a few bytes.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use dormouse_api::{CreateSession, IdleTimeout, Phase, SessionInfo};
use dormouse_vm_tests::stage::{Stage, inspect, program, runtime};
use dormouse_vm_tests::{fake, file_system, in_mount_namespace};

fn dorm(stage: &Stage, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(program("dorm"));
    command.args(arguments).env("DORM_HOME", stage.home()).env_remove("DORM_SESSION").stdin(Stdio::null());
    Ok(command.output()?)
}

/// Fails unless `dorm` refuses with exit code 1, one line that says all of `words`, and what to do.
fn refused(stage: &Stage, arguments: &[&str], words: &[&str]) -> Result<()> {
    let output = dorm(stage, arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{arguments:?} ended with {}: {said}", output.status);
    ensure!(output.stdout.is_empty(), "{arguments:?} printed {:?}", String::from_utf8_lossy(&output.stdout));
    let first = said.lines().next().unwrap_or_default();
    ensure!(first.starts_with("error: "), "{arguments:?} said {said}");
    for word in words {
        ensure!(said.contains(word), "{arguments:?} said {said:?} without {word:?}");
    }
    Ok(())
}

/// A store of images with a guest that never says hello.
fn fake_images(folder: &Path) -> Result<Vec<(&'static str, OsString)>> {
    fake::publish(folder)?;
    Ok(vec![("DORM_IMAGES", folder.into())])
}

async fn session(stage: &Stage, change: impl FnOnce(&mut CreateSession)) -> Result<SessionInfo> {
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Seconds(1);
    wish.memory_mib = Some(64);
    change(&mut wish);
    Ok(stage.make(&wish).await?)
}

/// Fails unless docker is told all of `words`, and nothing of the start that failed is left.
async fn start_fails(stage: &Stage, session: &SessionInfo, words: &[&str]) -> Result<()> {
    let output = stage.run(session, &["ps"]).await?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "docker ended with {}: {said}", output.status);
    for word in words {
        ensure!(said.contains(word), "docker was told {said:?} without {word:?}");
    }
    let info = inspect(session).await?;
    ensure!(info.vm.phase == Phase::Absent, "{info:?}");
    let mut left = fs::read_dir(runtime(stage, session))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    left.retain(|name| name.starts_with("vm"));
    ensure!(left.is_empty(), "a failed start leaves {left:?}");
    Ok(())
}

#[tokio::test]
async fn storage_that_cannot_be_used_is_refused_at_creation() -> Result<()> {
    let (stage, other) = (Stage::new()?, Stage::new()?);
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    fs::write(path("file"), "")?;
    fs::create_dir(path("empty"))?;
    fs::create_dir(path("photos"))?;
    fs::write(path("photos/cat.jpg"), "precious")?;
    let create = |storage: &str, more: &[&str], words: &[&str]| {
        refused(&stage, &[&["session", "create", "a", "--storage", storage], more].concat(), words)
    };
    create(&path("no/such"), &[], &["doesn't exist", "make it first"])?;
    create(&path("file"), &[], &["can't read", "Not a directory", "name a folder of your own"])?;
    create(&path("photos"), &[], &["is not empty and no store", "name an empty folder"])?;
    create(&path("none"), &["--no-create"], &["there is no store", "--no-create"])?;
    create(&path("empty"), &["--no-create"], &["there is no store", "--no-create"])?;
    refused(&stage, &["session", "create", "a", "--no-create"], &["--storage"])?;
    if !rustix::process::geteuid().is_root() {
        fs::set_permissions(path("empty"), fs::Permissions::from_mode(0o000))?;
        create(&path("empty"), &[], &["can't read", "Permission denied"])?;
        fs::set_permissions(path("empty"), fs::Permissions::from_mode(0o700))?;
    }

    ensure!(dorm(&stage, &["session", "create", "a", "--storage", &path("store")])?.status.success());
    let again = ["session", "create", "b", "--storage", &path("store")];
    refused(&stage, &again, &["is used by the session \"a\"", "one session at a time"])?;
    refused(&other, &again, &["is used by a session of another home", "one session at a time"])?;

    ensure!(fs::read(path("photos/cat.jpg"))? == b"precious");
    ensure!(fs::read_dir(path("empty"))?.next().is_none(), "a refusal writes nothing");
    let sessions =
        |stage: &Stage| Ok::<_, std::io::Error>(fs::read_dir(stage.home().join("data/sessions"))?.count());
    ensure!(sessions(&stage)? == 1 && sessions(&other)? == 0, "a refusal leaves half a session");
    Ok(())
}

#[tokio::test]
async fn names_and_values_that_cannot_be_are_refused() -> Result<()> {
    let stage = Stage::new()?;
    let long = "n".repeat(256);
    for (name, words) in [
        (long.as_str(), ["at most 255 bytes", "256"]),
        ("a b", ["letters, digits", "a b"]),
        ("../up", ["letters, digits", "../up"]),
        ("", ["can't be empty", ""]),
        ("Dorm-x", ["reserved", "Dorm-x"]),
    ] {
        refused(&stage, &["session", "create", name], &words)?;
    }
    for (option, value, words) in [
        ("--cpus", "0", ["0 CPUs can't be given", "1 to 64 can"]),
        ("--cpus", "many", ["--cpus", "many"]),
        ("--memory", "1M", ["1 MiB of memory can't be given", "MiB can on this host"]),
        ("--memory", "900T", ["MiB of memory can't be given", "MiB can on this host"]),
        ("--memory", "much", ["--memory", "much"]),
        ("--storage-size", "1M", ["a disk of 1048576 bytes can't be made", "bytes can"]),
        ("--idle-timeout", "soon", ["--idle-timeout", "never"]),
        ("--boot-timeout", "0", ["a boot timeout of 0 s makes no sense", "give 1 to"]),
    ] {
        refused(&stage, &["session", "create", "a", option, value], &words)?;
    }
    refused(&stage, &["session", "inspect", "a"], &["there is no session named \"a\""])?;
    ensure!(fs::read_dir(stage.home().join("data/sessions"))?.next().is_none());
    Ok(())
}

#[tokio::test]
async fn a_qemu_that_is_missing_or_too_old_is_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let stage = Stage::with(&[("PATH", folder.path().into())])?;
    refused(&stage, &["session", "create", "a"], &["QEMU not found", "install qemu-system-x86"])?;

    let folder = tempfile::tempdir()?;
    // Speaks just enough QMP, on the descriptor that the probe passes.
    let script = r#"#!/bin/bash
echo '{"QMP": {"version": {"qemu": {"micro": 1, "minor": 2, "major": 6}, "package": ""}, "capabilities": []}}' >&10
read -u 10
echo '{"return": {}, "id": 0}' >&10
read -u 10
echo '{"return": {}, "id": 1}' >&10
"#;
    let qemu = folder.path().join("qemu-system-x86_64");
    fs::write(&qemu, script)?;
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755))?;
    let stage = Stage::with(&[("PATH", folder.path().into())])?;
    refused(&stage, &["session", "create", "a"], &["QEMU 6.2.1 is too old", "7.2 is needed"])
}

#[tokio::test]
async fn a_guest_image_that_is_missing_or_damaged_is_named_and_never_booted() -> Result<()> {
    let images = tempfile::tempdir()?;
    let stage = Stage::with(&[("DORM_IMAGES", images.path().into())])?;
    let session = session(&stage, |_| {}).await?;
    start_fails(&stage, &session, &["there is no guest image", "make guest-image"]).await?;

    let hash = fake::publish(images.path())?;
    let root = images.path().join(hash.as_str()).join("root.erofs");
    fs::File::options().write(true).open(root)?.write_all_at(b"x", 4711)?;
    retry(&stage, &session, &["the guest image is damaged", "root.erofs", "make guest-image"]).await
}

/// After a start that failed the next one waits a little: until then the last error is repeated.
async fn retry(stage: &Stage, session: &SessionInfo, words: &[&str]) -> Result<()> {
    let mut last = Ok(());
    for _ in 0..20 {
        last = start_fails(stage, session, words).await;
        if last.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    last
}

#[tokio::test]
async fn a_guest_that_never_says_hello_is_given_up_with_its_consoles_last_lines() -> Result<()> {
    let images = tempfile::tempdir()?;
    let stage = Stage::with(&fake_images(images.path())?)?;
    let session = session(&stage, |wish| wish.boot_timeout_seconds = Some(3)).await?;
    start_fails(&stage, &session, &["could not be started", "the console's last lines", "boo"]).await?;
    let left = stage.processes()?;
    // The service and the host.
    ensure!(left.len() == 2, "{left:?}");
    Ok(())
}

#[tokio::test]
async fn a_vm_that_the_host_has_no_memory_for_is_refused_with_what_to_do() -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut stage = Stage::with(&fake_images(images.path())?)?;
    let mib = fs::read_to_string("/proc/meminfo")?
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .context("/proc/meminfo names no total")?
        / 1024;
    let session = session(&stage, |wish| wish.memory_mib = Some(mib)).await?;
    // As on a host whose memory is used up: nothing that this service starts may map so much.
    stage.limit_memory(mib / 2)?;
    start_fails(&stage, &session, &["MiB of memory", "give the session less memory"]).await
}

/// In a namespace, where files are root's whoever runs this: other hooks of the machine are not run.
#[test]
fn a_session_that_a_hook_of_the_machine_forbids_is_not_made_and_no_end_is_told() -> Result<()> {
    if in_mount_namespace("a_session_that_a_hook_of_the_machine_forbids_is_not_made_and_no_end_is_told")? {
        return Ok(());
    }
    let stage = tokio::runtime::Runtime::new()?.block_on(async { Stage::new() })?;
    let hooks = stage.home().join("etc/hooks.d");
    fs::create_dir_all(&hooks)?;
    let hook = hooks.join("10-test");
    let told = stage.home().join("told");
    let script = "echo $1 >> TOLD; [ $1 != session-created ] || { echo 'not on Sundays' >&2; exit 1; }";
    let script = script.replace("TOLD", &told.to_string_lossy());
    fs::write(&hook, format!("#!/bin/sh\n{script}\n"))?;
    for (path, mode) in [(&hooks, 0o755), (&hook, 0o755)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    let store = stage.home().join("store");
    fs::create_dir(&store)?;
    fs::write(store.join("store.json"), r#"{"format": 1}"#)?;
    fs::write(store.join("data.raw"), "precious")?;
    let path = store.to_str().context("a path without letters")?;
    for create in [&["session", "create", "a"][..], &["session", "create", "a", "--storage", path]] {
        refused(&stage, create, &["a hook refused the session: not on Sundays"])?;
    }
    ensure!(fs::read_to_string(store.join("data.raw"))? == "precious", "a store that was there");
    for folder in ["data/sessions", "run"] {
        let left = fs::read_dir(stage.home().join(folder))?.map(|entry| Ok(entry?.path()));
        let left = left.collect::<Result<Vec<_>>>()?;
        ensure!(!left.iter().any(|path| path.is_dir()), "{left:?}");
    }
    fs::remove_file(&hook)?;
    ensure!(dorm(&stage, &["session", "create", "a"])?.status.success());
    let told = fs::read_to_string(told)?;
    ensure!(told == "session-created\n".repeat(2), "of a session that never was this was told: {told}");
    Ok(())
}

#[test]
fn a_disk_of_the_host_that_is_full_is_named_before_anything_is_started() -> Result<()> {
    if in_mount_namespace("a_disk_of_the_host_that_is_full_is_named_before_anything_is_started")? {
        return Ok(());
    }
    let folder = file_system("64m")?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let images = tempfile::tempdir()?;
        let stage = Stage::with(&fake_images(images.path())?)?;
        let session = session(&stage, |wish| wish.storage = Some(folder.path().join("store"))).await?;
        let words = ["MiB free", "at least 256 MiB are needed", "free some space"];
        start_fails(&stage, &session, &words).await?;
        ensure!(!session.storage.path.join("memory").exists());
        anyhow::Ok(())
    })
}
