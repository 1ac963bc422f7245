//! A session end to end: the real service, the real host, real QEMU, the real docker client.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_agent_proto::RunProcess;
use dormouse_api::{
    HistoryEntry, Hold, HoldInfo, HoldKind, Phase, SessionInfo, SessionState, TerminationReason,
};
use dormouse_client::Endpoint;
use dormouse_vm_tests::figure;
use dormouse_vm_tests::root_process::guest_output;
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, becomes, held_by, host_of, inspect, qemu_of, until};
use http::Method;
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
    an_engine_that_dies_comes_back_beneath_its_containers_and_one_that_dies_again_is_a_crash(
        &stage, &session,
    )
    .await?;
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
    let script = "echo $$ > /left; exec sleep 100001";
    stage.succeed(session, &["exec", "--detach", "long", "sh", "-c", script]).await?;
    // It says something all the time: whoever hears it dies as well.
    let script = "echo $$ > /run/left; while :; do echo; sleep 0.2; done";
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let process = RunProcess { argv, detach: true, ..RunProcess::default() };
    let control = Endpoint::new(&session.control_socket);
    let client = control.upgrade(http::Method::POST, "/v1/run", &process, "dorm-process").await?;
    drop(client);
    for kind in [HoldKind::RootProcess, HoldKind::Exec] {
        held_by(session, kind).await?;
    }
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
    what_runs_in_an_adopted_vm_holds_it_until_it_ends(stage, session).await
}

async fn what_runs_in_an_adopted_vm_holds_it_until_it_ends(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    let info = held_by(session, HoldKind::RootProcess).await?;
    let is_it = |hold: &HoldInfo| hold.kind == HoldKind::RootProcess && hold.reason.contains("/run/left");
    ensure!(info.holds.iter().any(is_it), "{info:?}");
    held_by(session, HoldKind::Exec).await?;
    guest_output(session, "kill $(cat /run/left)").await?;
    until(session, |info| !info.holds.iter().any(is_it)).await?;
    stage.succeed(session, &["exec", "long", "sh", "-c", "kill $(cat /left)"]).await?;
    until(session, |info| info.holds.iter().all(|hold| hold.kind != HoldKind::Exec)).await?;
    Ok(())
}

/// Kills the engine in the guest as a bug in it would.
const KILL_DOCKERD: &str =
    "for p in /proc/[0-9]*; do [ \"$(cat $p/comm)\" != dockerd ] || kill -9 ${p#/proc/}; done";

async fn an_engine_that_dies_comes_back_beneath_its_containers_and_one_that_dies_again_is_a_crash(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    stage.succeed(session, &["start", "long"]).await?;
    let started = ["inspect", "--format", "{{.State.Running}} {{.State.StartedAt}}", "long"];
    let before = stage.succeed(session, &started).await?;
    ensure!(before.starts_with("true "), "{before}");
    let control = Endpoint::new(&session.control_socket);
    let held = control.hold(&Hold { reason: "over the engine's death".to_owned() }).await?;
    let info = inspect(session).await?;
    guest_output(session, KILL_DOCKERD).await?;
    let back = async {
        loop {
            let output = stage.run(session, &started).await?;
            if output.status.success() {
                return anyhow::Ok(String::from_utf8(output.stdout)?);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let after = tokio::time::timeout(STATE_WITHIN, back).await.context("the engine doesn't come back")??;
    ensure!(after == before, "the container did not live on: {before} {after}");
    ensure!(inspect(session).await?.vm.generation == info.vm.generation, "it was another VM that answered");

    // Again, and within a minute of the last time even where all of this is slow. Who asks meanwhile opens the next
    // incarnation at once, so that the end is in the history only.
    let crash = async {
        loop {
            // The process that kills may end with the VM.
            let _ = guest_output(session, KILL_DOCKERD).await;
            for _ in 0..50 {
                let history: Vec<HistoryEntry> = control.get("/v1/history").await?;
                let crash = history.into_iter().rfind(|entry| entry.what == "crash");
                if let Some(crash) = crash.filter(|crash| crash.generation >= info.vm.generation) {
                    return anyhow::Ok(crash);
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    };
    let crash = tokio::time::timeout(STATE_WITHIN, crash).await.context("it never crashes")??;
    ensure!(crash.generation == info.vm.generation && crash.reason.contains("dockerd"), "{crash:?}");
    drop(held);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_guest_is_told_with_its_last_words() -> Result<()> {
    let stage = Stage::new()?;
    let session = stage.create(30).await?;
    let control = Endpoint::new(&session.control_socket);
    let argv = ["sh", "-c", "echo c > /proc/sysrq-trigger"].map(str::to_owned).to_vec();
    let process = RunProcess { argv, ..RunProcess::default() };
    let _client = control.upgrade(Method::POST, "/v1/run", &process, "dorm-process").await?;
    let crashed = becomes(&session, "terminated").await?;
    let end = crashed.termination.context("there is no reason")?;
    ensure!(
        end.reason == TerminationReason::Crashed && end.details.contains("sysrq triggered crash"),
        "{end:?}\n{}",
        stage.logs(&session)
    );
    Ok(())
}
