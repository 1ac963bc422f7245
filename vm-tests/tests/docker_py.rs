//! docker-py's own integration tests, unmodified: against an engine without a session before it, through a session's socket,
//! and with its VM asleep before each. Each takes some half an hour under emulation: `scripts/test-long docker-py-1-raw`,
//! `docker-py-2-warm`, `docker-py-3-asleep`. What was run before an interruption isn't run again.
#![cfg(feature = "long")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use dormouse_agent_proto::{EngineState, GuestEvent, ProcessFrame, RunProcess, Target};
use dormouse_api::{CreateSession, IdleTimeout, RunningContainers, SessionInfo};
use dormouse_mux::{Agent, read_process_frame};
use dormouse_vm::NetworkKind;
use dormouse_vm_tests::registry::{Registry, give_host_an_address};
use dormouse_vm_tests::stage::{Stage, fall_asleep, inspect, program};
use dormouse_vm_tests::{Home, in_network_namespace, project, raw};
use tokio::net::UnixListener;

/// Files of tests: all but those of swarm and its services, configs and secrets, and of plugins.
const FILES: &[&str] = &[
    "api_build_test",
    "api_client_test",
    "api_container_test",
    "api_exec_test",
    "api_healthcheck_test",
    "api_image_test",
    "api_network_test",
    "api_volume_test",
    "client_test",
    "context_api_test",
    "errors_test",
    "models_containers_test",
    "models_images_test",
    "models_networks_test",
    "models_resources_test",
    "models_volumes_test",
    "regression_test",
];

/// Tests that bind paths of the host. Without a session an engine binds what its VM has of that name.
const BINDS: [&str; 2] = [
    "api_container_test::VolumeBindTest",
    "models_containers_test::ContainerCollectionTest::test_run_with_volume",
];

/// What passes if the engine's reads from a terminal happen to get a line whole: a kernel puts its text and its end there one
/// after the other, so on a slow machine they may come apart. Of no use as a measure, with or without a session.
const CUT_BY_CHANCE: [&str; 2] = [
    "api_exec_test::ExecDemuxTest::test_exec_command_tty_stream_demux",
    "api_exec_test::ExecDemuxTest::test_exec_command_tty_stream_no_demux",
];

/// How many run with the VM asleep before each.
const ASLEEP: usize = 60;

/// Longest run of one test, in seconds.
const TEST_SECONDS: u32 = 240;

/// Tests that pass against the raw engine, one a line. The shard `docker-py-1-raw` writes it.
fn list() -> PathBuf {
    project().join("docs/results/docker-py-passes.txt")
}

/// A client's library and its tests, before one socket.
struct Tests<'a> {
    socket: &'a Path,
    /// What was seen so far lies here.
    seen: PathBuf,
    mode: &'a str,
    variables: Vec<(&'static str, String)>,
}

/// Outcomes by `FILE::CLASS::TEST`.
type Outcomes = BTreeMap<String, String>;

impl<'a> Tests<'a> {
    fn new(socket: &'a Path, mode: &'a str) -> Result<Self> {
        let state = std::env::var("DORM_TEST_STATE").context("run it by scripts/test-long")?;
        let seen = Path::new(&state).join(mode);
        std::fs::create_dir_all(&seen)?;
        Ok(Self { socket, seen, mode, variables: Vec::new() })
    }

    /// Runs a file's tests, or those of them that are named, unless that was done before.
    fn file(&self, file: &str, named: &[String]) -> Result<Outcomes> {
        let log = self.seen.join(file);
        if !log.exists() {
            let beside = self.seen.join(format!("{file}.new"));
            self.run(file, named, &beside)?;
            std::fs::rename(&beside, &log)?;
        }
        let outcomes = outcomes(&std::fs::read_to_string(&log)?);
        for (name, outcome) in &outcomes {
            match outcome.as_str() {
                "PASSED" | "XPASS" => println!("test {}::{name} ... ok", self.mode),
                "FAILED" | "ERROR" => println!("test {}::{name} ... FAILED", self.mode),
                other => println!("{}::{name} {other}", self.mode),
            }
        }
        Ok(outcomes)
    }

    /// What an interrupted run has written to `log` isn't run again.
    fn run(&self, file: &str, named: &[String], log: &Path) -> Result<()> {
        let before = outcomes(&std::fs::read_to_string(log).unwrap_or_default());
        let python = project().join("build/docker-py");
        // One of its tests leaves a context behind, which lies here where docker has no configuration.
        let _ = std::fs::remove_dir_all(python.join("source/contexts"));
        let mut command = Command::new(python.join("venv/bin/python"));
        command.args(["-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "-p", "before_each"]);
        command.arg(format!("--timeout={TEST_SECONDS}"));
        let path = |name: &str| format!("tests/integration/{}", name.replacen("::", ".py::", 1));
        match named {
            [] => drop(command.arg(format!("tests/integration/{file}.py"))),
            named => drop(command.args(named.iter().map(|name| path(name)))),
        }
        command.args(before.keys().map(|name| format!("--deselect={}", path(name))));
        let log = std::fs::File::options().create(true).append(true).open(log)?;
        let status = command
            .current_dir(python.join("source"))
            .env("DOCKER_HOST", format!("unix://{}", self.socket.display()))
            .env("PYTHONPATH", project().join("vm-tests/python"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PYTHONUNBUFFERED", "1")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log)
            .status()?;
        // 0: all passed; 1: some failed; 5: there are none.
        ensure!(matches!(status.code(), Some(0 | 1 | 5)), "pytest {file} ended with {status}");
        Ok(())
    }

    fn all(&self) -> Result<Outcomes> {
        let mut all = Outcomes::new();
        for file in FILES {
            all.extend(self.file(file, &[])?);
        }
        Ok(all)
    }
}

/// Reads `tests/integration/FILE.py::CLASS::TEST OUTCOME [ 12%]`. A test that fails in its end has two such lines.
fn outcomes(log: &str) -> Outcomes {
    let mut found = Outcomes::new();
    for line in log.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(outcome)) = (words.next(), words.next()) else { continue };
        let Some(name) = name.strip_prefix("tests/integration/") else { continue };
        if matches!(outcome, "PASSED" | "FAILED" | "ERROR" | "SKIPPED" | "XFAIL" | "XPASS") {
            found.insert(name.replacen(".py::", "::", 1), outcome.to_owned());
        }
    }
    found
}

fn passed(outcomes: &Outcomes) -> BTreeSet<&str> {
    outcomes.iter().filter(|(_, outcome)| *outcome == "PASSED").map(|(name, _)| name.as_str()).collect()
}

/// The tests that have to pass through a session.
fn wanted() -> Result<Vec<String>> {
    let list = std::fs::read_to_string(list()).context("run the shard docker-py-1-raw first")?;
    let wanted = list.lines().filter(|name| !CUT_BY_CHANCE.contains(name)).map(str::to_owned);
    let wanted: Vec<_> = wanted.collect();
    ensure!(wanted.len() > 100, "the list has {} tests", wanted.len());
    Ok(wanted)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_a_session_passes_most_of_them() -> Result<()> {
    if in_network_namespace("an_engine_without_a_session_passes_most_of_them")? {
        return Ok(());
    }
    give_host_an_address()?;
    let registry = Registry::start()?;
    let mut home = Home::new()?;
    home.network = NetworkKind::Passt;
    let machine = home.boot(1).await?;
    let folder = tempfile::Builder::new().prefix("dorm").tempdir()?;
    let socket = folder.path().join("docker.sock");
    let outcomes = async {
        let mut watch = machine.agent.watch().await?;
        while watch.next().await? != GuestEvent::Engine(EngineState::Ready) {}
        use_mirror(&machine.agent, &registry.mirror()).await?;
        tokio::spawn(raw::serve(UnixListener::bind(&socket)?, machine.agent.clone(), Target::Engine));
        tokio::task::block_in_place(|| Tests::new(&socket, "raw")?.all())
    }
    .await;
    machine.end().await?;
    let outcomes = outcomes?;
    let passed = passed(&outcomes);
    let skipped = outcomes.values().filter(|outcome| *outcome == "SKIPPED").count();
    let counted = outcomes.len() - skipped;
    println!(
        "figure: passed by an engine without a session = {} of {counted}, {skipped} skipped",
        passed.len()
    );
    let lines: String = passed.iter().map(|name| format!("{name}\n")).collect();
    std::fs::write(list(), lines)?;
    ensure!(passed.len() * 100 >= counted * 85, "{} of {counted} pass", passed.len());
    Ok(())
}

async fn use_mirror(agent: &Agent, mirror: &str) -> Result<()> {
    let script = format!(
        "mkdir -p /etc/docker && echo '{{\"registry-mirrors\":[\"{mirror}\"]}}' > /etc/docker/daemon.json \
         && kill -HUP $(cat /run/docker.pid)"
    );
    let argv = ["sh", "-c", &script].map(str::to_owned).to_vec();
    let mut stream = agent.run(RunProcess { argv, ..RunProcess::default() }).await?.stream;
    let mut buffer = Vec::new();
    while let Some(frame) = read_process_frame(&mut stream, &mut buffer).await? {
        if let ProcessFrame::Exit(status) = frame {
            ensure!(status == 0, "the engine can't be told of its mirror");
            return Ok(());
        }
    }
    bail!("the guest tells no more")
}

/// A session whose engine gets images from the registry.
async fn session_with(stage: &Stage, registry: &Registry) -> Result<SessionInfo> {
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Never;
    // So that the VM can be absent before a test, whatever the last one left running.
    wish.running = RunningContainers::Suspend;
    wish.registries.mirrors = vec![registry.mirror()];
    Ok(stage.make(&wish).await?)
}

fn stage_with_network() -> Result<Stage> {
    Stage::with(&[("DORM_NETWORK", "passt".into())])
}

#[tokio::test(flavor = "multi_thread")]
async fn through_a_sessions_socket_the_same_ones_pass() -> Result<()> {
    if in_network_namespace("through_a_sessions_socket_the_same_ones_pass")? {
        return Ok(());
    }
    give_host_an_address()?;
    let (wanted, registry, stage) = (wanted()?, Registry::start()?, stage_with_network()?);
    let session = session_with(&stage, &registry).await?;
    let outcomes = tokio::task::block_in_place(|| Tests::new(&session.docker_socket, "warm")?.all())?;
    let passed = passed(&outcomes);
    let lost: Vec<_> = wanted.iter().filter(|name| !passed.contains(name.as_str())).collect();
    println!("figure: passed through a session's socket = {} of {}", wanted.len() - lost.len(), wanted.len());
    ensure!(lost.is_empty(), "through the socket these fail, and not without it: {lost:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn those_that_bind_folders_of_the_host_pass_through_a_sessions_socket() -> Result<()> {
    if in_network_namespace("those_that_bind_folders_of_the_host_pass_through_a_sessions_socket")? {
        return Ok(());
    }
    give_host_an_address()?;
    let (registry, stage) = (Registry::start()?, stage_with_network()?);
    let session = session_with(&stage, &registry).await?;
    let tests = Tests::new(&session.docker_socket, "binds")?;
    let named = BINDS.map(str::to_owned);
    let outcomes = tokio::task::block_in_place(|| tests.file("those that bind", &named))?;
    let passed = passed(&outcomes);
    println!(
        "figure: passed of those that bind folders of the host = {} of {}",
        passed.len(),
        outcomes.len()
    );
    ensure!(passed.len() >= 6 && passed.len() == outcomes.len(), "{outcomes:#?}\n{}", stage.logs(&session));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_of_them_pass_with_the_vm_asleep_before_each_and_on_its_way_there() -> Result<()> {
    if in_network_namespace("sixty_of_them_pass_with_the_vm_asleep_before_each_and_on_its_way_there")? {
        return Ok(());
    }
    give_host_an_address()?;
    let (wanted, registry, stage) = (wanted()?, Registry::start()?, stage_with_network()?);
    let chosen: Vec<_> = (0..ASLEEP).map(|index| wanted[index * wanted.len() / ASLEEP].clone()).collect();
    let session = session_with(&stage, &registry).await?;
    // Wakes from what has no memory yet are another matter.
    stage.succeed(&session, &["pull", "--quiet", "alpine:3.10"]).await?;
    stage.succeed(&session, &["pull", "--quiet", "alpine:latest"]).await?;
    stage.succeed(&session, &["pull", "--quiet", "busybox"]).await?;
    let dorm = program("dorm").display().to_string();
    let home = stage.home().display().to_string();

    let before = format!("env DORM_HOME={home} {dorm} session suspend default");
    let asleep = Asleep { stage: &stage, session: &session, chosen: &chosen };
    // Some ask nothing but what is answered asleep, or no engine at all.
    asleep.pass("asleep", vec![("DORM_BEFORE", before)], ASLEEP * 9 / 10).await?;
    let grace = Command::new(&dorm)
        .args(["session", "set", "default", "--idle-timeout", "1"])
        .env("DORM_HOME", &home)
        .status()?;
    ensure!(grace.success());
    // Half of the pauses are longer than the grace period and the sleep, so each moment of the way is met.
    let variables = vec![("DORM_BEFORE", "true".to_owned()), ("DORM_PAUSE", "4".to_owned())];
    asleep.pass("grace", variables, ASLEEP / 4).await
}

struct Asleep<'a> {
    stage: &'a Stage,
    session: &'a SessionInfo,
    chosen: &'a [String],
}

impl Asleep<'_> {
    /// All pass, with so many wakes at least.
    async fn pass(&self, mode: &str, variables: Vec<(&'static str, String)>, wakes: usize) -> Result<()> {
        let mut tests = Tests::new(&self.session.docker_socket, mode)?;
        tests.variables = variables;
        fall_asleep(self.session).await?;
        for file in FILES {
            let named: Vec<_> =
                self.chosen.iter().filter(|name| name.starts_with(&format!("{file}::"))).cloned().collect();
            if !named.is_empty() {
                let starts = inspect(self.session).await?.vm.start_count;
                tokio::task::block_in_place(|| tests.file(file, &named))?;
                let starts = inspect(self.session).await?.vm.start_count - starts;
                let count = tests.seen.join(format!("{file}.starts"));
                if !count.exists() {
                    std::fs::write(count, starts.to_string())?;
                }
            }
        }
        let (mut starts, mut passed_all) = (0, Outcomes::new());
        for file in FILES {
            let log = std::fs::read_to_string(tests.seen.join(file)).unwrap_or_default();
            passed_all.extend(outcomes(&log));
            let count =
                std::fs::read_to_string(tests.seen.join(format!("{file}.starts"))).unwrap_or_default();
            starts += count.parse::<usize>().unwrap_or(0);
        }
        let passed = passed(&passed_all);
        println!("figure: passed, {mode} = {} of {}, with {starts} wakes", passed.len(), self.chosen.len());
        let lost: Vec<_> = self.chosen.iter().filter(|name| !passed.contains(name.as_str())).collect();
        ensure!(lost.is_empty(), "{mode}: {lost:#?}\n{}", self.stage.logs(self.session));
        ensure!(starts >= wakes, "{mode}: only {starts} wakes");
        Ok(())
    }
}
