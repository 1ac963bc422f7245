//! Folders of the host in containers: the real docker client, compose and dorm, a real virtiofsd, over sleeps and deaths.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::{HoldKind, How, Phase};
use dormouse_vm_tests::desk::{Desk, text};
use dormouse_vm_tests::registry::give_host_an_address;
use dormouse_vm_tests::stage::{STATE_WITHIN, fall_asleep, host_of, inspect, program, until};
use dormouse_vm_tests::{figure, in_network_namespace};
use rustix::process::{Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};

const COMPOSE: &str = "
services:
  web:
    image: busybox
    command: sh -c 'cat /src/host > /out/seen; test ! -w /src/host'
    volumes: ['./src:/src:ro', './made:/out']
";

/// What a file of the host's says that isn't shared.
const SECRET: &str = "a secret of the host's";

/// What root of a VM tries that has the folder `/src` of the host's home `$H`, in which the links `out`, `up`, `parent` and
/// `proc` lead out of it and `socket` is one. Who reads the secret, prints it; who does what can't be seen on the host, says
/// so. docs/SECURITY.md lists them.
const ATTEMPTS: &[(&str, &str)] = &[
    ("reading through an absolute link", "cat out"),
    ("reading through a relative link", "cat up"),
    ("reading through a link by way of a process", "cat proc"),
    ("reading through a link that the container makes", "ln -s $H/secret made; cat made"),
    ("reading through a link to a folder around it", "ls parent; cat parent/secret"),
    ("reading above the share", "cat ../secret /src/../../secret /src/sub/../../secret $H/secret"),
    ("reading above it by very many steps", "cat $(yes ../ | head -n 500 | tr -d '\\n')$H/secret"),
    ("reading above it by an open folder", "exec 3< /src; cat /proc/self/fd/3/../secret /proc/self/fd/3/up"),
    ("writing through a link", "echo overwritten > out; echo overwritten > up; echo made > parent/written"),
    ("making something behind a link", "mkdir parent/folder; ln -s x parent/link; touch parent/file"),
    ("a hard link to a file outside", "ln ../secret hard; ln parent/secret hard; cat hard"),
    ("moving a file in", "mv parent/secret here; cat here"),
    ("moving a folder out", "mkdir moves; mv moves parent/moved; mv moves ../moved"),
    ("removing something outside", "rm parent/secret; rm -r parent/other"),
    ("making a block device", "mknod disk b 7 0 && head -c 1 disk && echo it is done"),
    ("making a character device", "mknod memory c 1 1 && head -c 1 memory && echo it is done"),
    ("connecting to a socket of the host", "echo | nc -w 1 local:/src/socket; nc -w 1 -U socket < /dev/null"),
    ("making a folder beside the shares", "nsenter -t 1 -m mkdir /mnt/beside && echo it is done"),
    ("making a link beside the shares", "nsenter -t 1 -m ln -s / /mnt/root && echo it is done"),
    ("renaming a share", "nsenter -t 1 -m sh -c 'mv /mnt/dormouse* /mnt/renamed' && echo it is done"),
    ("removing a share", "nsenter -t 1 -m sh -c 'rmdir /mnt/dormouse*' && echo it is done"),
    (
        "reading above the tree",
        "nsenter -t 1 -m sh -c \"cat /mnt/../$H/secret /mnt/*/../..$H/secret /mnt/*/*/*/secret\"",
    ),
    (
        "mounting the tree once more",
        "mkdir /t; mount -t virtiofs dormouse /t; cat /t/../secret /t/*/*/*/secret; ls /t/.. /t",
    ),
    (
        "mounting over the tree",
        "nsenter -t 1 -m sh -c \"mount --bind / /mnt && { echo x > /mnt$H/over; cat /mnt$H/secret; umount /mnt; }\"",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn folders_of_the_host_are_in_containers_as_if_they_were_there() -> Result<()> {
    let mut desk = Desk::new().await?;
    let outcome = async {
        reads_and_writes_go_both_ways(&desk).await?;
        nothing_else_is_reached(&desk).await?;
        dorm_and_compose_do_it_too(&desk).await?;
        others_volumes_and_mounts_of_older_clients_are_folders_as_well(&desk).await?;
        a_watcher_in_a_container_is_told_of_what_the_host_changes(&desk).await?;
        a_container_with_a_folder_holds_the_vm_and_finds_it_again_after_a_sleep(&desk).await?;
        the_death_of_virtiofsd_is_an_error_in_the_container_and_no_more(&desk).await?;
        who_restarts_by_itself_has_its_folder_after_a_boot(&mut desk).await
    }
    .await;
    outcome.with_context(|| desk.stage.logs(&desk.session))
}

/// With passt, QEMU, virtiofsd and the service as a user who is nobody else.
#[test]
fn a_user_without_root_has_folders_as_well() -> Result<()> {
    if in_network_namespace("a_user_without_root_has_folders_as_well")? {
        return Ok(());
    }
    give_host_an_address()?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let desk = Desk::of_an_ordinary_user("passt").await?;
        let outcome = an_ordinary_users_folders(&desk).await;
        outcome.with_context(|| desk.stage.logs(&desk.session))
    })
}

async fn an_ordinary_users_folders(desk: &Desk) -> Result<()> {
    let user = desk.user.unwrap_or(rustix::process::geteuid().as_raw());
    let script = "cat /src/host && echo inside > /src/inside && stat -c %u /src/host && id -u && sleep 3600";
    let bind = format!("{}:/src", desk.at("src"));
    let run = ["run", "-d", "--init", "--name", "keeps", "-v", &bind, "busybox", "sh", "-c", script];
    desk.succeed(&run).await?;
    for name in ["dormd", "dorm-session", "passt", "qemu-system-x86", "virtiofsd"] {
        let found = desk.processes(name)?;
        ensure!(!found.is_empty(), "no {name} runs");
        for pid in found {
            let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
            let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("it has ids")?;
            ensure!(ids.split_whitespace().all(|id| id == user.to_string()), "{name} runs as {ids}");
        }
    }
    let as_user = ["exec", "--user", &user.to_string(), "keeps", "sh", "-c", "echo more >> /src/inside"];
    desk.succeed(&as_user).await?;
    ensure!(desk.succeed(&["logs", "keeps"]).await? == format!("from the host\n{user}\n0\n"));
    let made = fs::metadata(desk.at("src/inside"))?;
    ensure!(made.uid() == user && fs::read_to_string(desk.at("src/inside"))? == "inside\nmore\n", "{made:?}");
    // What the user can't read, no container can.
    if desk.user.is_some() {
        fs::write(desk.at("src/roots"), "secret\n")?;
        fs::set_permissions(desk.at("src/roots"), fs::Permissions::from_mode(0o600))?;
        let output = desk.stage.run(&desk.session, &["exec", "keeps", "cat", "/src/roots"]).await?;
        ensure!(text(&output.stderr).contains("Permission denied") && output.stdout.is_empty(), "{output:?}");
    }
    desk.succeed(&["rm", "-f", "keeps"]).await?;
    desk.taken_back().await?;
    fall_asleep(&desk.session).await?;
    desk.prints(&[("src", "/src")], "cat /src/inside", "inside\nmore\n").await
}

async fn reads_and_writes_go_both_ways(desk: &Desk) -> Result<()> {
    let begun = Instant::now();
    let script = "cat /src/host; echo inside > /src/inside; mkdir /src/sub/new; ln -s host /src/link; \
                  ln /src/host /src/hard; stat -c '%u %a' /src/host; cat /other/file; cat /src/sub/x/file; cat /one";
    let folders = [("src", "/src"), ("other", "/other:ro"), ("other", "/src/sub/x"), ("src/host", "/one")];
    let uid = rustix::process::geteuid().as_raw();
    let mode = fs::metadata(desk.at("src/host"))?.permissions().mode() & 0o777;
    let expected = format!("from the host\n{uid} {mode:o}\nanother\nanother\nfrom the host\n");
    desk.prints(&folders, script, &expected).await?;
    figure("docker run --rm with four folders", begun.elapsed());
    ensure!(fs::read_to_string(desk.at("src/inside"))? == "inside\n");
    let made = fs::metadata(desk.at("src/inside"))?;
    ensure!(made.uid() == uid && made.gid() == rustix::process::getegid().as_raw(), "{made:?}");
    ensure!(fs::read_link(desk.at("src/link"))? == Path::new("host"));
    ensure!(
        fs::metadata(desk.at("src/hard"))?.nlink() == 2 && fs::metadata(desk.at("src/sub/new"))?.is_dir()
    );
    desk.taken_back().await?;

    // For reading means so, for the container and for root of the VM.
    let script = "echo x > /other/x; mount -o remount,rw /other; echo x > /other/file; echo over";
    let output = desk.run(&[("other", "/other:ro"), ("new/folder", "/new")], script).await?;
    let errors = text(&output.stderr);
    ensure!(text(&output.stdout) == "over\n" && errors.contains("Read-only file system"), "{errors}");
    ensure!(!Path::new(&desk.at("other/x")).exists() && fs::read(desk.at("other/file"))? == b"another\n");
    ensure!(Path::new(&desk.at("new/folder")).is_dir(), "a folder that is missing is made");

    let mount = format!("--mount=type=bind,source={},target=/m", desk.at("missing"));
    let output = desk.stage.run(&desk.session, &["run", "--rm", &mount, "busybox", "true"]).await?;
    let words = format!("bind source path does not exist: {}", desk.at("missing"));
    ensure!(output.status.code() == Some(125) && text(&output.stderr).contains(&words), "{output:?}");
    Ok(())
}

/// What a client may name is the policy's, and has its own tests. This is what a container does that has a folder.
async fn nothing_else_is_reached(desk: &Desk) -> Result<()> {
    let home = |path: &str| desk.home.path().join(path);
    fs::write(home("secret"), format!("{SECRET}\n"))?;
    symlink(home("secret"), home("src/out"))?;
    symlink("../secret", home("src/up"))?;
    symlink("..", home("src/parent"))?;
    symlink(Path::new("/proc/1/root").join(home("secret").strip_prefix("/")?), home("src/proc"))?;
    let listening = UnixListener::bind(home("src/socket"))?;
    listening.set_nonblocking(true)?;
    let runtime = desk.stage.home().join("run");
    for (path, why) in [
        ("/etc".into(), "outside of the folders"),
        (home("src/../../../etc/passwd"), "outside of the folders"),
        ("/proc/self/root".into(), "outside of the folders"),
        ("/mnt/dormouse-rw1/etc".into(), "outside of the folders"),
        (runtime, "outside of the folders"),
        (home("src/out"), "is a symbolic link"),
        (home("src/socket"), "it is a socket"),
    ] {
        let bind = format!("{}:/x", path.display());
        let output = desk.stage.run(&desk.session, &["create", "-v", &bind, "busybox"]).await?;
        let errors = text(&output.stderr);
        ensure!(!output.status.success() && errors.contains(why), "{}: {errors}", path.display());
    }
    let before = outside(desk)?;
    let attempts = ATTEMPTS.iter().map(|(what, script)| format!("echo '== {what}'; ({script}) 2>&1\n"));
    let attempts: String = attempts.collect();
    let (bind, at) = (format!("{}:/src", desk.at("src")), format!("H={}", desk.home.path().display()));
    // As root of the VM, with the whole tree in its hands.
    let run = ["run", "--rm", "--privileged", "--pid=host", "--env", &at, "-v", &bind, "--workdir", "/src"];
    let output =
        desk.stage.run(&desk.session, &[&run[..], &["busybox", "sh", "-c", &attempts]].concat()).await?;
    let said = text(&output.stdout);
    let outcomes: Vec<_> = said.split("== ").skip(1).collect();
    ensure!(outcomes.len() == ATTEMPTS.len(), "{said} {}", text(&output.stderr));
    for outcome in outcomes {
        ensure!(!outcome.contains(SECRET), "{outcome}");
        ensure!(!outcome.contains("it is done"), "{outcome}");
    }
    ensure!(listening.accept().is_err(), "a socket of the host was reached: {said}");
    ensure!(outside(desk)? == before, "something outside of the share was changed: {said}");
    for entry in fs::read_dir(desk.at("src"))? {
        let kind = entry?.file_type()?;
        ensure!(!kind.is_block_device() && !kind.is_char_device(), "a device was made: {said}");
    }
    println!("figure: attempts to leave a share as root of the VM, refused = {}", ATTEMPTS.len());
    fs::remove_file(home("src/socket"))?;
    desk.taken_back().await
}

/// The home without `src` and what is there for a while: paths, and what files contain.
fn outside(desk: &Desk) -> Result<BTreeMap<PathBuf, Option<Vec<u8>>>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![desk.home.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            if ["src", "tmp"].iter().any(|name| path == desk.home.path().join(name)) {
                continue;
            }
            if kind.is_dir() {
                folders.push(path.clone());
            }
            let content = if kind.is_file() { Some(fs::read(&path)?) } else { None };
            found.insert(path, content);
        }
    }
    Ok(found)
}

async fn dorm_and_compose_do_it_too(desk: &Desk) -> Result<()> {
    let mut dorm = Command::new(program("dorm"));
    dorm.args(["run", "--rm", "-v", "./src:/src", "busybox", "cat", "/src/inside"])
        .env("DORM_HOME", desk.stage.home())
        .current_dir(desk.home.path());
    let output = desk.stage.finish(&desk.session, dorm).await?;
    ensure!(text(&output.stdout) == "inside\n", "{output:?}");
    fs::write(desk.at("compose.yaml"), COMPOSE)?;
    for arguments in [&["up", "--quiet-pull"][..], &["down"]] {
        let mut compose = desk.stage.docker(&desk.session, &["compose", "--ansi", "never"]);
        compose.args(arguments).current_dir(desk.home.path());
        let output = desk.stage.finish(&desk.session, compose).await?;
        ensure!(output.status.success(), "{output:?}");
    }
    ensure!(fs::read_to_string(desk.at("made/seen"))? == "from the host\n");
    Ok(())
}

async fn others_volumes_and_mounts_of_older_clients_are_folders_as_well(desk: &Desk) -> Result<()> {
    // Who has the folder doesn't run.
    let bind = format!("{}:/src", desk.at("src"));
    desk.succeed(&["create", "--name", "store", "-v", &bind, "busybox"]).await?;
    let run = ["run", "--rm", "--volumes-from", "store", "busybox", "cat", "/src/host"];
    ensure!(desk.succeed(&run).await? == "from the host\n");
    desk.succeed(&["rm", "store"]).await?;

    // As Debian 12's docker asks for it.
    let mount = format!("type=bind,source={},target=/m,readonly", desk.at("src"));
    let run = ["run", "--rm", "--mount", &mount, "busybox", "sh", "-c", "cat /m/host; touch /m/touched"];
    let mut docker = desk.stage.docker(&desk.session, &run);
    docker.env("DOCKER_API_VERSION", "1.41");
    let output = desk.stage.finish(&desk.session, docker).await?;
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    ensure!(said == "from the host\n" && errors.contains("Read-only file system"), "{said} {errors}");
    desk.taken_back().await
}

/// What the watcher in a container prints.
struct Told(tokio::io::Lines<BufReader<tokio::process::ChildStdout>>);

impl Told {
    async fn next(&mut self) -> Result<String> {
        let line = tokio::time::timeout(STATE_WITHIN, self.0.next_line()).await;
        line.context("the watcher is told of nothing")??.context("the watcher has ended")
    }

    /// All up to this line.
    async fn until(&mut self, wanted: &str) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        while lines.last().is_none_or(|line| line != wanted) {
            lines.push(self.next().await?);
        }
        Ok(lines)
    }
}

async fn a_watcher_in_a_container_is_told_of_what_the_host_changes(desk: &Desk) -> Result<()> {
    desk.lend(env!("CARGO_BIN_EXE_follow"))?;
    let binds = [format!("{}:/src", desk.at("src")), format!("{}:/tools:ro", desk.at("tools"))];
    let mut run = desk.stage.docker(&desk.session, &["run", "--rm", "--name", "watches"]);
    run.args(["-v", &binds[0], "-v", &binds[1], "busybox", "/tools/loader", "--library-path", "/tools"]);
    run.args(["/tools/program", "/src/sub"]).stdout(Stdio::piped());
    let mut watcher = tokio::process::Command::from(run).kill_on_drop(true).spawn()?;
    let stdout = watcher.stdout.take().context("it is piped")?;
    let mut told = Told(BufReader::new(stdout).lines());
    told.until("watching").await?;

    let edit = |name: &str| fs::write(desk.home.path().join("src/sub").join(name), "by the host\n");
    edit("first")?;
    told.until("attribute first").await?;
    let mut took = Vec::new();
    let mut heard = Vec::new();
    for number in 0..7 {
        // What a container does, its watcher is told by its own kernel, and not again.
        desk.succeed(&["exec", "watches", "sh", "-c", "echo by itself > /src/sub/own"]).await?;
        let begun = Instant::now();
        edit(&format!("edited-{number}"))?;
        heard.extend(told.until(&format!("attribute edited-{number}")).await?);
        took.push(begun.elapsed());
        ensure!(heard.iter().any(|line| line == "other own"), "{number}: {heard:?}");
    }
    ensure!(!heard.iter().any(|line| line == "attribute own"), "{heard:?}");
    // One that came back as a change of the host's would never end.
    fs::remove_file(desk.at("src/sub/edited-0"))?;
    heard.extend(told.until("attribute ").await?);
    let edits = heard.iter().filter(|line| line.starts_with("attribute edited")).count();
    ensure!((7..=2 * 7).contains(&edits), "{edits} times: {heard:?}");
    took.sort_unstable();
    figure("from an edit on the host to a watcher in a container, median", took[took.len() / 2]);
    figure("from an edit on the host to a watcher in a container, longest", took[took.len() - 1]);
    desk.succeed(&["rm", "-f", "watches"]).await?;
    watcher.wait().await?;
    desk.taken_back().await
}

async fn a_container_with_a_folder_holds_the_vm_and_finds_it_again_after_a_sleep(desk: &Desk) -> Result<()> {
    let bind = format!("{}:/src", desk.at("src"));
    let script = "while :; do sleep 1; done";
    desk.succeed(&["run", "-d", "--name", "keeps", "--init", "-v", &bind, "busybox", "sh", "-c", script])
        .await?;
    let source = desk
        .succeed(&["inspect", "--format", "{{(index .Mounts 0).Source}} {{.HostConfig.Binds}}", "keeps"])
        .await?;
    ensure!(source == format!("{} [{bind}]\n", desk.at("src")), "{source}");
    until(&desk.session, |info| {
        let words = desk.at("src");
        info.holds.iter().any(|hold| hold.kind == HoldKind::Container && hold.reason.contains(&words))
    })
    .await?;
    // What the host does is seen at once, also by who has seen another state before.
    let exec = ["exec", "keeps", "sh", "-c", "cat /src/changing; ls /src/sub; stat -c %s /src/changing"];
    for (written, made) in [("one\n", "first"), ("longer than before\n", "second")] {
        fs::write(desk.at("src/changing.new"), written)?;
        fs::rename(desk.at("src/changing.new"), desk.at("src/changing"))?;
        fs::write(desk.home.path().join("src/sub").join(made), "")?;
        let seen = desk.succeed(&exec).await?;
        let mut lines = seen.lines();
        ensure!(lines.next() == Some(written.trim_end()), "{seen}");
        ensure!(lines.next_back() == Some(&written.len().to_string()), "{seen}");
        ensure!(lines.any(|line| line == made), "{seen}");
    }
    // The next host finds what the last one shared, and takes it back.
    kill_process(host_of(&desk.session)?, Signal::KILL)?;
    ensure!(desk.succeed(&["exec", "keeps", "cat", "/src/changing"]).await? == "longer than before\n");
    desk.succeed(&["stop", "-t", "2", "keeps"]).await?;
    desk.taken_back().await?;
    let mounted = desk.mounted().await?;
    ensure!(mounted.is_empty(), "{mounted}");
    fall_asleep(&desk.session).await?;
    let asleep = inspect(&desk.session).await?;
    ensure!(asleep.vm.phase == Phase::Absent && asleep.snapshot.is_some(), "it was suspended: {asleep:?}");
    let listed = desk.succeed(&["inspect", "--format", "{{.HostConfig.Binds}}", "keeps"]).await?;
    ensure!(listed == format!("[{bind}]\n"), "{listed}");
    fs::write(desk.at("src/changing"), "while it slept\n")?;
    desk.succeed(&["cp", "keeps:/src/changing", &desk.at("copied")]).await?;
    ensure!(fs::read_to_string(desk.at("copied"))? == "while it slept\n");
    desk.succeed(&["start", "keeps"]).await?;
    ensure!(desk.succeed(&["exec", "keeps", "cat", "/src/changing"]).await? == "while it slept\n");
    let mounted = desk.mounted().await?;
    ensure!(mounted.lines().count() == 1, "{mounted}");
    Ok(())
}

async fn the_death_of_virtiofsd_is_an_error_in_the_container_and_no_more(desk: &Desk) -> Result<()> {
    let virtiofsds = desk.virtiofsds()?;
    ensure!(!virtiofsds.is_empty());
    for pid in virtiofsds {
        // The second ends with the first.
        let _ = kill_process(pid, Signal::KILL);
    }
    let output = desk.stage.run(&desk.session, &["exec", "keeps", "cat", "/src/changing"]).await?;
    ensure!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    let before = inspect(&desk.session).await?;
    desk.succeed(&["restart", "-t", "2", "keeps"]).await?;
    ensure!(desk.succeed(&["exec", "keeps", "cat", "/src/changing"]).await? == "while it slept\n");
    let after = inspect(&desk.session).await?;
    ensure!(after.vm.generation == before.vm.generation, "the VM goes on");
    desk.succeed(&["rm", "-f", "keeps"]).await?;
    desk.taken_back().await?;
    let mounted = desk.mounted().await?;
    ensure!(mounted.is_empty(), "both are gone: {mounted}");
    Ok(())
}

async fn who_restarts_by_itself_has_its_folder_after_a_boot(desk: &mut Desk) -> Result<()> {
    let bind = format!("{}:/src", desk.at("src"));
    let script = "date > /src/started; while :; do sleep 1; done";
    let run = [
        "run",
        "-d",
        "--name",
        "again",
        "--init",
        "--restart",
        "always",
        "-v",
        &bind,
        "busybox",
        "sh",
        "-c",
        script,
    ];
    desk.succeed(&run).await?;
    // A service that has to go can't suspend such a VM: it stops it.
    desk.stage.stop_service()?;
    // Who shared with the VM sees its end, and follows.
    desk.taken_back().await?;
    fs::remove_file(desk.at("src/started"))?;
    desk.stage.start_service()?;
    let begun = Instant::now();
    desk.succeed(&["ps", "--quiet"]).await?;
    while !Path::new(&desk.at("src/started")).exists() {
        ensure!(begun.elapsed() < STATE_WITHIN, "it doesn't start again\n{}", desk.stage.logs(&desk.session));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let info = inspect(&desk.session).await?;
    ensure!(info.vm.how == Some(How::Cold), "{:?}", info.vm);
    Ok(())
}
