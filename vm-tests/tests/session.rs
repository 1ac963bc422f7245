//! A session end to end: the real service, the real host, real QEMU, the real docker client.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::{HoldKind, Phase, SessionInfo, SessionState, TerminationReason};
use dormouse_vm_tests::figure;
use dormouse_vm_tests::stage::{Stage, becomes, held_by, host_of, inspect, qemu_of, until};
use rustix::process::{Signal, kill_process};

/// Clients that knock at once.
const KNOCKS: usize = 20;

/// One home for all of it: each VM start costs seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_starts_sleeps_wakes_and_survives_the_death_of_each_of_its_processes() -> Result<()> {
    let mut stage = Stage::new()?;
    let session = stage.create(2).await?;
    ensure!(session.vm.phase == Phase::Absent, "creating a session starts no VM");

    knocks_at_once_start_one_vm(&stage, &session).await?;
    containers_work(&stage, &session).await?;
    it_sleeps_and_wakes_with_everything_in_place(&stage, &session).await?;
    a_running_container_survives_the_service_and_the_host(&mut stage, &session).await?;
    a_killed_vm_is_a_crash_and_the_next_command_opens_a_new_incarnation(&stage, &session).await?;
    Ok(())
}

async fn knocks_at_once_start_one_vm(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let begin = Instant::now();
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..KNOCKS {
        let client = stage.docker(session, &["ps", "--quiet"]);
        let mut client = tokio::process::Command::from(client);
        clients.spawn(async move { client.kill_on_drop(true).output().await });
    }
    while let Some(served) = clients.join_next().await {
        let output = served??;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{errors}\n{}", stage.logs(session));
    }
    figure("twenty clients served by one start", begin.elapsed());
    let info = inspect(session).await?;
    ensure!(info.vm.start_count == 1 && info.vm.generation == 1, "{:?}", info.vm);
    Ok(())
}

async fn containers_work(stage: &Stage, session: &SessionInfo) -> Result<()> {
    stage.load_busybox(session).await?;
    let script = "echo out; echo err >&2; exit 7";
    let output = stage.run(session, &["run", "--rm", "busybox", "sh", "-c", script]).await?;
    ensure!(output.status.code() == Some(7), "{output:?}");
    ensure!(output.stdout == b"out\n" && output.stderr == b"err\n", "{output:?}");
    let script = "echo kept > /things/file";
    let arguments = ["run", "--name", "first", "-v", "things:/things", "busybox", "sh", "-c", script];
    stage.succeed(session, &arguments).await?;
    Ok(())
}

async fn it_sleeps_and_wakes_with_everything_in_place(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let asleep = becomes(session, "absent").await?;
    ensure!(asleep.state == SessionState::Running && asleep.termination.is_none(), "{asleep:?}");
    ensure!(stage.succeed(session, &["ps", "--all", "--format", "{{.Names}}"]).await? == "first\n");
    let arguments = ["run", "--rm", "-v", "things:/things", "busybox", "cat", "/things/file"];
    let file = stage.succeed(session, &arguments).await?;
    ensure!(file == "kept\n", "{file}");
    let info = inspect(session).await?;
    ensure!(info.vm.start_count == 2 && info.incarnation == 1, "{info:?}");
    Ok(())
}

async fn a_running_container_survives_the_service_and_the_host(
    stage: &mut Stage,
    session: &SessionInfo,
) -> Result<()> {
    stage.succeed(session, &["run", "--detach", "--name", "long", "busybox", "sleep", "100000"]).await?;
    let before = held_by(session, HoldKind::Container).await?;
    let host = host_of(session)?;
    stage.kill_service()?;
    kill_process(host, Signal::KILL)?;
    stage.start_service()?;
    let running = stage.succeed(session, &["ps", "--format", "{{.Names}}"]).await?;
    ensure!(running == "long\n", "{running}");
    let after = inspect(session).await?;
    ensure!(
        after.vm.generation == before.vm.generation && after.vm.start_count == before.vm.start_count,
        "{after:?}"
    );
    Ok(())
}

async fn a_killed_vm_is_a_crash_and_the_next_command_opens_a_new_incarnation(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    stage.succeed(session, &["exec", "long", "sync"]).await?;
    let mut follower =
        stage.docker(session, &["wait", "long"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    // Not just any request: a client asks other things first, and what it asks after the crash is served by a new VM.
    until(session, |info| info.holds.iter().any(|hold| hold.reason.ends_with("/wait"))).await?;
    let qemu = qemu_of(stage, session)?;
    // Whoever waits for it is there before it happens, so that what is measured is the notice.
    let seen = becomes(session, "terminated");
    let killed = async {
        let killed = Instant::now();
        kill_process(qemu, Signal::KILL)?;
        let ended = tokio::task::spawn_blocking(move || follower.wait());
        let ended = tokio::time::timeout(Duration::from_secs(60), ended).await;
        let status = ended.context("work in flight outlives the VM")???;
        anyhow::Ok((killed, killed.elapsed(), status))
    };
    let seen = async { anyhow::Ok((seen.await?, Instant::now())) };
    let ((crashed, noticed), (killed, failed_within, status)) = tokio::try_join!(seen, killed)?;
    figure("a killed QEMU is noticed", noticed - killed);
    figure("work in flight fails after the kill", failed_within);
    ensure!(!status.success(), "docker wait ended with {status}");
    let end = crashed.termination.clone().context("there is no reason")?;
    ensure!(end.reason == TerminationReason::Crashed, "{end:?}");
    ensure!(end.details.contains("QEMU"), "{end:?}");

    let names = stage.succeed(session, &["ps", "--all", "--format", "{{.Names}}"]).await?;
    ensure!(names.contains("first") && names.contains("long"), "{names}");
    let info = inspect(session).await?;
    ensure!(info.incarnation == crashed.incarnation + 1, "{info:?}");
    Ok(())
}
