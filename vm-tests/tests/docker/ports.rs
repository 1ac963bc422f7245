//! Published ports, from the host's side.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dormouse_api::SessionInfo;
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, fall_asleep, host_of, inspect};
use dormouse_vm_tests::{fetch, figure, project};

/// Longest wait for a byte, which may have to wake a VM first.
const BYTE_WITHIN: Duration = Duration::from_secs(300);

const SERVER: &str = "echo served > /index.html; exec httpd -f -p 80 -h /";

/// A number that was free a moment ago.
fn free() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Three numbers, of which somebody else has the first.
fn range_behind_a_taken_number() -> Result<(TcpListener, RangeInclusive<u16>)> {
    for _ in 0..100 {
        let taken = TcpListener::bind("127.0.0.1:0")?;
        let first = taken.local_addr()?.port();
        let others = [1, 2].map(|more| TcpListener::bind(("127.0.0.1", first.saturating_add(more))).ok());
        if others.iter().all(Option::is_some) {
            return Ok((taken, first..=first + 2));
        }
    }
    bail!("no three numbers in a row are free");
}

fn is_open(address: SocketAddr) -> bool {
    TcpStream::connect_timeout(&address, BYTE_WITHIN).is_ok()
}

/// Its container was running when it fell asleep, and its host has left.
pub(crate) async fn a_knock_wakes_whoever_is_behind_the_door(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    server(stage, session, "web", "80").await?;
    let told = stage.succeed(session, &["port", "web", "80/tcp"]).await?;
    let number = told.lines().next().and_then(|line| line.rsplit_once(':')).context("no port")?.1.trim();
    fall_asleep(session).await?;
    let before = inspect(session).await?;
    let left = async {
        while host_of(session).is_ok() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    tokio::time::timeout(STATE_WITHIN, left).await.context("its host never leaves")?;
    let address = format!("127.0.0.1:{number}");
    let begun = Instant::now();
    let page = tokio::task::spawn_blocking(move || fetch(&address)).await?;
    let page = page.with_context(|| stage.logs(session))?;
    figure("a knock at a sleeping session without a host is answered", begun.elapsed());
    ensure!(page.ends_with("served\n"), "{page}");
    let after = inspect(session).await?;
    ensure!(
        after.vm.generation == before.vm.generation + 1 && after.incarnation == before.incarnation,
        "{after:?}"
    );
    stage.succeed(session, &["rm", "--force", "web"]).await?;
    Ok(())
}

async fn server(stage: &Stage, session: &SessionInfo, name: &str, publish: &str) -> Result<String> {
    let arguments = ["run", "--detach", "--name", name, "--publish", publish, "busybox", "sh", "-c", SERVER];
    stage.succeed(session, &arguments).await
}

/// All of it with a VM that is awake: who knocks at a sleeping one is shown with a scripted VM.
pub(crate) async fn ports_are_published_on_the_host(stage: &Stage, session: &SessionInfo) -> Result<()> {
    // A number of the host's choice is the one that clients are told.
    server(stage, session, "any", "80").await?;
    let told = stage.succeed(session, &["port", "any", "80/tcp"]).await?;
    let number = told.lines().next().and_then(|line| line.rsplit_once(':')).context("no port")?.1.trim();
    ensure!(fetch(&format!("127.0.0.1:{number}"))?.ends_with("served\n"), "{told}");

    // A given one; on this host only, unless more was asked for.
    let given = free()?;
    server(stage, session, "given", &format!("{given}:80")).await?;
    ensure!(fetch(&format!("127.0.0.1:{given}"))?.ends_with("served\n"));
    let told = stage.succeed(session, &["port", "given"]).await?;
    ensure!(told == format!("80/tcp -> 127.0.0.1:{given}\n"), "{told}");
    ensure!(!is_open(format!("127.0.0.2:{given}").parse()?), "more is open than was asked for");
    let wide = free()?;
    server(stage, session, "wide", &format!("0.0.0.0:{wide}:80")).await?;
    ensure!(fetch(&format!("127.0.0.2:{wide}"))?.ends_with("served\n"));
    server(stage, session, "six", &format!("[::1]:{wide}:80")).await?;
    ensure!(fetch(&format!("[::1]:{wide}"))?.ends_with("served\n"));
    stage.succeed(session, &["rm", "--force", "six"]).await?;

    // One of several: the next that neither another container nor another program of the host has.
    let (taken, range) = range_behind_a_taken_number()?;
    for name in ["first", "second"] {
        server(stage, session, name, &format!("{}-{}:80", range.start(), range.end())).await?;
        let told = stage.succeed(session, &["port", name]).await?;
        let next = range.start() + if name == "first" { 1 } else { 2 };
        ensure!(told == format!("80/tcp -> 127.0.0.1:{next}\n"), "{told}");
        ensure!(fetch(&format!("127.0.0.1:{next}"))?.ends_with("served\n"));
    }
    let whole = format!("{}-{}:80", range.start(), range.end());
    let full = stage.run(session, &["run", "--publish", &whole, "busybox", "true"]).await?;
    let errors = String::from_utf8_lossy(&full.stderr);
    ensure!(full.status.code() == Some(125) && errors.contains("address already in use"), "{errors}");
    drop(taken);

    // All that the image and the client name.
    let all = [
        "run",
        "--detach",
        "--name",
        "all",
        "--publish-all",
        "--expose",
        "80",
        "busybox",
        "sh",
        "-c",
        SERVER,
    ];
    stage.succeed(session, &all).await?;
    let told = stage.succeed(session, &["port", "all"]).await?;
    let number = told.trim().strip_prefix("80/tcp -> 127.0.0.1:").with_context(|| told.clone())?;
    ensure!(fetch(&format!("127.0.0.1:{number}"))?.ends_with("served\n"), "{told}");
    stage.succeed(session, &["rm", "--force", "first", "second", "all"]).await?;

    // Taken by another container, and by another program of the host.
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let number = taken.local_addr()?.port();
    let twice = [format!("{given}:80"), format!("{number}:80")];
    let arguments = |publish| ["run", "--detach", "--publish", publish, "busybox", "true"];
    let allocated = stage.run(session, &arguments(&twice[0])).await?;
    let errors = String::from_utf8_lossy(&allocated.stderr);
    ensure!(allocated.status.code() == Some(125) && errors.contains("port is already allocated"), "{errors}");
    let bound = stage.run(session, &arguments(&twice[1])).await?;
    let errors = String::from_utf8_lossy(&bound.stderr);
    ensure!(bound.status.code() == Some(125) && errors.contains("address already in use"), "{errors}");
    let running = stage.succeed(session, &["ps", "--quiet"]).await?;
    ensure!(running.lines().count() == 3, "who could not be published runs: {running}");

    stage.succeed(session, &["rm", "--force", "any", "given", "wide"]).await?;
    let closed = async {
        while is_open(format!("127.0.0.1:{given}").parse()?) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    };
    tokio::time::timeout(BYTE_WITHIN, closed).await.context("a door stays open without its container")?
}

/// There and back, as many bytes as go into one.
pub(crate) async fn datagrams_are_forwarded(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let program = stage.home().join("udp-echo");
    let mut compiler = Command::new("rustc");
    compiler.args(["--edition", "2024", "-C", "target-feature=+crt-static", "-o"]).arg(&program);
    ensure!(compiler.arg(project().join("vm-tests/udp_echo.rs")).status()?.success(), "rustc fails");
    stage.succeed(session, &["create", "--name", "udp", "--publish", "7/udp", "busybox", "/echo"]).await?;
    stage.succeed(session, &["cp", &program.to_string_lossy(), "udp:/echo"]).await?;
    stage.succeed(session, &["start", "udp"]).await?;
    let told = stage.succeed(session, &["port", "udp", "7/udp"]).await?;
    let number = told.lines().next().and_then(|line| line.rsplit_once(':')).context("no port")?.1.trim();
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(format!("127.0.0.1:{number}"))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    for length in [1, 1400, 65_507] {
        let sent: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
        let (begun, mut back) = (Instant::now(), vec![0; 65_507]);
        // A datagram may be lost, and the program may not listen yet.
        let count = loop {
            socket.send(&sent)?;
            match socket.recv(&mut back) {
                Ok(count) if count == length => break count,
                _ => ensure!(begun.elapsed() < BYTE_WITHIN, "no datagram of {length} bytes comes back"),
            }
        };
        ensure!(back[..count] == sent, "other bytes come back");
    }
    stage.succeed(session, &["rm", "--force", "udp"]).await?;
    Ok(())
}
