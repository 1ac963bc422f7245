//! The docker client against a session whose VM is absent before each command, and what is left when sessions end. With some
//! forty wakes it takes longer than `make test` may: `scripts/test-long clients`.
#![cfg(feature = "long")]

use std::io::Write;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::{
    CreateSession, HoldKind, IdleTimeout, Phase, RunningContainers, SessionInfo, TerminationReason,
};
use dormouse_client::Endpoint;
use dormouse_vm_tests::stage::{Stage, fall_asleep, held_by, inspect, runtime, until};
use dormouse_vm_tests::{fetch, figure};
use expectrl::{Eof, Expect, Session as Terminal};

/// Longest wait for a client that has all it needs.
const ANSWER_WITHIN: Duration = Duration::from_secs(300);

/// What is typed: the size arrives when it arrives.
const SIZED: &str = "until [ \"$(stty size)\" = '33 77' ]; do sleep 1; done; test -t 0 && echo a ter''minal of that size; exit 5";

/// One home for all of it: each VM start costs seconds.
#[tokio::test(flavor = "multi_thread")]
async fn docker_works_with_the_vm_absent_before_each_command_and_a_session_that_ends_leaves_nothing()
-> Result<()> {
    let mut stage = Stage::new()?;
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Never;
    // So that the VM can be absent before `exec` and `attach`, whose containers run.
    wish.running = RunningContainers::Suspend;
    stage.template().await?;
    let session = stage.make(&wish).await?;
    stage.load_busybox(&session).await?;
    let absent = Absent { stage: &stage, session: &session };

    absent.containers().await?;
    absent.terminals().await?;
    absent.streams().await?;
    absent.files().await?;
    absent.builds().await?;
    absent.images().await?;
    absent.volumes_and_networks().await?;

    the_cache_can_be_deleted_while_sessions_sleep(&stage, &session).await?;
    a_service_that_is_told_to_end_puts_every_vm_to_sleep(&mut stage, &session).await?;
    a_terminated_session_leaves_no_vm(&stage, &session).await
}

/// A session whose VM is put to sleep before each command.
struct Absent<'a> {
    stage: &'a Stage,
    session: &'a SessionInfo,
}

impl Absent<'_> {
    async fn docker(&self, arguments: &[&str]) -> Result<String> {
        fall_asleep(self.session).await?;
        self.stage.succeed(self.session, arguments).await
    }

    async fn status(&self, arguments: &[&str]) -> Result<Option<i32>> {
        fall_asleep(self.session).await?;
        Ok(self.stage.run(self.session, arguments).await?.status.code())
    }

    /// Runs a client that is given `input`.
    async fn with_input(&self, mut command: Command, input: &'static [u8]) -> Result<Output> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let talk = tokio::task::spawn_blocking(move || {
            let mut child = command.spawn()?;
            // Open until all was said: the engine ends an attached stream with its input.
            let mut open = child.stdin.take().context("a pipe was asked for")?;
            open.write_all(input)?;
            let output = child.wait_with_output()?;
            drop(open);
            Ok(output)
        });
        tokio::time::timeout(ANSWER_WITHIN, talk).await.context("it hangs")??
    }

    async fn containers(&self) -> Result<()> {
        let begin = Instant::now();
        ensure!(self.docker(&["run", "--rm", "busybox", "echo", "hi"]).await? == "hi\n");
        figure("docker run --rm on a sleeping session", begin.elapsed());
        ensure!(self.status(&["run", "--rm", "busybox", "sh", "-c", "exit 7"]).await? == Some(7));
        let script = "echo served > /index.html; exec httpd -f -p 80 -h /";
        self.docker(&["run", "-d", "-p", "80", "--name", "web", "busybox", "sh", "-c", script]).await?;
        let told = self.docker(&["port", "web", "80/tcp"]).await?;
        let number: u16 = told.trim().rsplit_once(':').context("no port")?.1.parse()?;
        fall_asleep(self.session).await?;
        let page = tokio::task::spawn_blocking(move || fetch(&format!("127.0.0.1:{number}"))).await??;
        ensure!(page.ends_with("served\n"), "{page}");
        self.docker(&["rm", "--force", "web"]).await?;
        self.docker(&["run", "-d", "-i", "--name", "cat", "busybox", "cat"]).await?;
        Ok(())
    }

    /// `exec -it` in a real terminal.
    async fn terminals(&self) -> Result<()> {
        fall_asleep(self.session).await?;
        // The terminal has its size before docker looks: of a change it may miss the signal.
        let docker = self.stage.docker(self.session, &["exec", "-it", "cat", "sh"]);
        let mut shell = Command::new("sh");
        shell.args(["-c", "stty rows 33 cols 77; exec \"$@\"", "sh"]);
        shell.arg(docker.get_program()).args(docker.get_args());
        shell.envs(docker.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let talk = tokio::task::spawn_blocking(move || {
            let mut terminal = Terminal::spawn(shell)?;
            terminal.set_expect_timeout(Some(ANSWER_WITHIN));
            terminal.expect("#")?;
            terminal.send_line(SIZED)?;
            terminal.expect("a terminal of that size")?;
            terminal.expect(Eof)?;
            Ok(format!("{:?}", terminal.get_process().wait()?))
        });
        let status: Result<String> = talk.await?;
        let status = status.with_context(|| self.stage.logs(self.session))?;
        ensure!(status.starts_with("Exited(") && status.ends_with(", 5)"), "{status}");
        Ok(())
    }

    /// `attach` and `logs -f`.
    async fn streams(&self) -> Result<()> {
        self.docker(&["run", "-d", "-i", "--name", "once", "busybox", "head", "-n", "1"]).await?;
        fall_asleep(self.session).await?;
        let attach = self.stage.docker(self.session, &["attach", "once"]);
        let output = self.with_input(attach, b"through the pipe\n").await?;
        ensure!(output.status.success() && output.stdout == b"through the pipe\n", "{output:?}");

        let script = "for n in 1 2 3; do echo line $n; sleep 1; done";
        self.docker(&["run", "-d", "--name", "talker", "busybox", "sh", "-c", script]).await?;
        let logs = self.docker(&["logs", "-f", "talker"]).await?;
        ensure!(logs == "line 1\nline 2\nline 3\n", "{logs}");
        Ok(())
    }

    async fn files(&self) -> Result<()> {
        let (there, back) = (self.stage.home().join("there"), self.stage.home().join("back"));
        let bytes: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(&there, &bytes)?;
        let path = |path: &Path| path.to_string_lossy().into_owned();
        self.docker(&["cp", &path(&there), "talker:/copy"]).await?;
        self.docker(&["cp", "talker:/copy", &path(&back)]).await?;
        ensure!(std::fs::read(back)? == bytes);
        Ok(())
    }

    /// A Dockerfile of three steps, by the engine's own builder and by BuildKit.
    async fn builds(&self) -> Result<()> {
        let context = self.stage.home().join("context");
        std::fs::create_dir(&context)?;
        std::fs::write(context.join("message"), "built\n")?;
        let file = "FROM busybox\nCOPY message /message\nRUN cat /message /message > /twice\nCMD [\"cat\", \"/twice\"]\n";
        std::fs::write(context.join("Dockerfile"), file)?;
        for (builder, tag) in [("0", "classic"), ("1", "buildkit")] {
            fall_asleep(self.session).await?;
            let begin = Instant::now();
            let folder = context.to_string_lossy().into_owned();
            let mut docker = self.stage.docker(self.session, &["build", "--tag", tag, &folder]);
            docker.env("DOCKER_BUILDKIT", builder);
            let output = self.stage.finish(self.session, docker).await?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            figure(&format!("docker build of three steps, {tag}"), begin.elapsed());
            ensure!(self.docker(&["run", "--rm", tag]).await? == "built\nbuilt\n");
        }
        Ok(())
    }

    /// `save | load`.
    async fn images(&self) -> Result<()> {
        fall_asleep(self.session).await?;
        let mut save =
            self.stage.docker(self.session, &["save", "classic"]).stdout(Stdio::piped()).spawn()?;
        let image = save.stdout.take().context("no output")?;
        let mut load = self.stage.docker(self.session, &["load"]);
        load.stdin(Stdio::from(OwnedFd::from(image)));
        let output = self.stage.finish(self.session, load).await?;
        ensure!(save.wait()?.success());
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(said.contains("Loaded image: classic"), "{said}");
        ensure!(self.docker(&["images", "--quiet", "classic"]).await?.lines().count() == 1);
        Ok(())
    }

    async fn volumes_and_networks(&self) -> Result<()> {
        ensure!(self.docker(&["volume", "create", "things"]).await? == "things\n");
        self.docker(&["run", "--rm", "-v", "things:/t", "busybox", "sh", "-c", "echo kept > /t/f; sync"])
            .await?;
        ensure!(
            self.docker(&["run", "--rm", "-v", "things:/t", "busybox", "cat", "/t/f"]).await? == "kept\n"
        );
        ensure!(self.docker(&["volume", "ls", "--quiet"]).await?.contains("things"));
        self.docker(&["network", "create", "net"]).await?;
        let script = "while :; do echo over the net | nc -l -p 80; done";
        self.docker(&["run", "-d", "--network", "net", "--name", "peer", "busybox", "sh", "-c", script])
            .await?;
        let ask = ["run", "--rm", "--network", "net", "busybox", "nc", "peer", "80"];
        ensure!(self.docker(&ask).await? == "over the net\n");
        self.docker(&["rm", "--force", "peer"]).await?;
        self.docker(&["network", "rm", "net"]).await?;
        Ok(())
    }
}

async fn the_cache_can_be_deleted_while_sessions_sleep(stage: &Stage, session: &SessionInfo) -> Result<()> {
    fall_asleep(session).await?;
    std::fs::remove_dir_all(stage.home().join("cache"))?;
    ensure!(
        stage.succeed(session, &["run", "--rm", "-v", "things:/t", "busybox", "cat", "/t/f"]).await?
            == "kept\n"
    );
    Ok(())
}

async fn a_service_that_is_told_to_end_puts_every_vm_to_sleep(
    stage: &mut Stage,
    session: &SessionInfo,
) -> Result<()> {
    stage.succeed(session, &["run", "-d", "--name", "long", "busybox", "sleep", "100000"]).await?;
    held_by(session, HoldKind::Container).await?;
    let generation = inspect(session).await?.vm.generation;
    let begin = Instant::now();
    stage.stop_service()?;
    figure("SIGTERM until every VM sleeps", begin.elapsed());
    let left = stage.processes()?;
    ensure!(left.is_empty(), "{left:?} outlive a service that was told to end");
    ensure!(vm_files(stage, session)?.is_empty(), "{:?}", vm_files(stage, session)?);

    stage.start_service()?;
    let info = inspect(session).await?;
    ensure!(info.vm.phase == Phase::Absent && info.termination.is_none(), "{info:?}");
    // Only a VM that is up can do that, in a container that runs on.
    stage.succeed(session, &["exec", "long", "true"]).await?;
    ensure!(inspect(session).await?.vm.generation > generation);
    Ok(())
}

async fn a_terminated_session_leaves_no_vm(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let control = Endpoint::new(&session.control_socket);
    stage
        .succeed(session, &["run", "-d", "-p", "80", "--name", "door", "busybox", "sleep", "100000"])
        .await?;
    let told = stage.succeed(session, &["port", "door", "80/tcp"]).await?;
    let port: u16 = told.trim().rsplit_once(':').context("no port")?.1.parse()?;
    ensure!(TcpStream::connect(("127.0.0.1", port)).is_ok(), "nobody listens at {port}");
    let ended: SessionInfo = control.post("/v1/session/terminate").await?;
    let end = ended.termination.context("there is no reason")?;
    ensure!(end.reason == TerminationReason::Shutdown, "{end:?}");
    until(session, |info| info.vm.phase == Phase::Absent).await?;
    ensure!(vm_files(stage, session)?.is_empty(), "{:?}", vm_files(stage, session)?);
    ensure!(TcpStream::connect(("127.0.0.1", port)).is_err(), "{port} is still published");
    let again: SessionInfo = control.post("/v1/session/terminate").await?;
    ensure!(again.termination.is_some(), "it can be repeated");
    stage.service().call::<_, ()>(http::Method::DELETE, "/v1/sessions/default", &()).await?;
    // One may be being made, as this session booted.
    stage.template().await?;
    for folder in ["data/sessions", "run"] {
        let left = std::fs::read_dir(stage.home().join(folder))?.map(|entry| Ok(entry?.path()));
        let left = left.collect::<Result<Vec<_>>>()?;
        ensure!(left.iter().all(|path| !path.is_dir()), "{left:?}");
    }
    Ok(())
}

/// Sockets and records of VMs.
fn vm_files(stage: &Stage, session: &SessionInfo) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(runtime(stage, session))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    Ok(names.collect::<Result<Vec<_>>>()?.into_iter().filter(|name| name.starts_with("vm")).collect())
}
