//! The life of a session with real VMs: timers, holds, and what goes wrong at the worst moment.
//!
//! That every interleaving is right is the model's to show, that the owner does what the core says its driver tests';
//! here the same stories are told by a real guest, a real engine, real hooks and real signals.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_agent_proto::RunProcess;
use dormouse_api::{
    ChangeSettings, CreateSession, HistoryEntry, Hold, HoldKind, IdleTimeout, Phase, SessionInfo,
    SessionState, SleepAnswer, TerminationReason, Why,
};
use dormouse_client::Endpoint;
use dormouse_lifecycle::{Event, PhaseName, Trace};
use dormouse_vm_tests::stage::{
    Stage, becomes, fall_asleep, held_by, host_of, inspect, program, qemu_of, runtime, until,
};
use http::Method;
use rustix::process::{Signal, kill_process};

/// Commands of the thrash.
const COMMANDS: usize = if cfg!(feature = "long") { 200 } else { 40 };

/// Each window has to be met so often.
const MET_LEAST: usize = 5;

/// A hook that does what files in the session's folder say: `slow` holds a stop up, `hang` for ever, `fail` fails it, and
/// `veto` refuses the start of a container.
const HOOK: &str = r#"#!/bin/sh
cd "$(dirname "$0")/.." || exit 1
echo "$1" >> told
if [ "$1" = container-starting ] && [ -e veto ]; then echo "not on Sundays" >&2; exit 1; fi
[ "$1" = vm-stopping ] || exit 0
if [ -e hang ]; then sleep 1000; fi
if [ -e fail ]; then echo "it can't be" >&2; exit 3; fi
if [ -e slow ]; then sleep "$(cat slow)"; fi
"#;

struct Play {
    stage: Stage,
    session: SessionInfo,
}

impl Play {
    async fn new(idle_seconds: u64) -> Result<Self> {
        let stage = Stage::new()?;
        let session = stage.create(idle_seconds).await?;
        let play = Self { stage, session };
        let hooks = play.folder().join("hooks.d");
        fs::create_dir_all(&hooks)?;
        fs::write(hooks.join("10-test"), HOOK)?;
        fs::set_permissions(hooks.join("10-test"), Permissions::from_mode(0o755))?;
        Ok(play)
    }

    fn folder(&self) -> PathBuf {
        self.stage.home().join("data/sessions").join(self.session.id.as_str())
    }

    fn flag(&self, name: &str, contents: &str) -> Result<()> {
        Ok(fs::write(self.folder().join(name), contents)?)
    }

    fn unflag(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.folder().join(name))?)
    }

    fn control(&self) -> Endpoint {
        Endpoint::new(&self.session.control_socket)
    }

    /// Needs the VM for a moment.
    async fn use_it(&self) -> Result<SessionInfo> {
        let held = self.control().hold(&Hold { reason: "a short command".to_owned() }).await?;
        let info = inspect(&self.session).await?;
        drop(held);
        Ok(info)
    }

    async fn set_idle_timeout(&self, timeout: IdleTimeout) -> Result<SessionInfo> {
        let change = ChangeSettings { idle_timeout: Some(timeout), ..ChangeSettings::default() };
        Ok(self.stage.service().call(Method::POST, "/v1/sessions/default/settings", &change).await?)
    }

    async fn history(&self) -> Result<Vec<HistoryEntry>> {
        Ok(self.control().get("/v1/history").await?)
    }

    /// The latest entry of a kind.
    async fn latest(&self, what: &str) -> Result<HistoryEntry> {
        let found = self.history().await?.into_iter().rfind(|entry| entry.what == what);
        found.with_context(|| format!("the history has no {what}"))
    }

    /// Asks for the sleep from another task, and waits until hooks are told of it.
    async fn commit(&self) -> Result<tokio::task::JoinHandle<Result<SleepAnswer>>> {
        until(&self.session, |info| info.holds.iter().all(|hold| hold.weak)).await?;
        let control = self.control();
        let asked = tokio::spawn(async move { Ok(control.post("/v1/session/sleep").await?) });
        until(&self.session, |info| info.vm.phase == Phase::Committed).await?;
        Ok(asked)
    }
}

/// One session for all of it: each start costs seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_sessions_life_goes_as_promised_whatever_happens_to_it() -> Result<()> {
    let play = Play::new(2).await?;
    the_timer_runs_from_the_last_use_and_each_use_sets_it_back(&play).await?;
    a_changed_setting_counts_at_once(&play).await?;
    a_sleep_that_is_asked_for_waits_its_time_or_comes_at_once(&play).await?;
    a_killed_clients_token_is_gone(&play).await?;
    a_detached_root_process_outlives_its_client(&play).await?;
    a_host_that_panics_leaves_its_last_steps_and_its_vm(&play).await?;
    who_comes_while_hooks_are_told_is_served_by_the_next_vm(&play).await?;
    a_crash_while_hooks_are_told_is_a_sleep(&play).await?;
    hooks_that_fail_or_hang_hold_up_nothing_for_ever(&play).await?;
    hooks_forbid_the_start_of_a_container_wherever_it_comes_from(&play).await?;
    containers_of_an_engine_that_died_and_came_back_hold_and_let_go(&play).await?;
    whoever_wakes_a_vm_that_lost_its_snapshot_is_told(&play).await?;
    terminate_wins_over_a_sleep_that_is_under_way(&play).await?;
    terminate_wins_over_a_sleep_that_nobody_asked_for(&play).await
}

async fn the_timer_runs_from_the_last_use_and_each_use_sets_it_back(play: &Play) -> Result<()> {
    let generation = play.use_it().await?.vm.generation;
    let begun = Instant::now();
    let mut uses = 0;
    while begun.elapsed() < Duration::from_secs(6) {
        let info = play.use_it().await?;
        ensure!(info.vm.generation == generation, "it fell asleep between two uses");
        uses += 1;
    }
    ensure!(uses > 5, "it was used {uses} times only");
    let last = Instant::now();
    until(&play.session, |info| info.vm.phase != Phase::Running).await?;
    let waited = last.elapsed();
    ensure!(waited >= Duration::from_millis(1900), "asleep {waited:?} after its last use");
    println!("figure: idle_timer_2s_seconds = {:.2}", waited.as_secs_f64());
    becomes(&play.session, "absent").await?;
    Ok(())
}

async fn a_changed_setting_counts_at_once(play: &Play) -> Result<()> {
    play.set_idle_timeout(IdleTimeout::Never).await?;
    play.use_it().await?;
    let info = until(&play.session, |info| info.holds.is_empty()).await?;
    ensure!(info.vm.deadline.is_none(), "{info:?}");
    play.set_idle_timeout(IdleTimeout::Seconds(0)).await?;
    becomes(&play.session, "absent").await?;
    let kept = fs::read_to_string(play.folder().join("session.json"))?;
    ensure!(kept.contains(r#""idle_timeout": 0"#) || kept.contains(r#""idle_timeout":0"#), "{kept}");
    play.set_idle_timeout(IdleTimeout::Seconds(1)).await?;
    Ok(())
}

async fn a_sleep_that_is_asked_for_waits_its_time_or_comes_at_once(play: &Play) -> Result<()> {
    let sleep = async |more: &[&str]| {
        let mut command = tokio::process::Command::new(program("dorm"));
        command.args(["session", "sleep"]).args(more).env("DORM_HOME", play.stage.home());
        let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await?;
        let said = [output.stdout, output.stderr].concat();
        anyhow::Ok((output.status.code(), String::from_utf8_lossy(&said).trim().to_owned()))
    };
    let held = play.control().hold(&Hold { reason: "still at work".to_owned() }).await?;
    let generation = inspect(&play.session).await?.vm.generation;
    for more in [&[][..], &["--now"]] {
        let (code, said) = sleep(more).await?;
        ensure!(code == Some(1) && said.contains("still at work"), "{code:?} {said}");
    }
    drop(held);
    until(&play.session, |info| info.holds.is_empty()).await?;
    let asleep = (Some(0), format!("asleep: VM {generation} was suspended"));
    let found = sleep(&[]).await?;
    ensure!(found == asleep || found.1.contains("asleep already"), "{found:?}");
    ensure!(inspect(&play.session).await?.vm.phase == Phase::Absent);
    play.set_idle_timeout(IdleTimeout::Never).await?;
    let generation = play.use_it().await?.vm.generation;
    until(&play.session, |info| info.holds.is_empty()).await?;
    let (code, said) = sleep(&[]).await?;
    ensure!(code == Some(1) && said.contains("never falls asleep by itself"), "{code:?} {said}");
    let found = sleep(&["--now"]).await?;
    ensure!(found == (Some(0), format!("asleep: VM {generation} was suspended")), "{found:?}");
    play.set_idle_timeout(IdleTimeout::Seconds(1)).await?;
    Ok(())
}

async fn a_killed_clients_token_is_gone(play: &Play) -> Result<()> {
    let mut client = tokio::process::Command::new(program("dorm"))
        .args(["hold", "--reason", "until it is killed", "--", "sleep", "1000"])
        .env("DORM_HOME", play.stage.home())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let info = held_by(&play.session, HoldKind::Operation).await?;
    ensure!(info.holds.iter().any(|hold| hold.reason == "until it is killed"), "{info:?}");
    client.kill().await?;
    let info = until(&play.session, |info| info.holds.is_empty()).await?;
    ensure!(info.vm.phase != Phase::Absent, "the VM was still up when the token went");
    becomes(&play.session, "absent").await?;
    Ok(())
}

async fn a_detached_root_process_outlives_its_client(play: &Play) -> Result<()> {
    let argv = ["sleep", "5"].map(str::to_owned).to_vec();
    let process = RunProcess { argv, detach: true, ..RunProcess::default() };
    let client = play.control().upgrade(Method::POST, "/v1/run", &process, "dorm-process").await?;
    let begun = Instant::now();
    held_by(&play.session, HoldKind::RootProcess).await?;
    drop(client);
    until(&play.session, |info| info.vm.phase != Phase::Running).await?;
    let held = begun.elapsed();
    ensure!(held >= Duration::from_secs(5), "it held the VM for {held:?}, its grace period is a second");
    becomes(&play.session, "absent").await?;
    Ok(())
}

async fn a_host_that_panics_leaves_its_last_steps_and_its_vm(play: &Play) -> Result<()> {
    play.set_idle_timeout(IdleTimeout::Never).await?;
    let before = play.use_it().await?;
    until(&play.session, |info| info.holds.is_empty()).await?;
    let fell = host_of(&play.session)?;
    fs::write(runtime(&play.stage, &play.session).join("fault"), "owner.sleep")?;
    let asked = play.control().post::<SleepAnswer>("/v1/session/sleep").await;
    ensure!(!matches!(asked, Ok(SleepAnswer::Asleep { .. } | SleepAnswer::NoVm)), "{asked:?}");
    let gone = async {
        while host_of(&play.session).is_ok_and(|host| host == fell) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.context("the host lives on")?;
    let after = play.use_it().await?;
    ensure!((after.vm.generation, after.vm.boots) == (before.vm.generation, before.vm.boots), "{after:?}");

    let mut told = tokio::process::Command::new(program("dorm"));
    told.args(["session", "trace", "--crash"]).env("DORM_HOME", play.stage.home());
    let told = told.output().await?;
    let left = play.folder().join("trace.json");
    ensure!(told.status.success() && told.stdout.trim_ascii_end() == fs::read(&left)?, "{told:?}");
    let replay = tokio::process::Command::new(program("xtask")).arg("replay").arg(&left).output().await?;
    let steps = String::from_utf8_lossy(&replay.stdout);
    ensure!(replay.status.success() && !steps.contains("CONTRADICTION"), "{replay:?}");
    let last = format!("running (incarnation 1, generation {}, 0 leases, 0 wait)", before.vm.generation);
    ensure!(steps.trim_end().ends_with(&last), "{steps}");
    play.set_idle_timeout(IdleTimeout::Seconds(1)).await?;
    becomes(&play.session, "absent").await?;
    Ok(())
}

async fn who_comes_while_hooks_are_told_is_served_by_the_next_vm(play: &Play) -> Result<()> {
    let before = play.use_it().await?;
    play.flag("slow", "1")?;
    let asked = play.commit().await?;
    let waiting = play.use_it();
    let after = waiting.await?;
    ensure!(after.vm.generation == before.vm.generation + 1, "{before:?}\n{after:?}");
    let told = asked.await??;
    ensure!(
        matches!(told, SleepAnswer::Asleep { generation, .. } if generation == before.vm.generation),
        "{told:?}"
    );
    play.unflag("slow")?;
    fall_asleep(&play.session).await
}

async fn a_crash_while_hooks_are_told_is_a_sleep(play: &Play) -> Result<()> {
    let before = play.use_it().await?;
    play.flag("slow", "3")?;
    let asked = play.commit().await?;
    kill_process(qemu_of(&play.stage, &play.session)?, Signal::KILL)?;
    let told = asked.await??;
    ensure!(
        matches!(told, SleepAnswer::Asleep { generation, .. } if generation == before.vm.generation),
        "{told:?}"
    );
    let info = becomes(&play.session, "absent").await?;
    ensure!(info.incarnation == before.incarnation && info.termination.is_none(), "{info:?}");
    let slept = play.latest("sleep").await?;
    ensure!(slept.reason == "the VM exited before it was told to", "{slept:?}");
    play.unflag("slow")
}

async fn hooks_that_fail_or_hang_hold_up_nothing_for_ever(play: &Play) -> Result<()> {
    play.flag("fail", "")?;
    play.use_it().await?;
    fall_asleep(&play.session).await?;
    let failed = play.latest("hook_failed").await?;
    ensure!(failed.reason == "vm-stopping: the hook 10-test failed: it can't be", "{failed:?}");
    play.unflag("fail")?;
    play.flag("hang", "")?;
    play.use_it().await?;
    let begun = Instant::now();
    let asked = play.commit().await?;
    ensure!(matches!(asked.await??, SleepAnswer::Asleep { .. }));
    ensure!(begun.elapsed() >= Duration::from_secs(9), "it had its time");
    play.unflag("hang")?;
    until_in_history(play, "hook_failed", "vm-stopping: the hook 10-test hung and was killed after 10 s")
        .await
}

/// The core goes on without hooks that had their time, so what the history says of them may come a moment later.
async fn until_in_history(play: &Play, what: &str, reason: &str) -> Result<()> {
    let found = async {
        while !play.history().await?.iter().any(|entry| entry.what == what && entry.reason == reason) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    };
    tokio::time::timeout(Duration::from_secs(30), found).await.context("the history doesn't say it")?
}

async fn hooks_forbid_the_start_of_a_container_wherever_it_comes_from(play: &Play) -> Result<()> {
    let Play { stage, session } = play;
    stage.load_busybox(session).await?;
    stage.succeed(session, &["create", "--name", "web", "busybox", "true"]).await?;
    play.flag("veto", "")?;
    let refused = stage.run(session, &["start", "web"]).await?;
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && words.contains("not on Sundays"), "{refused:?}");
    let state = ["inspect", "--format", "{{.State.Status}}", "web"];
    ensure!(stage.succeed(session, &state).await? == "created\n");
    play.unflag("veto")?;
    stage.succeed(session, &["start", "web"]).await?;
    // Within the engine nobody can be asked before: its own restart of a container is undone.
    let again = ["run", "--detach", "--restart", "always", "--name", "again", "busybox", "sleep", "1"];
    stage.succeed(session, &again).await?;
    play.flag("veto", "")?;
    let words = "the container again was started within the VM and was stopped: not on Sundays";
    until_in_history(play, "warning", words).await?;
    let why: Why = play.control().get("/v1/why").await?;
    ensure!(why.warnings.iter().any(|warning| warning == words), "{why:?}");
    until_nothing_runs(play).await?;
    play.unflag("veto")?;
    // An engine that boots would start it again.
    stage.succeed(session, &["rm", "--force", "again"]).await?;
    Ok(())
}

async fn containers_of_an_engine_that_died_and_came_back_hold_and_let_go(play: &Play) -> Result<()> {
    let Play { stage, session } = play;
    play.set_idle_timeout(IdleTimeout::Never).await?;
    let before = play.use_it().await?.vm.generation;
    let mut killing = tokio::process::Command::new(program("dorm"));
    killing.args(["session", "run", "sh", "-c", "kill -9 $(cat /run/docker.pid)"]);
    let killed = killing.env("DORM_HOME", stage.home()).output().await?;
    ensure!(killed.status.success(), "{killed:?}");
    let back = async {
        let again = ["run", "--detach", "--rm", "--name", "again", "busybox", "sleep", "1000"];
        while !stage.run(session, &again).await?.status.success() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(120), back).await.context("the engine does not come back")??;
    held_by(session, HoldKind::Container).await?;
    stage.succeed(session, &["kill", "again"]).await?;
    play.set_idle_timeout(IdleTimeout::Seconds(1)).await?;
    let asleep = becomes(session, "absent").await?;
    ensure!(asleep.vm.generation == before, "{asleep:?}");
    Ok(())
}

/// The engine answers a stop when the process has ended, and writes into its list of containers after that.
async fn until_nothing_runs(Play { stage, session }: &Play) -> Result<()> {
    let empty = async {
        while !stage.succeed(session, &["ps", "--quiet"]).await?.is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    };
    tokio::time::timeout(Duration::from_secs(30), empty).await.context("a container runs on")?
}

async fn whoever_wakes_a_vm_that_lost_its_snapshot_is_told(play: &Play) -> Result<()> {
    fall_asleep(&play.session).await?;
    let state = play.session.storage.path.join("memory.state");
    fs::File::options().write(true).open(state)?.set_len(1000)?;
    let engine = dormouse_client::Engine::new(&play.session.docker_socket);
    let create = async |name: &str| {
        let wish = serde_json::json!({ "Image": "busybox" });
        let made: serde_json::Value =
            engine.post_json(&format!("/containers/create?name={name}"), wish).await?;
        anyhow::Ok(made["Warnings"].to_string())
    };
    let told = create("woke").await?;
    ensure!(told.contains("its device state is damaged"), "{told}");
    let told = create("later").await?;
    ensure!(told == "[]", "another client was told: {told}");
    Ok(())
}

async fn terminate_wins_over_a_sleep_that_is_under_way(play: &Play) -> Result<()> {
    play.use_it().await?;
    play.flag("slow", "2")?;
    let asked = play.commit().await?;
    let ended: SessionInfo = play.control().post("/v1/session/terminate").await?;
    ensure!(matches!(asked.await??, SleepAnswer::Failed { .. }));
    let end = ended.termination.context("there is no reason")?;
    ensure!(ended.state == SessionState::Terminated && end.reason == TerminationReason::Shutdown, "{end:?}");
    let refused = play.use_it().await.err().context("a terminated session serves nobody")?;
    ensure!(refused.to_string().contains("terminated"), "{refused}");
    play.unflag("slow")
}

/// The sleep comes of the timer, and is met at each of its steps.
async fn terminate_wins_over_a_sleep_that_nobody_asked_for(play: &Play) -> Result<()> {
    play.flag("slow", "1")?;
    for (window, wanted) in [(Phase::Committed, PhaseName::Committed), (Phase::Stopping, PhaseName::Stopping)]
    {
        let mut met = Vec::new();
        // A step may be over before the request is there.
        for _ in 0..5 {
            met.push(terminate_at(play, window).await?);
            if met.last() == Some(&wanted) {
                break;
            }
        }
        ensure!(met.last() == Some(&wanted), "no race: it was met at {met:?} instead of {wanted:?}");
    }
    Ok(())
}

/// Opens the session anew, and ends it at this step of its sleep. Gives the phase that was met, from the trace.
async fn terminate_at(play: &Play, window: Phase) -> Result<PhaseName> {
    let incarnation = play.control().post::<SessionInfo>("/v1/session/start").await?.incarnation;
    play.use_it().await?;
    meet(play, window).await?;
    let ended: SessionInfo = play.control().post("/v1/session/terminate").await?;
    let end = ended.termination.context("there is no reason")?;
    ensure!(ended.state == SessionState::Terminated && ended.vm.phase == Phase::Absent, "{:?}", ended.vm);
    ensure!(end.reason == TerminationReason::Shutdown && ended.incarnation == incarnation, "{end:?}");
    let trace: Trace = play.control().get("/v1/trace").await?;
    let mut before = trace.base().view().phase;
    let mut met = None;
    for step in trace.replay() {
        if matches!(step.event, Event::Terminate { .. }) {
            met = Some(before);
        }
        before = step.session.view().phase;
    }
    met.context("the trace tells of no end")
}

/// A session of another size than the template's: it has to boot, which takes long enough to be met.
#[tokio::test(flavor = "multi_thread")]
async fn bring_ups_that_crash_or_take_too_long_are_told_and_nothing_is_left_of_them() -> Result<()> {
    let stage = Stage::new()?;
    let mut wish = CreateSession::named("late".parse()?);
    wish.memory_mib = Some(640);
    wish.boot_timeout_seconds = Some(2);
    let session = stage.make(&wish).await?;
    let late = stage.run(&session, &["ps"]).await?;
    let words = String::from_utf8_lossy(&late.stderr).into_owned();
    ensure!(
        !late.status.success() && words.contains("could not be started"),
        "{late:?}\n{}",
        stage.logs(&session)
    );
    becomes(&session, "absent").await?;
    ensure!(dormouse_vm::VmRecord::read(&runtime(&stage, &session))?.is_none(), "a VM is left");

    let mut wish = CreateSession::named("crash".parse()?);
    wish.memory_mib = Some(640);
    let session = stage.make(&wish).await?;
    // One request: docker would send another when its first has failed, and that one starts the next VM.
    let control = Endpoint::new(&session.control_socket);
    let hold = Hold { reason: "to start it".to_owned() };
    let killing = async {
        let step = |info: &SessionInfo| info.vm.phase == Phase::Starting && info.vm.step.is_some();
        until(&session, step).await?;
        kill_process(qemu_of(&stage, &session)?, Signal::KILL)?;
        anyhow::Ok(())
    };
    let (held, killed) = tokio::join!(control.hold(&hold), killing);
    killed?;
    let words = held.err().context("it was started")?.to_string();
    ensure!(words.contains("could not be started"), "{words}");
    let history: Vec<HistoryEntry> = Endpoint::new(&session.control_socket).get("/v1/history").await?;
    ensure!(history.iter().any(|entry| entry.what == "start_failed"), "{history:?}");
    ensure!(history.iter().all(|entry| entry.what != "crash"), "a failed start is no crash: {history:?}");
    Ok(())
}

/// Waits until an idle VM is in this phase. One that was asleep before anybody could look is woken, to try again.
async fn meet(play: &Play, window: Phase) -> Result<()> {
    loop {
        let met = |info: &SessionInfo| info.vm.phase == window && info.holds.is_empty();
        let info = until(&play.session, |info| met(info) || info.vm.phase == Phase::Absent).await?;
        if met(&info) {
            return Ok(());
        }
        play.use_it().await?;
    }
}

/// Short commands at every moment of the way to sleep. That they met it there is counted from the lifecycle's own trace.
#[tokio::test(flavor = "multi_thread")]
async fn short_commands_around_the_grace_period_never_fail_wherever_they_hit() -> Result<()> {
    let play = Play::new(1).await?;
    play.flag("slow", "0.4")?;
    play.use_it().await?;
    let windows = [Phase::Running, Phase::Counting, Phase::Committed, Phase::Stopping];
    for command in 0..COMMANDS {
        let window = windows[command % windows.len()];
        meet(&play, window).await?;
        play.use_it().await.with_context(|| format!("command {command}, at {window:?}"))?;
    }
    let trace: Trace = play.control().get("/v1/trace").await?;
    let mut met = BTreeMap::new();
    let mut before = trace.base().view().phase;
    for step in trace.replay() {
        if matches!(step.event, Event::LeaseRequested { .. }) {
            *met.entry(before.as_str()).or_insert(0) += 1;
        }
        before = step.session.view().phase;
    }
    println!("figure: thrash_met = {met:?}");
    for window in [PhaseName::Running, PhaseName::Counting, PhaseName::Committed, PhaseName::Stopping] {
        let times = met.get(window.as_str()).copied().unwrap_or(0);
        ensure!(times >= MET_LEAST, "{} was met {times} times only: {met:?}", window.as_str());
    }
    let info = inspect(&play.session).await?;
    ensure!(info.incarnation == 1, "something crashed: {:?}", play.history().await?);
    Ok(())
}
