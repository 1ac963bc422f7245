//! A user's home beside the one of Dormouse, and a session whose containers have folders of it.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dormouse_api::{CreateSession, IdleTimeout, RunningContainers, SessionInfo};
use rustix::process::Pid;

use crate::stage::{STATE_WITHIN, Stage, program};

/// An ordinary user, whom no account is needed for.
pub const USER: u32 = 23_456;

/// A home with folders, and a session.
#[derive(Debug)]
pub struct Desk {
    /// Where the service is.
    pub stage: Stage,
    /// The session.
    pub session: SessionInfo,
    /// The user's home: `src` with `host` and `sub`, and `other` with `file`.
    pub home: tempfile::TempDir,
    /// Whose all of it is, by user and group; of whoever runs the test when absent.
    pub user: Option<u32>,
}

impl Desk {
    /// Of whoever runs the test. The first VM is copied from the template.
    ///
    /// # Errors
    /// When there is none.
    pub async fn new() -> Result<Self> {
        Self::of(None, "none").await
    }

    /// Of [`USER`], if the test is run by root; else of whoever runs it. The first VM is booted.
    ///
    /// # Errors
    /// When there is none.
    pub async fn of_an_ordinary_user(network: &str) -> Result<Self> {
        Self::of(rustix::process::geteuid().is_root().then_some(USER), network).await
    }

    async fn of(user: Option<u32>, network: &str) -> Result<Self> {
        let home = tempfile::Builder::new().prefix("home").tempdir()?;
        fs::create_dir_all(home.path().join("src/sub"))?;
        fs::create_dir_all(home.path().join("other"))?;
        fs::write(home.path().join("src/host"), "from the host\n")?;
        fs::write(home.path().join("other/file"), "another\n")?;
        for path in ["", "src", "src/sub", "src/host", "other", "other/file"] {
            chown(home.path().join(path), user, user)?;
        }
        let mut variables = vec![
            ("HOME", home.path().into()),
            ("TMPDIR", home.path().join("tmp").into()),
            ("DORM_NETWORK", network.into()),
        ];
        if user.is_some() {
            variables.push(("DORM_TEMPLATES", home.path().join("templates").into()));
        }
        let stage = Stage::of(user, &variables)?;
        let mut wish = CreateSession::named("default".parse()?);
        wish.idle_timeout = IdleTimeout::Seconds(3600);
        // So that it is the folders that hold.
        wish.running = RunningContainers::Suspend;
        if user.is_none() {
            stage.template().await?;
        }
        let session = stage.make(&wish).await?;
        stage.load_busybox(&session).await?;
        Ok(Self { stage, session, home, user })
    }

    /// A path of the home.
    #[must_use]
    pub fn at(&self, path: &str) -> String {
        self.home.path().join(path).to_string_lossy().into_owned()
    }

    /// Makes a folder of the user's.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn make_folder(&self, path: &str) -> Result<()> {
        fs::create_dir_all(self.at(path))?;
        Ok(chown(self.at(path), self.user, self.user)?)
    }

    /// Runs docker, and gives what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub async fn succeed(&self, arguments: &[&str]) -> Result<String> {
        self.stage.succeed(&self.session, arguments).await
    }

    /// `docker run --rm` with these folders, as `--volume` names them.
    ///
    /// # Errors
    /// When docker can't be run.
    pub async fn run(&self, folders: &[(&str, &str)], script: &str) -> Result<Output> {
        let folders: Vec<_> =
            folders.iter().map(|(path, target)| format!("-v{}:{target}", self.at(path))).collect();
        let mut arguments = vec!["run", "--rm"];
        arguments.extend(folders.iter().map(String::as_str));
        arguments.extend(["busybox", "sh", "-c", script]);
        self.stage.run(&self.session, &arguments).await
    }

    /// The same, which has to print this.
    ///
    /// # Errors
    /// When it doesn't.
    pub async fn prints(&self, folders: &[(&str, &str)], script: &str, expected: &str) -> Result<()> {
        let output = self.run(folders, script).await?;
        let (said, errors) = (text(&output.stdout), text(&output.stderr));
        ensure!(said == expected, "{script}: {said:?} {errors}\n{}", self.stage.logs(&self.session));
        Ok(())
    }

    /// Processes whose names begin so and that belong to the service.
    ///
    /// # Errors
    /// When they can't be listed.
    pub fn processes(&self, program: &str) -> Result<Vec<Pid>> {
        let ours = self.stage.processes()?.into_iter();
        let name = |pid: &Pid| fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
        Ok(ours.filter(|pid| name(pid).is_ok_and(|name| name.starts_with(program))).collect())
    }

    /// Processes of virtiofsd.
    ///
    /// # Errors
    /// When they can't be listed.
    pub fn virtiofsds(&self) -> Result<Vec<Pid>> {
        self.processes("virtiofsd")
    }

    /// What is mounted in the VM where folders are, and was never unmounted.
    ///
    /// # Errors
    /// When the guest doesn't tell.
    pub async fn mounted(&self) -> Result<String> {
        let script =
            "while read -r line; do case $line in *virtiofs*) echo $line;; esac; done < /proc/self/mountinfo";
        let mut dorm = Command::new(program("dorm"));
        dorm.args(["session", "run", "sh", "-c", script]).env("DORM_HOME", self.stage.home());
        let output = self.stage.finish(&self.session, dorm).await?;
        ensure!(output.status.success(), "{output:?}");
        Ok(text(&output.stdout))
    }

    /// Waits until no folder is shared.
    ///
    /// # Errors
    /// When one stays shared; with the logs.
    pub async fn taken_back(&self) -> Result<()> {
        let gone = async {
            while !self.virtiofsds()?.is_empty() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        };
        let gone = tokio::time::timeout(STATE_WITHIN, gone).await;
        gone.with_context(|| format!("folders stay shared\n{}", self.stage.logs(&self.session)))?
    }

    /// Puts a program, and what it and this process are linked with, where containers find it: `loader`, with `program`
    /// as its argument, in the folder `tools`.
    ///
    /// # Errors
    /// When it can't be copied.
    pub fn lend(&self, program: &str) -> Result<()> {
        self.make_folder("tools")?;
        let tools = self.home.path().join("tools");
        fs::copy(program, tools.join("program"))?;
        for line in fs::read_to_string("/proc/self/maps")?.lines() {
            let Some(at) = line.find('/') else { continue };
            let path = Path::new(&line[at..]);
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("ld-linux") {
                fs::copy(path, tools.join("loader"))?;
            } else if name.starts_with("libc.so") || name.starts_with("libgcc_s.so") {
                fs::copy(path, tools.join(&*name))?;
            }
        }
        Ok(())
    }
}

/// What a program printed.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
