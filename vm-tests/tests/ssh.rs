//! Docker's client on another machine, with `DOCKER_HOST=ssh://`: what it runs asleep and awake, and what is left of it.
//! `scripts/test-long ssh`.
#![cfg(feature = "long")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use dormouse_api::{HoldKind, SessionInfo};
use dormouse_vm_tests::remote::{Docker, Remote};
use dormouse_vm_tests::stage::{Stage, fall_asleep, inspect, program, until};

/// More than any buffer on the way holds.
const MANY: usize = 3_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_client_on_another_machine_comes_by_ssh_and_leaves_nothing() -> Result<()> {
    let stage = Stage::new()?;
    let session = stage.create(3600).await?;
    stage.load_busybox(&session).await?;
    // What the guide says to do once on the machine with the sessions.
    let mut install = Command::new(program("dorm"));
    install.args(["docker-context", "install"]).env("DORM_HOME", stage.home());
    install.env("DOCKER_CONFIG", stage.home().join("docker-config"));
    ensure!(stage.finish(&session, install).await?.status.success(), "there is no context");
    let mut default = stage.docker(&session, &["context", "use", "dorm"]);
    default.env_remove("DOCKER_HOST");
    ensure!(stage.finish(&session, default).await?.status.success(), "it isn't used");
    for docker in [Docker::Own, Docker::Dorm] {
        let remote = Remote::new(&stage, docker)?;
        let outcome = it_works(&stage, &session, &remote).await;
        outcome.with_context(|| format!("with {docker:?}: {}", remote.log()))?;
    }
    // Docker's own client stays there until it has something to write.
    let remote = Remote::new(&stage, Docker::Dorm)?;
    a_client_that_is_killed_holds_nothing(&stage, &session, &remote).await
}

async fn it_works(stage: &Stage, session: &SessionInfo, remote: &Remote) -> Result<()> {
    fall_asleep(session).await?;
    let before = inspect(session).await?.vm.start_count;
    let output = stage.finish(session, remote.docker(&["run", "--rm", "busybox", "echo", "hello"])).await?;
    ensure!(output.status.success() && output.stdout == b"hello\n", "{output:?}");
    ensure!(inspect(session).await?.vm.start_count == before + 1, "nothing was woken");
    let output =
        stage.finish(session, remote.docker(&["run", "--rm", "busybox", "sh", "-c", "exit 7"])).await?;
    ensure!(output.status.code() == Some(7), "{output:?}");

    // The end of its input reaches the container, and all of its output comes.
    let mut cat = remote.docker(&["run", "--rm", "--interactive", "busybox", "cat"]);
    cat.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = cat.spawn()?;
    let mut stdin = child.stdin.take().context("it is piped")?;
    let writing = std::thread::spawn(move || stdin.write_all(&vec![b'x'; MANY]));
    let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
    writing.join().ok().context("it panicked")??;
    ensure!(output.status.success() && output.stdout.len() == MANY, "{} bytes", output.stdout.len());
    Ok(())
}

/// Though its container says nothing that would have to be written to it.
async fn a_client_that_is_killed_holds_nothing(
    stage: &Stage,
    session: &SessionInfo,
    remote: &Remote,
) -> Result<()> {
    let script = "echo up; sleep 100000";
    let mut run = remote.docker(&["run", "--name", "talks", "busybox", "sh", "-c", script]);
    let mut child = run.stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("it is piped")?).read_line(&mut line)?;
    ensure!(line == "up\n", "{line:?}");
    let is_held =
        |info: &SessionInfo| info.holds.iter().any(|hold| hold.kind == HoldKind::Request && !hold.weak);
    ensure!(is_held(&inspect(session).await?), "whoever is attached holds");
    child.kill()?;
    child.wait()?;
    until(session, |info| !is_held(info)).await?;
    ensure!(stage.succeed(session, &["ps", "--format", "{{.Names}}"]).await? == "talks\n");
    stage.succeed(session, &["rm", "--force", "talks"]).await?;
    Ok(())
}
