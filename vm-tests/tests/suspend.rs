//! Sessions that sleep by suspend: what runs in them goes on, and whoever dies on the way, nothing synced is lost.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use dormouse_api::{
    Checksum, CreateSession, HistoryEntry, How, IdleTimeout, MemoryForm, RunningContainers, SessionInfo,
    SnapshotInfo,
};
use dormouse_client::Endpoint;
use dormouse_vm_tests::database::Database;
use dormouse_vm_tests::fault::{Held, next_answer, until_there};
use dormouse_vm_tests::root_process::guest_output;
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, fall_asleep, host_of, inspect, program, qemu_of};
use rustix::process::{Signal, kill_process};

/// How far a guest's clock may be off after a wake.
const CLOCK_OFF_MAX: Duration = Duration::from_secs(1);

/// A program that writes numbered lines with their checksums, each synced before the next.
const WRITER: &str =
    "n=0; while :; do n=$((n+1)); echo $n $(echo $n | md5sum) >> /data/records; sync; sleep 0.05; done";

/// Fails unless the records are numbered without a gap, each with its checksum.
const READER: &str = "n=0; while read number sum _; do n=$((n+1)); [ $number = $n ] || exit 3; \
    [ \"$(echo $n | md5sum)\" = \"$sum  -\" ] || exit 4; done < /data/records; echo $n";

async fn quiet_session(stage: &Stage, name: &str) -> Result<SessionInfo> {
    let mut wish = CreateSession::named(name.parse()?);
    // Put to sleep by the test, never by itself.
    wish.idle_timeout = IdleTimeout::Seconds(3600);
    wish.running = RunningContainers::Suspend;
    stage.template().await?;
    Ok(stage.make(&wish).await?)
}

async fn history(session: &SessionInfo) -> Result<Vec<HistoryEntry>> {
    Ok(Endpoint::new(&session.control_socket).get("/v1/history").await?)
}

fn median(mut milliseconds: Vec<u64>) -> u64 {
    milliseconds.sort_unstable();
    milliseconds.get(milliseconds.len() / 2).copied().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_writes_goes_on_over_many_suspends() -> Result<()> {
    let cycles = if cfg!(feature = "long") { cycles()? } else { 20 };
    let stage = Stage::new()?;
    let session = quiet_session(&stage, "default").await?;
    stage.load_busybox(&session).await?;
    let volume = ["--volume", "records:/data", "busybox", "sh", "-c"];
    let writer = [&["run", "--detach", "--name", "writer"][..], &volume, &[WRITER]].concat();
    stage.succeed(&session, &writer).await?;
    let count = "wc -l < /var/lib/docker/volumes/records/_data/records";
    let mut last = 0;
    let mut database = match cfg!(feature = "long") {
        true => Some(Database::start(&stage, &session).await?),
        false => None,
    };
    for cycle in 0..cycles {
        fall_asleep(&session).await?;
        // A number that grew since the last sleep was written by a program that runs on.
        let number: u64 = loop {
            let number = guest_output(&session, &format!("{count}; date +%s.%N")).await?;
            let (number, time) = number.split_once('\n').context("two lines")?;
            clock_is_right(time.trim())?;
            let number = number.trim().parse()?;
            if number > last {
                break number;
            }
        };
        last = number;
        let info = inspect(&session).await?;
        ensure!(info.vm.how == Some(How::Resume) && info.vm.boots == 1, "cycle {cycle}: {:?}", info.vm);
        ensure!(info.vm.start_count == cycle + 2, "{:?}", info.vm);
        if let Some(database) = &mut database {
            database.grows().await.with_context(|| format!("cycle {cycle}"))?;
            // A client that is started in the guest takes longer than all the rest.
            if cycle % 10 == 0 {
                database.speaks_tls().await.with_context(|| format!("cycle {cycle}"))?;
            }
        }
    }
    if let Some(database) = database {
        database.answers_the_host().await?;
        println!("figure: rows of a database that was suspended = {}", database.check().await?);
    }
    stage.succeed(&session, &["stop", "--time", "1", "writer"]).await?;
    let checked = [&["run", "--rm"][..], &volume, &[READER]].concat();
    let written: u64 = stage.succeed(&session, &checked).await?.trim().parse()?;
    ensure!(written >= last, "{written} of {last} records are left");

    let entries = history(&session).await?;
    let took = |what: &str| -> Vec<u64> {
        entries.iter().filter(|entry| entry.what == what).map(|entry| entry.duration_ms).collect()
    };
    println!("figure: suspends = {cycles}");
    println!("figure: suspend, median = {} ms", median(took("sleep")));
    println!("figure: resume to the engine's list, median = {} ms", median(took("start")));
    Ok(())
}

/// Of the shard; `DORM_TEST_CYCLES` makes them fewer, to try it out.
fn cycles() -> Result<u64> {
    std::env::var("DORM_TEST_CYCLES").map_or(Ok(300), |text| Ok(text.parse()?))
}

/// Compared after the answer has come: a guest that is slow to answer looks late, never early.
fn clock_is_right(time: &str) -> Result<()> {
    let guest = Duration::from_secs_f64(time.parse()?);
    let host = SystemTime::now().duration_since(UNIX_EPOCH)?;
    // What the answer took on its way isn't the clock's fault.
    ensure!(guest < host + CLOCK_OFF_MAX, "the guest's clock is ahead by {:?}", guest - host);
    ensure!(
        host < guest + CLOCK_OFF_MAX + Duration::from_secs(2),
        "the guest's clock is behind by {:?}",
        host - guest
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_share_no_random_number_no_machine_id_and_no_name() -> Result<()> {
    let clones = if cfg!(feature = "long") { 1000 } else { 30 };
    let stage = Stage::new()?;
    let mut seen = BTreeSet::new();
    let mut took = Vec::new();
    for number in 0..clones {
        let name = format!("clone-{number}");
        let session = quiet_session(&stage, &name).await?;
        let begun = Instant::now();
        let told = guest_output(
            &session,
            "cat /etc/machine-id; od -An -N16 -tx8 /dev/urandom | tr -d ' '; cat /proc/sys/kernel/random/uuid /proc/sys/kernel/hostname",
        )
        .await?;
        took.push(u64::try_from(begun.elapsed().as_millis())?);
        let info = inspect(&session).await?;
        ensure!(info.vm.how == Some(How::Clone), "{:?}", history(&session).await?);
        let lines: Vec<_> = told.lines().map(str::to_owned).collect();
        ensure!(lines.len() == 4 && lines[3] == name, "{told}");
        for line in lines {
            ensure!(seen.insert(line.clone()), "{line} was seen before, in clone {number}");
        }
        fall_asleep(&session).await?;
        stage.remove(&name).await?;
    }
    println!("figure: clones = {clones}");
    println!("figure: clone to a program's output, median = {} ms", median(took));
    Ok(())
}

/// Whom a point of a suspend or a resume costs the life.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Qemu,
    Host,
    Service,
}

/// Every point, and what of them fits into `make test`.
const DEATHS: &[(&str, Victim, Often)] = &[
    ("suspend.begun", Victim::Qemu, Often::Long),
    ("suspend.begun", Victim::Host, Often::Long),
    ("suspend.begun", Victim::Service, Often::Long),
    ("suspend.frozen", Victim::Qemu, Often::Long),
    ("suspend.frozen", Victim::Host, Often::Always),
    ("suspend.frozen", Victim::Service, Often::Long),
    ("suspend.saved", Victim::Qemu, Often::Long),
    ("suspend.saved", Victim::Host, Often::Always),
    ("suspend.saved", Victim::Service, Often::Long),
    ("suspend.quit", Victim::Host, Often::Long),
    ("suspend.quit", Victim::Service, Often::Long),
    ("suspend.sealed", Victim::Host, Often::Always),
    ("suspend.sealed", Victim::Service, Often::Long),
    ("resume.made", Victim::Qemu, Often::Long),
    ("resume.made", Victim::Host, Often::Long),
    ("resume.made", Victim::Service, Often::Always),
    ("resume.loaded", Victim::Qemu, Often::Long),
    ("resume.loaded", Victim::Host, Often::Long),
    ("resume.loaded", Victim::Service, Often::Long),
    ("resume.broken", Victim::Qemu, Often::Always),
    ("resume.broken", Victim::Host, Often::Long),
    ("resume.broken", Victim::Service, Often::Long),
    ("resume.running", Victim::Qemu, Often::Long),
    ("resume.running", Victim::Host, Often::Long),
    ("resume.running", Victim::Service, Often::Long),
    ("resume.greeted", Victim::Qemu, Often::Long),
    ("resume.greeted", Victim::Host, Often::Long),
    ("resume.greeted", Victim::Service, Often::Long),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Often {
    Always,
    Long,
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_dies_at_any_step_of_a_sleep_or_a_wake_the_next_request_finds_all_that_was_synced()
-> Result<()> {
    let mut stage = Stage::new()?;
    let session = quiet_session(&stage, "default").await?;
    for (number, (point, victim, often)) in DEATHS.iter().enumerate() {
        if *often == Often::Long && !cfg!(feature = "long") {
            continue;
        }
        one_death(&mut stage, &session, number, point, *victim)
            .await
            .with_context(|| format!("{victim:?} died at {point}\n{}", stage.logs(&session)))?;
    }
    Ok(())
}

async fn one_death(
    stage: &mut Stage,
    session: &SessionInfo,
    number: usize,
    point: &str,
    victim: Victim,
) -> Result<()> {
    let written = format!("{number} {point} {victim:?}");
    guest_output(session, &format!("echo {written} > /var/lib/docker/marker; sync")).await?;
    let held = Held::at(stage, session, point).await?;
    match victim {
        Victim::Qemu => kill_process(qemu_of(stage, session)?, Signal::KILL)?,
        Victim::Host => kill_process(host_of(session)?, Signal::KILL)?,
        Victim::Service => stage.kill_service()?,
    }
    held.let_go()?;
    if matches!(victim, Victim::Service) {
        stage.start_service()?;
    }
    held.abandon();
    let found = next_answer(session, "cat /var/lib/docker/marker; ls /var/lib/docker").await?;
    ensure!(found.starts_with(&written), "{found:?} instead of {written:?}");
    let entries = history(session).await?;
    let last = entries.last().context("there is no history")?;
    println!("{victim:?} at {point}: {} {} {}", last.what, last.how, last.reason);
    Ok(())
}

/// What is done to a sleeping store, and what the history says of it.
type Damage = (&'static str, fn(&Path) -> Result<()>, &'static str);

const DAMAGES: &[Damage] = &[
    ("a device state that was cut short", cut_state, "device state is damaged"),
    ("a memory file of another size", cut_memory, "another size"),
    ("a memory file from elsewhere", other_memory, "another file"),
    ("a seal that was changed", change_seal, "description is damaged"),
    ("a seal that is no text", garble_seal, "description is damaged"),
    ("a compressed memory with a flipped bit", flip_compressed, "can't be decompressed"),
    ("a compressed memory that was cut short", cut_compressed, "it was cut short"),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_was_changed_is_refused_with_its_reason_and_the_disk_is_booted_instead() -> Result<()>
{
    let stage = Stage::new()?;
    let session = quiet_session(&stage, "default").await?;
    let store = session.storage.path.clone();
    // What a flipped bit comes to is what every damage comes to, and it is seen below.
    let damages = if cfg!(feature = "long") { DAMAGES } else { &[] };
    for (what, damage, words) in damages {
        guest_output(&session, &format!("echo {what} > /var/lib/docker/marker; sync")).await?;
        let is_compressed = what.starts_with("a compressed");
        set(&stage, &session, "snapshots.compress-after", if is_compressed { "0" } else { "never" }).await?;
        fall_asleep(&session).await?;
        if is_compressed {
            until_compressed(&stage, &session).await?;
        }
        damage(&store)?;
        let read = async || {
            let mut command = std::process::Command::new(program("dorm"));
            command.args(["session", "run", "cat", "/var/lib/docker/marker"]);
            command.env("DORM_HOME", stage.home()).stdin(Stdio::null());
            stage.finish(&session, command).await
        };
        let woken = read().await?;
        ensure!(String::from_utf8_lossy(&woken.stdout).trim() == *what, "{woken:?}");
        let said = String::from_utf8_lossy(&woken.stderr).into_owned();
        ensure!(
            said.contains("warning: ") && said.contains(words),
            "{what}: whoever woke it was told {said:?}"
        );
        let later = read().await?;
        ensure!(later.status.success() && later.stderr.is_empty(), "{what}: others were told: {later:?}");
        let entries = history(&session).await?;
        let note = entries.iter().rev().find(|entry| entry.what == "warning").context("nothing is said")?;
        ensure!(note.reason.contains(words), "{what}: {}", note.reason);
        let info = inspect(&session).await?;
        ensure!(info.vm.how == Some(How::Cold), "{what}: {:?}", info.vm);
    }
    asked_for_by_name(&stage, &session).await
}

/// Suspend, look, verify, resume, stop: each by its own command.
async fn asked_for_by_name(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let store = &session.storage.path;
    guest_output(session, "true").await?;
    until_told(stage, session, "suspend", "was suspended").await?;
    let verified = dorm(stage, session, "verify").await?;
    ensure!(verified.contains("intact") || verified.contains("now it has"), "{verified}");
    let snapshot = snapshot_of(stage, session).await?;
    ensure!(snapshot.checksum == Checksum::Made && snapshot.unfit.is_none(), "{snapshot:?}");
    ensure!(snapshot.used_bytes > 1 << 20 && snapshot.key["number of CPUs"] != "0", "{snapshot:?}");
    println!("figure: snapshot of an idle VM on disk = {} MB", snapshot.used_bytes / 1_000_000);

    let resumed = dorm(stage, session, "resume").await?;
    ensure!(resumed.contains("as it fell asleep"), "{resumed}");
    ensure!(dorm(stage, session, "verify").await?.contains("no snapshot"), "it is used up");
    an_old_snapshot_is_compressed_and_wakes_all_the_same(stage, session).await?;

    guest_output(session, "echo flipped > /var/lib/docker/marker; sync").await?;
    until_told(stage, session, "suspend", "was suspended").await?;
    ensure!(dorm(stage, session, "verify").await?.contains(' '), "it has a checksum now");
    flip_a_bit(&store.join("memory"))?;
    let refused = dorm(stage, session, "verify").await.expect_err("a bit flipped").to_string();
    ensure!(refused.contains("its checksum is another one"), "{refused}");
    let found = guest_output(session, "cat /var/lib/docker/marker").await?;
    ensure!(found.trim() == "flipped", "{found}");
    let entries = history(session).await?;
    let note = entries.iter().rev().find(|entry| entry.what == "warning").context("nothing is said")?;
    ensure!(note.reason.contains("its checksum is another one"), "{}", note.reason);

    until_told(stage, session, "stop", "was stopped").await?;
    let info = inspect(session).await?;
    ensure!(info.snapshot.is_none() && info.vm.how == Some(How::Cold), "{info:?}");
    the_oldest_snapshot_is_given_up(stage, session).await
}

/// A second time with a wake that comes while it is compressed: each sleep is older than no time at all.
async fn an_old_snapshot_is_compressed_and_wakes_all_the_same(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    let store = &session.storage.path;
    let marker = "/run/marker";
    guest_output(session, &format!("echo kept in memory > {marker}")).await?;
    set(stage, session, "snapshots.compress-after", "0").await?;
    until_told(stage, session, "suspend", "was suspended").await?;
    let snapshot = until_compressed(stage, session).await?;
    println!("figure: compressed snapshot of an idle VM on disk = {} MB", snapshot.used_bytes / 1_000_000);
    ensure!(snapshot.checksum == Checksum::Made && snapshot.unfit.is_none(), "{snapshot:?}");
    ensure!(!store.join("memory").exists(), "the memory lies there twice");
    ensure!(dorm(stage, session, "verify").await?.contains("intact"), "it is what was put to sleep");
    let begun = Instant::now();
    let kept = guest_output(session, &format!("cat {marker}")).await?;
    println!("figure: compressed snapshot to a program's output = {} ms", begun.elapsed().as_millis());
    let info = inspect(session).await?;
    ensure!(kept.trim() == "kept in memory" && info.vm.how == Some(How::Resume), "{kept:?}, {:?}", info.vm);
    ensure!(!store.join("memory.compressed").exists(), "it was used");

    until_told(stage, session, "suspend", "was suspended").await?;
    until_there(&store.join("memory.compressing")).await?;
    let kept = guest_output(session, &format!("cat {marker}")).await?;
    let info = inspect(session).await?;
    ensure!(kept.trim() == "kept in memory" && info.vm.how == Some(How::Resume), "{kept:?}, {:?}", info.vm);
    until_called_off(stage).await?;
    set(stage, session, "snapshots.compress-after", "never").await
}

async fn until_compressed(stage: &Stage, session: &SessionInfo) -> Result<SnapshotInfo> {
    let mut look = tokio::time::interval(Duration::from_millis(50));
    let compressed = async {
        loop {
            // It is told of a moment before the memory that it replaces is removed.
            let is_alone = !session.storage.path.join("memory").exists();
            let told: SessionInfo = serde_json::from_str(&dorm(stage, session, "inspect").await?)?;
            match told.snapshot.filter(|_| is_alone) {
                Some(snapshot) if snapshot.memory == MemoryForm::Compressed => return anyhow::Ok(snapshot),
                // The service hears of a sleep a moment after whoever asked for it.
                Some(_) | None => {}
            }
            look.tick().await;
        }
    };
    tokio::time::timeout(STATE_WITHIN, compressed)
        .await
        .with_context(|| format!("it is never compressed\n{}", stage.logs(session)))?
}

/// Whoever wakes a session waits for nothing: the thread that compresses hears of it between two blocks.
async fn until_called_off(stage: &Stage) -> Result<()> {
    let path = stage.home().join("dormd.log");
    let mut look = tokio::time::interval(Duration::from_millis(50));
    let called_off = async {
        while !std::fs::read_to_string(&path)?.contains("a compression was called off") {
            look.tick().await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(STATE_WITHIN, called_off).await.context("the wake raced nothing")?
}

async fn snapshot_of(stage: &Stage, session: &SessionInfo) -> Result<SnapshotInfo> {
    let told: SessionInfo = serde_json::from_str(&dorm(stage, session, "inspect").await?)?;
    told.snapshot.context("a suspended session has a snapshot")
}

/// Sets a user's setting.
async fn set(stage: &Stage, session: &SessionInfo, name: &str, value: &str) -> Result<()> {
    let mut line = std::process::Command::new(program("dorm"));
    line.args(["settings", "set", name, value]).env("DORM_HOME", stage.home());
    ensure!(stage.finish(session, line).await?.status.success(), "{name} can't be set");
    Ok(())
}

/// Over the limit a snapshot goes, its session boots from the disk, and is told why.
async fn the_oldest_snapshot_is_given_up(stage: &Stage, session: &SessionInfo) -> Result<()> {
    set(stage, session, "snapshots.limit", "1M").await?;
    guest_output(session, "echo given up > /var/lib/docker/marker; sync").await?;
    until_told(stage, session, "suspend", "was suspended").await?;
    let seal = session.storage.path.join("snapshot.json");
    let gone = async {
        let mut look = tokio::time::interval(Duration::from_millis(20));
        while seal.exists() {
            look.tick().await;
        }
    };
    tokio::time::timeout(STATE_WITHIN, gone).await.context("the snapshot is never given up")?;
    let found = guest_output(session, "cat /var/lib/docker/marker").await?;
    ensure!(found.trim() == "given up", "{found}");
    let entries = history(session).await?;
    let note = entries.iter().rev().find(|entry| entry.what == "warning").context("nothing is said")?;
    ensure!(note.reason.contains("may take 1 MiB"), "{}", note.reason);
    Ok(())
}

/// What a command of `dorm session` prints; what it says on its way out, when it fails.
async fn dorm(stage: &Stage, session: &SessionInfo, command: &str) -> Result<String> {
    let mut line = std::process::Command::new(program("dorm"));
    line.args(["session", command, session.name.as_str()]).env("DORM_HOME", stage.home());
    let output = stage.finish(session, line).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{command}: {}", text(&output.stderr));
    Ok(text(&output.stdout))
}

/// Repeats a sleep until nothing holds: what the last client held ends a moment after that client.
async fn until_told(stage: &Stage, session: &SessionInfo, command: &str, words: &str) -> Result<()> {
    let told = async {
        loop {
            match dorm(stage, session, command).await {
                Ok(told) if told.contains(words) => return Ok(()),
                Ok(told) => bail!("{command}: {told}"),
                Err(error) if error.to_string().contains("held awake") => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return Err(error),
            }
        }
    };
    tokio::time::timeout(STATE_WITHIN, told).await.with_context(|| format!("{command} is never done"))?
}

/// In place, in the first block that holds data: the same file, of the same size.
fn flip_a_bit(memory: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options().read(true).write(true).open(memory)?;
    let at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0))?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[byte[0] ^ 1], at)?)
}

fn file(store: &Path, name: &str) -> PathBuf {
    store.join(name)
}

fn cut_state(store: &Path) -> Result<()> {
    let path = file(store, "memory.state");
    let length = std::fs::metadata(&path)?.len();
    Ok(std::fs::File::options().write(true).open(path)?.set_len(length / 2)?)
}

fn cut_memory(store: &Path) -> Result<()> {
    Ok(std::fs::File::options().write(true).open(file(store, "memory"))?.set_len(1 << 20)?)
}

fn other_memory(store: &Path) -> Result<()> {
    let copy = file(store, "copy");
    dormouse_vm::copy_sparse(&file(store, "memory"), &copy, &AtomicU64::new(0))?;
    Ok(std::fs::rename(copy, file(store, "memory"))?)
}

fn flip_compressed(store: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options().read(true).write(true).open(file(store, "memory.compressed"))?;
    let (at, mut byte) = (file.metadata()?.len() / 2, [0]);
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[byte[0] ^ 1], at)?)
}

fn cut_compressed(store: &Path) -> Result<()> {
    let file = std::fs::File::options().write(true).open(file(store, "memory.compressed"))?;
    Ok(file.set_len(file.metadata()?.len() / 2)?)
}

fn change_seal(store: &Path) -> Result<()> {
    let path = file(store, "snapshot.json");
    let text = std::fs::read_to_string(&path)?;
    let changed = text.replace("\"cpus\": ", "\"cpus\": 1");
    ensure!(changed != text, "the seal names no CPUs");
    Ok(std::fs::write(path, changed)?)
}

fn garble_seal(store: &Path) -> Result<()> {
    Ok(std::fs::write(file(store, "snapshot.json"), "{")?)
}
