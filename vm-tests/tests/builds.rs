//! What BuildKit asks of the relay: its session carries files, secrets and an agent's socket to the engine while the build runs.
//! `scripts/test-long builds`.
#![cfg(feature = "long")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::SessionInfo;
use dormouse_vm_tests::figure;
use dormouse_vm_tests::stage::{Stage, fall_asleep, host_of};

const STAGES: &str = "
FROM busybox AS first
RUN echo from the first > /message
FROM busybox AS never
RUN exit 1
FROM busybox
COPY --from=first /message /message
CMD [\"cat\", \"/message\"]
";

const SECRET: &str = "
FROM busybox
RUN --mount=type=secret,id=word grep -q '^not to be kept$' /run/secrets/word
CMD [\"sh\", \"-c\", \"test ! -e /run/secrets/word && echo not kept\"]
";

const SSH: &str = "
FROM busybox
RUN --mount=type=ssh test -S \"$SSH_AUTH_SOCK\"
";

const CACHE: &str = "
FROM busybox
ARG ROUND
RUN --mount=type=cache,target=/cache echo $ROUND >> /cache/lines && echo lines: $(wc -l < /cache/lines)
";

const LARGE: &str = "
FROM busybox
RUN --mount=type=bind,target=/context echo bytes: $(wc -c < /context/large) && md5sum /context/large
";

/// A context of so many bytes.
const LARGE_BYTES: usize = 500_000_000;

/// More memory than this a relay doesn't take for it, in KiB.
const GROWTH_KIB: u64 = 48 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn builds_have_their_stages_secrets_agents_caches_and_large_contexts() -> Result<()> {
    let stage = Stage::new()?;
    let session = stage.create(3600).await?;
    stage.load_busybox(&session).await?;
    let builds = Builds { stage: &stage, session: &session };

    builds.succeeds("stages", STAGES, &["--tag", "stages"]).await?;
    ensure!(stage.succeed(&session, &["run", "--rm", "stages"]).await? == "from the first\n");
    println!("test multi_stage ... ok");

    let word = stage.home().join("word");
    fs::write(&word, "not to be kept\n")?;
    // Asleep: the build's own connections wake the VM, one after the other.
    fall_asleep(&session).await?;
    builds
        .succeeds(
            "secret",
            SECRET,
            &["--tag", "secret", "--secret", &format!("id=word,src={}", word.display())],
        )
        .await?;
    ensure!(stage.succeed(&session, &["run", "--rm", "secret"]).await? == "not kept\n");
    println!("test secret ... ok");

    let key = stage.home().join("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status()?;
    ensure!(made.success(), "ssh-keygen ended with {made}");
    builds.succeeds("ssh", SSH, &["--ssh", &format!("default={}", key.display())]).await?;
    let without = builds.build("ssh", SSH, &["--no-cache"]).await?;
    ensure!(!without.status.success(), "there is an agent though none was given");
    println!("test ssh ... ok");

    for round in ["1", "2"] {
        let said = builds.succeeds("cache", CACHE, &["--build-arg", &format!("ROUND={round}")]).await?;
        ensure!(said.contains(&format!("lines: {round}")), "{said}");
        // A cache is on the disk.
        fall_asleep(&session).await?;
    }
    println!("test cache_mount ... ok");
    builds.large().await
}

struct Builds<'a> {
    stage: &'a Stage,
    session: &'a SessionInfo,
}

impl Builds<'_> {
    async fn build(&self, name: &str, file: &str, options: &[&str]) -> Result<Output> {
        let folder = self.stage.home().join("contexts").join(name);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("Dockerfile"), file)?;
        let mut command = self.stage.docker(self.session, &["build", "--progress", "plain"]);
        command.args(options).arg(&folder);
        self.stage.finish(self.session, command).await
    }

    async fn succeeds(&self, name: &str, file: &str, options: &[&str]) -> Result<String> {
        let output = self.build(name, file, options).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{name}: {said}\n{}", self.stage.logs(self.session));
        Ok(said)
    }

    async fn large(&self) -> Result<()> {
        let folder = self.stage.home().join("contexts/large");
        fs::create_dir_all(&folder)?;
        let sum = write_large(&folder.join("large"))?;
        let host = host_of(self.session)?.as_raw_nonzero().get();
        let before = resident_kib(host)?;
        let watching = Watching::start(host);
        let begun = Instant::now();
        let said = self.succeeds("large", LARGE, &[]).await?;
        let took = begun.elapsed();
        let most = watching.end();
        ensure!(said.contains(&format!("bytes: {LARGE_BYTES}")) && said.contains(&sum), "{said}");
        figure("a build with a context of 500 MB", took);
        println!("figure: the relay's memory before = {before} KiB");
        println!("figure: the relay's memory at most = {most} KiB");
        ensure!(most < before + GROWTH_KIB, "the relay grew from {before} to {most} KiB");
        println!("test context_of_500_mb ... ok");
        Ok(())
    }
}

/// A file that can't be made smaller, and its MD5.
fn write_large(path: &Path) -> Result<String> {
    let mut file = std::io::BufWriter::new(fs::File::create(path)?);
    let mut state = 1_u64;
    for _ in 0..LARGE_BYTES / 8 {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        file.write_all(&(state >> 16 ^ state << 11).to_le_bytes())?;
    }
    file.flush()?;
    let output = Command::new("md5sum").arg(path).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("no sum")?.to_owned())
}

/// What a process has in memory.
fn resident_kib(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Looks all the time at what a process has in memory.
struct Watching {
    most: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Watching {
    fn start(pid: i32) -> Self {
        let (most, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, ends) = (Arc::clone(&most), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                seen.fetch_max(resident_kib(pid).unwrap_or(0), Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_millis(50));
            }
        });
        Self { most, over, thread }
    }

    fn end(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        self.most.load(Ordering::Relaxed)
    }
}
