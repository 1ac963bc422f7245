//! What hooks, followers and clients are told.

use dormouse_api::{Fact, Phase};
use dormouse_lifecycle::{Exit, Generation, PhaseName, Policy};

use super::stage::{Call, Hooked, Stage, granted, pass, request, seconds};
use crate::hooks::Verdict;
use crate::owner::{EngineEvent, Message};

#[tokio::test(start_paused = true)]
async fn events_are_told_once_each_in_order_and_counted_on_by_the_next_host() {
    let mut stage = Stage::new();
    let (before, mut coming) = stage.owner.events().await.unwrap();
    let (lease, _guest) = stage.up().await;
    drop(lease);
    stage.falls_asleep().await;
    stage.exits(1, Exit::GuestShutdown);
    stage.becomes(Phase::Absent).await;
    let mut seen = before;
    while let Ok(event) = coming.try_recv() {
        seen.push(event);
    }
    let names: Vec<_> = seen.iter().map(|event| (event.sequence, event.fact.name())).collect();
    assert_eq!(names, [(1, "session-created"), (2, "vm-started"), (3, "vm-stopping")]);
    let mut stage = stage.host_dies().await;
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(2));
    let _guest = stage.ready(2);
    let _lease = granted(asked).await;
    let (all, _) = stage.owner.events().await.unwrap();
    assert_eq!(all[..3], seen[..], "the next host remembers");
    assert_eq!((all.len(), all[3].sequence, all[3].fact.generation()), (4, 4, Some(2)));
    assert_eq!(stage.told().await, ["vm-started 2"], "the session was created once");
}

#[tokio::test(start_paused = true)]
async fn followers_get_what_was_and_what_comes_as_lines() {
    let mut stage = Stage::new();
    let mut follower = stage.connect();
    let answer = request(&mut follower, "GET /v1/events?follow=true", "", "").await;
    assert!(answer.contains("transfer-encoding: chunked"), "{answer}");
    let (_lease, _guest) = stage.up().await;
    let mut text = String::new();
    while !text.contains("vm-started") {
        let mut bytes = [0; 1024];
        let count = tokio::io::AsyncReadExt::read(&mut follower, &mut bytes).await.unwrap();
        assert!(count > 0, "{text}");
        text += std::str::from_utf8(&bytes[..count]).unwrap();
    }
    assert!(text.find("session-created") < text.find("vm-started"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn warnings_go_to_the_client_that_woke_the_vm_and_to_nobody_else() {
    let mut stage = Stage::new();
    let first = stage.ask(Policy::Acquire);
    pass(seconds(1)).await;
    let second = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(1));
    for (generation, words) in [(1, "a volume is gone"), (7, "of another VM")] {
        let (generation, what) = (Generation(generation), words.to_owned());
        stage.inbox().send(Message::Note { generation, what });
    }
    let _guest = stage.ready(1);
    assert_eq!(granted(first).await.warnings(), ["a volume is gone"]);
    assert_eq!(granted(second).await.warnings(), [] as [String; 0]);
    assert_eq!(granted(stage.ask(Policy::Acquire)).await.warnings(), [] as [String; 0]);
    assert_eq!(stage.owner.why().await.unwrap().warnings, ["a volume is gone"]);
    assert!(stage.history().await.contains(&"warning 1".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_token_or_process_that_woke_the_vm_is_told_its_warnings_in_the_answers_head() {
    const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: dorm\r\n";
    for (line, body) in
        [("POST /v1/hold", r#"{"reason":"a build"}"#), ("POST /v1/run", r#"{"argv":["sleep","1000"]}"#)]
    {
        let mut stage = Stage::new();
        let mut client = stage.connect();
        let asked = async { request(&mut client, line, UPGRADE, body).await };
        let starting = async {
            assert_eq!(stage.call().await, Call::Start(1));
            for what in ["a volume\r\nis gone", "so is another"] {
                stage.inbox().send(Message::Note { generation: Generation(1), what: what.to_owned() });
            }
            stage.ready(1)
        };
        let (answer, _guest) = tokio::join!(asked, starting);
        let header = dormouse_api::WARNING_HEADER.to_ascii_lowercase();
        for words in ["a volume  is gone", "so is another"] {
            assert!(answer.contains(&format!("\r\n{header}: {words}\r\n")), "{answer}");
        }
        let mut other = stage.connect();
        let answer = request(&mut other, line, UPGRADE, body).await;
        assert!(answer.starts_with("http/1.1 101") && !answer.contains(&header), "{answer}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_is_started_only_if_no_hook_objects_and_is_told_of_once() {
    let mut stage = Stage::new();
    let (_lease, _guest) = stage.up().await;
    stage.hooked.send_replace(Hooked::Veto("not on Sundays"));
    let verdict = stage.owner.may_start(1, "web".to_owned()).await;
    assert_eq!(verdict, Verdict::Veto("not on Sundays".to_owned()));
    stage.hooked.send_replace(Hooked::Fine);
    assert_eq!(stage.owner.may_start(1, "db".to_owned()).await, Verdict::Fine);
    let events = vec![
        EngineEvent::Started { id: "0123abcd".to_owned(), name: "db".to_owned() },
        EngineEvent::Started { id: "4567cdef".to_owned(), name: "sidecar".to_owned() },
        EngineEvent::Died { id: "0123abcd".to_owned() },
        EngineEvent::ImageCreated { image: "busybox".to_owned() },
        EngineEvent::ImageDeleted { image: "sha256:1".to_owned() },
    ];
    let (taken, is_taken) = tokio::sync::oneshot::channel();
    stage.inbox().send(Message::Engine { generation: Generation(1), events, execs: 0, taken });
    is_taken.await.unwrap();
    let (all, _) = stage.owner.events().await.unwrap();
    let container =
        |container: &str| Fact::ContainerStarting { generation: 1, container: container.to_owned() };
    let told: Vec<_> = all.into_iter().skip(2).map(|event| event.fact).collect();
    assert_eq!(
        told,
        [
            container("web"),
            container("db"),
            // The start of `db` was asked about already.
            container("4567cdef"),
            Fact::ContainerStopping { generation: 1, container: "0123abcd".to_owned() },
            Fact::ImageCreated { generation: 1, image: "busybox".to_owned() },
            Fact::ImageDeleted { generation: 1, image: "sha256:1".to_owned() },
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_veto_against_the_sessions_creation_reaches_whoever_creates_it() {
    let stage = Stage::new();
    stage.hooked.send_replace(Hooked::Veto("too many sessions"));
    let mut client = stage.connect();
    let answer = request(&mut client, "POST /v1/session/created", "", "").await;
    assert!(answer.starts_with("http/1.1 403"), "{answer}");
    assert!(answer.contains("a hook refused the session: too many sessions"), "{answer}");
    // Whoever hosts it next has nothing to ask.
    let stage = stage.host_dies().await;
    let answer = request(&mut stage.connect(), "POST /v1/session/created", "", "").await;
    assert!(answer.starts_with("http/1.1 200"), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn more_events_than_may_wait_for_a_hook_that_hangs_are_said_to_be_lost() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    stage.told().await;
    stage.hooked.send_replace(Hooked::Hang);
    let events = vec![EngineEvent::Died { id: "a".to_owned() }; 300];
    let (taken, is_taken) = tokio::sync::oneshot::channel();
    stage.inbox().send(Message::Engine { generation: Generation(1), events, execs: 0, taken });
    is_taken.await.unwrap();
    let lost = stage.history().await.iter().filter(|entry| *entry == "hook_failed 1").count();
    assert!((43..=45).contains(&lost), "{lost}");
    // The sleep does not wait for them.
    drop(lease);
    stage.falls_asleep().await;
}

#[tokio::test(start_paused = true)]
async fn a_trace_can_be_stepped_through_to_where_the_session_is() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    drop(lease);
    stage.falls_asleep().await;
    let answer = request(&mut stage.connect(), "GET /v1/trace", "", "").await;
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let trace: dormouse_lifecycle::Trace = serde_json::from_str(body).unwrap();
    let phases: Vec<_> = trace.replay().map(|step| step.session.view().phase).collect();
    assert!(phases.contains(&PhaseName::Counting) && phases.contains(&PhaseName::Committed), "{phases:?}");
    assert_eq!(phases.last(), Some(&PhaseName::Stopping));
}

#[tokio::test(start_paused = true)]
async fn why_says_what_the_vm_waits_for() {
    let mut stage = Stage::new();
    let first = |why: dormouse_api::Why| why.lines.into_iter().next().unwrap();
    assert!(first(stage.owner.why().await.unwrap()).starts_with("asleep since"));
    let (lease, _guest) = stage.up().await;
    let why = stage.owner.why().await.unwrap();
    assert_eq!(why.woken_by.as_deref(), Some("a test (to see)"));
    assert!(why.lines[1].starts_with("held: request of a test (to see)"), "{why:?}");
    drop(lease);
    assert!(first(stage.owner.why().await.unwrap()).contains("falls asleep at"));
    stage.hooked.send_replace(Hooked::Hang);
    let count = stage.call().await;
    assert!(first(stage.owner.why().await.unwrap()).contains("the engine is asked what runs"));
    stage.counted(count, dormouse_lifecycle::Census::default());
    stage.becomes(Phase::Committed).await;
    assert!(first(stage.owner.why().await.unwrap()).contains("hooks are told"));
    assert!(matches!(stage.call().await, Call::ShutDown(_)));
    assert!(first(stage.owner.why().await.unwrap()).contains("(stop)"));
}

#[tokio::test(start_paused = true)]
async fn a_trace_that_a_crash_left_can_be_read_from_the_next_host() {
    let stage = Stage::new();
    let answer = request(&mut stage.connect(), "GET /v1/trace?crash=true", "", "").await;
    assert!(answer.starts_with("http/1.1 404"), "{answer}");
    // What the panic hook does: here it must not be set, as tests share a process.
    stage.owner.trace.write().unwrap();
    let stage = stage.host_dies().await;
    let answer = request(&mut stage.connect(), "GET /v1/trace?crash=true", "", "").await;
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(serde_json::from_str::<dormouse_lifecycle::Trace>(body).is_ok(), "{body}");
}

#[tokio::test(start_paused = true)]
async fn a_crash_policy_that_was_changed_counts_for_the_vm_that_is_up() {
    let mut stage = Stage::new();
    let (_lease, _guest) = stage.up().await;
    let crash = Some(dormouse_api::CrashPolicy::Terminate);
    stage.owner.change(dormouse_api::ChangeSettings { crash, ..Default::default() });
    stage.exits(1, Exit::Crashed("signal 9".into()));
    assert_eq!(stage.becomes(Phase::Absent).await.crash, dormouse_api::CrashPolicy::Terminate);
    let words = super::stage::refused(stage.ask(Policy::Acquire)).await.to_string();
    assert_eq!(words, "the session is terminated: signal 9");
}
