//! A home of its own with the real service in it, and the real docker client before it.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use command_fds::{CommandFdExt, FdMapping};
use dormouse_api::{
    CreateSession, CreateTemplate, HoldKind, IdleAction, IdleTimeout, Phase, SessionInfo, SleepAnswer,
    TemplateInfo,
};
use dormouse_client::{ClientError, Endpoint};
use dormouse_vm::VmRecord;
use rustix::process::{Pid, Signal, kill_process};

use crate::{images, project, templates};

/// Longest wait for a state of a session. It is for hangs: a loaded machine takes a multiple of what a quiet one does.
pub const STATE_WITHIN: Duration = Duration::from_secs(300);

/// Longest wait for a service that was asked to end: it gives its sessions 65 s.
const END_WITHIN: Duration = Duration::from_secs(120);

/// Longest wait for a client of docker.
const CLIENT_WITHIN: Duration = Duration::from_secs(400);

/// A home with a service. Whatever runs in it ends with it.
#[derive(Debug)]
pub struct Stage {
    folder: tempfile::TempDir,
    variables: Vec<(&'static str, OsString)>,
    user: Option<u32>,
    service: Child,
}

/// A program of ours, built beside the running test.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap_or_default();
    test.parent().and_then(|deps| deps.parent()).map_or_else(|| name.into(), |folder| folder.join(name))
}

fn start_service(folder: &Path, variables: &[(&'static str, OsString)], user: Option<u32>) -> Result<Child> {
    let (mut ready, writer) = std::io::pipe()?;
    let log = File::options().create(true).append(true).open(folder.join("dormd.log"))?;
    let mut command = Command::new(program("dormd"));
    command
        .args(["--ready-fd", "3"])
        .env("DORM_HOME", folder)
        .env("DORM_IMAGES", images())
        .env("DORM_TEMPLATES", templates())
        .env("DORM_NETWORK", "none")
        .env("DORM_VIRTIOFSD", project().join("build/virtiofsd/bin/virtiofsd"))
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .fd_mappings(vec![FdMapping { parent_fd: writer.into(), child_fd: 3 }])?;
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let child = command.spawn().context("can't start dormd")?;
    // The command holds the pipe until it is dropped.
    drop(command);
    let mut word = [0; 6];
    ready.read_exact(&mut word).context("dormd did not start")?;
    Ok(child)
}

impl Stage {
    /// A home with a service, and guests without a network.
    ///
    /// # Errors
    /// When the service doesn't start.
    pub fn new() -> Result<Self> {
        Self::with(&[])
    }

    /// The same, with environment variables for the service.
    ///
    /// # Errors
    /// When the service doesn't start.
    pub fn with(variables: &[(&'static str, OsString)]) -> Result<Self> {
        Self::of(None, variables)
    }

    /// The same, as this user and group, whom root alone can be in place of.
    ///
    /// # Errors
    /// When the service doesn't start.
    pub fn of(user: Option<u32>, variables: &[(&'static str, OsString)]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dorm").tempdir()?;
        let variables = variables.to_vec();
        std::fs::create_dir(folder.path().join("docker-config"))?;
        let config = serde_json::json!({ "cliPluginsExtraDirs": [project().join("build/clients/plugins")] });
        std::fs::write(folder.path().join("docker-config/config.json"), config.to_string())?;
        chown(folder.path(), user, user)?;
        let service = start_service(folder.path(), &variables, user)?;
        Ok(Self { folder, variables, user, service })
    }

    /// The folder that all of it lies in (`DORM_HOME`).
    #[must_use]
    pub fn home(&self) -> &Path {
        self.folder.path()
    }

    /// The service's API.
    #[must_use]
    pub fn service(&self) -> Endpoint {
        Endpoint::new(self.home().join("run/dormd.sock"))
    }

    /// The service's process.
    #[must_use]
    pub fn service_pid(&self) -> Pid {
        pid(self.service.id())
    }

    /// Kills the service as a power cut would.
    ///
    /// # Errors
    /// When it can't be waited for.
    pub fn kill_service(&mut self) -> Result<()> {
        self.service.kill()?;
        self.service.wait()?;
        Ok(())
    }

    /// Asks the service to end, and waits until it has.
    ///
    /// # Errors
    /// When it does not end; then with what it waits for.
    pub fn stop_service(&mut self) -> Result<()> {
        kill_process(self.service_pid(), Signal::TERM)?;
        let asked = Instant::now();
        while self.service.try_wait()?.is_none() {
            if asked.elapsed() > END_WITHIN {
                bail!("the service does not end\n{}", self.waits());
            }
            std::thread::park_timeout(Duration::from_millis(2));
        }
        Ok(())
    }

    /// What this home's processes are waiting for, and what the service logged.
    fn waits(&self) -> String {
        let mut told = String::new();
        for pid in self.processes().unwrap_or_default() {
            let process = format!("/proc/{}", pid.as_raw_nonzero());
            let line = std::fs::read(format!("{process}/cmdline")).unwrap_or_default();
            let _ = writeln!(told, "{pid:?} {}", String::from_utf8_lossy(&line).replace('\0', " "));
            for thread in std::fs::read_dir(format!("{process}/task")).into_iter().flatten().flatten() {
                let [name, waits, call] = ["comm", "wchan", "syscall"]
                    .map(|file| std::fs::read_to_string(thread.path().join(file)).unwrap_or_default());
                let _ = writeln!(told, "  {} {waits} {}", name.trim(), call.trim());
            }
        }
        told + &std::fs::read_to_string(self.home().join("dormd.log")).unwrap_or_default()
    }

    /// Starts another service after the last one ended.
    ///
    /// # Errors
    /// When it doesn't start.
    pub fn start_service(&mut self) -> Result<()> {
        self.service = start_service(self.home(), &self.variables, self.user)?;
        Ok(())
    }

    /// From now on no process of the service's may map more memory than this.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn limit_memory(&mut self, mib: u64) -> Result<()> {
        use rustix::process::{Resource, Rlimit, prlimit};
        let bytes = Some(mib << 20);
        prlimit(Some(self.service_pid()), Resource::As, Rlimit { current: bytes, maximum: bytes })?;
        Ok(())
    }

    /// Makes a session.
    ///
    /// # Errors
    /// The service's.
    pub async fn make(&self, wish: &CreateSession) -> Result<SessionInfo, ClientError> {
        let service = self.service();
        let made = service.call(http::Method::POST, "/v1/sessions", wish);
        let late = |_| ClientError::Answer(format!("there is none\n{}", self.waits()));
        tokio::time::timeout(STATE_WITHIN, made).await.map_err(late)?
    }

    /// Makes the session `default` with this grace period. Its first VM is copied from a template, which is made once for
    /// all tests.
    ///
    /// # Errors
    /// The service's.
    pub async fn create(&self, idle_seconds: u64) -> Result<SessionInfo> {
        let mut wish = CreateSession::named("default".parse()?);
        wish.idle_timeout = IdleTimeout::Seconds(idle_seconds);
        self.template().await?;
        Ok(self.make(&wish).await?)
    }

    /// Makes the template that all tests share, unless it is there.
    ///
    /// # Errors
    /// The service's.
    pub async fn template(&self) -> Result<TemplateInfo> {
        let size = CreateTemplate::default();
        Ok(self.service().call(http::Method::POST, "/v1/templates", &size).await?)
    }

    /// Removes a session.
    ///
    /// # Errors
    /// The service's.
    pub async fn remove(&self, name: &str) -> Result<(), ClientError> {
        self.service().call(http::Method::DELETE, &format!("/v1/sessions/{name}"), &()).await
    }

    /// The docker client on a session's socket.
    #[must_use]
    pub fn docker(&self, session: &SessionInfo, arguments: &[&str]) -> Command {
        let mut command = Command::new(project().join("build/clients/docker"));
        command
            .args(arguments)
            .env("DOCKER_HOST", format!("unix://{}", session.docker_socket.display()))
            .env("DOCKER_CONFIG", self.home().join("docker-config"))
            .stdin(Stdio::null());
        command
    }

    /// Runs docker to its end, whatever that is.
    ///
    /// # Errors
    /// When it can't be run, or hangs.
    pub async fn run(&self, session: &SessionInfo, arguments: &[&str]) -> Result<Output> {
        self.finish(session, self.docker(session, arguments)).await
    }

    /// Runs a command to its end, whatever that is. One that hangs is killed.
    ///
    /// # Errors
    /// When it can't be run, or hangs; with the logs.
    pub async fn finish(&self, session: &SessionInfo, command: Command) -> Result<Output> {
        let shown = format!("{command:?}");
        let mut command = tokio::process::Command::from(command);
        let output = tokio::time::timeout(CLIENT_WITHIN, command.kill_on_drop(true).output());
        match output.await {
            Ok(output) => Ok(output?),
            Err(_) => bail!("{shown} hangs\n{}", self.logs(session)),
        }
    }

    /// Runs docker, fails unless it succeeds, and gives what it printed.
    ///
    /// # Errors
    /// When it fails; with what it said, and the logs.
    pub async fn succeed(&self, session: &SessionInfo, arguments: &[&str]) -> Result<String> {
        self.succeeds(session, self.docker(session, arguments)).await
    }

    /// Runs a command, fails unless it succeeds, and gives what it printed.
    ///
    /// # Errors
    /// When it fails; with what it said, and the logs.
    pub async fn succeeds(&self, session: &SessionInfo, command: Command) -> Result<String> {
        let shown = format!("{command:?}");
        let output = self.finish(session, command).await?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{shown} ended with {}: {errors}\n{}",
            output.status,
            self.logs(session)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Brings the test's image into a session's engine.
    ///
    /// # Errors
    /// When that fails.
    pub async fn load_busybox(&self, session: &SessionInfo) -> Result<()> {
        let image = project().join("build/busybox.tar");
        self.succeed(session, &["load", "--input", image.to_str().context("paths are UTF-8")?]).await?;
        Ok(())
    }

    /// What the service, the session's host and its guest logged. A VM that is about to be given up is waited for, so that
    /// why it was stands there too.
    #[must_use]
    pub fn logs(&self, session: &SessionInfo) -> String {
        let name = session.name.to_string();
        self.told(&["session", "wait", &name, "--for", "terminated"]);
        let logs = [self.home().join("dormd.log"), runtime(self, session).join("host.log")];
        let [service, host] = logs.map(|log| std::fs::read_to_string(log).unwrap_or_default());
        let console = self.told(&["session", "logs", &name, "--console"]);
        format!("{service}\n-- host --\n{host}\n-- console --\n{console}")
    }

    /// What `dorm` has to say within a few seconds.
    fn told(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", "5"])
            .arg(program("dorm"))
            .args(arguments)
            .env("DORM_HOME", self.home());
        let output = command.stdin(Stdio::null()).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    }

    /// Processes of this home: those whose command line or environment names it, without this one.
    ///
    /// # Errors
    /// When `/proc` can't be read.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        let ours = self.home().to_string_lossy().into_owned();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")? {
            let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let names_us = |file: &str| {
                let text = std::fs::read(format!("/proc/{number}/{file}")).unwrap_or_default();
                String::from_utf8_lossy(&text).contains(&ours)
            };
            if number != std::process::id() && (names_us("cmdline") || names_us("environ")) {
                found.push(pid(number));
            }
        }
        Ok(found)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let ended = match self.service.try_wait() {
            Ok(None) => self.stop_service(),
            _ => Ok(()),
        };
        // What a test left behind, by having killed who would have ended it.
        for left in self.processes().unwrap_or_default() {
            let _ = kill_process(left, Signal::KILL);
        }
        if let Err(error) = ended
            && !std::thread::panicking()
        {
            panic!("{error:#}");
        }
    }
}

/// A process id.
///
/// # Panics
/// On 0, which is none.
#[must_use]
pub fn pid(raw: u32) -> Pid {
    Pid::from_raw(raw.cast_signed()).expect("a process id is no 0")
}

/// Where a session's sockets lie.
#[must_use]
pub fn runtime(stage: &Stage, session: &SessionInfo) -> PathBuf {
    stage.home().join("run").join(session.id.as_str())
}

/// The session, from its host.
///
/// # Errors
/// When that doesn't answer.
pub async fn inspect(session: &SessionInfo) -> Result<SessionInfo> {
    Ok(Endpoint::new(&session.control_socket).get("/v1/session").await?)
}

/// Waits until a session is `terminated`, `absent` or `running`.
///
/// # Errors
/// When it doesn't become that.
pub async fn becomes(session: &SessionInfo, state: &str) -> Result<SessionInfo> {
    let control = Endpoint::new(&session.control_socket);
    let path = format!("/v1/session/wait?for={state}");
    let waiting = control.get(&path);
    let became = tokio::time::timeout(STATE_WITHIN, waiting).await;
    Ok(became.with_context(|| format!("the session doesn't become {state}"))??)
}

/// Puts a session's VM to sleep as soon as nothing holds it.
///
/// # Errors
/// When it does not fall asleep.
pub async fn fall_asleep(session: &SessionInfo) -> Result<()> {
    // By name where there are two ways: so nothing depends on how quiet the containers are.
    let order = match session.idle.action {
        IdleAction::Suspend => "/v1/session/sleep?how=suspend",
        IdleAction::Stop => "/v1/session/sleep",
    };
    let asleep = async {
        loop {
            let control = Endpoint::new(&session.control_socket);
            match control.post::<SleepAnswer>(order).await? {
                SleepAnswer::NoVm | SleepAnswer::Asleep { .. } => break,
                // What the last client held ends a moment after that client.
                SleepAnswer::Busy { .. } => tokio::time::sleep(Duration::from_millis(100)).await,
                other => bail!("{other:?}"),
            }
        }
        let info = inspect(session).await?;
        ensure!(info.vm.phase == Phase::Absent, "{info:?}");
        Ok(())
    };
    tokio::time::timeout(STATE_WITHIN, asleep).await.context("the VM doesn't fall asleep")?
}

/// Waits until the session is as wanted.
///
/// # Errors
/// When it never is.
pub async fn until(session: &SessionInfo, wanted: impl Fn(&SessionInfo) -> bool) -> Result<SessionInfo> {
    let mut changes = Endpoint::new(&session.control_socket).lines("/v1/session/watch").await?;
    let mut last = None;
    let found = async {
        while let Some(info) = changes.next::<SessionInfo>().await? {
            if wanted(&info) {
                return Ok(info);
            }
            last = Some(info);
        }
        bail!("the host went")
    };
    match tokio::time::timeout(STATE_WITHIN, found).await {
        Ok(found) => found,
        Err(_) => bail!("the session never became what was waited for: {last:#?}"),
    }
}

/// Waits for a hold. The engine's word about a container comes a moment after its client's.
///
/// # Errors
/// When nothing of that kind comes to hold the VM.
pub async fn held_by(session: &SessionInfo, kind: HoldKind) -> Result<SessionInfo> {
    until(session, |info| info.holds.iter().any(|hold| hold.kind == kind)).await
}

/// The session's QEMU.
///
/// # Errors
/// When there is none.
pub fn qemu_of(stage: &Stage, session: &SessionInfo) -> Result<Pid> {
    let record = VmRecord::read(&runtime(stage, session))?.context("there is no VM")?;
    Ok(pid(record.process.context("the VM has no process")?.pid))
}

/// The session's host: the process that was started with this session's runtime directory.
///
/// # Errors
/// When there is none.
pub fn host_of(session: &SessionInfo) -> Result<Pid> {
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
    bail!("the session has no host")
}
