//! A disk that is full, the guest's and the host's: it is told, work waits for room, and nothing is lost. It takes longer
//! than `make test` may: `scripts/test-long full-disk`.
#![cfg(feature = "long")]

use std::fs::File;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use dormouse_api::{CreateSession, HistoryEntry, IdleTimeout, RunningContainers, SessionInfo, Why};
use dormouse_client::Endpoint;
use dormouse_vm_tests::fault::{Held, POINTS, next_answer};
use dormouse_vm_tests::root_process::guest_output;
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, fall_asleep, inspect};
use dormouse_vm_tests::{file_system, in_mount_namespace};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

/// What is left of the host's disk while the guest writes more than that.
const LEFT_MIB: u64 = 48;

/// What the guest writes, and its checksum: longer than what is left, and past every cache.
const WRITE: &str = "yes a line of the file | head -c 200000000 | dd of=/v/file bs=1M iflag=fullblock oflag=direct \
                     && sync && md5sum < /v/file";

/// Takes the whole disk, in ever smaller files that nothing is written to: the host's disk stays as it is.
const FILL: &str = "mkdir /hog; cd /hog; for step in 1G 100M 10M 1M 100K 4K; do n=0; \
                    while fallocate -l $step $step.$n 2>/dev/null; do n=$((n + 1)); done; done; echo full";

/// One session for all of it, on a file system of a few gigabytes.
#[test]
fn a_full_disk_is_told_and_work_goes_on_once_there_is_room() -> Result<()> {
    if in_mount_namespace("a_full_disk_is_told_and_work_goes_on_once_there_is_room")? {
        return Ok(());
    }
    let folder = file_system("3g")?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let stage = Stage::new()?;
        let session = session_in(&stage, folder.path()).await?;
        stage.load_busybox(&session).await?;
        a_full_guest_says_so_sleeps_and_wakes(&stage, &session).await?;
        a_guest_whose_host_is_full_waits_for_room(&stage, &session).await
    })
}

/// A session whose storage is in this folder.
async fn session_in(stage: &Stage, folder: &Path) -> Result<SessionInfo> {
    stage.template().await?;
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Never;
    wish.running = RunningContainers::Suspend;
    wish.storage = Some(folder.join("store"));
    Ok(stage.make(&wish).await?)
}

/// Each step goes on on a disk that has not a block left, whatever comes of that. Then there is room again.
#[test]
fn a_disk_that_fills_at_any_step_of_a_sleep_or_a_wake_costs_nothing_that_was_synced() -> Result<()> {
    if in_mount_namespace("a_disk_that_fills_at_any_step_of_a_sleep_or_a_wake_costs_nothing_that_was_synced")?
    {
        return Ok(());
    }
    let folder = file_system("3g")?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let stage = Stage::new()?;
        let session = session_in(&stage, folder.path()).await?;
        for point in POINTS {
            fills_at(&stage, &session, point)
                .await
                .with_context(|| format!("the disk filled at {point}\n{}", stage.logs(&session)))?;
        }
        Ok(())
    })
}

async fn fills_at(stage: &Stage, session: &SessionInfo, point: &str) -> Result<()> {
    guest_output(session, &format!("echo {point} > /var/lib/docker/marker; sync")).await?;
    let held = Held::at(stage, session, point).await?;
    let filler = session.storage.path.with_file_name("filler");
    fill(&filler)?;
    held.let_go()?;
    held.told().await?;
    std::fs::remove_file(&filler)?;
    let found = next_answer(session, "cat /var/lib/docker/marker").await?;
    ensure!(found.trim() == point, "{found:?}");
    let entries: Vec<HistoryEntry> = Endpoint::new(&session.control_socket).get("/v1/history").await?;
    let last: Vec<_> = entries
        .iter()
        .rev()
        .take(3)
        .map(|entry| format!("{} {} {}", entry.what, entry.how, entry.reason))
        .collect();
    println!("full at {point}: {}", last.join(" <- "));
    Ok(())
}

/// Takes all that there is of a file system.
fn fill(filler: &Path) -> Result<()> {
    let (file, mut at) = (File::create(filler)?, 0);
    for step in [64 << 20, 1 << 20, 4096] {
        loop {
            match fallocate(&file, FallocateFlags::empty(), at, step) {
                Ok(()) => at += step,
                Err(Errno::NOSPC) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

async fn a_full_guest_says_so_sleeps_and_wakes(stage: &Stage, session: &SessionInfo) -> Result<()> {
    stage
        .succeed(session, &["run", "--rm", "-v", "vol:/v", "busybox", "sh", "-c", "echo kept > /v/kept"])
        .await?;
    let filled = stage.succeed(session, &["run", "--name", "hog", "busybox", "sh", "-c", FILL]).await?;
    ensure!(filled == "full\n", "{filled:?}");
    let write = ["run", "--rm", "-v", "vol:/v", "busybox", "sh", "-c", "echo more > /v/more"];
    for _ in 0..2 {
        let refused = stage.run(session, &write).await?;
        let words = String::from_utf8_lossy(&refused.stderr);
        ensure!(words.to_lowercase().contains("no space left on device"), "{refused:?}");
        // And so it is after a sleep, which needs no room in the guest.
        fall_asleep(session).await?;
    }
    stage.succeed(session, &["rm", "hog"]).await?;
    stage.succeed(session, &write).await?;
    let read = ["run", "--rm", "-v", "vol:/v", "busybox", "cat", "/v/kept", "/v/more"];
    ensure!(stage.succeed(session, &read).await? == "kept\nmore\n");
    Ok(())
}

async fn a_guest_whose_host_is_full_waits_for_room(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let expected = stage
        .succeed(
            session,
            &["run", "--rm", "busybox", "sh", "-c", "yes a line of the file | head -c 200000000 | md5sum"],
        )
        .await?;
    let before = inspect(session).await?;
    let filler = session.storage.path.with_file_name("filler");
    let room = statvfs(&session.storage.path)?;
    let taken = room.f_bavail * room.f_frsize - (LEFT_MIB << 20);
    fallocate(File::create(&filler)?, FallocateFlags::empty(), 0, taken)?;

    let run = ["run", "--rm", "-v", "vol:/v", "busybox", "sh", "-c", WRITE];
    let mut writer = stage.docker(session, &run);
    let writer = writer.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let paused = async {
        let control = Endpoint::new(&session.control_socket);
        loop {
            let why: Why = control.get("/v1/why").await?;
            if why.lines.iter().any(|line| line.contains("it is paused by its disk: ")) {
                return anyhow::Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    let paused = tokio::time::timeout(STATE_WITHIN, paused).await;
    paused.with_context(|| format!("nobody says that the disk is full\n{}", stage.logs(session)))??;
    let refused = stage.run(session, &["ps"]).await?;
    let words = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && words.contains("paused by its disk"), "{refused:?}");

    std::fs::remove_file(&filler)?;
    let written = tokio::task::spawn_blocking(|| writer.wait_with_output());
    let written = tokio::time::timeout(STATE_WITHIN, written).await.context("it never goes on")???;
    ensure!(written.status.success(), "{written:?}\n{}", stage.logs(session));
    ensure!(written.stdout == expected.as_bytes(), "{written:?} and not {expected}");
    let after = inspect(session).await?;
    ensure!(
        after.vm.generation == before.vm.generation && after.incarnation == before.incarnation,
        "{after:?}"
    );
    Ok(())
}
