//! An IDE that looks at a sleeping session all the time, beside an echo server that shows what this machine can do.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::CreateSession;

use crate::client::Client;
use crate::stage::{Stage, host_of};

/// Reads of an IDE that polls.
const READS_A_SECOND: u32 = 10;

/// How long something took that was done often.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    /// Half of them took no longer.
    pub median: Duration,
    /// 99 of 100 took no longer.
    pub p99: Duration,
}

impl Spread {
    fn of(mut took: Vec<Duration>) -> Self {
        took.sort();
        Self { median: took[took.len() / 2], p99: took[took.len() * 99 / 100] }
    }
}

/// Reads one target of a sleeping session at an IDE's pace, each over a connection of its own, and tells how long it took,
/// and an exchange of as many bytes with an echo server at the same moment.
///
/// # Errors
/// When one read isn't answered asleep.
pub fn poll(docker_socket: &Path, target: &str, time: Duration) -> Result<[Spread; 2]> {
    let folder = tempfile::tempdir()?;
    let echo = folder.path().join("echo");
    let listener = UnixListener::bind(&echo)?;
    std::thread::spawn(move || serve_echo(&listener));
    let length = {
        let response = Client::connect(docker_socket)?.ask("GET", target)?;
        response.head.len() + response.body.len()
    };
    let (begun, mut reads, mut echoes) = (Instant::now(), Vec::new(), Vec::new());
    for number in 0.. {
        let due = begun + number * Duration::from_secs(1) / READS_A_SECOND;
        if due >= begun + time {
            break;
        }
        std::thread::park_timeout(due.saturating_duration_since(Instant::now()));
        let asked = Instant::now();
        let response = Client::connect(docker_socket)?.ask("GET", target)?;
        reads.push(asked.elapsed());
        ensure!(response.is_asleep(), "{response:?}");
        let asked = Instant::now();
        exchange(&echo, length)?;
        echoes.push(asked.elapsed());
    }
    ensure!(reads.len() > 200, "{} reads", reads.len());
    println!("figure: reads while asleep = {}", reads.len());
    let spreads = [Spread::of(reads), Spread::of(echoes)];
    for (name, spread) in ["a read while asleep", "the same bytes echoed"].into_iter().zip(&spreads) {
        println!("figure: median of {name} = {} us", spread.median.as_micros());
        println!("figure: p99 of {name} = {} us", spread.p99.as_micros());
    }
    Ok(spreads)
}

/// Connects so often to a session whose host lingers 0 s, one client after the other: each is served, by this host or the
/// next. The session never ran, and what is asked needs no VM.
///
/// # Errors
/// When one isn't served, or no host leaves.
pub fn connect_often(connects: usize) -> Result<()> {
    let stage = Stage::with(&[("DORM_LINGER", "0".into())])?;
    let wish = CreateSession::named("default".parse()?);
    let session = tokio::runtime::Handle::current().block_on(stage.make(&wish))?;
    let (mut hosts, mut last) = (0, None);
    let begun = Instant::now();
    for number in 0..connects {
        let response = Client::connect(&session.docker_socket)
            .and_then(|mut client| client.ask("GET", "/_ping"))
            .with_context(|| format!("client {number} was not served\n{}", stage.logs(&session)))?;
        ensure!(response.status == 200 && response.is_asleep(), "client {number}: {response:?}");
        // Half of them come at once, while the host is leaving.
        if number % 2 == 0 {
            let host = host_of(&session).ok();
            if host.is_some() && host != last {
                (hosts, last) = (hosts + 1, host);
            }
        }
    }
    println!("figure: {connects} clients of hosts that leave at once = {} ms", begun.elapsed().as_millis());
    println!("figure: hosts that were seen = {hosts}");
    ensure!(hosts > connects / 100, "only {hosts} hosts: nobody left");
    Ok(())
}

fn serve_echo(listener: &UnixListener) {
    while let Ok((mut stream, _)) = listener.accept() {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
    }
}

fn exchange(socket: &Path, length: usize) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    let mut bytes = vec![7; length];
    stream.write_all(&bytes)?;
    stream.read_exact(&mut bytes).context("the echo broke off")
}
