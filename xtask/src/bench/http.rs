//! The least of HTTP: one request on a connection of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::ANSWER_WITHIN;

/// Longest answer, in bytes.
const ANSWER_BYTES_MAX: u64 = 1024 * 1024;

/// The bytes of a request.
pub(super) fn request(method: &str, path: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Asks, and waits for the end of the answer; one that is no success is an error.
pub(super) fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Result<Value> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("can't reach {}", socket.display()))?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    stream.write_all(request(method, path, body).as_bytes())?;
    let mut answer = String::new();
    stream
        .take(ANSWER_BYTES_MAX)
        .read_to_string(&mut answer)
        .with_context(|| format!("no answer to {path}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").context("what came is no HTTP")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    ensure!(status.starts_with('2'), "{method} {path} was answered {status}: {body}");
    // A chunked body's sizes stand on lines of their own, and JSON of ours begins a line.
    match body.find(['{', '[']) {
        Some(begin) => {
            let mut values = serde_json::Deserializer::from_str(&body[begin..]).into_iter::<Value>();
            values.next().context("the answer is empty")?.context("the answer is no JSON")
        }
        None => Ok(Value::Null),
    }
}

/// The JSON lines of an answer that doesn't end.
pub(super) fn lines(socket: &Path, path: &str) -> Result<impl Iterator<Item = Value> + use<>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    stream.write_all(request("GET", path, "").as_bytes())?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if !line.contains(" 200 ") {
        bail!("{path} was answered {line}");
    }
    let json = |line: std::io::Result<String>| serde_json::from_str::<Value>(&line.ok()?).ok();
    Ok(reader.lines().filter_map(json).filter(Value::is_object))
}
