mod creates;
mod patience;

use std::future::Future;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{DuplexStream, duplex};
use tokio::sync::watch;

use super::*;
use crate::engine::Refusal;
use crate::mounts::{Bind, Given, Mount};
use crate::publish::AnyPort;

/// Who has which numbers.
type Numbers = Arc<Mutex<Vec<(String, Vec<u16>)>>>;

/// An engine whose connections are handed to a script.
#[derive(Clone)]
struct Script {
    dials: mpsc::Sender<DuplexStream>,
    held: watch::Sender<usize>,
    refusal: Option<Refusal>,
    starts: Arc<AtomicUsize>,
    crashed: watch::Sender<bool>,
    given: Arc<Mutex<Vec<(String, String)>>>,
    numbers: Numbers,
}

const CRASHED: &str = "the VM crashed";

const WARNING: &str = "a volume\r\nX-Evil: is gone";

/// A lease; a strong one counts.
struct Held {
    script: Script,
    strong: bool,
    /// Are all connections to the engine in use?
    busy: bool,
    warnings: Vec<String>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.strong {
            self.script.held.send_modify(|held| *held -= 1);
        }
    }
}

impl Engine for Script {
    type Lease = Held;

    async fn answer(&self, request: &RequestHead, class: Class) -> Result<Option<Answer>, Refusal> {
        Ok(match (class, request.target.as_str()) {
            (Class::Reads, "/_ping") => {
                Some(Answer::Whole(Bytes::from_static(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK")))
            }
            (Class::Events, _) => {
                let (sender, chunks) = mpsc::channel(8);
                for event in ["{\"a\":1}\n", "{}\n"] {
                    sender.try_send(Bytes::from_static(event.as_bytes())).unwrap();
                }
                let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                Some(Answer::Stream(Bytes::from_static(head.as_bytes()), chunks))
            }
            _ => None,
        })
    }

    async fn lease(&self, request: &RequestHead, _: Class) -> Result<Held, Refusal> {
        if request.target == "/never" {
            std::future::pending::<()>().await;
        }
        match &self.refusal {
            Some(refusal) => Err(refusal.clone()),
            None => {
                self.held.send_modify(|held| *held += 1);
                let warnings =
                    if request.target.contains("woke") { vec![WARNING.to_owned()] } else { Vec::new() };
                let busy = request.target == "/busy";
                Ok(Held { script: self.clone(), strong: true, busy, warnings })
            }
        }
    }

    fn publish_address(&self) -> Option<IpAddr> {
        None
    }

    fn free_port(&self, _: AnyPort) -> Option<u16> {
        Some(20_000)
    }

    async fn started(&self) {
        self.starts.fetch_add(1, Ordering::SeqCst);
    }

    fn mount(&self, bind: Bind<'_>) -> Mount {
        match bind.source {
            "/here/docker.sock" => Mount::From("/run/docker.sock".to_owned()),
            source => Mount::Refused(format!("{source}: there are no folders")),
        }
    }

    fn take_back(&self, numbers: &[u16]) {
        self.numbers.lock().unwrap().push(("nobody".to_owned(), numbers.to_vec()));
    }

    async fn created(&self, container: &str, given: Vec<Given>, numbers: Vec<u16>) {
        self.numbers.lock().unwrap().push((container.to_owned(), numbers));
        self.given.lock().unwrap().extend(given.into_iter().map(|given| (container.to_owned(), given.path)));
    }

    fn restore(&self, answer: &[u8]) -> Option<Vec<u8>> {
        let text = String::from_utf8_lossy(answer);
        text.contains("/run/docker.sock")
            .then(|| text.replace("/run/docker.sock", "/here/docker.sock").into_bytes())
    }
}

impl Lease for Held {
    type Stream = DuplexStream;

    async fn dial(&self) -> io::Result<DuplexStream> {
        if self.busy {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "all are in use"));
        }
        let (ours, theirs) = duplex(1024);
        self.script.dials.send(theirs).await.map_err(io::Error::other)?;
        Ok(ours)
    }

    async fn exposed_ports(&self, image: &str) -> Vec<String> {
        vec![if image == "web" { "80/tcp" } else { "9/tcp" }.to_owned()]
    }

    async fn given_to(&self, container: &str) -> Result<Vec<Given>, Refusal> {
        match container {
            "nobody-knows" => Err(Refusal { status: 503, message: "all are in use".to_owned() }),
            "unknown" => Ok(Vec::new()),
            known => Ok(vec![Given { path: format!("/mnt/{known}"), make: false }]),
        }
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn ended(&self) -> impl Future<Output = String> + Send + 'static {
        let mut crashed = self.script.crashed.subscribe();
        async move {
            if crashed.wait_for(|crashed| *crashed).await.is_err() {
                std::future::pending::<()>().await;
            }
            CRASHED.to_owned()
        }
    }

    async fn weaken(mut self) -> Option<Self> {
        self.strong = false;
        self.script.held.send_modify(|held| *held -= 1);
        Some(self)
    }

    async fn strengthen(mut self) -> Option<Self> {
        if *self.script.crashed.borrow() {
            return None;
        }
        self.strong = true;
        self.script.held.send_modify(|held| *held += 1);
        Some(self)
    }
}

struct Stage {
    client: UnixStream,
    dials: mpsc::Receiver<DuplexStream>,
    held: watch::Sender<usize>,
    starts: Arc<AtomicUsize>,
    crashed: watch::Sender<bool>,
    given: Arc<Mutex<Vec<(String, String)>>>,
    numbers: Numbers,
    relay: tokio::task::JoinHandle<()>,
}

fn stage(refusal: Option<Refusal>) -> Stage {
    let (client, ours) = UnixStream::pair().unwrap();
    let (sender, dials) = mpsc::channel(8);
    let held = watch::channel(0).0;
    let starts = Arc::new(AtomicUsize::new(0));
    let crashed = watch::channel(false).0;
    let (given, numbers) = (Arc::default(), Arc::default());
    let script = Script {
        dials: sender,
        held: held.clone(),
        refusal,
        starts: Arc::clone(&starts),
        crashed: crashed.clone(),
        given: Arc::clone(&given),
        numbers: Arc::clone(&numbers),
    };
    Stage { client, dials, held, starts, crashed, given, numbers, relay: tokio::spawn(serve(ours, script)) }
}

impl Stage {
    /// Sends a request and gives the engine that it reached.
    async fn ask(&mut self, request: &str) -> DuplexStream {
        self.client.write_all(request.as_bytes()).await.unwrap();
        let mut engine = self.dials.recv().await.unwrap();
        expect(&mut engine, request).await;
        engine
    }

    fn held(&self) -> usize {
        *self.held.borrow()
    }

    async fn held_becomes(&self, count: usize) {
        self.held.subscribe().wait_for(|held| *held == count).await.unwrap();
    }

    /// The client goes, and nothing is held when the relay has seen it.
    async fn leave(self) {
        drop(self.client);
        self.relay.await.unwrap();
        assert_eq!(*self.held.borrow(), 0);
    }
}

async fn expect(stream: &mut (impl AsyncRead + Unpin), text: &str) {
    let mut bytes = vec![0; text.len()];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), text);
}

#[tokio::test]
async fn pipelined_requests_are_served_in_order_and_hold_nothing_between() {
    let mut stage = stage(None);
    let (first, second) = ("POST /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "GET /b HTTP/1.1\r\n\r\n");
    stage.client.write_all(format!("{first}{second}").as_bytes()).await.unwrap();
    for (request, answer) in [
        (first, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
        (second, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"),
    ] {
        let mut engine = stage.dials.recv().await.unwrap();
        expect(&mut engine, request).await;
        engine.write_all(answer.as_bytes()).await.unwrap();
        expect(&mut stage.client, answer).await;
    }
    stage.client.shutdown().await.unwrap();
    stage.relay.await.unwrap();
    assert_eq!(*stage.held.borrow(), 0);
}

#[tokio::test]
async fn warnings_are_told_in_the_answer_to_the_request_that_woke_and_can_forge_no_header() {
    let mut stage = stage(None);
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n";
    let told = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nDormouse-Warning: a volume  X-Evil: is gone\r\n\r\n";
    for (request, head) in [("GET /woke HTTP/1.1\r\n\r\n", told), ("GET /next HTTP/1.1\r\n\r\n", answer)] {
        let mut engine = stage.ask(request).await;
        engine.write_all(format!("{answer}ok").as_bytes()).await.unwrap();
        expect(&mut stage.client, &format!("{head}ok")).await;
    }
    stage.leave().await;
}

#[tokio::test]
async fn warnings_are_in_the_body_as_well_where_clients_show_them() {
    let created =
        |name| format!("POST /v1.45/containers/create?name={name} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}");
    let plain = "HTTP/1.1 201 Created\r\nApi-Version: 1.45\r\n";
    let header = "Dormouse-Warning: a volume  X-Evil: is gone\r\n";
    let body = r#"{"Id":"c1","Warnings":["a volume\r\nX-Evil: is gone"]}"#;
    let told = format!("{plain}{header}Content-Length: {}\r\n\r\n{body}", body.len());
    let body = r#"{"Id":"c1","Warnings":[]}"#;
    let length = format!("{plain}Content-Length: {}\r\n\r\n{body}", body.len());
    let chunked = format!("{plain}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let mut stage = stage(None);
    for (name, answer, told) in
        [("woke", &length, &told), ("woke", &chunked, &told), ("other", &length, &length)]
    {
        let mut engine = stage.ask(&created(name)).await;
        // In two pieces, as an engine may answer.
        let (first, second) = answer.split_at(answer.len() - 10);
        engine.write_all(first.as_bytes()).await.unwrap();
        tokio::task::yield_now().await;
        engine.write_all(second.as_bytes()).await.unwrap();
        expect(&mut stage.client, told).await;
    }
    // What isn't created has the engine's words.
    let mut engine = stage.ask(&created("woke")).await;
    let refused = "HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n";
    engine.write_all(format!("{refused}\r\nno").as_bytes()).await.unwrap();
    expect(&mut stage.client, &format!("{refused}{header}\r\nno")).await;
    stage.leave().await;
}

#[tokio::test]
async fn the_hosts_paths_are_told_where_the_engine_names_the_vms() {
    let mut stage = stage(None);
    let inside = r#"{"Source":"/run/docker.sock"}"#;
    let outside = inside.replace("/run", "/here");
    let plain = |body: &str| format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let chunked = |body: &str| {
        format!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
            body.len()
        )
    };
    for (target, answer, told) in [
        ("GET /containers/a/json", plain(inside), plain(&outside)),
        ("GET /v1.45/containers/json?all=1", chunked(inside), plain(&outside)),
        // What names none passes as it came.
        ("GET /volumes", chunked("{}"), chunked("{}")),
        ("GET /info", plain(inside), plain(inside)),
        ("GET /containers/a/logs", plain(inside), plain(inside)),
    ] {
        let mut engine = stage.ask(&format!("{target} HTTP/1.1\r\n\r\n")).await;
        engine.write_all(answer.as_bytes()).await.unwrap();
        expect(&mut stage.client, &told).await;
    }
    // An answer without a body tells of one.
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n";
    let mut engine = stage.ask("HEAD /containers/json HTTP/1.1\r\n\r\n").await;
    engine.write_all(head.as_bytes()).await.unwrap();
    expect(&mut stage.client, head).await;
    stage.leave().await;
}

#[tokio::test]
async fn a_hijacked_stream_keeps_its_half_close() {
    for answer in [
        "HTTP/1.1 101 UPGRADED\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n",
    ] {
        let mut stage = stage(None);
        let request = "POST /v1.45/exec/x/start HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";
        stage.client.write_all(request.as_bytes()).await.unwrap();
        let mut engine = stage.dials.recv().await.unwrap();
        expect(&mut engine, request).await;
        engine.write_all(answer.as_bytes()).await.unwrap();
        expect(&mut stage.client, answer).await;
        stage.client.write_all(b"stdin").await.unwrap();
        stage.client.shutdown().await.unwrap();
        let mut input = String::new();
        engine.read_to_string(&mut input).await.unwrap();
        assert_eq!(input, "stdin");
        engine.write_all(b"stdout").await.unwrap();
        drop(engine);
        let mut output = String::new();
        stage.client.read_to_string(&mut output).await.unwrap();
        assert_eq!(output, "stdout");
        stage.relay.await.unwrap();
        assert_eq!(*stage.held.borrow(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_has_said_its_last_reads_on_as_long_as_the_client_sends() {
    for client_is_silent in [false, true] {
        let mut stage = stage(None);
        let mut engine = stage.ask("POST /exec/x/start HTTP/1.1\r\n\r\n").await;
        engine.write_all(b"HTTP/1.1 101 UPGRADED\r\n\r\nend").await.unwrap();
        engine.shutdown().await.unwrap();
        let mut output = String::new();
        stage.client.read_to_string(&mut output).await.unwrap();
        assert_eq!(output, "HTTP/1.1 101 UPGRADED\r\n\r\nend");
        for word in ["one", "two"] {
            tokio::time::sleep(QUIET_AFTER / 2).await;
            stage.client.write_all(word.as_bytes()).await.unwrap();
            expect(&mut engine, word).await;
        }
        assert_eq!(stage.held(), 1);
        let begun = tokio::time::Instant::now();
        if !client_is_silent {
            stage.client.shutdown().await.unwrap();
        }
        assert_eq!(engine.read(&mut [0]).await.unwrap(), 0);
        stage.held_becomes(0).await;
        assert_eq!(begun.elapsed() >= QUIET_AFTER, client_is_silent, "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_client_that_goes_gives_its_lease_back_at_once() {
    let mut stage = stage(None);
    stage.client.write_all(b"GET /containers/x/logs?follow=1 HTTP/1.1\r\n\r\n").await.unwrap();
    let mut engine = stage.dials.recv().await.unwrap();
    let mut head = [0; 16];
    engine.read_exact(&mut head).await.unwrap();
    assert_eq!(*stage.held.borrow(), 1);
    drop(stage.client);
    stage.relay.await.unwrap();
    assert_eq!(*stage.held.borrow(), 0);
}

#[tokio::test]
async fn a_client_that_goes_while_the_vm_starts_is_not_waited_for() {
    let mut stage = stage(None);
    stage.client.write_all(b"GET /never HTTP/1.1\r\n\r\n").await.unwrap();
    drop(stage.client);
    stage.relay.await.unwrap();
}

#[tokio::test]
async fn a_head_with_the_tokens_of_many_registries_passes() {
    let mut stage = stage(None);
    let tokens = "e30=".repeat(60 * 1024);
    stage.ask(&format!("POST /build HTTP/1.1\r\nX-Registry-Config: {tokens}\r\n\r\n")).await;
}

#[tokio::test]
async fn a_refusal_is_an_answer_in_dockers_own_form() {
    let mut stage = stage(Some(Refusal { status: 503, message: "no \"VM\"".into() }));
    stage.client.write_all(b"GET /build/x HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stage.client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{answer}");
    assert!(answer.ends_with(r#"{"message":"no \"VM\""}"#), "{answer}");
}

#[tokio::test]
async fn what_could_smuggle_a_request_is_refused() {
    let mut stage = stage(None);
    let request = b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n";
    stage.client.write_all(request).await.unwrap();
    let mut answer = String::new();
    stage.client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(stage.dials.try_recv().is_err());
}

#[tokio::test]
async fn a_client_that_waits_to_be_told_to_continue_is_told_by_the_engine() {
    let mut stage = stage(None);
    let mut engine =
        stage.ask("POST /build HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n").await;
    engine.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
    expect(&mut stage.client, "HTTP/1.1 100 Continue\r\n\r\n").await;
    stage.client.write_all(b"body").await.unwrap();
    expect(&mut engine, "body").await;
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    engine.write_all(answer.as_bytes()).await.unwrap();
    expect(&mut stage.client, answer).await;
    // The connection carries on.
    drop(stage.ask("GET /images/get HTTP/1.1\r\n\r\n").await);
}

#[tokio::test]
async fn trailers_pass_and_the_next_request_begins_behind_them() {
    let mut stage = stage(None);
    let chunks = "Transfer-Encoding: chunked\r\nTrailer: X\r\n\r\n3;e=1\r\nabc\r\n0\r\nX: y\r\n\r\n";
    let request = format!("POST /images/load HTTP/1.1\r\n{chunks}");
    let mut engine = stage.ask(&request).await;
    let answer = format!("HTTP/1.1 200 OK\r\n{chunks}");
    engine.write_all(answer.as_bytes()).await.unwrap();
    expect(&mut stage.client, &answer).await;
    drop(stage.ask("GET /images/get HTTP/1.1\r\n\r\n").await);
}

#[tokio::test]
async fn an_answer_to_head_has_no_body_whatever_its_length_says() {
    let mut stage = stage(None);
    let mut engine = stage.ask("HEAD /containers/a/archive?path=/ HTTP/1.1\r\n\r\n").await;
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n";
    engine.write_all(answer.as_bytes()).await.unwrap();
    expect(&mut stage.client, answer).await;
    drop(stage.ask("GET /images/get HTTP/1.1\r\n\r\n").await);
}

#[tokio::test]
async fn a_websocket_gets_what_was_sent_before_the_protocol_changed() {
    let mut stage = stage(None);
    let request = "GET /containers/a/attach/ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let mut engine = stage.ask(request).await;
    stage.client.write_all(b"early").await.unwrap();
    let answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\nfirst";
    engine.write_all(answer.as_bytes()).await.unwrap();
    expect(&mut stage.client, answer).await;
    expect(&mut engine, "early").await;
    stage.client.write_all(b"late").await.unwrap();
    expect(&mut engine, "late").await;
    assert_eq!(stage.held(), 1);
    drop(engine);
    stage.leave().await;
}

#[tokio::test]
async fn what_the_engine_says_after_it_has_closed_its_input_arrives() {
    let mut stage = stage(None);
    let mut engine = stage.ask("POST /exec/x/start HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}").await;
    engine.write_all(b"HTTP/1.1 101 UPGRADED\r\n\r\n").await.unwrap();
    expect(&mut stage.client, "HTTP/1.1 101 UPGRADED\r\n\r\n").await;
    // An engine that reads no more blocks who writes to it, for ever.
    stage.client.write_all(&vec![b'y'; 64 * 1024]).await.unwrap();
    engine.write_all(b"last words").await.unwrap();
    drop(engine);
    let mut output = String::new();
    stage.client.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "last words");
    stage.relay.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dead_client_of_a_silent_stream_holds_nothing_for_long() {
    for (request, answer) in [
        ("POST /containers/a/attach?stream=1 HTTP/1.1\r\n\r\n", "HTTP/1.1 101 UPGRADED\r\n\r\n"),
        ("POST /containers/a/attach?stream=1 HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"),
        ("POST /containers/a/wait HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ] {
        let mut stage = stage(None);
        let mut engine = stage.ask(request).await;
        engine.write_all(answer.as_bytes()).await.unwrap();
        expect(&mut stage.client, answer).await;
        assert_eq!(stage.held(), 1, "{request}");
        stage.leave().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_dies_in_a_stream_has_its_last_bytes_read_and_holds_nothing_a_second_later() {
    let mut stage = stage(None);
    let answer = "HTTP/1.1 101 UPGRADED\r\n\r\n";
    let mut engine = stage.ask("POST /exec/x/start HTTP/1.1\r\n\r\n").await;
    engine.write_all(answer.as_bytes()).await.unwrap();
    expect(&mut stage.client, answer).await;
    stage.client.write_all(b"last words").await.unwrap();
    let died = tokio::time::Instant::now();
    stage.leave().await;
    assert!(died.elapsed() < Duration::from_secs(1), "held for {:?}", died.elapsed());
    let mut heard = String::new();
    engine.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "last words");
}

#[tokio::test]
async fn a_client_that_dies_while_the_engine_does_not_read_holds_nothing() {
    let mut stage = stage(None);
    let head = "POST /images/load HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n";
    let engine = stage.ask(head).await;
    stage.client.write_all(&vec![0; 64 * 1024]).await.unwrap();
    stage.leave().await;
    drop(engine);
}

#[tokio::test]
async fn a_client_that_dies_after_it_sent_far_ahead_holds_nothing() {
    let mut stage = stage(None);
    let engine = stage.ask("POST /containers/a/wait HTTP/1.1\r\n\r\n").await;
    stage.client.write_all(&vec![b'x'; BUFFER_BYTES + 1]).await.unwrap();
    stage.leave().await;
    drop(engine);
}

#[tokio::test]
async fn a_path_of_the_host_is_refused_before_anything_is_woken() {
    let body = r#"{"HostConfig":{"Binds":["/home/me:/x"]}}"#;
    let length = body.len();
    for request in [
        format!("POST /v1.45/containers/create HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}"),
        format!(
            "POST /containers/create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n"
        ),
    ] {
        let mut stage = stage(None);
        stage.client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stage.client.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 400 ") && answer.contains("/home/me: there are no folders"),
            "{answer}"
        );
        assert!(stage.dials.try_recv().is_err());
    }
}

#[tokio::test]
async fn an_answer_without_the_engine_takes_no_lease_and_keeps_the_connection() {
    let mut stage = stage(None);
    for _ in 0..2 {
        stage.client.write_all(b"GET /_ping HTTP/1.1\r\n\r\n").await.unwrap();
        expect(&mut stage.client, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK").await;
    }
    stage.client.write_all(b"GET /events HTTP/1.1\r\n\r\n").await.unwrap();
    let chunks = "8\r\n{\"a\":1}\n\r\n3\r\n{}\n\r\n0\r\n\r\n";
    expect(&mut stage.client, &format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}"))
        .await;
    assert!(stage.dials.try_recv().is_err() && stage.held() == 0);
    drop(stage.ask("GET /images/get HTTP/1.1\r\n\r\n").await);
}

#[tokio::test]
async fn a_client_that_is_still_sending_sees_why_it_is_refused() {
    let mut stage = stage(Some(Refusal { status: 503, message: "no VM".into() }));
    let (mut reader, mut writer) = stage.client.split();
    let sending = async {
        writer.write_all(b"POST /images/load HTTP/1.1\r\nContent-Length: 8388608\r\n\r\n").await?;
        writer.write_all(&vec![0; 8 << 20]).await
    };
    let mut answer = String::new();
    let (sent, read) = tokio::join!(sending, reader.read_to_string(&mut answer));
    sent.unwrap();
    read.unwrap();
    assert!(answer.ends_with(r#"{"message":"no VM"}"#), "{answer}");
}

#[tokio::test]
async fn a_client_that_is_not_served_at_all_sees_why_although_it_is_still_sending() {
    let (client, ours) = UnixStream::pair().unwrap();
    let (mut reader, mut writer) = client.into_split();
    let refusal = Refusal { status: 503, message: "too many".into() };
    let sending = async move {
        let sent = writer.write_all(&vec![0; 8 << 20]).await;
        drop(writer);
        sent
    };
    let mut answer = String::new();
    let ((), sent, read) =
        tokio::join!(crate::client::refuse(ours, &refusal), sending, reader.read_to_string(&mut answer));
    sent.unwrap();
    read.unwrap();
    assert!(answer.ends_with(r#"{"message":"too many"}"#), "{answer}");
}

#[tokio::test]
async fn an_engine_that_has_too_many_connections_is_not_lost() {
    let mut stage = stage(None);
    stage.client.write_all(b"GET /busy HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stage.client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with(r#"{"message":"all are in use"}"#), "{answer}");
}

#[tokio::test]
async fn an_engine_that_hangs_up_is_an_answer_not_silence() {
    let mut stage = stage(None);
    drop(stage.ask("GET /images/get HTTP/1.1\r\n\r\n").await);
    let mut answer = String::new();
    stage.client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn whose_vm_crashes_before_the_answer_has_begun_is_told_so_whatever_was_said_before() {
    let interim = "HTTP/1.1 100 Continue\r\n\r\n";
    let upload = "POST /images/load HTTP/1.1\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n";
    let list = "GET /containers/json HTTP/1.1\r\n\r\n";
    for (request, said, heard, hangs_up) in [
        (upload, interim, interim, false),
        (upload, interim, interim, true),
        (list, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[{", "", false),
        (list, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[{", "", true),
    ] {
        let mut stage = stage(None);
        let mut engine = stage.ask(request).await;
        engine.write_all(said.as_bytes()).await.unwrap();
        expect(&mut stage.client, heard).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        let engine = if hangs_up { None } else { Some(engine) };
        tokio::time::sleep(Duration::from_millis(100)).await;
        stage.crashed.send_replace(true);
        let mut answer = String::new();
        stage.client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains(CRASHED), "{request}{answer}");
        drop(engine);
    }
}

#[tokio::test]
async fn a_client_that_dies_while_an_answer_is_read_whole_holds_nothing() {
    let mut stage = stage(None);
    let mut engine = stage.ask("GET /containers/json HTTP/1.1\r\n\r\n").await;
    engine.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[{").await.unwrap();
    stage.leave().await;
    drop(engine);
}

#[tokio::test(start_paused = true)]
async fn whose_vm_crashed_is_told_so_although_the_connection_ends_first() {
    let mut stage = stage(None);
    drop(stage.ask("GET /images/get HTTP/1.1\r\n\r\n").await);
    tokio::time::sleep(Duration::from_millis(100)).await;
    stage.crashed.send_replace(true);
    let mut answer = String::new();
    stage.client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains(CRASHED), "{answer}");
}

#[tokio::test]
async fn who_serves_the_session_hears_of_a_start_before_the_client() {
    let mut stage = stage(None);
    let mut engine = stage.ask("POST /containers/a/start HTTP/1.1\r\n\r\n").await;
    let answer = "HTTP/1.1 204 No Content\r\n\r\n";
    engine.write_all(answer.as_bytes()).await.unwrap();
    expect(&mut stage.client, answer).await;
    assert_eq!(stage.starts.load(Ordering::SeqCst), 1);
    let mut engine = stage.ask("POST /containers/a/stop HTTP/1.1\r\n\r\n").await;
    engine.write_all(answer.as_bytes()).await.unwrap();
    expect(&mut stage.client, answer).await;
    assert_eq!(stage.starts.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_empty_line_before_a_request_may_come_in_two_halves() {
    let mut stage = stage(None);
    stage.client.write_all(b"\r").await.unwrap();
    tokio::task::yield_now().await;
    let request = "GET /images/get HTTP/1.1\r\n\r\n";
    stage.client.write_all(format!("\n{request}").as_bytes()).await.unwrap();
    expect(&mut stage.dials.recv().await.unwrap(), request).await;
}
