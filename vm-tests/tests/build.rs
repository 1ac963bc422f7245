//! `dorm build` by the BuildKit of a session's engine: what only it can, and what a build comes to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use dormouse_api::SessionInfo;
use dormouse_vm_tests::stage::{Stage, fall_asleep, program};
use expectrl::{Expect, Session as Terminal};

/// Its stage `never` would fail.
const STAGES: &str = "
FROM busybox AS first
ARG WORD=none
RUN echo from the first: $WORD > /message
FROM busybox AS never
RUN exit 1
FROM scratch AS files
COPY --from=first /message /folder/message
FROM busybox
COPY --from=first /message /message
CMD [\"cat\", \"/message\"]
";

const GIVEN: &str = "
FROM busybox
RUN --mount=type=secret,id=word --mount=type=ssh grep -q '^hush$' /run/secrets/word && test -S \"$SSH_AUTH_SOCK\"
";

const FAILS: &str = "
FROM busybox
RUN echo what it wrote; exit 3
";

#[tokio::test(flavor = "multi_thread")]
async fn a_build_has_its_stages_secrets_and_agents_and_comes_to_what_was_asked_for() -> Result<()> {
    let stage = Stage::new()?;
    let session = stage.create(600).await?;
    stage.load_busybox(&session).await?;
    let builds = Builds { stage: &stage, session: &session };
    builds.images().await?;
    builds.given().await?;
    builds.files().await?;
    // A build wakes the VM, as any command does.
    fall_asleep(&session).await?;
    builds.failures().await
}

struct Builds<'a> {
    stage: &'a Stage,
    session: &'a SessionInfo,
}

impl Builds<'_> {
    fn folder(&self, name: &str, file: &str) -> Result<PathBuf> {
        let folder = self.stage.home().join("contexts").join(name);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("Containerfile"), file)?;
        Ok(folder)
    }

    fn command(&self, folder: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(program("dorm"));
        command
            .arg("build")
            .args(options)
            .arg(folder)
            .env("DORM_HOME", self.stage.home())
            .env("DOCKER_CONFIG", self.stage.home().join("docker-config"))
            .env_remove("DORM_SESSION")
            .stdin(Stdio::null());
        command
    }

    async fn build(&self, name: &str, file: &str, options: &[&str]) -> Result<Output> {
        let folder = self.folder(name, file)?;
        self.stage.finish(self.session, self.command(&folder, options)).await
    }

    async fn succeeds(&self, name: &str, file: &str, options: &[&str]) -> Result<Output> {
        let output = self.build(name, file, options).await?;
        ensure!(output.status.success(), "{name}: {output:?}\n{}", self.stage.logs(self.session));
        Ok(output)
    }

    async fn images(&self) -> Result<()> {
        let id = self.stage.home().join("id");
        let id_path = id.to_string_lossy();
        let options = ["--tag", "stages", "--build-arg", "WORD=set", "--iidfile", &id_path];
        let output = self.succeeds("stages", STAGES, &options).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.stdout.is_empty() && said.contains("RUN echo from the first"), "{said}");
        ensure!(said.contains(" DONE ") && !said.contains("RUN exit 1"), "{said}");
        ensure!(
            self.stage.succeed(self.session, &["run", "--rm", "stages"]).await? == "from the first: set\n"
        );
        let known = self.stage.succeed(self.session, &["inspect", "--format", "{{.Id}}", "stages"]).await?;
        ensure!(fs::read_to_string(&id)? == known.trim(), "{known}");
        let again = self.succeeds("stages", STAGES, &["--quiet", "--build-arg", "WORD=set"]).await?;
        ensure!(String::from_utf8_lossy(&again.stdout) == known && again.stderr.is_empty(), "{again:?}");
        Ok(())
    }

    async fn given(&self) -> Result<()> {
        let word = self.stage.home().join("word");
        fs::write(&word, "hush\n")?;
        let agent = self.stage.home().join("agent");
        let _listens = std::os::unix::net::UnixListener::bind(&agent)?;
        let secret = format!("id=word,src={}", word.display());
        let ssh = format!("default={}", agent.display());
        self.succeeds("given", GIVEN, &["--secret", &secret, "--ssh", &ssh, "--tag", "given"]).await?;
        let without = self.build("given", GIVEN, &["--no-cache", "--progress", "plain"]).await?;
        ensure!(without.status.code() == Some(1), "{without:?}");
        Ok(())
    }

    async fn files(&self) -> Result<()> {
        let folder = self.stage.home().join("out");
        let to = folder.to_string_lossy();
        self.succeeds("stages", STAGES, &["--target", "files", "--output", &to]).await?;
        ensure!(fs::read_to_string(folder.join("folder/message"))? == "from the first: none\n");
        let archive = self.stage.home().join("out.tar");
        let dest = format!("type=tar,dest={}", archive.display());
        self.succeeds("stages", STAGES, &["--target", "files", "--output", &dest]).await?;
        let piped = self.succeeds("stages", STAGES, &["--target", "files", "--output", "-"]).await?;
        ensure!(!piped.stdout.is_empty() && piped.stdout.len() == fs::read(&archive)?.len());
        let listed = Command::new("tar").arg("-tf").arg(&archive).output()?;
        ensure!(String::from_utf8_lossy(&listed.stdout).contains("folder/message"), "{listed:?}");
        let saved = self.stage.home().join("saved.tar");
        let dest = format!("type=docker,dest={}", saved.display());
        self.succeeds("stages", STAGES, &["--tag", "stages", "--output", &dest]).await?;
        let listed = Command::new("tar").arg("-tf").arg(&saved).output()?;
        ensure!(String::from_utf8_lossy(&listed.stdout).contains("manifest.json"), "{listed:?}");
        self.succeeds("stages", STAGES, &["--output", "type=cacheonly"]).await?;
        Ok(())
    }

    async fn failures(&self) -> Result<()> {
        let failed = self.build("fails", FAILS, &["--progress", "plain", "--tag", "fails"]).await?;
        let said = String::from_utf8_lossy(&failed.stderr);
        ensure!(failed.status.code() == Some(1) && said.contains("what it wrote"), "{said}");
        ensure!(
            said.lines().any(|line| line.starts_with("error: ") && line.contains("exit code: 3")),
            "{said}"
        );
        // What the live view had no room for is told when it fails.
        let folder = self.folder("fails", FAILS)?;
        let mut sized = Command::new("sh");
        sized.args(["-c", "stty rows 30 cols 100; \"$0\" build --no-cache \"$1\""]);
        sized.arg(program("dorm")).arg(&folder).env("DORM_HOME", self.stage.home()).env("TERM", "xterm");
        let mut terminal = Terminal::spawn(sized)?;
        terminal.set_expect_timeout(Some(Duration::from_secs(300)));
        terminal.expect("building: ")?;
        terminal.expect("------")?;
        terminal.expect("what it wrote")?;
        terminal.expect("exit code: 3")?;
        terminal.expect(expectrl::Eof)?;
        let none = self.stage.home().join("none");
        fs::create_dir(&none)?;
        let output = self.stage.finish(self.session, self.command(&none, &[])).await?;
        ensure!(String::from_utf8_lossy(&output.stderr).contains("there is no Dockerfile in"), "{output:?}");
        Ok(())
    }
}
