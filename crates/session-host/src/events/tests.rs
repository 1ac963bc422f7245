use dormouse_api::SessionId;
use tokio::io::{DuplexStream, duplex};

use super::*;

fn line(time: i64, action: &str) -> String {
    let nanos = time * 1_000_000_000;
    format!(
        r#"{{"Type":"container","Action":"{action}","Actor":{{"ID":"c","Attributes":{{"name":"web"}}}},"scope":"local","time":{time},"timeNano":{nanos}}}"#
    ) + "\n"
}

/// A subscription, and what it asked for.
struct Subscription {
    engine: DuplexStream,
    request: String,
    heard: tokio::task::JoinHandle<io::Result<()>>,
}

async fn subscribe(events: &Events, generation: u64, is_same_boot: bool) -> Subscription {
    let (ours, mut engine) = duplex(1 << 20);
    let events = events.clone();
    let heard = tokio::spawn(async move { events.hear(ours, generation, is_same_boot).await });
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        engine.read_buf(&mut request).await.unwrap();
    }
    engine.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
    Subscription { engine, request: String::from_utf8(request).unwrap(), heard }
}

impl Subscription {
    async fn tell(&mut self, text: &str) {
        let chunk = format!("{:x}\r\n{text}\r\n", text.len());
        self.engine.write_all(chunk.as_bytes()).await.unwrap();
    }

    async fn end(mut self) {
        self.engine.write_all(b"0\r\n\r\n").await.unwrap();
        self.heard.await.unwrap().unwrap();
    }
}

fn info(phase: Phase) -> watch::Sender<SessionInfo> {
    let info = serde_json::json!({
        "name": "default", "id": SessionId::from_random(7).as_str(), "owner": 0, "state": "running", "incarnation": 1,
        "vm": { "phase": phase, "generation": 1, "boot": null, "how": null, "start_count": 1, "boots": 1,
            "since": "2026-01-01T00:00:00Z", "deadline": null, "step": null, "acceleration": null, "cpus": 1,
            "memory_mib": 1024 },
        "holds": [], "idle": { "timeout_seconds": 30, "action": "stop" },
        "network": { "kind": "none", "host_loopback": false },
        "storage": { "path": "/", "size_bytes": 1, "used_bytes": 0 }, "termination": null,
        "docker_socket": "/d", "control_socket": "/c",
    });
    watch::channel(serde_json::from_value(info).unwrap()).0
}

fn listen(events: &Events, target: &str, info: &watch::Sender<SessionInfo>) -> mpsc::Receiver<Bytes> {
    match events.answer(target, None, info.subscribe()) {
        Ok(Some(Answer::Stream(_, chunks))) => chunks,
        other => panic!("{other:?}"),
    }
}

async fn next(chunks: &mut mpsc::Receiver<Bytes>) -> Option<String> {
    let next = timeout(Duration::from_secs(20), chunks.recv()).await.expect("nothing came");
    next.map(|line| String::from_utf8(line.to_vec()).unwrap())
}

#[tokio::test]
async fn a_stream_stays_open_over_a_sleep_and_hears_everything_once() {
    let folder = tempfile::tempdir().unwrap();
    let (events, info) = (Events::load(folder.path()), info(Phase::Running));
    let mut first = subscribe(&events, 1, false).await;
    let mut client = listen(&events, "/v1.45/events", &info);
    first.tell(&line(10, "create")).await;
    first.tell(&(line(11, "start") + &line(11, "die"))).await;
    for action in ["create", "start", "die"] {
        assert!(next(&mut client).await.unwrap().contains(action), "{action}");
    }
    first.end().await;
    // Suspended and resumed: the engine goes on, and repeats what it still knows from `since` on.
    let mut second = subscribe(&events, 2, true).await;
    assert!(second.request.starts_with("GET /events?since=11.000000000 "), "{}", second.request);
    second.tell(&(line(11, "die") + &line(20, "restart"))).await;
    assert_eq!(next(&mut client).await.unwrap(), line(20, "restart"));
    drop(second);
    info.send_modify(|info| info.vm.phase = Phase::Absent);
    let all = timeout(Duration::from_secs(1), async {
        let mut replay = listen(&events, "/events?since=1&until=30", &info);
        let mut lines = Vec::new();
        while let Some(line) = next(&mut replay).await {
            lines.push(line);
        }
        lines
    });
    let expected = [line(10, "create"), line(11, "start"), line(11, "die"), line(20, "restart")];
    assert_eq!(all.await.unwrap(), expected);
}

#[tokio::test]
async fn events_that_the_engine_has_forgotten_are_said_to_be_lost() {
    let folder = tempfile::tempdir().unwrap();
    let (events, info) = (Events::load(folder.path()), info(Phase::Running));
    let mut first = subscribe(&events, 1, false).await;
    first.tell(&line(10, "create")).await;
    first.end().await;
    let (mut client, mut picky) = (
        listen(&events, "/events", &info),
        listen(&events, "/events?filters=%7B%22type%22%3A%5B%22container%22%5D%7D", &info),
    );
    let mut second = subscribe(&events, 1, true).await;
    second.tell(&line(300, "die")).await;
    assert!(next(&mut client).await.unwrap().contains(r#""Action":"events-lost""#));
    assert_eq!(next(&mut client).await.unwrap(), line(300, "die"));
    assert_eq!(next(&mut picky).await.unwrap(), line(300, "die"));
}

#[tokio::test(start_paused = true)]
async fn until_ends_a_stream_while_the_vm_sleeps() {
    let folder = tempfile::tempdir().unwrap();
    let (events, info) = (Events::load(folder.path()), info(Phase::Absent));
    let begun = tokio::time::Instant::now();
    let until = Timestamp::now().as_second() + 60;
    let mut client = listen(&events, &format!("/events?until={until}"), &info);
    assert_eq!(timeout(Duration::from_secs(70), client.recv()).await.unwrap(), None);
    assert!(begun.elapsed() >= Duration::from_secs(58), "{:?}", begun.elapsed());
    let mut past = listen(&events, "/events?since=1&until=2", &info);
    assert_eq!(next(&mut past).await, None);
}

#[tokio::test]
async fn the_end_of_the_session_ends_its_streams() {
    let folder = tempfile::tempdir().unwrap();
    let (events, info) = (Events::load(folder.path()), info(Phase::Running));
    let mut client = listen(&events, "/events", &info);
    info.send_modify(|info| info.state = SessionState::Terminating);
    assert_eq!(next(&mut client).await, None);
}

#[tokio::test]
async fn a_client_that_reads_too_slowly_is_told_what_it_missed_and_costs_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (events, info) = (Events::load(folder.path()), info(Phase::Running));
    let mut engine = subscribe(&events, 1, false).await;
    let mut slow = listen(&events, "/events", &info);
    engine.tell(&line(1, "first")).await;
    assert!(next(&mut slow).await.unwrap().contains("first"));
    let count = i64::try_from(EVENTS_MAX).unwrap() + 1000;
    for time in 2..2 + count {
        engine.tell(&line(time, "x")).await;
    }
    engine.end().await;
    assert_eq!(events.ring().entries.len(), EVENTS_MAX);
    let mut seen = Vec::new();
    loop {
        seen.push(next(&mut slow).await.unwrap());
        if seen.last().unwrap().contains(&format!("\"time\":{},", 1 + count)) {
            break;
        }
    }
    assert_eq!(seen.iter().filter(|line| line.contains("events-lost")).count(), 1);
}

#[tokio::test]
async fn the_next_host_knows_the_latest_events() {
    let folder = tempfile::tempdir().unwrap();
    let (events, info) = (Events::load(folder.path()), info(Phase::Absent));
    let mut engine = subscribe(&events, 1, false).await;
    for time in 1..=300 {
        engine.tell(&line(time, "x")).await;
    }
    engine.end().await;
    events.leave();
    let next_host = Events::load(folder.path());
    let mut replay = listen(&next_host, "/events?since=1&until=1000", &info);
    let mut count = 0;
    while next(&mut replay).await.is_some() {
        count += 1;
    }
    assert_eq!(count, LEFT_MAX);
}

#[tokio::test]
async fn the_answer_has_the_engines_head_and_a_version_that_it_does_not_speak_is_left_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let (events, info) = (Events::load(folder.path()), info(Phase::Running));
    let engine = EngineFacts { version: "26.1.5".into(), api: "1.45".into(), kernel: "6.12".into() };
    for target in ["/events", "/v1.45/events?until=1", "/v1.24/events"] {
        let Ok(Some(Answer::Stream(head, _))) = events.answer(target, Some(&engine), info.subscribe()) else {
            panic!("{target}");
        };
        let head = String::from_utf8(head.to_vec()).unwrap();
        for line in [
            "Api-Version: 1.45",
            "Ostype: linux",
            "Server: Docker/26.1.5 (linux)",
            "Docker-Experimental: false",
        ] {
            assert!(head.contains(&format!("\r\n{line}\r\n")), "{head}");
        }
    }
    for target in ["/v1.46/events", "/v1.12/events", "/v1%2e99/events"] {
        let answer = events.answer(target, Some(&engine), info.subscribe());
        assert!(matches!(answer, Ok(None)), "{target}: {answer:?}");
    }
}

#[tokio::test]
async fn nonsense_is_refused_or_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let (events, info) = (Events::load(folder.path()), info(Phase::Running));
    let refused = events.answer("/events?since=yesterday", None, info.subscribe());
    assert!(matches!(refused, Err(Refusal { status: 400, .. })), "{refused:?}");
    let mut engine = subscribe(&events, 1, false).await;
    let mut client = listen(&events, "/events", &info);
    engine.tell("no json\n{}\n{\"Type\":1}\n").await;
    engine.tell(&line(1, "real")).await;
    assert!(next(&mut client).await.unwrap().contains("real"));
}
