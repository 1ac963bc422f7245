//! What leads to a session's engine: `docker-env` and `dial-stdio`, with a service and engines that only answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;

/// What a client asked for.
struct Request {
    /// Method and path, as in `GET /_ping`.
    line: String,
    body: Vec<u8>,
}

/// A status, a header and a body.
type Answer = (u16, &'static str, Vec<u8>);

fn ok(body: impl ToString) -> Answer {
    (200, "", body.to_string().into_bytes())
}

fn not_found() -> Answer {
    (404, "", br#"{"message":"no such thing"}"#.to_vec())
}

/// Everything that one service was asked for, in order.
type Asked = Arc<Mutex<Vec<Request>>>;

/// Listens on a socket for as long as the tests run.
fn serve(socket: &Path, answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Asked {
    let listener = UnixListener::bind(socket).unwrap();
    let asked = Asked::default();
    let (log, answer) = (Arc::clone(&asked), Arc::new(answer));
    thread::spawn(move || {
        for client in listener.incoming() {
            let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
            thread::spawn(move || answer_one(client.unwrap(), &log, &*answer));
        }
    });
    asked
}

fn answer_one(mut client: UnixStream, log: &Asked, answer: &dyn Fn(&Request) -> Answer) {
    let mut reader = BufReader::new(client.try_clone().unwrap());
    let Some(request) = read(&mut reader) else { return };
    let (status, header, body) = answer(&request);
    log.lock().unwrap().push(request);
    let upgrade = if status == 101 { "Connection: upgrade\r\nUpgrade: dorm-hold\r\n" } else { "" };
    let length = if status == 101 { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    let head = format!("HTTP/1.1 {status} x\r\n{upgrade}{header}{length}\r\n");
    let _ = client.write_all(&[head.as_bytes(), &body].concat());
    // A token is held until its client goes.
    let _ = reader.read_to_end(&mut Vec::new());
}

fn read(reader: &mut impl BufRead) -> Option<Request> {
    let line = |reader: &mut dyn BufRead| {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        Some(line.trim_end().to_owned())
    };
    let first = line(reader)?;
    let (mut length, mut chunked) = (0, false);
    loop {
        let header = line(reader)?.to_ascii_lowercase();
        match header.split_once(": ") {
            None => break,
            Some(("content-length", value)) => length = value.parse().ok()?,
            Some(("transfer-encoding", "chunked")) => chunked = true,
            Some(_) => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    while chunked {
        let mut chunk = vec![0; usize::from_str_radix(&line(reader)?, 16).ok()?];
        chunked = !chunk.is_empty();
        reader.read_exact(&mut chunk).ok()?;
        line(reader)?;
        body.extend(chunk);
    }
    Some(Request { line: first.trim_end_matches(" HTTP/1.1").replace("/v1.45", ""), body })
}

fn lines(asked: &Asked) -> Vec<String> {
    asked.lock().unwrap().iter().map(|request| request.line.clone()).collect()
}

/// A home with a service that has one session.
struct Home {
    folder: tempfile::TempDir,
    /// What the session's host was asked for.
    host: Asked,
}

impl Home {
    fn new(state: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("run")).unwrap();
        let since = "2026-01-01T00:00:00Z";
        let mut info = json!({
            "name": "default", "id": "00000000000000aa", "owner": 7, "state": state, "incarnation": 1,
            "vm": {
                "phase": "running", "generation": 1, "boot": null, "how": null, "start_count": 1, "boots": 1,
                "since": since, "deadline": null, "step": null, "acceleration": null, "cpus": 1, "memory_mib": 512,
            },
            "holds": [], "idle": { "timeout_seconds": 30, "action": "suspend" },
            "network": { "kind": "none", "host_loopback": false },
            "storage": { "path": "/s", "size_bytes": 0, "used_bytes": 0 },
            "termination": { "reason": "Shutdown", "details": "", "at": since },
            "docker_socket": at("docker.sock"), "control_socket": at("control.sock"),
        });
        let known = info.to_string();
        info["state"] = "running".into();
        let started = info.to_string();
        serve(&at("run/dormd.sock"), move |_| ok(&known));
        let host = serve(&at("control.sock"), move |request| match &*request.line {
            "POST /v1/session/start" => ok(&started),
            "POST /v1/hold" => (101, "", Vec::new()),
            _ => ok(""),
        });
        Self { folder, host }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn dorm(&self, arguments: &[&str]) -> Command {
        let mut dorm = Command::new(env!("CARGO_BIN_EXE_dorm"));
        dorm.args(arguments).env("DORM_HOME", self.folder.path()).env_remove("DORM_SESSION");
        dorm
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.dorm(arguments).stdin(Stdio::null()).output().unwrap()
    }
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_shell_is_led_to_the_session_whatever_it_was_led_to_before() {
    let home = Home::new("running");
    let script = text(home.run(&["docker-env"]).stdout);
    let mut shell = Command::new("sh");
    shell.args(["-c", "eval \"$1\"; env | grep ^DOCKER_", "sh", &script]);
    for name in ["DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"] {
        shell.env(name, "elsewhere");
    }
    let led = text(shell.output().unwrap().stdout);
    assert_eq!(led, format!("DOCKER_HOST=unix://{}\n", home.at("docker.sock").display()));
}

#[test]
fn who_comes_over_ssh_has_the_default_session_opened_again() {
    let home = Home::new("terminated");
    serve(&home.at("docker.sock"), |_| ok("OK"));
    let mut dial = home.dorm(&["dial-stdio"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    dial.stdin.take().unwrap().write_all(b"GET /_ping HTTP/1.1\r\n\r\n").unwrap();
    let output = dial.wait_with_output().unwrap();
    assert!(output.status.success() && text(output.stdout).ends_with("OK"));
    assert_eq!(lines(&home.host), ["POST /v1/session/start"]);
}
