//! The guest itself: what boots, what answers, what happens when the engine dies.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use dormouse_agent_proto::{EngineState, GuestEvent, ProcessFrame, RunProcess, Target, TerminalSize};
use dormouse_mux::{Agent, Watch, read_process_frame};
use dormouse_vm::ExitCause;
use dormouse_vm_tests::{BOOT_WITHIN, Home, greet};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

async fn engine_becomes(watch: &mut Watch, wanted: impl Fn(&EngineState) -> bool) -> Result<EngineState> {
    timeout(BOOT_WITHIN, async {
        loop {
            match watch.next().await? {
                GuestEvent::Engine(state) if wanted(&state) => return Ok(state),
                GuestEvent::Engine(EngineState::Dead { details }) => bail!("the engine is dead: {details}"),
                _ => {}
            }
        }
    })
    .await?
}

async fn run(agent: &Agent, process: RunProcess, input: &[u8]) -> Result<(String, i32)> {
    let mut process = agent.run(process).await?;
    process.stream.write_all(&ProcessFrame::Stdin(input.to_vec()).encode()).await?;
    if !input.is_empty() {
        process.stream.write_all(&ProcessFrame::Stdin(Vec::new()).encode()).await?;
    }
    let (mut text, mut buffer) = (Vec::new(), Vec::new());
    loop {
        match read_process_frame(&mut process.stream, &mut buffer).await?.context("the stream ended early")? {
            ProcessFrame::Stdout(bytes) | ProcessFrame::Stderr(bytes) => text.extend(bytes),
            ProcessFrame::Exit(status) => return Ok((String::from_utf8(text)?, status)),
            other => bail!("the guest sent {other:?}"),
        }
    }
}

fn sh(script: &str) -> RunProcess {
    RunProcess { argv: vec!["sh".into(), "-c".into(), script.into()], ..RunProcess::default() }
}

async fn ask_engine(agent: &Agent, path: &str) -> Result<String> {
    let mut stream = agent.dial(Target::Engine).await?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// One boot for all of it: a boot is the expensive part.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_serves_its_engine_runs_processes_survives_an_engine_death_and_powers_off() -> Result<()> {
    let mut home = Home::new()?;
    let machine = home.boot(1).await?;
    let mut watch = machine.agent.watch().await?;
    let outcome = async {
        engine_becomes(&mut watch, |state| *state == EngineState::Ready).await?;
        let version = ask_engine(&machine.agent, "/version").await?;
        anyhow::ensure!(
            version.starts_with("HTTP/1.0 200") && version.contains("\"ApiVersion\""),
            "{version}"
        );
        let listed = ask_engine(&machine.agent, "/containers/json?all=1").await?;
        anyhow::ensure!(listed.ends_with("[]\n"), "{listed}");

        only_iptables_lies_at_fixed_addresses(&machine.agent).await?;
        processes(&machine.agent).await?;
        missing_things_are_named(&machine.agent).await?;
        the_clock_is_the_hosts(&machine.agent).await?;
        one_engine_death_is_mended(&machine.agent, &mut watch).await?;
        run(&machine.agent, sh("echo kept > /var/lib/docker/kept"), b"").await?;
        anyhow::Ok(())
    }
    .await;
    if let Err(error) = outcome {
        let console = machine.console.last_lines(60).join("\n");
        machine.end().await?;
        return Err(error.context(console));
    }
    machine.agent.power_off().await?;
    let exit = timeout(BOOT_WITHIN, machine.gone()).await??;
    assert_eq!(exit.cause, ExitCause::GuestShutdown, "{}", exit.details);
    a_larger_disk_is_used_whole_and_a_guest_without_a_host_ends_itself(&mut home).await
}

/// Size of the data file system, in MiB.
const DISK_MIB: &str =
    "stat -f -c '%b %S' /var/lib/docker | { read blocks bytes; echo $((blocks * bytes / 1048576)); }";

async fn a_larger_disk_is_used_whole_and_a_guest_without_a_host_ends_itself(home: &mut Home) -> Result<()> {
    home.grow_disk(6 << 30)?;
    home.lonely_after = Some(Duration::from_secs(20));
    let machine = home.boot(2).await?;
    let mut watch = machine.agent.watch().await?;
    engine_becomes(&mut watch, |state| *state == EngineState::Ready).await?;
    let (text, _) = run(&machine.agent, sh(DISK_MIB), b"").await?;
    let mib: u64 = text.trim().parse()?;
    anyhow::ensure!((5_500..6_144).contains(&mib), "the file system has {mib} MiB");
    let kept = run(&machine.agent, sh("cat /var/lib/docker/kept"), b"").await?;
    anyhow::ensure!(kept == ("kept\n".to_owned(), 0), "{kept:?}");

    machine.agent.close().await;
    let console = machine.console.clone();
    let gone = timeout(BOOT_WITHIN, machine.gone()).await;
    let lives_on = || format!("a guest without a host lives on:\n{}", console.last_lines(60).join("\n"));
    let exit = gone.with_context(lives_on)??;
    assert_eq!(exit.cause, ExitCause::GuestShutdown, "{}", exit.details);
    Ok(())
}

/// And only where the CPU is emulated.
async fn only_iptables_lies_at_fixed_addresses(agent: &Agent) -> Result<()> {
    let (cpu, _) = run(agent, sh("cat /proc/cpuinfo"), b"").await?;
    let (environment, _) =
        run(agent, sh("tr '\\0' '\\n' < /proc/$(cat /run/docker.pid)/environ"), b"").await?;
    let is_found_first = environment.lines().any(|line| line.starts_with("PATH=/run/dormouse/fixed:"));
    anyhow::ensure!(is_found_first == cpu.contains("QEMU TCG CPU"), "{environment}");
    let random =
        "cd /proc; cat $(cat /run/docker.pid)/personality self/personality sys/kernel/randomize_va_space";
    let random = run(agent, sh(random), b"").await?;
    anyhow::ensure!(random == ("00000000\n00000000\n2\n".to_owned(), 0), "{random:?}");
    if is_found_first {
        for program in ["iptables", "ip6tables"] {
            let (version, status) =
                run(agent, sh(&format!("/run/dormouse/fixed/{program} --version")), b"").await?;
            anyhow::ensure!(status == 0 && version.starts_with(&format!("{program} v")), "{version}");
        }
        let (rules, status) = run(
            agent,
            sh("/run/dormouse/fixed/iptables -S DOCKER-USER; /run/dormouse/fixed/iptables -S NO"),
            b"",
        )
        .await?;
        anyhow::ensure!(rules.contains("-A DOCKER-USER -j RETURN") && status == 1, "{rules} {status}");
    }
    Ok(())
}

async fn processes(agent: &Agent) -> Result<()> {
    let (text, status) = run(agent, sh("cat; echo err >&2; exit 7"), b"through the pipe\n").await?;
    anyhow::ensure!(
        text.contains("through the pipe") && text.contains("err") && status == 7,
        "{text} {status}"
    );
    let tty = RunProcess { tty: Some(TerminalSize { rows: 33, columns: 77 }), ..sh("stty size; tty") };
    let (text, status) = run(agent, tty, b"").await?;
    anyhow::ensure!(text.contains("33 77") && text.contains("/dev/pts/") && status == 0, "{text} {status}");
    let user = RunProcess {
        user: Some("nobody".into()),
        env: vec!["GREETING=hi".into()],
        cwd: Some("/tmp".into()),
        ..sh("id -u; echo $GREETING; pwd; kill -9 $$")
    };
    let (text, status) = run(agent, user, b"").await?;
    anyhow::ensure!(text == "65534\nhi\n/tmp\n" && status == 137, "{text} {status}");
    Ok(())
}

async fn missing_things_are_named(agent: &Agent) -> Result<()> {
    let process = RunProcess { argv: vec!["/no/such".into()], ..RunProcess::default() };
    let error = agent.run(process).await.err().context("it ran")?;
    anyhow::ensure!(error.to_string().contains("/no/such"), "{error}");
    let error = agent.dial(Target::Unix("/no/such".into())).await.err().context("it connected")?;
    anyhow::ensure!(error.to_string().contains("No such file"), "{error}");
    Ok(())
}

async fn the_clock_is_the_hosts(agent: &Agent) -> Result<()> {
    agent.set_clock(2_000_000_000_000_000_000).await?;
    let (text, _) = run(agent, sh("date +%s"), b"").await?;
    let seconds: u64 = text.trim().parse()?;
    anyhow::ensure!((2_000_000_000..2_000_000_030).contains(&seconds), "{seconds}");
    Ok(())
}

async fn one_engine_death_is_mended(agent: &Agent, watch: &mut Watch) -> Result<()> {
    let (text, status) = run(agent, sh("kill -9 $(cat /run/docker.pid)"), b"").await?;
    anyhow::ensure!(status == 0, "{text}");
    let state = engine_becomes(watch, |state| matches!(state, EngineState::Restarting { .. })).await?;
    anyhow::ensure!(format!("{state:?}").contains("dockerd"), "{state:?}");
    engine_becomes(watch, |state| *state == EngineState::Ready).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_comes_back_finds_the_same_boot() -> Result<()> {
    let home = Home::new()?;
    let machine = home.boot(1).await?;
    let first = machine.agent.hello("first").await?;
    let agent = machine.agent.clone();
    let dormouse_vm_tests::Machine { .. } = &machine;
    drop(agent);
    let again = reconnect(&machine).await;
    machine.end().await?;
    let (boot, again) = (boot_of(&first), boot_of(&again?));
    assert_eq!(boot, again);
    Ok(())
}

async fn reconnect(machine: &dormouse_vm_tests::Machine) -> Result<dormouse_agent_proto::Answer> {
    machine.agent.close().await;
    let agent = greet(&machine.vm).await?;
    Ok(agent.hello("second").await?)
}

fn boot_of(answer: &dormouse_agent_proto::Answer) -> Option<String> {
    match answer {
        dormouse_agent_proto::Answer::Hello { boot, .. } => Some(boot.clone()),
        _ => None,
    }
}
