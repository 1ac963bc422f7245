//! A container that reads and writes a shared folder, over many sleeps of its VM: `scripts/test-long folders`.
#![cfg(feature = "long")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use dormouse_api::{How, Phase, SleepAnswer};
use dormouse_client::Endpoint;
use dormouse_vm_tests::desk::Desk;
use dormouse_vm_tests::figure;
use dormouse_vm_tests::stage::{STATE_WITHIN, fall_asleep, inspect, until};

/// Numbered lines with their checksums, to one file by a new descriptor each and to another that is held open; a file that
/// replaces the one before, with its checksum in its first line; and one of the host's, made in the same way, that is read
/// through each time.
const WORK: &str = r#"
cat /src/while-asleep > /src/seen
exec 3>> /src/held
trap 'stop=now' TERM
number=$(wc -l < /src/records)
[ "$number" = "$(wc -l < /src/held)" ] || exit 5
while [ -z "$stop" ]; do
    number=$((number + 1))
    line="$number $(echo $number | md5sum)"
    echo "$line" >> /src/records || exit 6
    echo "$line" >&3 || exit 6
    head -c 100000 /dev/urandom > /tmp/body
    { md5sum < /tmp/body; cat /tmp/body; } > /src/blob.new && mv /src/blob.new /src/blob || exit 6
    { read -r sum; found=$(md5sum); } < /src/given
    [ "$sum" = "$found" ] || { echo "$sum is not $found" > /src/failed; exit 3; }
done
exit 143
"#;

/// A file whose first line is the checksum of the rest, as `md5sum` prints that of its input, put in place at once.
fn give(folder: &Path, seed: usize) -> Result<()> {
    let body: Vec<u8> = (0..200_000 + seed).map(|at| (at * (seed + 7) / 3) as u8).collect();
    let mut content = format!("{}\n", sum(&body)?).into_bytes();
    content.extend_from_slice(&body);
    fs::write(folder.join("given.new"), content)?;
    Ok(fs::rename(folder.join("given.new"), folder.join("given"))?)
}

fn sum(bytes: &[u8]) -> Result<String> {
    use std::io::Write as _;
    let mut program = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    program.stdin.take().context("it is piped")?.write_all(bytes)?;
    Ok(String::from_utf8(program.wait_with_output()?.stdout)?.trim_end().to_owned())
}

/// Fails unless the records are numbered without a gap, each with its checksum. Gives how many there are.
fn check_records(path: &Path, known: usize) -> Result<usize> {
    let text = fs::read_to_string(path)?;
    // What is being written just now isn't looked at.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for (at, line) in whole.lines().enumerate() {
        let number = at + 1;
        let (first, rest) = line.split_once(' ').context("a record has a number and a checksum")?;
        ensure!(first == number.to_string(), "record {number} of {}: {line}", path.display());
        // Those that were right at an earlier look are compared by their number alone.
        ensure!(number <= known || rest == sum(format!("{number}\n").as_bytes())?, "{line}");
    }
    Ok(whole.lines().count())
}

/// The file as a whole, whichever it is just now.
fn check_blob(folder: &Path) -> Result<()> {
    let content = fs::read(folder.join("blob"))?;
    let end = content.iter().position(|byte| *byte == b'\n').context("it has a first line")?;
    ensure!(content.len() - end - 1 == 100_000, "{} bytes", content.len());
    ensure!(content[..end] == *sum(&content[end + 1..])?.as_bytes(), "the blob isn't what was written");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_reads_and_writes_a_folder_loses_nothing_over_many_sleeps() -> Result<()> {
    let cycles = std::env::var("DORM_TEST_CYCLES").map_or(Ok(20), |text| text.parse())?;
    let desk = Desk::new().await?;
    let outcome = go_through(&desk, cycles).await;
    outcome.with_context(|| desk.stage.logs(&desk.session))
}

async fn go_through(desk: &Desk, cycles: usize) -> Result<()> {
    let folder = desk.home.path().join("src");
    for name in ["records", "held", "while-asleep"] {
        fs::write(folder.join(name), "")?;
    }
    give(&folder, 0)?;
    let bind = format!("{}:/src", desk.at("src"));
    desk.succeed(&["create", "--name", "works", "--init", "-v", &bind, "busybox", "sh", "-c", WORK]).await?;
    // It runs on in memory over all of the sleeps.
    let beside = "number=0; while :; do number=$((number + 1)); echo $number > /v/number; sleep 0.2; done";
    desk.succeed(&["run", "-d", "--name", "beside", "-v", "beside:/v", "busybox", "sh", "-c", beside])
        .await?;
    let (mut known, mut starts, mut boots) = (0, Vec::new(), None);
    for cycle in 1..=cycles {
        let begun = Instant::now();
        desk.succeed(&["start", "works"]).await?;
        starts.push(begun.elapsed());
        known = work(desk, &folder, cycle, known).await.with_context(|| format!("cycle {cycle}"))?;
        let seen = fs::read_to_string(folder.join("seen"))?;
        ensure!(cycle == 1 || seen == format!("{}\n", cycle - 1), "of what the host wrote it saw {seen:?}");
        let vm = inspect(&desk.session).await?.vm;
        ensure!(cycle == 1 || vm.how == Some(How::Resume), "{vm:?}");
        ensure!(*boots.get_or_insert(vm.boots) == vm.boots, "it was booted again: {vm:?}");
        // With its files open it can't be suspended, and that is told.
        asked_to_sleep_it_stays_for_its_folder(desk).await?;
        desk.succeed(&["stop", "--time", "60", "works"]).await?;
        ensure!(!folder.join("failed").exists(), "{}", fs::read_to_string(folder.join("failed"))?);
        let state = desk.succeed(&["inspect", "--format", "{{.State.ExitCode}}", "works"]).await?;
        ensure!(state.trim() == "143", "it ended by itself: {state}");
        desk.taken_back().await?;
        fall_asleep(&desk.session).await?;
        ensure!(inspect(&desk.session).await?.snapshot.is_some(), "it was suspended");
        fs::write(folder.join("while-asleep"), format!("{cycle}\n"))?;
        give(&folder, cycle * 10)?;
        known = known.max(check_records(&folder.join("records"), known)?);
    }
    ensure!(check_records(&folder.join("held"), 0)? == check_records(&folder.join("records"), 0)?);
    ensure!(desk.succeed(&["exec", "beside", "cat", "/v/number"]).await?.trim().parse::<usize>()? > cycles);
    starts.sort_unstable();
    println!("figure: sleeps and wakes = {cycles}");
    println!("figure: records, each in two files with its checksum = {known}");
    figure("asleep to a container with a folder, median", starts[starts.len() / 2]);
    Ok(())
}

/// Waits until it has done something since the last look, while the host gives it other files.
async fn work(desk: &Desk, folder: &Path, cycle: usize, known: usize) -> Result<usize> {
    let begun = Instant::now();
    let mut round = 0;
    loop {
        round += 1;
        give(folder, cycle * 10 + round % 10)?;
        let count = check_records(&folder.join("records"), known)?;
        if count >= known + 5 {
            check_blob(folder)?;
            return Ok(count);
        }
        if folder.join("failed").exists() || begun.elapsed() > STATE_WITHIN {
            bail!("it does nothing: {}", desk.succeed(&["inspect", "works"]).await?);
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

async fn asked_to_sleep_it_stays_for_its_folder(desk: &Desk) -> Result<()> {
    let path = desk.at("src");
    until(&desk.session, |info| info.holds.iter().any(|hold| hold.reason.contains(&path))).await?;
    let asked = Endpoint::new(&desk.session.control_socket).post("/v1/session/sleep?how=suspend").await?;
    let SleepAnswer::Busy { holds } = asked else { bail!("asked to sleep: {asked:?}") };
    ensure!(holds.iter().any(|hold| hold.reason.contains(&path)), "{holds:?}");
    let info = inspect(&desk.session).await?;
    ensure!(info.vm.phase != Phase::Absent, "{info:?}");
    Ok(())
}
