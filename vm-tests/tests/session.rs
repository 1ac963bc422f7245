//! A session end to end: the real service, the real host, real QEMU, the real docker client.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use command_fds::{CommandFdExt, FdMapping};
use dormouse_api::{CreateSession, HoldKind, IdleTimeout, Phase, SessionInfo, TerminationReason};
use dormouse_client::Endpoint;
use dormouse_vm_tests::{images, project};
use rustix::process::{Pid, Signal, kill_process};

/// Clients that knock at once.
const KNOCKS: usize = 20;

/// A home of its own with a service. Whatever runs in it is ended with it.
struct Stage {
    folder: tempfile::TempDir,
    service: Child,
}

fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap_or_default();
    test.parent().and_then(|deps| deps.parent()).map_or_else(|| name.into(), |folder| folder.join(name))
}

fn start_service(folder: &std::path::Path) -> Result<Child> {
    let (mut ready, writer) = std::io::pipe()?;
    let mut command = Command::new(program("dormd"));
    command
        .args(["--ready-fd", "3"])
        .env("DORM_HOME", folder)
        .env("DORM_IMAGES", images())
        .env("DORM_NETWORK", "none")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(folder.join("dormd.log"))?)
        .fd_mappings(vec![FdMapping { parent_fd: writer.into(), child_fd: 3 }])?;
    let child = command.spawn().context("can't start dormd")?;
    // The command holds the pipe until it is dropped.
    drop(command);
    let mut word = [0; 6];
    std::io::Read::read_exact(&mut ready, &mut word).context("dormd did not start")?;
    Ok(child)
}

impl Stage {
    fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dorm").tempdir()?;
        let service = start_service(folder.path())?;
        Ok(Self { folder, service })
    }

    fn service(&self) -> Endpoint {
        Endpoint::new(self.folder.path().join("run/dormd.sock"))
    }

    async fn create(&self, idle_seconds: u64) -> Result<SessionInfo> {
        let mut wish = CreateSession::named("default".parse()?);
        wish.idle_timeout = IdleTimeout::Seconds(idle_seconds);
        Ok(self.service().call(http::Method::POST, "/v1/sessions", &wish).await?)
    }

    fn docker(&self, session: &SessionInfo, arguments: &[&str]) -> Command {
        let mut command = Command::new(project().join("build/clients/docker"));
        command
            .args(arguments)
            .env("DOCKER_HOST", format!("unix://{}", session.docker_socket.display()))
            .env("DOCKER_CONFIG", self.folder.path().join("docker-config"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, session: &SessionInfo, arguments: &[&str]) -> Result<Output> {
        Ok(self.docker(session, arguments).output()?)
    }

    /// Runs docker, and fails unless it succeeds.
    fn succeed(&self, session: &SessionInfo, arguments: &[&str]) -> Result<String> {
        let output = self.run(session, arguments)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "docker {arguments:?} ended with {}: {errors}\n{}",
            output.status,
            self.logs(session)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    fn logs(&self, session: &SessionInfo) -> String {
        let host = self.folder.path().join("run").join(session.id.as_str()).join("host.log");
        std::fs::read_to_string(host).unwrap_or_default()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = kill_process(pid(self.service.id()), Signal::TERM);
        let _ = self.service.wait();
    }
}

fn pid(raw: u32) -> Pid {
    Pid::from_raw(raw.cast_signed()).expect("a process id is no 0")
}

async fn inspect(session: &SessionInfo) -> Result<SessionInfo> {
    Ok(Endpoint::new(&session.control_socket).get("/v1/session").await?)
}

async fn becomes(session: &SessionInfo, state: &str) -> Result<SessionInfo> {
    let control = Endpoint::new(&session.control_socket);
    let path = format!("/v1/session/wait?for={state}");
    let waiting = control.get(&path);
    Ok(tokio::time::timeout(Duration::from_secs(120), waiting).await.context("it took too long")??)
}

/// Waits for a hold. The engine's word about a container comes a moment after its client's.
async fn held_by(session: &SessionInfo, kind: HoldKind) -> Result<SessionInfo> {
    let mut changes = Endpoint::new(&session.control_socket).lines("/v1/session/watch").await?;
    let held = async {
        while let Some(info) = changes.next::<SessionInfo>().await? {
            if info.holds.iter().any(|hold| hold.kind == kind) {
                return Ok(info);
            }
        }
        anyhow::bail!("the host went")
    };
    tokio::time::timeout(Duration::from_secs(60), held).await.context("nothing of that kind held the VM")?
}

fn qemu_of(stage: &Stage, session: &SessionInfo) -> Result<Pid> {
    let runtime = stage.folder.path().join("run").join(session.id.as_str());
    let record = dormouse_vm::VmRecord::read(&runtime)?.context("there is no VM")?;
    Ok(pid(record.process.context("the VM has no process")?.pid))
}

/// The session's host: the process that was started with this session's runtime directory.
fn host_of(session: &SessionInfo) -> Result<Pid> {
    for entry in std::fs::read_dir("/proc")? {
        let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let line = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains("dorm-session") && line.contains(session.id.as_str()) {
            return Ok(pid(number));
        }
    }
    anyhow::bail!("the session has no host")
}

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
    let mut clients = Vec::new();
    for _ in 0..KNOCKS {
        clients.push(
            stage
                .docker(session, &["ps", "--quiet"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?,
        );
    }
    for client in clients {
        let output = client.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            stage.logs(session)
        );
    }
    let info = inspect(session).await?;
    ensure!(info.vm.start_count == 1 && info.vm.generation == 1, "{:?}", info.vm);
    Ok(())
}

async fn containers_work(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let image = project().join("build/busybox.tar");
    stage.succeed(session, &["load", "--input", image.to_str().context("paths are UTF-8")?])?;
    let output =
        stage.run(session, &["run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7"])?;
    ensure!(output.status.code() == Some(7), "{output:?}");
    ensure!(output.stdout == b"out\n" && output.stderr == b"err\n", "{output:?}");
    stage.succeed(
        session,
        &[
            "run",
            "--name",
            "first",
            "-v",
            "things:/things",
            "busybox",
            "sh",
            "-c",
            "echo kept > /things/file",
        ],
    )?;
    Ok(())
}

async fn it_sleeps_and_wakes_with_everything_in_place(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let asleep = becomes(session, "absent").await?;
    ensure!(
        asleep.state == dormouse_api::SessionState::Running && asleep.termination.is_none(),
        "{asleep:?}"
    );
    ensure!(stage.succeed(session, &["ps", "--all", "--format", "{{.Names}}"])? == "first\n");
    let file =
        stage.succeed(session, &["run", "--rm", "-v", "things:/things", "busybox", "cat", "/things/file"])?;
    ensure!(file == "kept\n", "{file}");
    let info = inspect(session).await?;
    ensure!(info.vm.start_count == 2 && info.incarnation == 1, "{info:?}");
    Ok(())
}

async fn a_running_container_survives_the_service_and_the_host(
    stage: &mut Stage,
    session: &SessionInfo,
) -> Result<()> {
    stage.succeed(session, &["run", "--detach", "--name", "long", "busybox", "sleep", "100000"])?;
    let before = held_by(session, HoldKind::Container).await?;
    let host = host_of(session)?;
    stage.service.kill()?;
    stage.service.wait()?;
    kill_process(host, Signal::KILL)?;
    stage.service = start_service(stage.folder.path())?;
    let running = stage.succeed(session, &["ps", "--format", "{{.Names}}"])?;
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
    let mut follower =
        stage.docker(session, &["wait", "long"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    held_by(session, HoldKind::Request).await?;
    kill_process(qemu_of(stage, session)?, Signal::KILL)?;
    let crashed = becomes(session, "terminated").await?;
    let end = crashed.termination.context("there is no reason")?;
    ensure!(end.reason == TerminationReason::Crashed || end.reason == TerminationReason::Unknown, "{end:?}");
    let ended = tokio::task::spawn_blocking(move || follower.wait());
    tokio::time::timeout(Duration::from_secs(10), ended)
        .await
        .context("work in flight outlives the VM")???;
    let names = stage.succeed(session, &["ps", "--all", "--format", "{{.Names}}"])?;
    ensure!(names.contains("first") && names.contains("long"), "{names}");
    let info = inspect(session).await?;
    ensure!(info.incarnation == crashed.incarnation + 1, "{info:?}");
    Ok(())
}
