//! VMs that end though nobody asked.

use dormouse_api::{Phase, SessionState, TerminationReason};
use dormouse_lifecycle::{Config, CrashPolicy, Event, Exit, Generation, Policy};

use super::stage::{Call, Stage, granted, pass, refused, seconds, took};

#[tokio::test(start_paused = true)]
async fn a_killed_vm_fails_what_is_in_flight_and_the_next_request_opens_a_new_incarnation() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    stage.exits(1, Exit::Crashed("signal 9".into()));
    let (reason, time) = took(lease.ended()).await;
    assert_eq!(reason, "the VM crashed: signal 9");
    assert!(time < seconds(10), "{time:?}");
    let ended = stage.becomes(Phase::Absent).await;
    let end = ended.termination.expect("a reason");
    assert_eq!((ended.state, end.reason), (SessionState::Terminated, TerminationReason::Crashed));
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(2));
    let _next = stage.ready(2);
    assert_eq!(granted(asked).await.generation(), 2);
    assert_eq!(stage.owner.present().await.incarnation, 2);
    assert_eq!(
        stage.told().await,
        [
            "session-created",
            "vm-started 1",
            "vm-stopping 1",
            "session-stopping",
            "session-created",
            "vm-started 2"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn whoever_sees_the_end_can_read_its_reason() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    let mut info = stage.owner.info();
    let watching = tokio::spawn(async move {
        loop {
            info.changed().await.expect("the owner lives");
            let info = info.borrow_and_update().clone();
            if info.state == SessionState::Terminated {
                return info.termination;
            }
            assert_eq!(info.termination, None, "a reason before the end");
        }
    });
    stage.send(Event::Terminate { reason: "a test".into() });
    assert!(matches!(stage.call().await, Call::ShutDown(_)));
    assert_eq!(lease.ended().await, "the session is being terminated");
    stage.exits(1, Exit::GuestShutdown);
    assert_eq!(watching.await.unwrap().expect("a reason with the end").details, "a test");
}

#[tokio::test(start_paused = true)]
async fn with_the_policy_terminate_a_crash_is_the_end_until_somebody_starts_the_session() {
    let mut stage = Stage::with(Config { crash: CrashPolicy::Terminate, ..Config::default() });
    let (_lease, _guest) = stage.up().await;
    stage.exits(1, Exit::Crashed("signal 9".into()));
    stage.becomes(Phase::Absent).await;
    let words = refused(stage.ask(Policy::Acquire)).await.to_string();
    assert_eq!(words, "the session is terminated: signal 9");
    stage.send(Event::StartRequested);
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(2));
    let _next = stage.ready(2);
    assert_eq!(granted(asked).await.generation(), 2);
}

#[tokio::test(start_paused = true)]
async fn three_crashes_within_five_minutes_put_the_next_start_off() {
    let mut stage = Stage::new();
    for generation in 1..=3 {
        let asked = stage.ask(Policy::Acquire);
        assert_eq!(stage.call().await, Call::Start(generation));
        let _guest = stage.ready(generation);
        let _lease = granted(asked).await;
        stage.exits(generation, Exit::Crashed("signal 9".into()));
        stage.becomes(Phase::Absent).await;
        pass(seconds(10)).await;
    }
    let words = refused(stage.ask(Policy::Acquire)).await.to_string();
    assert!(words.contains("crashed too often (signal 9)"), "{words}");
    pass(seconds(280)).await;
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(4));
    asked.abort();
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_stays_dead_ends_the_vm() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    stage.send(Event::EngineDied { generation: Generation(1), reason: "dockerd: signal 11".into() });
    assert_eq!(stage.call().await, Call::Kill(1));
    assert_eq!(lease.ended().await, "the VM crashed: dockerd: signal 11");
    // A request that comes now waits for the next VM.
    let asked = stage.ask(Policy::Acquire);
    stage.is_quiet_for(seconds(1)).await;
    stage.exits(1, Exit::Crashed("killed".into()));
    assert_eq!(stage.call().await, Call::Start(2));
    let _next = stage.ready(2);
    assert_eq!(granted(asked).await.generation(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_its_disk_has_paused_is_run_on_again_or_given_up_after_five_minutes() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    stage.send(Event::VmPaused { generation: Generation(1), reason: "no space left".into() });
    let words = refused(stage.ask(Policy::Acquire)).await.to_string();
    assert_eq!(words, "the session's VM is paused by its disk: no space left");
    assert_eq!(stage.call().await, Call::Resume(1));
    stage.send(Event::VmResumed { generation: Generation(1) });
    assert_eq!(granted(stage.ask(Policy::Acquire)).await.generation(), 1);
    stage.send(Event::VmPaused { generation: Generation(1), reason: "no space left".into() });
    let (tries, time) = took(async {
        let mut tries = 0;
        while stage.call().await == Call::Resume(1) {
            tries += 1;
        }
        tries
    })
    .await;
    assert_eq!(tries, 59, "every five seconds");
    assert!(time >= seconds(299) && time <= seconds(301), "{time:?}");
    assert_eq!(lease.ended().await, "the VM crashed: no space left");
}
