//! What sessions take of the host's memory, awake, asleep and several at once: `scripts/test-long memory`.
#![cfg(feature = "long")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::{CreateSession, How, IdleTimeout, SessionInfo};
use dormouse_client::Endpoint;
use dormouse_vm_tests::root_process::guest_output;
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, fall_asleep, inspect};

const MIB: u64 = 1 << 20;

/// So much of the host's memory may be missing after a sleep.
const MISSING_MIB_MAX: i64 = 64;

/// So much a clone may take, of the host's memory that nobody else can have.
const CLONE_MIB_MAX: u64 = 200;

const CLONES: usize = 6;

/// Other programs come and go.
const ROUNDS: usize = 5;

async fn session(stage: &Stage, name: &str) -> Result<SessionInfo> {
    let mut wish = CreateSession::named(name.parse()?);
    wish.idle_timeout = IdleTimeout::Never;
    stage.template().await?;
    Ok(stage.make(&wish).await?)
}

/// What the kernel could give to new programs without swapping, in MiB.
fn available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_of_a_vm_that_fell_asleep_is_the_hosts_again() -> Result<()> {
    let stage = Stage::new()?;
    let session = session(&stage, "default").await?;
    guest_output(&session, "true").await?;
    fall_asleep(&session).await?;
    let (mut taken, mut missing) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let before = i64::try_from(available()?)?;
        guest_output(&session, "head -c 300M /dev/urandom > /run/held; sync").await?;
        taken.push(before - i64::try_from(available()?)?);
        guest_output(&session, "rm /run/held").await?;
        fall_asleep(&session).await?;
        missing.push(before - i64::try_from(available()?)?);
    }
    taken.sort_unstable();
    missing.sort_unstable();
    let (taken, missing) = (taken[ROUNDS / 2], missing[ROUNDS / 2]);
    println!("figure: of the host's memory a VM that works took = {taken} MiB");
    println!("figure: of the host's memory a sleep left missing, median = {missing} MiB");
    ensure!(missing <= MISSING_MIB_MAX, "{missing} MiB are missing");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn six_clones_at_once_take_little_each() -> Result<()> {
    let stage = Stage::new()?;
    let mut sessions = Vec::new();
    for number in 0..CLONES {
        sessions.push(session(&stage, &format!("clone-{number}")).await?);
    }
    let before = available()?;
    let begun = Instant::now();
    let mut answers = tokio::task::JoinSet::new();
    for session in &sessions {
        let engine = Endpoint::new(&session.docker_socket);
        answers.spawn(async move { engine.get::<serde_json::Value>("/containers/json?limit=4321").await });
    }
    while let Some(answered) = answers.join_next().await {
        answered??;
    }
    println!("figure: from nothing to six clones that answered = {} ms", begun.elapsed().as_millis());
    let each = before.saturating_sub(available()?) / CLONES as u64;
    println!("figure: of the host's memory each of six clones takes = {each} MiB");
    for session in &sessions {
        let info = inspect(session).await?;
        ensure!(info.vm.how == Some(How::Clone), "{info:?}");
    }
    ensure!(each <= CLONE_MIB_MAX, "{each} MiB each");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_frees_goes_back_while_it_is_awake() -> Result<()> {
    let stage = Stage::new()?;
    let session = session(&stage, "default").await?;
    guest_output(&session, "true").await?;
    let memory = session.storage.path.join("memory");
    let allocated = || dormouse_vm::allocated_bytes(&memory);
    let before = allocated()?;
    guest_output(&session, "head -c 300M /dev/urandom > /run/held").await?;
    let held = allocated()?;
    ensure!(held > before + 250 * MIB, "{before} {held}");
    guest_output(&session, "rm /run/held").await?;
    let begun = Instant::now();
    let taken = held - before;
    let back = async {
        // What lies scattered between pages that are in use stays: only blocks of 2 MiB are given back.
        while held - allocated()?.min(held) < taken * 2 / 3 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(())
    };
    let is_back = tokio::time::timeout(STATE_WITHIN, back).await;
    let told = || {
        format!("of {} MiB {} are back", taken / MIB, (held - allocated().unwrap_or(held).min(held)) / MIB)
    };
    is_back.with_context(told)??;
    println!("figure: two thirds of what a guest took and freed = {}", told());
    println!("figure: they were back after = {} ms", begun.elapsed().as_millis());
    Ok(())
}
