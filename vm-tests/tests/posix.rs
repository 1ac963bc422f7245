//! What POSIX wants of a file system, of a shared folder and of the host's own beside it: pjdfstest and fsx, both as the same
//! ordinary user. `scripts/test-long posix`.
#![cfg(feature = "long")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use dormouse_vm_tests::desk::{Desk, text};
use dormouse_vm_tests::project;

/// pjdfstest's settings: all that Linux has. Its users are those of every Debian.
const PJDFSTEST: &str = "\
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.05
[dummy_auth]
entries = [['nobody', 'nogroup'], ['daemon', 'daemon']]
";

/// The same users, for a container that has none.
const USERS: &str = "root:x:0:0::/:/bin/sh\ndaemon:x:1:1::/:/bin/false\nnobody:x:65534:65534::/:/bin/false\n";
const GROUPS: &str = "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n";

/// fsx's settings: each operation that it knows on Linux.
const FSX: &str = "\
[weights]
close_open = 1
read = 10
write = 10
mapread = 10
mapwrite = 10
invalidate = 1
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 2
punch_hole = 2
sendfile = 2
posix_fadvise = 2
copy_file_range = 2
";

/// How many operations fsx does with each seed.
const OPERATIONS: &str = "10000";
const SEEDS: &[&str] = &["1", "20261126", "4294967295"];

/// What the host's own folder passes and a shared one doesn't, by the test's name, and why.
const EXCEPTIONS: &[(&str, &str)] = &[(
    "link::link_count_max",
    "it is skipped, because no limit of a FUSE file system is known to the C library",
)];

/// As root of a container some fail that pass by root of a host, each for one of these reasons: by their names' parts.
const AS_ROOT: &[(&str, &str)] = &[
    ("::block", "device nodes aren't made in shared folders"),
    ("::char", "device nodes aren't made in shared folders"),
    ("device_files", "device nodes aren't made in shared folders"),
    ("privileged", "device nodes aren't made in shared folders"),
    ("uid_gid_eq_euid_egid", "all files are the user's"),
    ("clear_isgid_bit", "all files are the user's, also one that another user of the container makes"),
];

/// Outcomes by the test's name: `ok`, `FAILED`, `skipped`.
type Outcomes = BTreeMap<String, String>;

fn outcomes(log: &str) -> Outcomes {
    let words = log.lines().filter(|line| !line.starts_with(char::is_whitespace)).map(str::split_whitespace);
    let pairs = words.filter_map(|mut words| Some((words.next()?, words.next()?, words.next())));
    let is_outcome = |word: &str| matches!(word, "ok" | "FAILED" | "skipped");
    pairs
        .filter(|(_, outcome, rest)| rest.is_none() && is_outcome(outcome))
        .map(|(name, outcome, _)| (name.to_owned(), outcome.to_owned()))
        .collect()
}

/// With the suite in `tools`, and a folder for each place in which it runs.
async fn desk() -> Result<Desk> {
    let desk = Desk::of_an_ordinary_user("none").await?;
    for folder in ["tools", "native", "shared"] {
        desk.make_folder(folder)?;
    }
    for program in ["pjdfstest", "fsx"] {
        let built = project().join("build/posix/bin").join(program);
        fs::copy(built, desk.at(&format!("tools/{program}"))).context("run scripts/install-posix-suite")?;
    }
    for (name, content) in
        [("pjdfstest.toml", PJDFSTEST), ("fsx.toml", FSX), ("passwd", USERS), ("group", GROUPS)]
    {
        fs::write(desk.at(&format!("tools/{name}")), content)?;
    }
    Ok(desk)
}

/// Runs a program of `tools` in the folder `native`, as the user.
async fn natively(desk: &Desk, program: &str, arguments: &[&str]) -> Result<std::process::Output> {
    let mut command = Command::new(desk.at(&format!("tools/{program}")));
    command.args(arguments).current_dir(desk.at("native"));
    if let Some(user) = desk.user {
        command.uid(user).gid(user);
    }
    let mut command = tokio::process::Command::from(command);
    Ok(command.kill_on_drop(true).output().await?)
}

/// Runs it in a container, in the folder `shared`, as this user.
async fn in_a_container(
    desk: &Desk,
    user: &str,
    program: &str,
    arguments: &[&str],
) -> Result<std::process::Output> {
    let volumes = [("shared", "/shared"), ("tools", "/tools:ro")].map(|(path, at)| (desk.at(path), at));
    let files =
        ["passwd", "group"].map(|name| (desk.at(&format!("tools/{name}")), format!("/etc/{name}:ro")));
    let volumes = volumes.map(|(path, at)| format!("-v{path}:{at}"));
    let files = files.map(|(path, at)| format!("-v{path}:{at}"));
    let mut docker =
        desk.stage.docker(&desk.session, &["run", "--rm", "--workdir", "/shared", "--user", user]);
    docker.args(volumes).args(files).args(["busybox", &format!("/tools/{program}")]).args(arguments);
    let mut docker = tokio::process::Command::from(docker);
    Ok(docker.kill_on_drop(true).output().await?)
}

fn owner(desk: &Desk) -> String {
    let user = desk.user.unwrap_or_else(|| rustix::process::geteuid().as_raw());
    format!("{user}:{user}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_folder_is_what_posix_wants_as_far_as_the_hosts_own_is() -> Result<()> {
    let desk = desk().await?;
    let (settings, folder) = (desk.at("tools/pjdfstest.toml"), desk.at("native"));
    let native = ["-c", &settings, "-s", "/dev/shm", "-p", &folder];
    let native = natively(&desk, "pjdfstest", &native).await?;
    // Where the length of its folder's path is a multiple of something, the suite can't count: this one is none.
    let arguments = ["-c", "/tools/pjdfstest.toml", "-s", "/dev/shm", "-p", "/shared"];
    let shared = in_a_container(&desk, &owner(&desk), "pjdfstest", &arguments).await?;
    let root = in_a_container(&desk, "0:0", "pjdfstest", &arguments).await?;
    let logs = [native, shared, root].map(|output| text(&output.stdout) + &text(&output.stderr));
    let state = project().join("target/long");
    for (name, log) in ["native", "shared", "root"].iter().zip(&logs) {
        fs::write(state.join(format!("pjdfstest-{name}.log")), log)?;
    }
    let [native, shared, root] = logs.each_ref().map(|log| outcomes(log));
    let passed = |outcomes: &Outcomes| -> BTreeSet<String> {
        outcomes.iter().filter(|(_, outcome)| *outcome == "ok").map(|(name, _)| name.clone()).collect()
    };
    let count = |outcomes: &Outcomes| {
        let skipped = outcomes.values().filter(|outcome| *outcome == "skipped").count();
        format!("{} of {}, {skipped} skipped", passed(outcomes).len(), outcomes.len() - skipped)
    };
    println!("figure: pjdfstest on the host's own folder = {}", count(&native));
    println!("figure: pjdfstest on a shared folder = {}", count(&shared));
    println!("figure: pjdfstest on a shared folder as root of the container = {}", count(&root));
    ensure!(passed(&native).len() > 100, "the suite doesn't run:\n{}", logs[0]);
    let mut unknown = Vec::new();
    for lost in passed(&native).difference(&passed(&shared)) {
        match EXCEPTIONS.iter().find(|(name, _)| lost == name) {
            Some((_, why)) => println!("{lost} fails: {why}"),
            None => unknown.push(lost.clone()),
        }
    }
    ensure!(unknown.is_empty(), "these pass on the host's own folder: {unknown:#?}\n{}", logs[1]);
    for (name, _) in root.iter().filter(|(_, outcome)| *outcome == "FAILED") {
        let why = AS_ROOT.iter().find(|(part, _)| name.contains(part));
        let (_, why) =
            why.with_context(|| format!("as root {name} fails, and why isn't known\n{}", logs[2]))?;
        println!("as root {name} fails: {why}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_to_a_shared_file_at_random_is_read_again() -> Result<()> {
    let desk = desk().await?;
    let settings = desk.at("tools/fsx.toml");
    for seed in SEEDS {
        let arguments = |settings| ["-N", OPERATIONS, "-S", seed, "-f", settings, "file"];
        let native = natively(&desk, "fsx", &arguments(&settings)).await?;
        ensure!(native.status.success(), "on the host's own folder: {native:?}");
        let shared = in_a_container(&desk, &owner(&desk), "fsx", &arguments("/tools/fsx.toml")).await?;
        if !shared.status.success() {
            bail!("seed {seed}: {}{}", text(&shared.stdout), text(&shared.stderr));
        }
        // The same operations leave the same file.
        ensure!(fs::read(desk.at("native/file"))? == fs::read(desk.at("shared/file"))?, "seed {seed}");
    }
    println!("figure: operations of fsx on a shared file, seeds = {OPERATIONS} x {}", SEEDS.len());
    Ok(())
}
