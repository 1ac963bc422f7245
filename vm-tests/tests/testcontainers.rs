//! Programs that use testcontainers, with the VM asleep before each: `scripts/test-long testcontainers`.
#![cfg(feature = "long")]

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use dormouse_api::{CreateSession, IdleTimeout, RunningContainers};
use dormouse_vm_tests::project;
use dormouse_vm_tests::stage::{Stage, fall_asleep, inspect, program};

/// How many programs there are.
const PROGRAMS: u64 = 4;

#[tokio::test(flavor = "multi_thread")]
async fn testcontainers_programs_pass_with_the_vm_asleep_before_each() -> Result<()> {
    let stage = Stage::new()?;
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Never;
    wish.running = RunningContainers::Suspend;
    let session = stage.make(&wish).await?;
    stage.load_busybox(&session).await?;
    fall_asleep(&session).await?;
    let starts = inspect(&session).await?.vm.start_count;
    let (home, dorm) = (stage.home().display(), program("dorm"));
    let mut pytest = Command::new(project().join("build/testcontainers/bin/python"));
    pytest.args(["-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "-p", "before_each"]);
    pytest.arg(project().join("vm-tests/python/test_with_testcontainers.py"));
    pytest
        .env("DOCKER_HOST", format!("unix://{}", session.docker_socket.display()))
        .env("TESTCONTAINERS_RYUK_DISABLED", "true")
        // On a host that is a container itself it would take the engine for a neighbour.
        .env("TESTCONTAINERS_CONNECTION_MODE", "docker_host")
        .env("PYTHONPATH", project().join("vm-tests/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("DORM_BEFORE", format!("env DORM_HOME={home} {} session suspend default", dorm.display()))
        .stdin(Stdio::null());
    let output = stage.finish(&session, pytest).await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in said.lines().filter(|line| line.contains("::")) {
        println!("{line}");
    }
    ensure!(output.status.success(), "{said}\n{}", stage.logs(&session));
    let woken = inspect(&session).await?.vm.start_count - starts;
    println!("figure: wakes = {woken}");
    ensure!(woken >= PROGRAMS, "only {woken} wakes");
    ensure!(said.contains(&format!("{PROGRAMS} passed")), "{said}");
    Ok(())
}
