//! The client against a scripted server on the other end of a socket pair.
#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::time::Duration;

use dormouse_qmp::{
    Client, Closed, CodecError, ConnectError, Cont, Event, Events, ExecuteError, GetFd, Incoming,
    LINE_BYTES_MAX, QueryName, QueryStatus, ShutdownReason, Stop,
};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

const SOON: Duration = Duration::from_secs(60);

/// QEMU's side.
struct Server(BufReader<UnixStream>);

impl Server {
    async fn say(&mut self, line: &str) {
        self.0.get_mut().write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    async fn heard(&mut self) -> Value {
        let mut line = String::new();
        tokio::time::timeout(SOON, self.0.read_line(&mut line)).await.unwrap().unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn answer(&mut self, command: &Value, value: Value) {
        self.say(&json!({"return": value, "id": command["id"]}).to_string()).await;
    }

    async fn greet(&mut self) {
        self.say(r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#).await;
        let hello = self.heard().await;
        assert_eq!(hello["execute"], "qmp_capabilities");
        self.answer(&hello, json!({})).await;
    }
}

async fn connected() -> (Client, Events, Server) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server = Server(BufReader::new(theirs));
    let (connected, ()) = tokio::join!(Client::over(ours, SOON), server.greet());
    let (client, events) = connected.unwrap();
    (client, events, server)
}

async fn next(events: &mut Events) -> Incoming {
    tokio::time::timeout(SOON, events.next()).await.unwrap()
}

#[tokio::test]
async fn a_command_gets_its_typed_answer() {
    let (client, _events, mut server) = connected().await;
    assert_eq!(client.greeting().version.qemu.major, 7);
    let (name, ()) = tokio::join!(client.execute(QueryName {}, SOON), async {
        let command = server.heard().await;
        assert_eq!(command["execute"], "query-name");
        server.answer(&command, json!({"name": "dorm-1"})).await;
    });
    assert_eq!(name.unwrap().name.as_deref(), Some("dorm-1"));
}

#[tokio::test]
async fn a_refusal_is_told_with_qemus_words() {
    let (client, _events, mut server) = connected().await;
    let (outcome, ()) = tokio::join!(client.execute(Cont {}, SOON), async {
        let id = server.heard().await["id"].clone();
        server
            .say(&json!({"error": {"class": "GenericError", "desc": "not now"}, "id": id}).to_string())
            .await;
    });
    assert_eq!(outcome.unwrap_err().to_string(), "cont: not now");
}

#[tokio::test]
async fn a_dropped_command_harms_none_that_follow_it() {
    let (client, _events, mut server) = connected().await;
    let mut dropped = Vec::new();
    for _ in 0..200 {
        let command = tokio::select! {
            biased;
            _ = client.execute(QueryStatus {}, SOON) => panic!("nobody answered"),
            command = server.heard() => command,
        };
        dropped.push(command);
    }
    for command in dropped.iter().take(100) {
        server.answer(command, json!({"status": "running", "running": true})).await;
    }
    let (name, ()) = tokio::join!(client.execute(QueryName {}, SOON), async {
        let command = server.heard().await;
        for late in dropped.iter().skip(100) {
            server.answer(late, json!({"status": "running", "running": true})).await;
        }
        server.answer(&command, json!({"name": "mine"})).await;
    });
    assert_eq!(name.unwrap().name.as_deref(), Some("mine"));
}

#[tokio::test(start_paused = true)]
async fn a_command_without_a_reply_ends_at_its_deadline_and_its_late_reply_is_nobodys() {
    let (client, _events, mut server) = connected().await;
    let error = client.execute(Stop {}, Duration::from_secs(3)).await.unwrap_err();
    assert!(matches!(error, ExecuteError::Deadline { command: "stop", .. }), "{error}");
    let late = server.heard().await;
    let (name, ()) = tokio::join!(client.execute(QueryName {}, SOON), async {
        let command = server.heard().await;
        server.answer(&late, json!({"name": "wrong"})).await;
        server.answer(&command, json!({"name": "right"})).await;
    });
    assert_eq!(name.unwrap().name.as_deref(), Some("right"));
}

#[tokio::test]
async fn commands_beyond_the_bound_are_refused_as_busy() {
    let (client, _events, _server) = connected().await;
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..65 {
        let client = client.clone();
        waiting.spawn(async move { client.execute(Stop {}, SOON).await });
    }
    let first = waiting.join_next().await.unwrap().unwrap();
    assert!(matches!(first, Err(ExecuteError::Busy { command: "stop" })), "{first:?}");
}

#[tokio::test]
async fn events_arrive_typed_also_between_a_command_and_its_reply() {
    let (client, mut events, mut server) = connected().await;
    let (outcome, ()) = tokio::join!(client.execute(Cont {}, SOON), async {
        let command = server.heard().await;
        server.say(r#"{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 1}}"#).await;
        server.answer(&command, json!({})).await;
    });
    outcome.unwrap();
    assert_eq!(next(&mut events).await, Incoming::Event(Event::Resume));
}

#[tokio::test]
async fn the_end_of_qemu_is_reported_after_its_last_word_and_again_when_asked_again() {
    let (client, mut events, mut server) = connected().await;
    server.say(r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#).await;
    drop(server);
    let last_word = Event::Shutdown { guest: true, reason: ShutdownReason::GuestShutdown };
    assert_eq!(next(&mut events).await, Incoming::Event(last_word));
    assert_eq!(next(&mut events).await, Incoming::Closed(Closed::Eof));
    assert_eq!(next(&mut events).await, Incoming::Closed(Closed::Eof));
    let error = client.execute(Stop {}, SOON).await.unwrap_err();
    assert!(matches!(error, ExecuteError::Closed { closed: Closed::Eof, .. }), "{error}");
}

#[tokio::test]
async fn commands_in_flight_fail_when_qemu_dies() {
    let (client, _events, mut server) = connected().await;
    let (outcome, ()) = tokio::join!(client.execute(Stop {}, SOON), async {
        server.heard().await;
        drop(server);
    });
    assert!(matches!(outcome, Err(ExecuteError::Closed { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_flood_of_events_loses_the_oldest_and_keeps_the_last_word_and_the_replies() {
    let (client, mut events, mut server) = connected().await;
    let (outcome, ()) = tokio::join!(client.execute(Stop {}, SOON), async {
        let command = server.heard().await;
        for _ in 0..2_000 {
            server.say(r#"{"event": "RTC_CHANGE", "data": {"offset": 1}}"#).await;
        }
        server.say(r#"{"event": "SHUTDOWN", "data": {"guest": false, "reason": "host-signal"}}"#).await;
        server.answer(&command, json!({})).await;
    });
    outcome.unwrap();
    drop(server);
    let mut seen = Vec::new();
    loop {
        match next(&mut events).await {
            Incoming::Event(event) => seen.push(event),
            Incoming::Closed(closed) => break assert_eq!(closed, Closed::Eof),
        }
    }
    let lost: u64 = seen.iter().map(|event| if let Event::Lost(count) = event { *count } else { 0 }).sum();
    let kept = seen.iter().filter(|event| !matches!(event, Event::Lost(_))).count() as u64;
    assert!(lost > 0 && lost + kept == 2_001, "{lost} lost, {kept} kept");
    assert!(kept < 300);
    let last_word = Event::Shutdown { guest: false, reason: ShutdownReason::HostSignal };
    assert_eq!(seen.last(), Some(&last_word));
}

#[tokio::test]
async fn a_peer_that_talks_garbage_is_given_up() {
    let (client, mut events, mut server) = connected().await;
    server.say("HTTP/1.1 200 OK").await;
    assert!(matches!(next(&mut events).await, Incoming::Closed(Closed::Codec(CodecError::NotAMessage(_)))));
    assert!(client.execute(Stop {}, SOON).await.is_err());
}

#[tokio::test]
async fn a_peer_that_never_ends_its_line_is_given_up() {
    let (_client, mut events, mut server) = connected().await;
    let flood = vec![b'x'; LINE_BYTES_MAX + 64 * 1024];
    // The client hangs up in the middle, so that the write may fail.
    let (_, incoming) = tokio::join!(server.0.get_mut().write_all(&flood), next(&mut events));
    assert_eq!(incoming, Incoming::Closed(Closed::Codec(CodecError::LineTooLong)));
}

#[tokio::test(start_paused = true)]
async fn a_monitor_that_is_taken_by_somebody_else_is_an_error_in_time() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = Client::over(ours, SOON).await.unwrap_err();
    assert!(matches!(error, ConnectError::Deadline(SOON)), "{error}");
}

#[tokio::test]
async fn letting_go_of_client_and_events_closes_the_connection() {
    let (client, events, mut server) = connected().await;
    drop(events);
    drop(client);
    let mut line = String::new();
    let length = tokio::time::timeout(SOON, server.0.read_line(&mut line)).await.unwrap().unwrap();
    assert_eq!(length, 0);
}

#[tokio::test]
async fn a_file_descriptor_travels_with_its_command() {
    let (client, _events, server) = connected().await;
    let stream = server.0.into_inner();
    let (read_end, write_end) = std::io::pipe().unwrap();
    let (outcome, received) = tokio::join!(
        client.execute_with_fd(
            GetFd { fdname: "state".into() },
            OwnedFd::from(write_end),
            Duration::from_millis(300)
        ),
        receive_fd(&stream),
    );
    assert!(matches!(outcome, Err(ExecuteError::Deadline { .. })));
    let (line, received) = received;
    assert!(line.contains("getfd"), "{line}");
    std::io::Write::write_all(&mut std::fs::File::from(received), b"through").unwrap();
    let mut text = String::new();
    { read_end }.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through");
}

async fn receive_fd(stream: &UnixStream) -> (String, OwnedFd) {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    loop {
        stream.readable().await.unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 1024];
        let received = stream.try_io(tokio::io::Interest::READABLE, || {
            let slices = &mut [std::io::IoSliceMut::new(&mut bytes)];
            Ok(rustix::net::recvmsg(stream, slices, &mut control, RecvFlags::empty())?)
        });
        let Ok(received) = received else { continue };
        let length = received.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                return (String::from_utf8(bytes[..length].to_vec()).unwrap(), fds.next().unwrap());
            }
        }
        panic!("no descriptor came along");
    }
}
