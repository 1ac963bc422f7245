//! The grace period, and what ends it.

use dormouse_api::{ChangeSettings, IdleAction, IdleTimeout, Phase, SleepAnswer};
use dormouse_lifecycle::{Census, Config, Event, Exit, Generation, Policy, Storage};

use super::stage::{Call, Stage, granted, pass, seconds, took};
use crate::owner::Message;

const RUNNING: Census = Census { active: 1, inactive: 0, execs: 0 };
const CREATED: Census = Census { active: 0, inactive: 1, execs: 0 };

fn timeout_of(timeout: IdleTimeout) -> ChangeSettings {
    ChangeSettings { idle_timeout: Some(timeout), ..ChangeSettings::default() }
}

#[tokio::test(start_paused = true)]
async fn a_vm_falls_asleep_when_the_grace_period_after_its_last_lease_is_over() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    stage.is_quiet_for(seconds(3000)).await;
    drop(lease);
    let (ask, time) = took(stage.falls_asleep()).await;
    assert!(time >= seconds(30) && time < seconds(31), "{time:?}");
    assert_eq!(ask.generation, Generation(1));
    stage.exits(1, Exit::GuestShutdown);
    let asleep = stage.becomes(Phase::Absent).await;
    assert_eq!((asleep.vm.start_count, asleep.termination), (1, None));
    assert_eq!(stage.history().await, ["start 1", "sleep 1"]);
}

#[tokio::test(start_paused = true)]
async fn activity_sets_the_timer_back() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    drop(lease);
    for _ in 0..5 {
        stage.is_quiet_for(seconds(20)).await;
        assert_eq!(stage.phase().await, Phase::Running, "the grace period runs");
        drop(granted(stage.ask(Policy::Acquire)).await);
    }
    let (_, time) = took(stage.falls_asleep()).await;
    assert!(time >= seconds(30) && time < seconds(31), "{time:?}");
}

#[tokio::test(start_paused = true)]
async fn a_changed_grace_period_counts_from_when_the_vm_became_idle() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    drop(lease);
    stage.is_quiet_for(seconds(4)).await;
    stage.owner.change(timeout_of(IdleTimeout::Never));
    stage.is_quiet_for(seconds(3600)).await;
    assert!(stage.owner.present().await.vm.deadline.is_none());
    stage.owner.change(timeout_of(IdleTimeout::Seconds(7200)));
    let (_, time) = took(stage.falls_asleep()).await;
    assert!(time >= seconds(3596) && time < seconds(3597), "{time:?}");
}

#[tokio::test(start_paused = true)]
async fn a_shorter_grace_period_that_has_passed_already_is_over_at_once() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    drop(lease);
    stage.is_quiet_for(seconds(10)).await;
    stage.owner.change(timeout_of(IdleTimeout::Seconds(5)));
    let (_, time) = took(stage.falls_asleep()).await;
    assert!(time < seconds(1), "{time:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_comes_while_the_engine_is_asked_is_served_and_the_late_answer_counts_for_nothing() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    drop(lease);
    let count = stage.call().await;
    assert_eq!(stage.phase().await, Phase::Counting, "the lease comes while the engine is asked");
    let lease = granted(stage.ask(Policy::Acquire)).await;
    assert_eq!(lease.generation(), 1);
    stage.counted(count, Census::default());
    stage.is_quiet_for(seconds(600)).await;
    assert_eq!(stage.phase().await, Phase::Running);
    // An answer to the first question isn't one to the second.
    drop(lease);
    let second = stage.call().await;
    stage.counted(count, Census::default());
    stage.is_quiet_for(seconds(4)).await;
    stage.counted(second, Census::default());
    assert!(matches!(stage.call().await, Call::ShutDown(_)));
}

#[tokio::test(start_paused = true)]
async fn a_running_container_keeps_the_vm_awake_and_a_created_one_does_not() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    drop(lease);
    let count = stage.call().await;
    stage.counted(count, RUNNING);
    stage.is_quiet_for(seconds(3600)).await;
    assert_eq!(stage.owner.present().await.holds.len(), 1);
    // The engine tells that it is over.
    stage.send(Event::ContainersChanged { generation: Generation(1), census: CREATED });
    let count = stage.call().await;
    stage.counted(count, CREATED);
    assert!(matches!(stage.call().await, Call::ShutDown(_)));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_does_not_say_what_runs_is_asked_three_times_and_is_then_dead() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    drop(lease);
    for _ in 0..3 {
        assert!(matches!(stage.call().await, Call::Count(_)));
    }
    assert_eq!(stage.call().await, Call::Kill(1));
    stage.exits(1, Exit::Crashed("killed".into()));
    let info = stage.becomes(Phase::Absent).await;
    let end = info.termination.expect("it is a crash");
    assert_eq!(end.details, "the engine didn't say what runs");
}

#[tokio::test(start_paused = true)]
async fn whoever_asks_for_the_sleep_hears_what_came_of_it() {
    let mut stage = Stage::new();
    assert_eq!(stage.owner.sleep(None).await, SleepAnswer::NoVm);
    let (lease, _guest) = stage.up().await;
    let SleepAnswer::Busy { holds } = stage.owner.sleep(None).await else { panic!("a lease holds") };
    assert_eq!((holds[0].owner.as_str(), holds[0].reason.as_str()), ("a test", "to see"));
    drop(lease);
    // With a container in it, which only the engine knows of.
    let asked = tokio::spawn({
        let owner = stage.owner.clone();
        async move { owner.sleep(None).await }
    });
    let count = stage.call().await;
    stage.counted(count, RUNNING);
    assert!(matches!(asked.await.unwrap(), SleepAnswer::Busy { .. }));
    stage.send(Event::ContainersChanged { generation: Generation(1), census: Census::default() });
    let asked = tokio::spawn({
        let owner = stage.owner.clone();
        async move { owner.sleep(None).await }
    });
    let (_, time) = took(stage.falls_asleep()).await;
    assert!(time < seconds(1), "without the grace period");
    stage.exits(1, Exit::GuestShutdown);
    assert_eq!(asked.await.unwrap(), SleepAnswer::Asleep { generation: 1, how: IdleAction::Stop });
    assert_eq!(stage.owner.sleep(None).await, SleepAnswer::NoVm);
}

#[tokio::test(start_paused = true)]
async fn a_session_in_memory_never_sleeps() {
    let mut stage = Stage::with(Config { storage: Storage::Ephemeral, ..Config::default() });
    let (lease, _guest) = stage.up().await;
    assert_eq!(stage.owner.sleep(None).await, SleepAnswer::Disabled);
    drop(lease);
    stage.is_quiet_for(seconds(100_000)).await;
    assert_eq!(stage.owner.sleep(None).await, SleepAnswer::Disabled);
    assert_eq!(stage.phase().await, Phase::Running);
}

#[tokio::test(start_paused = true)]
async fn looking_wakes_nothing_and_is_no_activity() {
    let mut stage = Stage::new();
    let look = async |stage: &Stage| {
        let mut connection = stage.connect();
        for path in ["session", "history", "why", "events", "trace"] {
            let answer = super::stage::request(&mut connection, &format!("GET /v1/{path}"), "", "").await;
            assert!(answer.starts_with("http/1.1 200"), "{path}: {answer}");
            if path == "events" || path == "session/watch" {
                connection = stage.connect();
            }
        }
    };
    look(&stage).await;
    stage.is_quiet_for(seconds(60)).await;
    let (lease, _guest) = stage.up().await;
    drop(lease);
    for _ in 0..28 {
        pass(seconds(1)).await;
        look(&stage).await;
    }
    let (_, time) = took(stage.falls_asleep()).await;
    assert!(time <= seconds(3), "looking set the timer back: {time:?}");
}

#[tokio::test(start_paused = true)]
async fn who_is_granted_a_vm_that_dozed_is_served_when_it_runs_and_knows_the_time() {
    let mut stage = Stage::with(Config { doze: Some(seconds(600)), ..Config::default() });
    let (lease, _guest) = stage.up().await;
    drop(lease);
    let count = stage.call().await;
    stage.counted(count, Census::default());
    assert_eq!(stage.call().await, Call::Doze(1));
    stage.is_quiet_for(seconds(500)).await;
    assert_eq!(stage.phase().await, Phase::Dozing);

    let (first, second) = (stage.ask(Policy::Acquire), stage.ask(Policy::ExistingOnly));
    assert_eq!(stage.call().await, Call::Rouse(1, 1));
    stage.is_quiet_for(seconds(1)).await;
    assert_eq!(stage.phase().await, Phase::Running);
    assert!(!first.is_finished() && !second.is_finished(), "it doesn't know the time yet");
    let roused = |order| Message::Roused { generation: Generation(1), order };
    stage.inbox().send(roused(0));
    pass(seconds(1)).await;
    assert!(!first.is_finished(), "that was an earlier order");
    stage.inbox().send(roused(1));
    drop((granted(first).await, granted(second).await));

    // Whoever waits for one that doesn't run on is told of its end.
    let count = stage.call().await;
    stage.counted(count, Census::default());
    assert_eq!(stage.call().await, Call::Doze(1));
    let waiting = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Rouse(1, 2));
    stage.exits(1, Exit::Crashed("signal 9".into()));
    let lease = granted(waiting).await;
    assert!(lease.ended().await.contains("signal 9"));
}
