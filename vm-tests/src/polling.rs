//! An IDE that looks at a sleeping session all the time, beside an echo server that shows what this machine can do.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::client::Client;

/// Reads of an IDE that polls.
const READS_A_SECOND: u32 = 10;

/// Reads one target of a sleeping session at an IDE's pace, each over a connection of its own, and tells how long it took,
/// beside an exchange of as many bytes with an echo server at the same moment.
///
/// # Errors
/// When one read isn't answered asleep.
pub fn poll(docker_socket: &Path, target: &str, time: Duration) -> Result<()> {
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
    for (name, took) in [("a read while asleep", &mut reads), ("the same bytes echoed", &mut echoes)] {
        took.sort();
        for (share, at) in [("median", took.len() / 2), ("p99", took.len() * 99 / 100)] {
            println!("figure: {share} of {name} = {} us", took[at].as_micros());
        }
    }
    println!("figure: reads while asleep = {}", reads.len());
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
