//! Sessions whose containers may be suspended: they sleep when those are quiet, and stay awake when they aren't.

use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use dormouse_api::{
    CreateSession, HistoryEntry, HoldKind, IdleTimeout, Phase, RunningContainers, SessionInfo, SleepAnswer,
};
use dormouse_client::Endpoint;
use dormouse_vm_tests::figure;
use dormouse_vm_tests::stage::{Stage, fall_asleep, inspect, program, until};

const GRACE_SECONDS: u64 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn containers_that_are_quiet_are_suspended_and_those_that_are_not_hold_with_their_reason() -> Result<()>
{
    let stage = Stage::new()?;
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Seconds(GRACE_SECONDS);
    wish.running = RunningContainers::Suspend;
    stage.template().await?;
    let session = stage.make(&wish).await?;
    stage.load_busybox(&session).await?;

    a_health_check_and_a_loop_that_waits_are_quiet(&stage, &session).await?;
    work_holds_and_can_be_suspended_by_name(&stage, &session).await?;
    a_connection_out_of_the_vm_holds_unless_it_is_labelled(&stage, &session).await?;
    a_mark_holds_until_it_is_taken_away(&stage, &session).await?;
    a_vm_that_dozes_stands_still_and_is_back_at_once_with_the_right_time(&stage, &session).await
}

async fn a_health_check_and_a_loop_that_waits_are_quiet(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let check = ["--health-cmd", "true", "--health-interval", "5s"];
    let waiting = ["busybox", "sh", "-c", "while sleep 1; do :; done"];
    let run = [&["run", "--detach", "--name", "waiting"][..], &check, &waiting].concat();
    stage.succeed(session, &run).await?;
    asleep(session).await?;
    // Whoever wakes it finds it as it was.
    let started = ["inspect", "--format", "{{.State.Status}} {{.RestartCount}}", "waiting"];
    stage.succeed(session, &["exec", "waiting", "true"]).await?;
    ensure!(stage.succeed(session, &started).await? == "running 0\n");
    let info = asleep(session).await?;
    ensure!(info.vm.boots == 1, "{:?}", info.vm);
    let entries: Vec<HistoryEntry> = Endpoint::new(&session.control_socket).get("/v1/history").await?;
    ensure!(entries.iter().any(|entry| entry.what == "start" && entry.how == "resume"), "{entries:?}");
    stage.succeed(session, &["rm", "--force", "waiting"]).await?;
    Ok(())
}

async fn work_holds_and_can_be_suspended_by_name(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let spin = ["run", "--detach", "--name", "spin", "busybox", "sh", "-c", "while :; do :; done"];
    stage.succeed(session, &spin).await?;
    held_with(session, "container spin", "it uses the CPU").await?;
    let control = Endpoint::new(&session.control_socket);
    let asked: SleepAnswer = control.post("/v1/session/sleep").await?;
    ensure!(matches!(asked, SleepAnswer::Busy { .. }), "{asked:?}");
    fall_asleep(session).await?;
    stage.succeed(session, &["rm", "--force", "spin"]).await?;
    asleep(session).await?;
    Ok(())
}

/// An address of the VM's own way out is outside for a container, and is listened to by whoever shares the VM's network.
async fn a_connection_out_of_the_vm_holds_unless_it_is_labelled(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    let address = "198.51.100.1";
    let listen = format!("ip address add {address}/24 dev eth0; sleep 9999 | nc -l -p 7000");
    let host = ["run", "--detach", "--name", "server", "--network", "host", "--cap-add", "NET_ADMIN"];
    stage.succeed(session, &[&host[..], &["busybox", "sh", "-c", &listen]].concat()).await?;
    let connect = format!("sleep 9999 | nc {address} 7000");
    for (label, holds) in [("dormouse.idle=ignore", false), ("dormouse.idle=", true)] {
        let run = ["run", "--detach", "--name", "client", "--label", label];
        let run = [&run[..], &["busybox", "sh", "-c", &connect]].concat();
        stage.succeed(session, &run).await?;
        let connected = "until grep -q ' 01 ' /proc/net/tcp; do sleep 0.1; done";
        stage.succeed(session, &["exec", "client", "sh", "-c", connected]).await?;
        if holds {
            held_with(session, "container client", &format!("it is connected to {address}:7000")).await?;
        } else {
            asleep(session).await?;
        }
        stage.succeed(session, &["rm", "--force", "client"]).await?;
        stage.succeed(session, &["restart", "--time", "0", "server"]).await?;
    }
    stage.succeed(session, &["rm", "--force", "server"]).await?;
    Ok(())
}

async fn a_mark_holds_until_it_is_taken_away(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let marks = ["--volume", "/run/dormouse/busy:/busy", "busybox"];
    let run = [&["run", "--detach", "--name", "marker"][..], &marks, &["sleep", "9999"]].concat();
    stage.succeed(session, &run).await?;
    stage.succeed(session, &["exec", "marker", "touch", "/busy/backup"]).await?;
    held_with(session, "a container", r#"it left the mark "backup""#).await?;
    stage.succeed(session, &["exec", "marker", "rm", "/busy/backup"]).await?;
    asleep(session).await?;
    Ok(())
}

/// The time that the guest has been up tells whether its vCPUs ran.
async fn a_vm_that_dozes_stands_still_and_is_back_at_once_with_the_right_time(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    const DOZED: Duration = Duration::from_secs(3);
    let set = |seconds| {
        let mut dorm = Command::new(program("dorm"));
        dorm.args(["session", "set", "default", "--doze", seconds]).env("DORM_HOME", stage.home());
        dorm
    };
    ensure!(stage.finish(session, set("3600")).await?.status.success());
    let wait = ["run", "--detach", "--name", "waiting", "busybox", "sh", "-c", "while sleep 0.2; do :; done"];
    stage.succeed(session, &wait).await?;
    let before = clocks(stage, session).await?;
    let dozes = until(session, |info| info.vm.phase == Phase::Dozing).await?;
    tokio::time::sleep(DOZED).await;
    let asked = Instant::now();
    let engine = Endpoint::new(&session.docker_socket);
    let _: serde_json::Value = engine.get("/containers/json?limit=1234").await?;
    figure("from a doze to the first answer", asked.elapsed());
    let after = clocks(stage, session).await?;
    let (passed, ran) = (after.wall - before.wall, after.uptime - before.uptime);
    println!("figure: seconds that a VM ran of those that passed = {ran:.2} of {passed:.2}");
    ensure!(passed - ran > 0.9 * DOZED.as_secs_f64(), "{before:?} {after:?}");
    // The guest tells whole seconds.
    ensure!((after.wall - after.guest).abs() < 2.0, "its clock is wrong: {after:?}");
    let info = inspect(session).await?;
    ensure!(info.vm.start_count == dozes.vm.start_count, "it was put to sleep: {info:?}");

    // When it has dozed for its time, it is.
    ensure!(stage.finish(session, set("1")).await?.status.success());
    until(session, |info| info.vm.phase == Phase::Dozing).await?;
    asleep(session).await?;
    stage.succeed(session, &["rm", "--force", "waiting"]).await?;
    Ok(())
}

/// In seconds.
#[derive(Debug)]
struct Clocks {
    /// Since 1970, here.
    wall: f64,
    /// The same, by the guest.
    guest: f64,
    /// Since the guest's boot, by itself.
    uptime: f64,
}

async fn clocks(stage: &Stage, session: &SessionInfo) -> Result<Clocks> {
    let told = stage.succeed(session, &["exec", "waiting", "sh", "-c", "cat /proc/uptime; date +%s"]).await?;
    let wall = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    let mut words = told.split_whitespace();
    let (uptime, guest) = (words.next(), words.next_back());
    let (uptime, guest) = uptime.zip(guest).with_context(|| told.clone())?;
    Ok(Clocks { wall, guest: guest.parse()?, uptime: uptime.parse()? })
}

/// Waits until it has fallen asleep by itself.
async fn asleep(session: &SessionInfo) -> Result<SessionInfo> {
    until(session, |info| info.vm.phase == Phase::Absent).await.context("it doesn't fall asleep")
}

/// Waits for a hold by what goes on in a container.
async fn held_with(session: &SessionInfo, owner: &str, reason: &str) -> Result<()> {
    let is_held = |info: &SessionInfo| {
        let holds = &mut info.holds.iter().filter(|hold| hold.kind == HoldKind::Activity && !hold.weak);
        holds.any(|hold| (hold.owner.as_str(), hold.reason.as_str()) == (owner, reason))
    };
    until(session, is_held).await.map(drop)
}
