//! A registry with TLS and a password: who one is there is kept as docker's clients keep it, and told to the engine when it
//! matters. A registry that an authority of the host's has signed. `scripts/test-long registries`.
#![cfg(feature = "long")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use dormouse_api::{CreateSession, How, IdleTimeout, Registries, SessionInfo};
use dormouse_vm_tests::in_network_namespace;
use dormouse_vm_tests::registry::{PASSWORD, Registry, USER, give_host_an_address};
use dormouse_vm_tests::stage::{Stage, fall_asleep, inspect, program};

/// A credential helper that keeps what it is told in files of the folder `KEPT`, as `docker-credential-pass` keeps it in its.
const HELPER: &str = "#!/bin/sh
mkdir -p \"$KEPT\"
case $1 in
store) cat > \"$KEPT/entry\" ;;
get) read -r server; grep -q \"$server\" \"$KEPT/entry\" && cat \"$KEPT/entry\" ;;
erase) rm \"$KEPT/entry\" ;;
esac
";

#[tokio::test(flavor = "multi_thread")]
async fn a_private_registry_is_logged_in_to_pushed_to_pulled_and_built_from() -> Result<()> {
    if in_network_namespace("a_private_registry_is_logged_in_to_pushed_to_pulled_and_built_from")? {
        return Ok(());
    }
    give_host_an_address()?;
    let folder = tempfile::tempdir()?;
    let registry = Registry::start_private(folder.path())?;
    let stage = Stage::with(&[("DORM_NETWORK", "passt".into())])?;
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Never;
    // Nobody signed its certificate.
    wish.registries = Registries { insecure: vec![registry.name()], ..Registries::default() };
    let session = stage.make(&wish).await?;
    stage.load_busybox(&session).await?;
    let private = Private { stage: &stage, session: &session, server: registry.name() };
    private.strangers().await?;
    private.friends().await?;
    private.helpers().await
}

struct Private<'a> {
    stage: &'a Stage,
    session: &'a SessionInfo,
    server: String,
}

impl Private<'_> {
    fn config(&self) -> PathBuf {
        self.stage.home().join("docker-config/config.json")
    }

    fn image(&self) -> String {
        format!("{}/mine/one:1", self.server)
    }

    async fn dorm(&self, arguments: &[&str], input: &str) -> Result<Output> {
        let helpers = self.stage.home().join("helpers");
        let path = std::env::var("PATH").unwrap_or_default();
        let mut file = tempfile::tempfile()?;
        file.write_all(input.as_bytes())?;
        std::io::Seek::rewind(&mut file)?;
        let mut command = Command::new(program("dorm"));
        command
            .args(arguments)
            .env("DORM_HOME", self.stage.home())
            .env("DOCKER_CONFIG", self.stage.home().join("docker-config"))
            .env("KEPT", self.stage.home().join("kept"))
            .env("PATH", format!("{}:{path}", helpers.display()))
            .stdin(Stdio::from(file));
        self.stage.finish(self.session, command).await
    }

    async fn succeeds(&self, arguments: &[&str], input: &str) -> Result<String> {
        let output = self.dorm(arguments, input).await?;
        ensure!(output.status.success(), "{arguments:?}: {output:?}\n{}", self.stage.logs(self.session));
        Ok(String::from_utf8(output.stdout)?)
    }

    async fn fails(&self, arguments: &[&str], input: &str) -> Result<String> {
        let output = self.dorm(arguments, input).await?;
        ensure!(output.status.code() == Some(1), "{arguments:?}: {output:?}");
        Ok(String::from_utf8(output.stderr)?)
    }

    async fn login(&self, password: &str) -> Result<Output> {
        self.dorm(&["login", &self.server, "--username", USER, "--password-stdin"], password).await
    }

    /// Nobody is let in without the password, and a wrong one is not kept.
    async fn strangers(&self) -> Result<()> {
        self.succeeds(&["tag", "busybox", &self.image()], "").await?;
        let said = self.fails(&["push", &self.image()], "").await?;
        ensure!(said.contains("no basic auth credentials") || said.contains("denied"), "{said}");
        let wrong = self.login("wrong").await?;
        ensure!(wrong.status.code() == Some(1), "{wrong:?}");
        ensure!(!fs::read_to_string(self.config())?.contains(&self.server), "a wrong password is kept");
        let unasked = self.fails(&["login", &self.server], "").await?;
        ensure!(unasked.contains("--password-stdin"), "{unasked}");
        println!("test strangers_stay_out ... ok");
        Ok(())
    }

    async fn friends(&self) -> Result<()> {
        let output = self.login(PASSWORD).await?;
        ensure!(output.status.success() && output.stdout == b"Login Succeeded\n", "{output:?}");
        let mode = fs::metadata(self.config())?.permissions().mode() & 0o777;
        ensure!(mode == 0o600 && fs::read_to_string(self.config())?.contains(&self.server), "{mode:o}");
        self.round_trip().await?;
        // Docker's client knows what dorm was told.
        self.stage.succeed(self.session, &["pull", "--quiet", &self.image()]).await?;
        let said = self.succeeds(&["logout", &self.server], "").await?;
        ensure!(said.starts_with("Removing login credentials"), "{said}");
        self.succeeds(&["rmi", &self.image()], "").await?;
        self.fails(&["pull", &self.image()], "").await?;
        println!("test friends_are_let_in ... ok");
        Ok(())
    }

    /// Sends an image, gets it again, and builds from it what isn't here.
    async fn round_trip(&self) -> Result<()> {
        self.succeeds(&["tag", "busybox", &self.image()], "").await?;
        self.succeeds(&["push", &self.image()], "").await?;
        self.succeeds(&["rmi", &self.image()], "").await?;
        let said = self.succeeds(&["pull", &self.image()], "").await?;
        ensure!(said.ends_with(&format!("{}\n", self.image())), "{said}");
        self.succeeds(&["rmi", &self.image()], "").await?;
        let folder = self.stage.home().join("context");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("Dockerfile"), format!("FROM {}\nCMD [\"echo\", \"built\"]\n", self.image()))?;
        let context = folder.to_string_lossy();
        self.succeeds(&["build", "--pull", "--no-cache", "--tag", "built", &context], "").await?;
        ensure!(self.succeeds(&["run", "--rm", "built"], "").await? == "built\n");
        self.succeeds(&["rmi", "built"], "").await?;
        self.succeeds(&["pull", "--quiet", &self.image()], "").await?;
        Ok(())
    }

    /// Passwords that a helper keeps are in no file of docker's.
    async fn helpers(&self) -> Result<()> {
        let helpers = self.stage.home().join("helpers");
        fs::create_dir_all(&helpers)?;
        let helper = helpers.join("docker-credential-test");
        fs::write(&helper, HELPER)?;
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755))?;
        self.name_helper(&self.config())?;
        let output = self.login(PASSWORD).await?;
        ensure!(output.status.success(), "{output:?}");
        let kept = fs::read_to_string(self.stage.home().join("kept/entry"))?;
        ensure!(kept.contains(PASSWORD) && kept.contains(&self.server), "{kept}");
        ensure!(!fs::read_to_string(self.config())?.contains("\"auth\""), "the password is in docker's file");
        self.round_trip().await?;
        self.succeeds(&["logout", &self.server], "").await?;
        ensure!(!self.stage.home().join("kept/entry").exists(), "the helper still keeps it");
        self.fails(&["push", &self.image()], "").await?;
        println!("test helpers_keep_passwords ... ok");
        Ok(())
    }

    fn name_helper(&self, config: &Path) -> Result<()> {
        let mut values: serde_json::Value = serde_json::from_slice(&fs::read(config)?)?;
        let values_map = values.as_object_mut().context("an object")?;
        values_map.insert("credsStore".to_owned(), "test".into());
        Ok(fs::write(config, values.to_string())?)
    }
}

/// Where Debian's administrators put authorities.
const AUTHORITIES: &str = "/usr/local/share/ca-certificates";

/// Each session says by its name how it is to know the authority.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_is_trusted_whose_authority_only_the_host_knows() -> Result<()> {
    if in_network_namespace("a_registry_is_trusted_whose_authority_only_the_host_knows")? {
        return Ok(());
    }
    give_host_an_address()?;
    let folder = tempfile::tempdir()?;
    let registry = Registry::start_signed(folder.path())?;
    let stage = Stage::with(&[("DORM_NETWORK", "passt".into())])?;
    let trust = Trust { stage: &stage, image: format!("{}/library/busybox:latest", registry.name()) };
    // What this machine's administrator has added is out of sight, and nothing of the test's reaches it.
    let hidden = Command::new("mount").args(["-t", "tmpfs", "tmpfs", AUTHORITIES]).status()?;
    ensure!(hidden.success(), "{AUTHORITIES} can't be hidden: it comes with Debian's ca-certificates");

    let late = trust.session("late", &[]).await?;
    trust.fails(&late).await?;
    let known = Path::new(AUTHORITIES).join("company.crt");
    fs::copy(folder.path().join("authority.pem"), &known)?;
    // An engine that has looked at its authorities once never does so again.
    fall_asleep(&late).await?;
    trust.fails(&late).await?;
    println!("test a_suspended_engine_trusts_whom_it_trusted_before ... ok");
    trust.dorm(&late, &["session", "stop"]).await?;
    trust.succeeds(&late).await?;
    println!("test an_engine_trusts_the_hosts_authorities_from_its_next_boot ... ok");
    stage.remove("late").await?;

    stage.template().await?;
    let copied = trust.session("copied", &[]).await?;
    trust.succeeds(&copied).await?;
    let how = inspect(&copied).await?.vm.how;
    ensure!(how == Some(How::Clone), "it was to be a copy: {how:?}");
    fall_asleep(&copied).await?;
    let pulled = trust.dorm(&copied, &["pull", "--quiet", &trust.image]).await?;
    ensure!(pulled.status.success(), "{pulled:?}");
    stage.remove("copied").await?;
    println!("test a_copied_session_trusts_the_hosts_authorities_also_after_a_sleep ... ok");

    fs::remove_file(&known)?;
    let own = trust.session("own", &[folder.path(), Path::new("/nosuch")]).await?;
    trust.succeeds(&own).await?;
    let why = trust.dorm(&own, &["why"]).await?;
    ensure!(String::from_utf8_lossy(&why.stdout).contains("/nosuch: No such file"), "{why:?}");
    println!("test a_session_trusts_its_own_authorities ... ok");
    Ok(())
}

struct Trust<'a> {
    stage: &'a Stage,
    image: String,
}

impl Trust<'_> {
    async fn session(&self, name: &str, authorities: &[&Path]) -> Result<SessionInfo> {
        let mut wish = CreateSession::named(name.parse()?);
        wish.idle_timeout = IdleTimeout::Never;
        wish.registries.authorities = authorities.iter().map(|path| (*path).to_owned()).collect();
        Ok(self.stage.make(&wish).await?)
    }

    async fn dorm(&self, session: &SessionInfo, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(program("dorm"));
        command
            .args(["--session", session.name.as_str()])
            .args(arguments)
            .env("DORM_HOME", self.stage.home())
            .env("DOCKER_CONFIG", self.stage.home().join("docker-config"))
            .stdin(Stdio::null());
        self.stage.finish(session, command).await
    }

    async fn fails(&self, session: &SessionInfo) -> Result<()> {
        let output = self.dorm(session, &["pull", &self.image]).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && said.contains("unknown authority"), "{output:?}");
        ensure!(said.contains("hint: `dorm help registries`"), "{said}");
        Ok(())
    }

    /// What is pulled is sent, and built from, as well.
    async fn succeeds(&self, session: &SessionInfo) -> Result<()> {
        let server = self.image.split('/').next().context("a registry")?;
        let login =
            self.dorm(session, &["login", server, "--username", USER, "--password", PASSWORD]).await?;
        ensure!(login.status.success(), "{login:?}\n{}", self.stage.logs(session));
        let context = self.stage.home().join("context");
        fs::create_dir_all(&context)?;
        fs::write(context.join("Dockerfile"), format!("FROM {}\nLABEL a=b\n", self.image))?;
        let context = context.to_string_lossy();
        for line in [
            &["pull", "--quiet", &self.image][..],
            &["push", "--quiet", &self.image],
            &["build", "--quiet", "--pull", "--no-cache", &context],
        ] {
            let output = self.dorm(session, line).await?;
            ensure!(output.status.success(), "{line:?}: {output:?}\n{}", self.stage.logs(session));
        }
        Ok(())
    }
}
