use bytes::BytesMut;
use dormouse_docker_proxy::{HeadScanner, parse_request};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

/// An engine that answers from a table, one connection after the other.
#[derive(Debug, Clone, Default)]
struct Engine {
    asked: Arc<Mutex<Vec<String>>>,
    /// Somebody's container runs.
    runs: bool,
    /// Answers after which it closes the connection, instead of waiting for the next question.
    closes: bool,
}

const LIST: &str = r#"[{"Id":"a","Status":"Up 3 minutes"},{"Id":"b","Status":"Created"}]"#;

impl Engine {
    async fn dial(self) -> io::Result<DuplexStream> {
        let (ours, mut theirs) = duplex(4096);
        tokio::spawn(async move {
            let (mut scanner, mut bytes) = (HeadScanner::default(), BytesMut::new());
            while let Ok(1..) = theirs.read_buf(&mut bytes).await {
                while let Some(head) = scanner.take(&mut bytes).unwrap() {
                    let request = parse_request(head).unwrap();
                    let question = format!("{} {}", request.method, request.target);
                    let answer = Self::answer(&question, self.closes, self.runs);
                    self.asked.lock().unwrap().push(question);
                    theirs.write_all(answer.as_bytes()).await.unwrap();
                    if self.closes {
                        return;
                    }
                }
            }
        });
        Ok(ours)
    }

    fn answer(question: &str, closes: bool, runs: bool) -> String {
        let body = match question {
            "GET /v1.45/containers/json?all=1" => LIST,
            "GET /containers/json" => {
                if runs {
                    LIST
                } else {
                    "[]\n"
                }
            }
            "GET /containers/a/json" => {
                r#"{"State":{"Running":true,"Restarting":false,"StartedAt":"2026-01-01T00:00:00.5Z","FinishedAt":"0001-01-01T00:00:00Z"}}"#
            }
            "GET /v1.45/images/lost/json" => {
                return "HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n".to_owned();
            }
            "GET /v1.45/swarm" | "GET /v1.45/networks/slow" => {
                return "HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{}".to_owned();
            }
            "GET /v1.45/nodes" => return "HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "HEAD /_ping" => return "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n".to_owned(),
            _ => "{}",
        };
        let close = if closes { "Connection: close\r\n" } else { "" };
        format!("HTTP/1.1 200 OK\r\n{close}Content-Length: {}\r\n\r\n{body}", body.len())
    }

    async fn captured_by(&self, asleep: &Asleep, generation: u64) {
        asleep.capture(|| self.clone().dial(), generation).await;
    }
}

fn request(line: &str) -> RequestHead {
    parse_request(format!("{line} HTTP/1.1\r\n\r\n").into()).unwrap()
}

fn asks(asleep: &Asleep, line: &str, generation: u64) -> Option<String> {
    let request = request(line);
    asleep.answer(&request, generation).map(|bytes| String::from_utf8(bytes.to_vec()).unwrap())
}

const PS: &str = "GET /v1.45/containers/json?all=1";

#[tokio::test]
async fn an_answer_counts_once_its_sleep_is_over_and_for_no_other_generation() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    asleep.asked(&request(PS));
    assert_eq!(asks(&asleep, PS, 0), None);
    Engine::default().captured_by(&asleep, 3).await;
    assert_eq!(asks(&asleep, PS, 3), None, "the sleep isn't over");
    asleep.seal(4, true);
    assert_eq!(asks(&asleep, PS, 3), None, "another VM's end says nothing");
    Engine::default().captured_by(&asleep, 3).await;
    asleep.seal(3, true);
    let answer = asks(&asleep, PS, 3).unwrap();
    assert!(
        answer.contains("Dormouse-Answered: asleep\r\n") && answer.contains("\"Status\":\"Up "),
        "{answer}"
    );
    assert_eq!(asks(&asleep, PS, 4), None, "another VM ran since");
    // A new host knows as much.
    let next = Asleep::load(folder.path(), folder.path(), true, None);
    assert!(asks(&next, PS, 3).is_some());
    assert_eq!(asks(&next, PS, 4), None);
}

#[tokio::test]
async fn a_sleep_that_was_not_sealed_leaves_nothing_to_the_next_host() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    Engine::default().captured_by(&asleep, 1).await;
    assert_eq!(asks(&Asleep::load(folder.path(), folder.path(), true, None), "GET /_ping", 1), None);
}

#[tokio::test]
async fn what_was_asked_is_kept_word_for_word_and_anything_else_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    asleep.asked(&request("GET /v1.45/networks/mine?verbose=1"));
    asleep.asked(&request("GET /v1.45/images/lost/json"));
    let engine = Engine::default();
    engine.captured_by(&asleep, 1).await;
    asleep.seal(1, true);
    for kept in ["HEAD /_ping", "GET /_ping", "GET /v1.45/info", "GET /v1.45/networks/mine?verbose=1"] {
        assert!(asks(&asleep, kept, 1).is_some(), "{kept}");
    }
    for unknown in [
        "GET /v1.45/networks/mine",
        "GET /v1.44/info",
        "GET /networks/mine?verbose=1",
        "HEAD /v1.45/info",
        "GET /v1.45/images/lost/json",
    ] {
        assert_eq!(asks(&asleep, unknown, 1), None, "{unknown}");
    }
    let old = parse_request("GET /_ping HTTP/1.0\r\n\r\n".into()).unwrap();
    assert_eq!(asleep.answer(&old, 1), None, "HTTP/1.0 knows no chunks");
}

#[tokio::test]
async fn that_there_is_no_swarm_is_kept_and_no_other_failure_is() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    let targets = ["GET /v1.45/swarm", "GET /v1.45/networks/slow", "GET /v1.45/nodes"];
    targets.iter().for_each(|target| asleep.asked(&request(target)));
    Engine::default().captured_by(&asleep, 1).await;
    asleep.seal(1, true);
    let kept = targets.map(|target| asks(&asleep, target, 1));
    assert!(matches!(&kept, [Some(swarm), None, None] if swarm.starts_with("HTTP/1.1 503 ")), "{kept:?}");
}

#[tokio::test(start_paused = true)]
async fn lists_are_kept_before_anybody_asked_for_one_in_the_version_that_clients_spoke() {
    let folder = tempfile::tempdir().unwrap();
    let engine = EngineFacts { version: "26.1.5".into(), api: "1.45".into(), kernel: "6.12".into() };
    let asleep = Asleep::load(folder.path(), folder.path(), true, Some(engine));
    Engine::default().captured_by(&asleep, 1).await;
    asleep.seal(1, true);
    assert!(asks(&asleep, PS, 1).is_some(), "nobody spoke any version: the newest");
    assert!(asks(&asleep, "GET /v1.44/info", 1).is_none());
    asleep.spoken("/v1.44/containers/create?name=web");
    Engine::default().captured_by(&asleep, 2).await;
    asleep.seal(2, true);
    assert!(asks(&asleep, "GET /v1.44/info", 2).is_some());
    // Of many, those that were spoken last.
    for version in 30..40 {
        tokio::time::advance(Duration::from_secs(1)).await;
        asleep.spoken(&format!("/v1.{version}/containers/create"));
    }
    Engine::default().captured_by(&asleep, 3).await;
    asleep.seal(3, true);
    assert!(asks(&asleep, "GET /v1.39/info", 3).is_some() && asks(&asleep, "GET /v1.44/info", 3).is_none());
}

#[tokio::test]
async fn of_containers_that_ran_nothing_is_told_once_their_memory_was_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    asleep.asked(&request(PS));
    for (generation, runs) in [(1, true), (2, false)] {
        Engine { runs, ..Engine::default() }.captured_by(&asleep, generation).await;
        asleep.seal(generation, true);
        assert!(asks(&asleep, PS, generation).is_some());
        std::fs::write(folder.path().join("snapshot.json"), "{}").unwrap();
        dormouse_snapshot::give_up(folder.path(), "no room").unwrap();
        let next = Asleep::load(folder.path(), folder.path(), true, None);
        for host in [&asleep, &next] {
            assert_eq!(asks(host, PS, generation).is_none(), runs, "the VM that will be booted runs none");
        }
        assert!(dormouse_snapshot::given_up(folder.path()).is_some());
    }
}

#[tokio::test]
async fn of_containers_that_ran_nothing_is_told_after_a_stop_or_the_end_of_their_session() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    asleep.asked(&request(PS));
    let next = || Asleep::load(folder.path(), folder.path(), true, None);
    for (generation, runs) in [(1, true), (3, false)] {
        let engine = Engine { runs, ..Engine::default() };
        engine.captured_by(&asleep, generation).await;
        asleep.seal(generation, false);
        assert_eq!(asks(&asleep, PS, generation).is_none(), runs);
        engine.captured_by(&asleep, generation + 1).await;
        asleep.seal(generation + 1, true);
        assert!(asks(&asleep, PS, generation + 1).is_some());
        asleep.memory_goes();
        for host in [&asleep, &next()] {
            assert_eq!(asks(host, PS, generation + 1).is_none(), runs);
        }
    }
}

#[tokio::test]
async fn what_was_captured_before_a_container_came_or_went_is_not_told() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    Engine::default().captured_by(&asleep, 1).await;
    asleep.forget();
    asleep.seal(1, true);
    assert_eq!(asks(&asleep, "GET /_ping", 1), None);
}

#[tokio::test]
async fn an_engine_that_closes_each_connection_is_asked_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    asleep.asked(&request(PS));
    let engine = Engine { closes: true, ..Engine::default() };
    engine.captured_by(&asleep, 1).await;
    asleep.seal(1, true);
    assert!(asks(&asleep, PS, 1).is_some() && asks(&asleep, "GET /v1.45/info", 1).is_some());
}

#[tokio::test(start_paused = true)]
async fn questions_are_forgotten_after_an_hour_and_bounded_in_number() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    asleep.asked(&request("GET /v1.45/volumes/old"));
    tokio::time::advance(ASKED_WITHIN + Duration::from_secs(1)).await;
    asleep.asked(&request("GET /v1.45/volumes/new"));
    let targets: Vec<_> = asleep.questions().into_iter().map(|question| question.target).collect();
    assert!(targets.iter().any(|target| target.ends_with("/new")));
    assert!(!targets.iter().any(|target| target.ends_with("/old")));
    for number in 0..2 * QUESTIONS_MAX {
        asleep.asked(&request(&format!("GET /v1.{number}/volumes/x")));
    }
    assert!(asleep.questions().len() <= QUESTIONS_MAX + PINGS.len() + VERSIONS_MAX * FIXED.len());
    asleep.asked(&request(&format!("GET /v1.45/volumes/{}", "x".repeat(TARGET_BYTES_MAX))));
    assert!(asleep.questions().iter().all(|question| question.target.len() <= TARGET_BYTES_MAX));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_hangs_holds_a_sleep_up_for_a_bounded_time_only() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), true, None);
    let mut kept = Vec::new();
    let begun = Instant::now();
    let (sender, mut dials) = tokio::sync::mpsc::unbounded_channel();
    let dial = || {
        let (ours, theirs) = duplex(4096);
        let _ = sender.send(theirs);
        async { Ok(ours) }
    };
    asleep.capture(dial, 1).await;
    while let Ok(theirs) = dials.try_recv() {
        kept.push(theirs);
    }
    assert!(begun.elapsed() <= CAPTURE_WITHIN, "{:?}", begun.elapsed());
    assert!(!kept.is_empty());
}

#[tokio::test]
async fn switched_off_nothing_is_asked_kept_or_answered() {
    let folder = tempfile::tempdir().unwrap();
    let asleep = Asleep::load(folder.path(), folder.path(), false, None);
    let engine = Engine::default();
    asleep.asked(&request(PS));
    engine.captured_by(&asleep, 1).await;
    asleep.seal(1, true);
    assert!(engine.asked.lock().unwrap().is_empty());
    assert_eq!(asks(&asleep, "GET /_ping", 1), None);

    asleep.enable(true);
    engine.captured_by(&asleep, 2).await;
    asleep.seal(2, true);
    assert!(asks(&asleep, "GET /_ping", 2).is_some());
    asleep.enable(false);
    assert_eq!(asks(&asleep, "GET /_ping", 2), None);
}

#[tokio::test]
async fn an_engine_that_never_ran_is_told_of_until_it_has_run() {
    let folder = tempfile::tempdir().unwrap();
    let engine = EngineFacts { version: "26.1.5".into(), api: "1.45".into(), kernel: "6.12".into() };
    let asleep = Asleep::load(folder.path(), folder.path(), true, Some(engine));
    assert!(asks(&asleep, "GET /v1.45/version", 0).unwrap().contains("\"ApiVersion\":\"1.45\""));
    assert!(asks(&asleep, "HEAD /_ping", 0).is_some());
    assert_eq!(asks(&asleep, "GET /v1.45/info", 0), None);
    assert_eq!(asks(&asleep, "HEAD /_ping", 1), None);
}
