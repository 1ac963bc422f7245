//! What leads to a session's engine and between engines: `docker-env`, `dial-stdio` and `import-docker`, with a service and
//! engines that only answer.
#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

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
    // Also by who forgets the quotes, which makes one line of it.
    for eval in ["eval \"$1\"", "eval $1"] {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{eval}; env | grep ^DOCKER_"), "sh", &script]);
        for name in ["DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"] {
            shell.env(name, "elsewhere");
        }
        let led = text(shell.output().unwrap().stdout);
        assert_eq!(led, format!("DOCKER_HOST=unix://{}\n", home.at("docker.sock").display()), "{eval}");
    }
}

#[test]
fn dockers_client_uses_its_default_context_once_ours_is_removed() {
    let home = Home::new("running");
    let docker_context = |what: &str| {
        let mut dorm = home.dorm(&["docker-context", what]);
        dorm.env("DOCKER_CONFIG", home.folder.path()).stdin(Stdio::null()).output().unwrap()
    };
    assert_eq!(text(docker_context("install").stdout), "dorm\n");
    assert_eq!(text(docker_context("install").stdout), "dorm\n", "ours is replaced");
    let config = home.at("config.json");
    std::fs::write(&config, r#"{ "currentContext": "dorm", "psFormat": "x" }"#).unwrap();
    let removed = docker_context("remove");
    assert_eq!(
        (text(removed.stdout), text(removed.stderr)),
        ("dorm\n".to_owned(), "dorm was in use: docker uses its default context again\n".to_owned())
    );
    let left: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    assert_eq!(left, json!({ "psFormat": "x" }));
    let again = text(docker_context("remove").stderr);
    assert!(again.starts_with("error: there is no context \"dorm\"\n"), "{again}");
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

fn body(asked: &Asked, line: &str) -> Vec<u8> {
    let asked = asked.lock().unwrap();
    let request = asked.iter().find(|request| request.line == line);
    request.unwrap_or_else(|| panic!("nobody asked for {line}")).body.clone()
}

/// Where holders have their volume.
const PLACE: &str = "/dorm-import";

/// An engine that has these containers, images and volumes. Whatever is made in it is called `made`.
fn engine(socket: &Path, header: &'static str, has: Value, archive: &'static [u8]) -> Asked {
    serve(socket, move |request| {
        let (method, path) = request.line.split_once(' ').unwrap();
        let path = path.split('?').next().unwrap();
        match (method, path) {
            ("GET", "/_ping") => (200, header, b"OK".to_vec()),
            ("GET", "/containers/json" | "/images/json" | "/volumes") => ok(&has[path]),
            ("GET", "/containers/made/archive") => (200, "", archive.to_vec()),
            ("GET", _) if has.get(path).is_some() => ok(&has[path]),
            ("GET", "/images/get") => ok("an archive"),
            ("GET", _) => not_found(),
            ("POST", "/containers/create") => (201, "", br#"{"Id":"made"}"#.to_vec()),
            _ => ok(""),
        }
    })
}

/// A holder, with a volume that its image made it have.
fn holder(id: &str, volume: &str) -> Value {
    json!({ "Id": id, "Mounts": [
        { "Type": "volume", "Name": volume, "Destination": PLACE },
        { "Type": "volume", "Name": format!("{id}-anonymous"), "Destination": "/data" },
        { "Type": "tmpfs", "Destination": "/t" },
    ] })
}

fn other_engine(home: &Home, header: &'static str, archive: &'static [u8]) -> Asked {
    let has = json!({
        "/containers/json": [{ "Id": "left" }],
        "/containers/left/json": holder("left", "kept"),
        "/containers/made/json": holder("made", "kept"),
        "/images/json": [
            { "Id": "sha256:aa", "RepoTags": ["one:latest", "two:latest"], "RepoDigests": ["one@sha256:11"] },
            { "Id": "sha256:bb", "RepoTags": null, "RepoDigests": ["three@sha256:22"] },
            { "Id": "sha256:cc", "RepoTags": ["<none>:<none>"], "RepoDigests": ["<none>@<none>"] },
        ],
        "/volumes": { "Volumes": [
            { "Name": "kept", "Driver": "local", "Labels": { "a": "b" } }, { "Name": "far", "Driver": "nfs" },
        ] },
    });
    engine(&home.at("other.sock"), header, has, archive)
}

/// One with an image that isn't the first engine's.
fn own_engine(home: &Home, left: &Value) -> Asked {
    let mut has = json!({
        "/containers/json": left,
        "/containers/made/json": holder("made", "kept"),
        "/images/json": [{ "Id": "sha256:ee" }],
    });
    for holder in left.as_array().unwrap() {
        has[format!("/containers/{}/json", holder["Id"].as_str().unwrap())] = holder.clone();
    }
    engine(&home.at("docker.sock"), "", has, b"")
}

fn import(home: &Home, options: &[&str]) -> Output {
    let socket = home.at("other.sock").display().to_string();
    home.run(&[&["import-docker", "--from", &socket], options].concat())
}

#[test]
fn volumes_come_as_they_are_and_nothing_is_left_behind() {
    let home = Home::new("running");
    let archive = b"dorm-import/ with its owners";
    let other = other_engine(&home, "", archive);
    let own = own_engine(&home, &json!([holder("half", "broken")]));
    let output = import(&home, &["--no-images"]);
    let (said, warned) = (text(output.stdout), text(output.stderr));
    assert_eq!(said, "volume kept\n");
    assert_eq!(warned, "warning: volume far: it is no plain folder of the engine's\n");
    let filter = |value: &str| {
        format!(
            "GET /containers/json?all=1&filters=%7B%22label%22%3A%5B%22dormouse.import%3D{value}%22%5D%7D"
        )
    };
    assert_eq!(
        lines(&other),
        [
            "GET /_ping",
            &filter("7-default"),
            "GET /containers/left/json",
            "DELETE /containers/left",
            "DELETE /volumes/left-anonymous",
            "GET /volumes",
            "GET /images/json",
            "POST /containers/create?name=dorm-export-7-default-kept",
            "GET /containers/made/archive?path=%2Fdorm-import",
            "GET /containers/made/json",
            "DELETE /containers/made",
            "DELETE /volumes/made-anonymous",
        ]
    );
    assert_eq!(
        lines(&own),
        [
            &*filter("into"),
            "GET /containers/half/json",
            "DELETE /containers/half",
            "DELETE /volumes/half-anonymous",
            "DELETE /volumes/broken",
            "GET /volumes/kept",
            "POST /volumes/create",
            "GET /images/json",
            "POST /containers/create?name=dorm-import-kept",
            "PUT /containers/made/archive?path=%2F",
            "GET /containers/made/json",
            "DELETE /containers/made",
            "DELETE /volumes/made-anonymous",
        ]
    );
    assert_eq!(body(&own, "PUT /containers/made/archive?path=%2F"), archive);
    let json = |asked: &Asked, line: &str| serde_json::from_slice::<Value>(&body(asked, line)).unwrap();
    let wish = |image: &str, whose: &str, bind: &str| {
        json!({
            "Image": image, "Cmd": ["true"], "User": "0", "Labels": { "dormouse.import": whose },
            "HostConfig": { "Binds": [bind], "NetworkMode": "none" },
        })
    };
    let exported = json(&other, "POST /containers/create?name=dorm-export-7-default-kept");
    assert_eq!(exported, wish("sha256:aa", "7-default", "kept:/dorm-import:ro"));
    let imported = json(&own, "POST /containers/create?name=dorm-import-kept");
    assert_eq!(imported, wish("sha256:ee", "into", "kept:/dorm-import"));
}

#[test]
fn what_podman_roots_elsewhere_comes_to_its_place_and_that_owners_do_not_is_told() {
    let home = Home::new("running");
    other_engine(&home, "Libpod-Api-Version: 5.4.2\r\n", b"/ and /file");
    let own = own_engine(&home, &json!([]));
    let output = import(&home, &["--no-images"]);
    let warned = text(output.stderr);
    assert!(warned.contains("podman's socket doesn't tell whose a volume's files are"), "{warned}");
    assert_eq!(body(&own, "PUT /containers/made/archive?path=%2Fdorm-import"), b"/ and /file");
}

#[test]
fn images_without_a_tag_come_by_their_id_and_those_without_any_name_are_counted() {
    let home = Home::new("running");
    let other = other_engine(&home, "", b"");
    let own = own_engine(&home, &json!([]));
    let output = import(&home, &["--no-volumes"]);
    assert!(output.status.success(), "{}", text(output.stderr));
    assert_eq!(
        text(output.stdout),
        "image three@sha256:22: comes without its digest, as sha256:bb\n\
         images without a name, left where they are: 1\n"
    );
    let gotten: Vec<_> = lines(&other).into_iter().filter(|line| line.contains("/images/get")).collect();
    let names = ["names=one%3Alatest&names=two%3Alatest", "names=sha256%3Abb"];
    assert_eq!(gotten, names.map(|names| format!("GET /images/get?{names}")));
    assert_eq!(body(&own, "POST /images/load?quiet=1"), b"an archive");
}

#[test]
fn a_volume_that_does_not_come_to_be_whole_goes_again() {
    let home = Home::new("running");
    other_engine(&home, "", b"");
    let has = json!({
        "/containers/json": [], "/containers/made/json": holder("made", "kept"), "/images/json": [],
    });
    let own = engine(&home.at("docker.sock"), "", has, b"");
    let output = import(&home, &["--no-images"]);
    let warned = text(output.stderr);
    assert!(warned.contains("volume kept: an engine without any image"), "{warned}");
    assert_eq!(lines(&own).last().map(String::as_str), Some("DELETE /volumes/kept"));
}
