//! How long commands take that only tell something. `scripts/test-long startup` runs it with programs that are optimized.
#![cfg(feature = "long")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dormouse_api::{CreateSession, IdleTimeout, SessionInfo};
use dormouse_vm_tests::stage::{Stage, fall_asleep, program};

/// Measurements of each.
const ROUNDS: usize = 20;

/// Longest median of a command that asks nobody.
const ALONE_WITHIN: Duration = Duration::from_millis(10);

/// Longest median of one that asks about a session which sleeps.
const ASKING_WITHIN: Duration = Duration::from_millis(30);

#[tokio::test(flavor = "multi_thread")]
async fn what_only_tells_is_there_at_once_and_wakes_nothing() -> Result<()> {
    ensure!(!cfg!(debug_assertions), "programs that aren't optimized say nothing: use --release");
    // The session's host goes as soon as nobody needs it, as one does after a minute.
    for (linger, host) in [("600", "with a host"), ("0", "without one")] {
        let stage = Stage::with(&[("DORM_LINGER", linger.into())])?;
        let session = sleeping(&stage).await?;
        let starts = starts(&stage, &session).await?;
        let asks = format!("asleep, {host}");
        for (arguments, what, within) in [
            (&["--version"][..], "which asks nobody", ALONE_WITHIN),
            (&["ps"], asks.as_str(), ASKING_WITHIN),
            (&["ps", "--all"], &asks, ASKING_WITHIN),
            (&["images"], &asks, ASKING_WITHIN),
            (&["session", "ls"], &asks, ASKING_WITHIN),
        ] {
            let median = median(&stage, arguments)?;
            let name = format!("dorm {}, {what}, median of {ROUNDS}", arguments.join(" "));
            println!("figure: {name} = {:.1} ms", median.as_secs_f64() * 1e3);
            ensure!(median <= within, "{name}: {median:?}");
        }
        ensure!(self::starts(&stage, &session).await? == starts, "it was woken");
    }
    Ok(())
}

/// A session that has been asked what is asked of it, and then fell asleep.
async fn sleeping(stage: &Stage) -> Result<SessionInfo> {
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Never;
    let session = stage.make(&wish).await?;
    stage.load_busybox(&session).await?;
    stage.succeed(&session, &["create", "--name", "cc", "busybox", "true"]).await?;
    for arguments in [&["ps"][..], &["ps", "--all"], &["images"]] {
        ensure!(dorm(stage, arguments).status()?.success(), "{arguments:?}");
    }
    fall_asleep(&session).await?;
    Ok(session)
}

async fn starts(stage: &Stage, session: &SessionInfo) -> Result<u64> {
    let path = format!("/v1/sessions/{}", session.name);
    Ok(stage.service().get::<SessionInfo>(&path).await?.vm.start_count)
}

fn dorm(stage: &Stage, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("dorm"));
    command.args(arguments).env("DORM_HOME", stage.home()).env_remove("DORM_SESSION");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn median(stage: &Stage, arguments: &[&str]) -> Result<Duration> {
    let mut all = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let status = dorm(stage, arguments).status()?;
        all.push(begun.elapsed());
        ensure!(status.success(), "{arguments:?} ended with {status}");
    }
    all.sort();
    Ok(all[ROUNDS / 2])
}
