//! Stands for ryuk, whose image can't be had from Debian: what testcontainers starts first, and tells what belongs to a
//! program. When the program has gone, however it went, what belongs to it goes too. Compiled by the test that makes an
//! image of it, where nothing but this program is.
//!
//! As ryuk does it: a client of port 8080 sends filters, `label=KEY=VALUE` a line, each answered with `ACK`; when it hangs up,
//! the engine whose socket is mounted here is asked for what they match. Ryuk waits a while for another client, this doesn't.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

/// What is removed: where it is, what lists it there, and how one is removed.
const KINDS: [(&str, &str, &str); 2] = [("/containers", "/json", "?force=1&v=1"), ("/networks", "", "")];

fn main() -> io::Result<()> {
    let listener = TcpListener::bind("0.0.0.0:8080")?;
    println!("reaper: Started!");
    let (client, _) = listener.accept()?;
    for label in labels(client)? {
        for (kind, list, how) in KINDS {
            let filter = format!("%7B%22label%22%3A%5B%22{label}%22%5D%7D");
            let listed = ask("GET", &format!("{kind}{list}?all=1&filters={filter}"))?;
            for after in listed.split("\"Id\":\"").skip(1) {
                let id = after.split('"').next().unwrap_or_default();
                ask("DELETE", &format!("{kind}/{id}{how}"))?;
            }
        }
    }
    Ok(())
}

/// Reads filters until the client hangs up, or is gone.
fn labels(mut client: TcpStream) -> io::Result<Vec<String>> {
    let mut labels = Vec::new();
    for line in BufReader::new(client.try_clone()?).lines() {
        let Ok(line) = line else { break };
        if let Some(label) = line.strip_prefix("label=") {
            labels.push(label.to_owned());
            client.write_all(b"ACK\n")?;
        }
    }
    Ok(labels)
}

fn ask(method: &str, target: &str) -> io::Result<String> {
    let mut engine = UnixStream::connect("/var/run/docker.sock")?;
    write!(engine, "{method} {target} HTTP/1.0\r\nHost: docker\r\n\r\n")?;
    let mut answer = String::new();
    engine.read_to_string(&mut answer)?;
    match answer.split(' ').nth(1) {
        Some(status) if status.starts_with('2') => Ok(answer),
        _ => Err(io::Error::other(format!("{method} {target}: {answer}"))),
    }
}
