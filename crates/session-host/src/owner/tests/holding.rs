//! What holds a VM over the control socket: tokens, pins, root processes.

use std::time::Duration;

use dormouse_api::Phase;
use dormouse_lifecycle::{Census, Event, Exit, Generation, HoldKind, Policy};

use super::stage::{Call, Process, Stage, granted, pass, request, seconds, took};
use crate::owner::Message;

const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: dorm\r\n";

async fn run(stage: &mut Stage, detach: bool) -> (tokio::io::DuplexStream, super::stage::Guest) {
    let mut client = stage.connect();
    let body = format!(r#"{{"argv":["sleep","1000"],"detach":{detach}}}"#);
    let asked = async { request(&mut client, "POST /v1/run", UPGRADE, &body).await };
    let starting = async {
        assert_eq!(stage.call().await, Call::Start(1));
        stage.ready(1)
    };
    let (answer, guest) = tokio::join!(asked, starting);
    assert!(answer.starts_with("http/1.1 101"), "{answer}");
    (client, guest)
}

async fn held(stage: &Stage) -> usize {
    stage.owner.present().await.holds.iter().filter(|hold| !hold.weak).count()
}

#[tokio::test(start_paused = true)]
async fn a_token_goes_with_its_client() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    let asked = async { request(&mut client, "POST /v1/hold", UPGRADE, r#"{"reason":"a build"}"#).await };
    let starting = async {
        assert_eq!(stage.call().await, Call::Start(1));
        stage.ready(1)
    };
    let (answer, _guest) = tokio::join!(asked, starting);
    assert!(answer.starts_with("http/1.1 101"), "{answer}");
    stage.is_quiet_for(seconds(3600)).await;
    let hold = stage.owner.present().await.holds.remove(0);
    assert_eq!((hold.kind, hold.reason.as_str()), (dormouse_api::HoldKind::Operation, "a build"));
    drop(client);
    let (_, time) = took(stage.falls_asleep()).await;
    assert!(time < seconds(31), "{time:?}");
}

#[tokio::test(start_paused = true)]
async fn a_detached_root_process_holds_the_vm_after_its_client_is_gone() {
    let mut stage = Stage::new();
    let (client, guest) = run(&mut stage, true).await;
    drop(client);
    stage.is_quiet_for(seconds(3600)).await;
    assert_eq!(held(&stage).await, 1, "the process runs");
    assert!(guest.signals.lock().unwrap().is_empty());
    guest.process.send_replace(Process::Ended);
    stage.falls_asleep().await;
}

#[tokio::test(start_paused = true)]
async fn a_root_process_whose_client_dies_is_hung_up_on_and_holds_until_it_is_gone() {
    let mut stage = Stage::new();
    let (client, guest) = run(&mut stage, false).await;
    guest.process.send_replace(Process::Stubborn);
    drop(client);
    pass(seconds(5)).await;
    assert_eq!(*guest.signals.lock().unwrap(), [1]);
    assert_eq!(held(&stage).await, 1, "it ignores the hang-up, and runs");
    let (_, time) = took(stage.falls_asleep()).await;
    assert_eq!(*guest.signals.lock().unwrap(), [1, 9]);
    assert!(time >= seconds(34) && time < seconds(36), "{time:?}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stays_holds_the_vm_after_its_process_has_ended() {
    let mut stage = Stage::new();
    let (client, guest) = run(&mut stage, false).await;
    guest.process.send_replace(Process::Ended);
    stage.is_quiet_for(seconds(600)).await;
    assert_eq!(held(&stage).await, 1);
    drop(client);
    stage.falls_asleep().await;
}

#[tokio::test(start_paused = true)]
async fn a_root_process_ends_with_its_vm() {
    let mut stage = Stage::new();
    let (_client, _guest) = run(&mut stage, true).await;
    stage.exits(1, Exit::Crashed("signal 9".into()));
    stage.becomes(Phase::Absent).await;
    assert_eq!(held(&stage).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_pin_starts_nothing_holds_a_vm_that_is_up_and_ends_at_its_time() {
    let mut stage = Stage::new();
    let mut client = stage.connect();
    let answer = request(&mut client, "POST /v1/session/pin", "", r#"{"reason":"a demo"}"#).await;
    assert!(answer.starts_with("http/1.1 200"), "{answer}");
    stage.is_quiet_for(seconds(60)).await;
    let (lease, _guest) = stage.up().await;
    drop(lease);
    stage.is_quiet_for(seconds(3600)).await;
    // Now only for an hour.
    let until = jiff::Timestamp::now() + Duration::from_secs(3600);
    let body = format!(r#"{{"until":"{until}"}}"#);
    assert!(request(&mut client, "POST /v1/session/pin", "", &body).await.starts_with("http/1.1 200"));
    let (_, time) = took(stage.falls_asleep()).await;
    assert!(time > seconds(3600) && time < seconds(3640), "{time:?}");
}

#[tokio::test(start_paused = true)]
async fn a_pin_outlives_its_host() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    let mut client = stage.connect();
    assert!(request(&mut client, "POST /v1/session/pin", "", "{}").await.starts_with("http/1.1 200"));
    let mut stage = stage.host_dies().await;
    drop(lease);
    assert_eq!(stage.call().await, Call::Adopt(1));
    let _guest = stage.ready(1);
    stage.becomes(Phase::Running).await;
    stage.is_quiet_for(seconds(3600)).await;
    let mut client = stage.connect();
    assert!(request(&mut client, "DELETE /v1/session/pin", "", "").await.starts_with("http/1.1 200"));
    stage.falls_asleep().await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_events_is_listed_and_keeps_nothing_awake() {
    let mut stage = Stage::new();
    let asked = stage.ask_as(HoldKind::Events, Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(1));
    let _guest = stage.ready(1);
    let stream = granted(asked).await;
    assert!(stage.owner.present().await.holds[0].weak);
    let (_, time) = took(stage.falls_asleep()).await;
    assert!(time < seconds(31), "{time:?}");
    assert_eq!(stream.ended().await, "the VM goes to sleep");
}

#[tokio::test(start_paused = true)]
async fn execs_are_counted_from_the_engines_events_beside_its_list_of_containers() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    let (taken, is_taken) = tokio::sync::oneshot::channel();
    let generation = Generation(1);
    stage.inbox().send(Message::Engine { generation, events: Vec::new(), execs: 2, taken });
    is_taken.await.unwrap();
    stage.send(Event::ContainersChanged { generation, census: Census { active: 1, ..Census::default() } });
    drop(lease);
    let kinds: Vec<_> = stage.owner.present().await.holds.into_iter().map(|hold| hold.kind).collect();
    assert_eq!(kinds, [dormouse_api::HoldKind::Container, dormouse_api::HoldKind::Exec]);
    // None of them counts for another VM.
    stage.exits(1, Exit::Crashed("signal 9".into()));
    let (lease, _guest) = {
        let asked = stage.ask(Policy::Acquire);
        assert_eq!(stage.call().await, Call::Start(2));
        let guest = stage.ready(2);
        (granted(asked).await, guest)
    };
    drop(lease);
    stage.falls_asleep().await;
}
