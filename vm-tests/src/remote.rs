//! Docker's client on another machine, which comes by `ssh`: Debian's server of OpenSSH runs here, with the user's own home.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::project;
use crate::stage::{Stage, program};

/// What the other machine calls this one.
const HOST: &str = "box";

/// What is called `docker` where the client comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Docker {
    /// Docker's own client.
    Own,
    /// `dorm`, by that name.
    Dorm,
}

/// Keys and settings of both sides. No process: each connection has a server of its own, which ends with it.
#[derive(Debug)]
pub struct Remote {
    folder: tempfile::TempDir,
}

/// Users of a machine that has a server of OpenSSH.
const USERS: &str = "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n";

/// The same, without passwords.
const PASSWORDS: &str = "root:*:20000:0:99999:7:::\nsshd:!:20000::::::\n";

impl Remote {
    /// A way to this stage's home.
    ///
    /// # Errors
    /// When `scripts/install-sshd` wasn't run, or keys can't be made.
    pub fn new(stage: &Stage, docker: Docker) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dorm-ssh").tempdir()?;
        let at = |name: &str| folder.path().join(name);
        for name in ["host", "user"] {
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(at(name)).stdin(Stdio::null());
            ensure!(command.status()?.success(), "ssh-keygen makes no key");
        }
        let server = project().join("build/sshd");
        ensure!(server.join("sshd").exists(), "there is no server: run scripts/install-sshd");
        for folder in ["here", "there"] {
            fs::create_dir(at(folder))?;
        }
        let is_docker = match docker {
            Docker::Own => project().join("build/clients/docker"),
            Docker::Dorm => program("dorm"),
        };
        symlink(is_docker, at("there/docker"))?;
        let [place, server, home] = [folder.path(), &server, stage.home()].map(Path::display);
        fs::write(at("passwd"), USERS)?;
        fs::write(at("shadow"), PASSWORDS)?;
        fs::write(
            at("sshd_config"),
            format!(
                "HostKey {place}/host\nAuthorizedKeysFile {place}/user.pub\nStrictModes no\nUsePAM no\n\
                 PermitRootLogin yes\nSshdSessionPath {server}/sshd-session\nSshdAuthPath {server}/sshd-auth\n\
                 SetEnv PATH={place}/there:/usr/bin:/bin DORM_HOME={home} DOCKER_CONFIG={home}/docker-config\n"
            ),
        )?;
        // With users and a folder of its own, as the system may have no server.
        let script = format!(
            "mount --bind {place}/passwd /etc/passwd && mount --bind {place}/shadow /etc/shadow && \
             mount -t tmpfs none /run && mkdir -m 755 /run/sshd && \
             exec {server}/sshd -i -e -f {place}/sshd_config 2>> {place}/log"
        );
        write_program(&at("serve"), &format!("exec unshare --mount sh -c '{script}'"))?;
        fs::write(
            at("ssh_config"),
            format!(
                "Host {HOST}\n  User root\n  IdentityFile {place}/user\n  IdentitiesOnly yes\n\
                 UserKnownHostsFile {place}/known\n  StrictHostKeyChecking accept-new\n  ProxyCommand {place}/serve\n"
            ),
        )?;
        write_program(&at("here/ssh"), &format!("exec /usr/bin/ssh -F {place}/ssh_config \"$@\""))?;
        symlink(project().join("build/clients/docker"), at("here/docker"))?;
        Ok(Self { folder })
    }

    /// Where the other machine has its `ssh` and its `docker`.
    #[must_use]
    pub fn programs(&self) -> std::path::PathBuf {
        self.folder.path().join("here")
    }

    /// Docker's client on the other machine.
    #[must_use]
    pub fn docker(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.programs().join("docker"));
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(arguments)
            .env("PATH", format!("{}:{path}", self.programs().display()))
            .env("DOCKER_HOST", format!("ssh://{HOST}"))
            .env("DOCKER_CONFIG", self.folder.path().join("docker-config"))
            .stdin(Stdio::null());
        command
    }

    /// What the servers logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

fn write_program(path: &Path, line: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{line}\n"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context("it can't be made a program")
}
