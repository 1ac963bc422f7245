//! What only `dorm` has: what its options and settings come to in a VM, one by one. `scripts/test-long options`.
#![cfg(feature = "long")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use dormouse_api::{HoldKind, How, IdleAction, IdleTimeout, Phase, SessionInfo};
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, becomes, fall_asleep, inspect, program, until};
use dormouse_vm_tests::{fetch, project};

/// One home for all of it.
struct Desk {
    stage: Stage,
    /// Of the session that all of a test is about.
    session: SessionInfo,
}

impl Desk {
    /// With a session of these options.
    async fn new(options: &[&str]) -> Result<Self> {
        let stage = Stage::new()?;
        stage.template().await?;
        let line = [&["session", "create", "mine"], options].concat();
        let made = command(&stage, &line).output()?;
        ensure!(made.stdout == b"mine\n", "{made:?}");
        let session = stage.service().call(http::Method::GET, "/v1/sessions/mine", &()).await?;
        Ok(Self { stage, session })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        command(&self.stage, arguments)
    }

    /// Runs `dorm` to its end, whatever that is.
    async fn run(&self, arguments: &[&str]) -> Result<Output> {
        self.stage.finish(&self.session, self.command(arguments)).await
    }

    /// What `dorm` prints that ends well.
    async fn prints(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments).await?;
        ensure!(output.status.success(), "{arguments:?}: {output:?}\n{}", self.stage.logs(&self.session));
        Ok(String::from_utf8(output.stdout)?)
    }
}

fn command(stage: &Stage, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("dorm"));
    command.args(arguments).env("DORM_HOME", stage.home()).env("DORM_SESSION", "mine").stdin(Stdio::null());
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_session_is_made_with_is_so_in_its_vm() -> Result<()> {
    let desk = Desk::new(&[
        "--cpus=2",
        "--memory=768M",
        "--storage-size=5G",
        "--idle-timeout=never",
        "--idle-action=stop",
        "--crash=terminate",
        "--boot-timeout=600",
        "--asleep-answers=off",
        "--publish-address=127.0.0.9",
        "--registry-mirror=http://127.0.0.1:5001",
        "--insecure-registry=registry.lan:5000",
    ])
    .await?;
    let network = &desk.session.network;
    ensure!(network.publish_address.to_string() == "127.0.0.9", "{network:?}");
    ensure!(network.registries.insecure == ["registry.lan:5000"], "{network:?}");
    let seen =
        desk.prints(&["session", "run", "sh", "-c", "nproc; cat /sys/block/vdb/size /proc/meminfo"]).await?;
    let mut lines = seen.lines();
    ensure!(lines.next() == Some("2"), "processors: {seen}");
    ensure!(lines.next() == Some("10485760"), "5 GiB in sectors: {seen}");
    let total = lines.find_map(|line| line.strip_prefix("MemTotal:")).context("memory")?;
    let kib: u64 = total.trim().trim_end_matches(" kB").parse()?;
    ensure!((600 << 10..768 << 10).contains(&kib), "768 MiB without the kernel's own: {seen}");
    let registries = desk.prints(&["info", "--format", "{{json .RegistryConfig}}"]).await?;
    ensure!(
        registries.contains("http://127.0.0.1:5001/") && registries.contains("\"registry.lan:5000\""),
        "{registries}"
    );

    desk.stage.load_busybox(&desk.session).await?;
    let script = "echo served > /index.html; exec httpd -f -h /";
    desk.prints(&["run", "-d", "--name", "web", "-p", "18099:80", "busybox", "sh", "-c", script]).await?;
    ensure!(desk.prints(&["port", "web"]).await? == "80/tcp -> 127.0.0.9:18099\n");
    let page = tokio::task::spawn_blocking(|| fetch("127.0.0.9:18099")).await??;
    ensure!(page.ends_with("served\n"), "{page}");
    ensure!(TcpStream::connect("127.0.0.1:18099").is_err(), "more is open than was asked for");
    desk.prints(&["rm", "--force", "web"]).await?;

    // Shut down, and not suspended; a read is the engine's.
    fall_asleep(&desk.session).await?;
    let asleep = inspect(&desk.session).await?;
    ensure!(asleep.snapshot.is_none() && asleep.idle.action == IdleAction::Stop, "{asleep:?}");
    desk.prints(&["ps"]).await?;
    let awake = inspect(&desk.session).await?;
    ensure!(
        awake.vm.start_count == asleep.vm.start_count + 1 && awake.vm.how == Some(How::Cold),
        "{awake:?}"
    );

    // A crash is the session's end.
    let line = ["session", "run", "sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000"];
    ensure!(!desk.run(&line).await?.status.success(), "it outlived its kernel");
    desk.prints(&["session", "wait", "--for", "terminated"]).await?;
    let refused = desk.run(&["ps"]).await?;
    ensure!(
        !refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("session start"),
        "{refused:?}"
    );
    ensure!(desk.prints(&["session", "start"]).await? == "mine\n");
    desk.prints(&["ps"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_changed_of_a_session_is_so_at_once() -> Result<()> {
    let desk = Desk::new(&["--idle-timeout=never", "--running=suspend"]).await?;
    desk.stage.load_busybox(&desk.session).await?;
    // With a container that runs on: its memory is what it was.
    desk.prints(&["run", "-d", "--name", "on", "busybox", "sleep", "100000"]).await?;
    ensure!(desk.prints(&["ps", "--format", "{{.Names}}"]).await? == "on\n");
    fall_asleep(&desk.session).await?;
    let asleep = inspect(&desk.session).await?;
    ensure!(asleep.snapshot.is_some(), "{asleep:?}");
    desk.prints(&["ps"]).await?;
    ensure!(inspect(&desk.session).await?.vm.phase == Phase::Absent, "a read woke it");
    ensure!(desk.prints(&["session", "set", "--asleep-answers=off"]).await? == "mine\n");
    ensure!(desk.prints(&["ps", "--format", "{{.Names}}"]).await? == "on\n");
    let awake = inspect(&desk.session).await?;
    ensure!(awake.vm.how == Some(How::Resume) && awake.vm.boots == asleep.vm.boots, "{:?}", awake.vm);

    // Pinned, it stays; what was set meanwhile counts from the last use.
    desk.prints(&["rm", "--force", "on"]).await?;
    desk.prints(&["session", "pin", "--reason", "wait for me"]).await?;
    desk.prints(&["session", "set", "--idle-timeout=0", "--doze=600", "--crash=terminate"]).await?;
    let pinned = inspect(&desk.session).await?;
    ensure!(pinned.idle.timeout_seconds == IdleTimeout::Seconds(0) && pinned.idle.doze_seconds == 600);
    ensure!(pinned.vm.phase == Phase::Running, "{pinned:?}");
    ensure!(
        pinned.holds.iter().any(|hold| hold.kind == HoldKind::Pin && hold.reason.contains("wait for me"))
    );
    desk.prints(&["session", "unpin"]).await?;
    until(&desk.session, |info| info.vm.phase == Phase::Dozing).await?;
    desk.prints(&["session", "set", "--doze=0"]).await?;
    becomes(&desk.session, "absent").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_in_memory_goes_with_its_vm_and_a_temporary_session_with_its_command() -> Result<()> {
    let desk = Desk::new(&["--ephemeral", "--idle-timeout=0"]).await?;
    desk.stage.load_busybox(&desk.session).await?;
    desk.prints(&["run", "--rm", "-v", "things:/t", "busybox", "touch", "/t/file"]).await?;
    let refused = desk.run(&["session", "sleep", "--now"]).await?;
    ensure!(!refused.status.success(), "it slept: {refused:?}");
    ensure!(desk.prints(&["run", "--rm", "-v", "things:/t", "busybox", "ls", "/t"]).await? == "file\n");
    desk.prints(&["session", "terminate"]).await?;
    desk.prints(&["session", "start"]).await?;
    ensure!(desk.prints(&["volume", "ls", "--quiet"]).await?.is_empty(), "its disk outlived it");

    let mut temporary = desk.command(&["session", "create", "--temporary", "passing"]);
    let mut temporary = temporary.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut name = String::new();
    BufReader::new(temporary.stdout.take().context("it is piped")?).read_line(&mut name)?;
    ensure!(name == "passing\n", "{name:?}");
    ensure!(desk.prints(&["session", "ls", "--quiet"]).await?.contains("passing"));
    drop(temporary.stdin.take());
    temporary.wait()?;
    let wait = async {
        while desk.prints(&["session", "ls", "--quiet"]).await?.contains("passing") {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(dormouse_vm_tests::stage::STATE_WITHIN, wait).await.context("it stays")?
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_out_of_a_move_stays_and_the_socket_is_joined_with_pipes() -> Result<()> {
    let desk = Desk::new(&[]).await?;
    desk.stage.load_busybox(&desk.session).await?;
    desk.prints(&["run", "--rm", "-v", "things:/t", "busybox", "touch", "/t/file"]).await?;
    let images = desk.prints(&["images", "--verbose"]).await?;
    ensure!(images == desk.prints(&["images", "--digests", "--no-trunc"]).await?, "{images}");
    ensure!(images.contains("sha256:"), "{images}");

    // Another socket, as it would refuse to import from itself by name.
    let socket = desk.stage.home().join("other.sock");
    symlink(&desk.session.docker_socket, &socket)?;
    let socket = socket.display().to_string();
    for (option, comes, stays) in
        [("--no-images", "volume things", "Loaded"), ("--no-volumes", "Loaded", "volume things")]
    {
        let name = option.trim_start_matches("--");
        desk.prints(&["session", "create", name]).await?;
        if option == "--no-images" {
            // Without an image no volume can be written to.
            let image = dormouse_vm_tests::project().join("build/busybox.tar").display().to_string();
            desk.prints(&["--session", name, "load", "--quiet", "--input", &image]).await?;
        }
        let said = desk.prints(&["--session", name, "import-docker", "--from", &socket, option]).await?;
        ensure!(said.contains(comes) && !said.contains(stays), "{option}: {said}");
        desk.prints(&["session", "rm", "--force", name]).await?;
    }

    let mut dial = desk.command(&["dial-stdio"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = dial.stdin.take().context("it is piped")?;
    stdin.write_all(b"GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    dial.stdout.take().context("it is piped")?.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("OK"), "{answer}");
    ensure!(dial.wait()?.success());

    desk.prints(&["settings", "set", "session.memory", "768M"]).await?;
    ensure!(desk.prints(&["settings", "get", "session.memory"]).await? == "768M\n");
    desk.prints(&["settings", "reset"]).await?;
    ensure!(desk.prints(&["settings", "get", "session.memory"]).await?.is_empty());
    Ok(())
}

/// Its programs see their own tree as the root: `$1`; `$2` is what they may write to. Where nothing of the system's is theirs
/// they have to be told who they are.
const PODMAN: &str = r#"
mount --rbind "$1" "$1"
for folder in proc sys dev; do
    mkdir -p "$1/$folder"
    mount --rbind "/$folder" "$1/$folder"
done
mkdir -p "$1/etc/containers" "$1/var/tmp" "$1/x"
mount --bind "$2" "$1/x"
for folder in bin sbin lib lib64; do [ -e "$1/$folder" ] || ln -s "usr/$folder" "$1/$folder"; done
echo 'root:x:0:0::/x:/bin/sh' > "$1/etc/passwd"
echo 'root:x:0:' > "$1/etc/group"
echo '{ "default": [{ "type": "insecureAcceptAnything" }] }' > "$1/etc/containers/policy.json"
exec env -i HOME=/x PATH=/usr/bin:/usr/sbin chroot "$1" podman --storage-driver vfs --root /x/graph --runroot /x/run \
    system service --time 0 unix:///x/socket
"#;

/// Podman's service, as root of a user namespace: no container of it runs.
struct Podman {
    service: std::process::Child,
    socket: String,
}

impl Podman {
    fn start(desk: &Desk) -> Result<Self> {
        let folder = desk.stage.home().join("podman");
        std::fs::create_dir(&folder)?;
        let service = Command::new("unshare")
            .args(["--map-root-user", "--mount", "sh", "-euc", PODMAN, "sh"])
            .args([&project().join("build/podman/tree"), &folder])
            .stdin(Stdio::null())
            .spawn()?;
        Ok(Self { service, socket: folder.join("socket").display().to_string() })
    }

    /// Once it listens.
    async fn listens(&self) -> Result<()> {
        let listens = async {
            while std::os::unix::net::UnixStream::connect(&self.socket).is_err() {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(STATE_WITHIN, listens).await.context("podman doesn't listen")
    }

    /// What docker's client prints of it.
    fn prints(&self, arguments: &[&str]) -> Result<String> {
        let mut docker = Command::new(project().join("build/clients/docker"));
        docker.args(["--host", &format!("unix://{}", self.socket)]).args(arguments);
        let output = docker.stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "{arguments:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.service.kill();
        let _ = self.service.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_podman_has_is_taken_over_but_for_owners() -> Result<()> {
    let desk = Desk::new(&[]).await?;
    let podman = Podman::start(&desk)?;
    podman.listens().await?;
    let image = project().join("build/busybox.tar").display().to_string();
    podman.prints(&["load", "--input", &image])?;
    podman.prints(&["volume", "create", "kept"])?;
    podman.prints(&["create", "--name", "filler", "--network", "none", "--volume", "kept:/k", "busybox"])?;
    let folder = desk.stage.home().join("folder");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("file"), "words\n")?;
    podman.prints(&["cp", &format!("{}/.", folder.display()), "filler:/k"])?;
    podman.prints(&["rm", "filler"])?;

    let output = desk.run(&["import-docker", "--from", &podman.socket]).await?;
    let (said, warned) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success(), "{said}{warned}");
    ensure!(said.contains("Loaded image: localhost/busybox:latest\n"), "{said}");
    ensure!(said.contains("volume kept\n"), "{said}");
    ensure!(warned.contains("podman's socket doesn't tell whose a volume's files are"), "{warned}");
    let read = ["run", "--rm", "-v", "kept:/k", "localhost/busybox", "cat", "/k/file"];
    ensure!(desk.prints(&read).await? == "words\n");
    ensure!(podman.prints(&["ps", "--all", "--quiet"])?.is_empty(), "a container is left");
    ensure!(podman.prints(&["volume", "ls", "--quiet"])? == "kept\n", "a volume is left, or gone");
    Ok(())
}
