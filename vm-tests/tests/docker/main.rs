//! What a docker client sees of a session: the real docker client and compose, a real engine, asleep and awake.

mod compose;
mod ports;
mod tls;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::{CreateSession, IdleTimeout, Phase, RunningContainers, SessionInfo};
use dormouse_vm_tests::client::{Client, Response};
use dormouse_vm_tests::figure;
use dormouse_vm_tests::polling::{connect_often, poll};
use dormouse_vm_tests::stage::{Stage, fall_asleep, host_of, inspect, program};
use rustix::process::{Signal, kill_process};
use serde_json::value::RawValue;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::time::timeout;

/// How long a VM may stay up that is only polled.
const POLLED_WITHIN: Duration = Duration::from_secs(120);

/// How long a client that follows may take to say what is waited for.
const HEARD_WITHIN: Duration = Duration::from_secs(120);

const EVENTS: [&str; 3] = ["events", "--format", "json"];

/// How long an IDE polls.
const POLLING: Duration = Duration::from_secs(30);

/// One home for all of it: each VM start costs seconds.
#[tokio::test(flavor = "multi_thread")]
async fn docker_clients_can_not_tell_a_session_from_an_engine_but_that_it_sleeps() -> Result<()> {
    let stage = Stage::new()?;
    let session = stage.create(3600).await?;
    stage.load_busybox(&session).await?;

    let files = ["run", "--rm", "busybox", "sh", "-c", "ulimit -n; ulimit -Hn"];
    ensure!(
        stage.succeed(&session, &files).await? == "1024\n524288\n",
        "as many files as with systemd on a host"
    );
    host_paths_are_refused_and_the_engines_socket_is_there(&stage, &session).await?;
    ports::ports_are_published_on_the_host(&stage, &session).await?;
    ports::datagrams_are_forwarded(&stage, &session).await?;
    tls::only_clients_with_a_certificate_are_served(&stage, &session).await?;
    let mut events = Following::of(stage.docker(&session, &EVENTS))?;
    compose::a_project_works_over_a_sleep(&stage, &session).await?;
    events.heard("create").await?;
    // Nothing was removed before the sleep.
    events.heard("destroy").await?;
    drop(events);
    let asleep = reads_wake_nothing(&stage, &session).await?;
    let mut events = Following::of(stage.docker(&session, &EVENTS))?;
    stage.succeed(&session, &["run", "--rm", "--name", "after", "busybox", "true"]).await?;
    let info = inspect(&session).await?;
    ensure!(info.vm.start_count == asleep.vm.start_count + 1, "{:?}", info.vm);
    events.heard("after").await?;
    another_engines_images_and_volumes_are_taken_over(&stage, &session).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_knock_at_a_published_port_wakes_a_session_that_nobody_hosts() -> Result<()> {
    let stage = Stage::with(&[("DORM_LINGER", "1".into())])?;
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Seconds(3600);
    wish.running = RunningContainers::Suspend;
    let session = stage.make(&wish).await?;
    stage.load_busybox(&session).await?;
    ports::a_knock_wakes_whoever_is_behind_the_door(&stage, &session).await
}

/// Needs no VM.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_while_a_host_leaves_is_served_by_it_or_the_next() -> Result<()> {
    tokio::task::block_in_place(|| connect_often(300))
}

async fn another_engines_images_and_volumes_are_taken_over(stage: &Stage, from: &SessionInfo) -> Result<()> {
    let write = "echo words > /k/file; chown 70:71 /k/file; chown 70 /k; chmod 700 /k";
    stage.succeed(from, &["run", "--rm", "-v", "kept:/k", "busybox", "sh", "-c", write]).await?;
    // The newest image is what both engines make their holders from: its user and its volume are to leave no trace.
    stage.succeed(from, &["create", "--name", "changed", "busybox"]).await?;
    let change = ["--change", "USER nosuch", "--change", "VOLUME /data"];
    stage.succeed(from, &[&["commit"][..], &change, &["changed", "changed"]].concat()).await?;
    stage.succeed(from, &["rm", "changed"]).await?;
    let volumes = stage.succeed(from, &["volume", "ls", "--quiet"]).await?;
    let to = stage.make(&CreateSession::named("second".parse()?)).await?;
    let import = || async {
        let mut dorm = Command::new(program("dorm"));
        dorm.args(["--session", "second", "import-docker", "--from"]).arg(&from.docker_socket);
        dorm.env("DORM_HOME", stage.home()).stdin(Stdio::null());
        let output = stage.finish(&to, dorm).await?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{errors}\n{}", stage.logs(&to));
        Ok(String::from_utf8(output.stdout)?)
    };
    let said = import().await?;
    ensure!(said.contains("Loaded image: busybox:latest\n") && said.contains("volume kept\n"), "{said}");
    let read = "cat /k/file && stat -c %u:%g /k/file && stat -c %u:%a /k";
    let found = stage.succeed(&to, &["run", "--rm", "-v", "kept:/k", "busybox", "sh", "-c", read]).await?;
    ensure!(found == "words\n70:71\n70:700\n", "{found}");
    let left = stage.succeed(from, &["volume", "ls", "--quiet"]).await?;
    ensure!(left == volumes, "there were {volumes}, there are {left}");
    ensure!(stage.succeed(&to, &["volume", "ls", "--quiet"]).await? == volumes, "they differ");
    stage.succeed(from, &["rmi", "changed"]).await?;
    for engine in [from, &to] {
        let holders = stage.succeed(engine, &["ps", "--all", "--quiet", "--filter", "volume=kept"]).await?;
        ensure!(holders.is_empty(), "a container is left: {holders}");
    }
    let said = import().await?;
    let there = ["image busybox:latest: there already\n", "volume kept: there already\n"];
    ensure!(there.iter().all(|line| said.contains(line)), "{said}");
    Ok(())
}

async fn host_paths_are_refused_and_the_engines_socket_is_there(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    let output = stage.run(session, &["run", "--rm", "-v", "/etc:/x", "busybox", "true"]).await?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(125)
            && errors.contains("/etc: it is outside of the folders that may be shared"),
        "{errors}"
    );
    for socket in ["/var/run/docker.sock", &session.docker_socket.to_string_lossy()] {
        let bind = format!("{socket}:/s");
        stage.succeed(session, &["run", "--rm", "-v", &bind, "busybox", "test", "-S", "/s"]).await?;
    }
    Ok(())
}

/// An answer's bytes, but for what tells of the moment or of the engine's process, and for the order of a list: an engine
/// tells its networks and images in another one each time.
fn steady(target: &str, body: &str) -> String {
    let varies: &[&str] = match target {
        _ if target.contains("/containers/json") => &["Status"],
        _ if target.ends_with("/info") => &["SystemTime", "NFd", "NGoroutines", "NEventsListener"],
        _ => &[],
    };
    let masked = varies.iter().fold(body.to_owned(), |body, field| mask(&body, field));
    match serde_json::from_str::<Vec<&RawValue>>(&masked) {
        Ok(items) => {
            let mut items: Vec<_> = items.into_iter().map(RawValue::get).collect();
            items.sort_unstable();
            items.join("\n")
        }
        Err(_no_list) => masked,
    }
}

/// Takes the values out of a field that has a text or a number.
fn mask(body: &str, field: &str) -> String {
    let name = format!("\"{field}\":");
    let mut parts = body.split(&name);
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |masked, part| {
        let ends = if part.starts_with('"') { "\"" } else { ",}" };
        let quote = usize::from(part.starts_with('"'));
        let end = part[quote..].find(|next| ends.contains(next)).unwrap_or(part.len() - quote);
        masked + &name + &part[end + 2 * quote..]
    })
}

async fn reads_wake_nothing(stage: &Stage, session: &SessionInfo) -> Result<SessionInfo> {
    let names = ["one", "two"];
    for name in names {
        stage.succeed(session, &["run", "--name", name, "busybox", "true"]).await?;
    }
    // What clients are known to ask, and what this one has asked.
    for arguments in
        [&["ps", "--all"][..], &["images"], &["inspect", "one"], &["network", "ls"], &["version"]]
    {
        stage.succeed(session, arguments).await?;
    }
    fall_asleep(session).await?;
    let before = inspect(session).await?;
    let kept =
        std::fs::read(stage.home().join("data/sessions").join(session.id.as_str()).join("asleep.json"))
            .or_else(|_| find_kept(stage))?;
    let kept: serde_json::Value = serde_json::from_slice(&kept)?;
    let questions: Vec<(String, String)> = kept["answers"]
        .as_array()
        .context("there are no answers")?
        .iter()
        .map(|entry| &entry["question"])
        .filter_map(|question| {
            Some((question["method"].as_str()?.into(), question["target"].as_str()?.into()))
        })
        .collect();
    ensure!(questions.iter().any(|(_, target)| target.ends_with("/containers/one/json")), "{questions:?}");
    ensure!(questions.len() > 10, "{questions:?}");

    let mut asleep: Vec<Response> = Vec::new();
    let mut client = Client::connect(&session.docker_socket)?;
    for (method, target) in &questions {
        let response = client.ask(method, target)?;
        ensure!(response.is_asleep(), "{method} {target}: {response:?}");
        asleep.push(response);
    }
    let listed = stage.succeed(session, &["ps", "--all", "--format", "{{.Names}} {{.Status}}"]).await?;
    ensure!(listed.contains("one Exited (0) ") && listed.contains(" ago"), "{listed}");
    poll(&session.docker_socket, "/v1.45/containers/json?all=1", POLLING)?;
    kill_process(host_of(session)?, Signal::KILL)?;
    let begun = Instant::now();
    let first = Client::connect(&session.docker_socket)?.ask("GET", "/v1.45/containers/json?all=1")?;
    figure("first read after the host has gone", begun.elapsed());
    ensure!(first.is_asleep(), "{first:?}");
    let after = inspect(session).await?;
    ensure!(after.vm.phase == Phase::Absent && after.vm.generation == before.vm.generation, "{after:?}");

    // What isn't known wakes; and then the engine says the same to everything.
    let mut client = Client::connect(&session.docker_socket)?;
    let woken = client.ask("GET", "/v1.45/containers/json?all=1&limit=5")?;
    ensure!(woken.status == 200 && !woken.is_asleep(), "{woken:?}");
    for ((method, target), asleep) in questions.iter().zip(asleep) {
        let awake = client.ask(method, target)?;
        ensure!(!awake.is_asleep(), "{method} {target}");
        let (then, now) = (steady(target, &asleep.body), steady(target, &awake.body));
        ensure!(then == now, "{method} {target}\nasleep: {then}\nawake:  {now}");
        ensure!(
            asleep.status == awake.status && asleep.steady_lines() == awake.steady_lines(),
            "{asleep:?} {awake:?}"
        );
    }
    for name in names {
        stage.succeed(session, &["rm", name]).await?;
    }
    whoever_polls_keeps_no_vm_up(stage, session).await?;
    inspect(session).await
}

/// An IDE polls from before the last use until the VM sleeps, more often than the grace period ends.
async fn whoever_polls_keeps_no_vm_up(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let grace = |seconds: &'static str| async move {
        let mut dorm = Command::new(program("dorm"));
        dorm.args(["session", "set", "default", "--idle-timeout", seconds]).env("DORM_HOME", stage.home());
        let output = stage.finish(session, dorm).await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    stage.succeed(session, &["run", "--rm", "busybox", "true"]).await?;
    ensure!(inspect(session).await?.vm.phase == Phase::Running);
    grace("3").await?;
    let begun = Instant::now();
    let (mut client, mut reads) = (Client::connect(&session.docker_socket)?, 0);
    let asleep = loop {
        let response = client.ask("GET", "/v1.45/containers/json?all=1")?;
        ensure!(response.status == 200, "{response:?}");
        if response.is_asleep() {
            break begun.elapsed();
        }
        reads += 1;
        ensure!(begun.elapsed() < POLLED_WITHIN, "{reads} reads kept it up\n{}", stage.logs(session));
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    figure("a VM that is polled falls asleep, with a grace period of 3 s", asleep);
    ensure!(reads > 3, "only {reads} reads found it awake");
    grace("3600").await
}

/// The file of answers, wherever this home keeps its sessions.
fn find_kept(stage: &Stage) -> std::io::Result<Vec<u8>> {
    let mut folders = vec![stage.home().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.ends_with("asleep.json") {
                return std::fs::read(path);
            }
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    Err(std::io::ErrorKind::NotFound.into())
}

/// A client that tells what happens, and what it has told so far.
struct Following {
    client: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Following {
    fn of(client: Command) -> Result<Self> {
        let mut command = tokio::process::Command::from(client);
        let mut client = command.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        let stdout = client.stdout.take().context("a pipe was asked for")?;
        Ok(Self { client, lines: BufReader::new(stdout).lines() })
    }

    async fn heard(&mut self, word: &str) -> Result<()> {
        let hearing = async {
            while let Some(line) = self.lines.next_line().await? {
                if line.contains(word) {
                    return Ok(());
                }
            }
            anyhow::bail!("the stream ended before {word:?} was heard")
        };
        timeout(HEARD_WITHIN, hearing).await.with_context(|| format!("nobody says {word:?}"))?
    }

    /// It ends by itself.
    async fn ends(mut self) -> Result<()> {
        let ending = async {
            while self.lines.next_line().await?.is_some() {}
            anyhow::Ok(self.client.wait().await?)
        };
        let status = timeout(HEARD_WITHIN, ending).await.context("it goes on and on")??;
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }
}
