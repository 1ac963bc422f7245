//! Programs that use testcontainers: with its reaper, as they are, and with the VM asleep before each:
//! `scripts/test-long testcontainers`.
#![cfg(feature = "long")]

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use dormouse_api::{CreateSession, IdleTimeout, RunningContainers, SessionInfo};
use dormouse_vm_tests::project;
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, fall_asleep, inspect, program};

/// The programs, each a run of its own.
const PROGRAMS: [&str; 4] = [
    "a_server_is_reached_at_its_published_port",
    "a_command_runs_in_a_container",
    "two_containers_meet_in_a_network",
    "two_servers_have_ports_of_their_own",
];

/// What testcontainers starts first.
const REAPER: &str = "testcontainers/ryuk:0.8.1";

async fn session(stage: &Stage) -> Result<SessionInfo> {
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Never;
    wish.running = RunningContainers::Suspend;
    let session = stage.make(&wish).await?;
    stage.load_busybox(&session).await?;
    Ok(session)
}

fn python(session: &SessionInfo) -> Command {
    let mut python = Command::new(project().join("build/testcontainers/bin/python"));
    python
        .env("DOCKER_HOST", format!("unix://{}", session.docker_socket.display()))
        // On a host that is a container itself it would take the engine for a neighbour.
        .env("TESTCONTAINERS_CONNECTION_MODE", "docker_host")
        .env("PYTHONPATH", project().join("vm-tests/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null());
    python
}

fn pytest(session: &SessionInfo) -> Command {
    let mut pytest = python(session);
    pytest.args(["-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider"]);
    pytest
}

async fn passes(stage: &Stage, session: &SessionInfo, pytest: Command, count: usize) -> Result<()> {
    let output = stage.finish(session, pytest).await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in said.lines().filter(|line| line.contains("::")) {
        println!("{line}");
    }
    ensure!(output.status.success(), "{said}\n{}", stage.logs(session));
    ensure!(said.contains(&format!("{count} passed")), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn testcontainers_programs_pass_with_the_vm_asleep_before_each() -> Result<()> {
    let stage = Stage::new()?;
    let session = session(&stage).await?;
    fall_asleep(&session).await?;
    let starts = inspect(&session).await?.vm.start_count;
    let (home, dorm) = (stage.home().display(), program("dorm"));
    let mut pytest = pytest(&session);
    pytest.args(["-p", "before_each"]);
    pytest.arg(project().join("vm-tests/python/test_with_testcontainers.py"));
    pytest
        // A reaper's client stays for as long as all four run, and so the VM would be awake.
        .env("TESTCONTAINERS_RYUK_DISABLED", "true")
        .env("DORM_BEFORE", format!("env DORM_HOME={home} {} session suspend default", dorm.display()));
    passes(&stage, &session, pytest, PROGRAMS.len()).await?;
    let woken = inspect(&session).await?.vm.start_count - starts;
    println!("figure: wakes = {woken}");
    ensure!(woken >= PROGRAMS.len() as u64, "only {woken} wakes");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn testcontainers_programs_pass_with_a_reaper_that_clears_up_after_one_that_was_killed() -> Result<()> {
    let stage = Stage::new()?;
    let session = session(&stage).await?;
    import_reaper(&stage, &session).await?;
    let file = project().join("vm-tests/python/test_with_testcontainers.py");
    for program in PROGRAMS {
        let mut pytest = pytest(&session);
        pytest.arg(format!("{}::test_{program}", file.display()));
        passes(&stage, &session, pytest, 1).await?;
    }
    let reapers = stage
        .succeed(
            &session,
            &[
                "events",
                "--since",
                "1h",
                "--until",
                "0s",
                "--filter",
                &format!("image={REAPER}"),
                "--filter",
                "event=start",
                "--format",
                "{{.Action}}",
            ],
        )
        .await?;
    let reapers = reapers.lines().count();
    println!("figure: reapers that were started = {reapers}");
    ensure!(reapers >= PROGRAMS.len(), "only {reapers} reapers");

    let mut killed = python(&session);
    killed.arg(project().join("vm-tests/python/killed_with_testcontainers.py"));
    let output = stage.finish(&session, killed).await?;
    ensure!(output.stdout == b"started\n" && output.status.code().is_none(), "{output:?}");
    let gone = async {
        while !stage.succeed(&session, &["ps", "--all", "--quiet"]).await?.is_empty() {}
        Ok::<_, anyhow::Error>(())
    };
    tokio::time::timeout(STATE_WITHIN, gone).await.context("a container outlives its killed program")?
}

/// Makes an image of what stands for ryuk, by its name.
async fn import_reaper(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let folder = stage.home().join("reaper");
    std::fs::create_dir(&folder)?;
    let mut compiler = Command::new("rustc");
    compiler.args(["--edition", "2024", "-C", "target-feature=+crt-static", "-o"]).arg(folder.join("reaper"));
    ensure!(compiler.arg(project().join("vm-tests/reaper.rs")).status()?.success(), "rustc fails");
    let archive = stage.home().join("reaper.tar");
    let status =
        Command::new("tar").arg("-C").arg(&folder).arg("-cf").arg(&archive).arg("reaper").status()?;
    ensure!(status.success(), "tar fails");
    let archive = archive.to_string_lossy();
    let import = ["import", "--change", "CMD [\"/reaper\"]", "--change", "EXPOSE 8080", &archive, REAPER];
    stage.succeed(session, &import).await?;
    Ok(())
}
