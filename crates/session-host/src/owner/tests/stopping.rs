//! A sleep under way, and what comes in its way.

use dormouse_api::{Phase, SessionState, SleepAnswer, TerminationReason};
use dormouse_docker_proxy::{Class, Engine, parse_request};
use dormouse_lifecycle::{
    AfterFailure, Ask, Census, Config, Event, Exit, Grace, LastVm, Policy, SleepHow, StartHow, Then,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::stage::{Call, Guest, Hooked, Stage, granted, pass, refused, seconds, took};
use crate::owner::Message;
use crate::ports::tests as published;

/// A VM that nobody needs, up to the moment when the engine is asked.
async fn counting(stage: &mut Stage) -> (Guest, Call) {
    let (lease, guest) = stage.up().await;
    drop(lease);
    let count = stage.call().await;
    assert_eq!(stage.phase().await, Phase::Counting);
    (guest, count)
}

/// ... up to the moment when its hooks are told.
async fn committed(stage: &mut Stage) -> Guest {
    let (guest, count) = counting(stage).await;
    stage.hooked.send_replace(Hooked::Hang);
    stage.counted(count, Census::default());
    stage.becomes(Phase::Committed).await;
    guest
}

/// ... up to the order to shut down.
async fn stopping(stage: &mut Stage) -> (Guest, Ask) {
    let (guest, count) = counting(stage).await;
    stage.counted(count, Census::default());
    let Call::ShutDown(ask) = stage.call().await else { panic!("it is shut down") };
    assert_eq!(stage.phase().await, Phase::Stopping);
    (guest, ask)
}

#[tokio::test(start_paused = true)]
async fn who_only_looks_while_a_vm_falls_asleep_calls_nothing_off_and_wakes_nothing() {
    let mut stage = Stage::new();
    let (_guest, count) = counting(&mut stage).await;
    let list = parse_request("GET /containers/json HTTP/1.1\r\n\r\n".into()).unwrap();
    let (engine, hook) = (stage.engine(Policy::Acquire), stage.engine(Policy::ExistingOnly));
    let looking = tokio::spawn(async move { engine.answer(&list, Class::Reads).await });
    stage.is_quiet_for(seconds(1)).await;
    assert_eq!(stage.phase().await, Phase::Counting, "the count goes on");
    stage.counted(count, Census::default());
    let Call::ShutDown(_) = stage.call().await else { panic!("it is shut down") };
    stage.is_quiet_for(seconds(1)).await;
    assert!(!looking.is_finished(), "a lease would start the next VM");
    // A hook may be what the sleep waits for.
    let list = parse_request("GET /containers/json HTTP/1.1\r\n\r\n".into()).unwrap();
    assert!(hook.answer(&list, Class::Reads).await.unwrap().is_none());
    assert_eq!(stage.phase().await, Phase::Stopping);
    stage.exits(1, Exit::GuestShutdown);
    let answer = timeout(seconds(1), looking).await.expect("the sleep is over").unwrap();
    assert!(answer.unwrap().is_none(), "this engine was asked nothing before its sleep");
    assert_eq!(stage.phase().await, Phase::Absent);
}

#[tokio::test(start_paused = true)]
async fn a_lease_waits_out_a_stop_and_is_served_by_the_next_vm() {
    let mut stage = Stage::new();
    let (_guest, _) = stopping(&mut stage).await;
    let asked = stage.ask(Policy::Acquire);
    stage.is_quiet_for(seconds(20)).await;
    assert_eq!(stage.phase().await, Phase::Stopping, "it waits for the stop");
    assert!(!asked.is_finished());
    stage.exits(1, Exit::GuestShutdown);
    assert_eq!(stage.call().await, Call::Start(2));
    let _next = stage.ready(2);
    assert_eq!(granted(asked).await.generation(), 2);
    assert_eq!(stage.told().await, ["session-created", "vm-started 1", "vm-stopping 1", "vm-started 2"]);
}

#[tokio::test(start_paused = true)]
async fn while_hooks_are_told_they_are_served_and_everybody_else_waits_for_the_next_vm() {
    let mut stage = Stage::new();
    let _guest = committed(&mut stage).await;
    let hook = granted(stage.ask(Policy::ExistingOnly)).await;
    assert_eq!(hook.generation(), 1);
    let asked = stage.ask(Policy::Acquire);
    pass(seconds(1)).await;
    assert!(!asked.is_finished(), "the VM that goes is not for them");
    stage.hooked.send_replace(Hooked::Fine);
    assert!(matches!(stage.call().await, Call::ShutDown(_)));
    assert_eq!(hook.ended().await, "the VM goes to sleep");
    assert_eq!(refused(stage.ask(Policy::ExistingOnly)).await.to_string(), "the session's VM is not running");
    stage.exits(1, Exit::GuestShutdown);
    assert_eq!(stage.call().await, Call::Start(2));
    let _next = stage.ready(2);
    assert_eq!(granted(asked).await.generation(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_hangs_holds_a_sleep_up_for_ten_seconds() {
    let mut stage = Stage::new();
    let _guest = committed(&mut stage).await;
    let (call, time) = took(stage.call()).await;
    assert!(matches!(call, Call::ShutDown(_)), "{call:?}");
    assert!(time >= seconds(9) && time <= seconds(10), "{time:?}");
    // It ends after all: nobody waits for it any more.
    stage.hooked.send_replace(Hooked::Fine);
    stage.is_quiet_for(seconds(1)).await;
    stage.exits(1, Exit::GuestShutdown);
    stage.becomes(Phase::Absent).await;
    assert_eq!(stage.told().await, ["session-created", "vm-started 1", "vm-stopping 1"]);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_crashes_while_its_hooks_are_told_has_fallen_asleep() {
    let mut stage = Stage::new();
    let _guest = committed(&mut stage).await;
    let asked = stage.ask(Policy::Acquire);
    pass(seconds(1)).await;
    assert_eq!(stage.phase().await, Phase::Committed, "the crash hits the stop window");
    stage.exits(1, Exit::Crashed("signal 11".into()));
    assert_eq!(stage.call().await, Call::Start(2));
    let _next = stage.ready(2);
    assert_eq!(granted(asked).await.generation(), 2);
    stage.hooked.send_replace(Hooked::Fine);
    assert_eq!(stage.told().await, ["session-created", "vm-started 1", "vm-stopping 1", "vm-started 2"]);
    assert_eq!(stage.owner.present().await.incarnation, 1, "no crash ends it");
    let slept = stage.owner.history().await.into_iter().find(|entry| entry.what == "sleep").unwrap();
    assert_eq!(slept.reason, "the VM exited before it was told to");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_the_shutdown_is_killed_and_the_history_says_so() {
    let mut stage = Stage::new();
    let (_guest, _) = stopping(&mut stage).await;
    let (call, time) = took(stage.call()).await;
    assert_eq!(call, Call::Kill(1));
    assert!(time >= seconds(59) && time <= seconds(61), "{time:?}");
    stage.exits(1, Exit::Crashed("killed".into()));
    stage.becomes(Phase::Absent).await;
    let slept = stage.owner.history().await.pop().unwrap();
    assert_eq!(
        (slept.what.as_str(), slept.reason.as_str()),
        ("sleep", "the VM didn't end in time and was killed")
    );
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_no_kill_ends_is_given_up_and_no_other_is_made_beside_it() {
    let mut stage = Stage::new();
    let (_guest, _) = stopping(&mut stage).await;
    let asked = stage.ask(Policy::Acquire);
    for _ in 0..3 {
        assert_eq!(stage.call().await, Call::Kill(1));
    }
    let stuck = "the session's VM 1 was killed and does not go away";
    assert_eq!(refused(asked).await.to_string(), stuck);
    assert_eq!(refused(stage.ask(Policy::Acquire)).await.to_string(), stuck);
    let why = stage.owner.why().await.unwrap();
    assert!(why.lines.iter().any(|line| line.contains("was never seen to exit")), "{why:?}");
    // It goes after all.
    stage.exits(1, Exit::Unknown("gone".into()));
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(2));
    let _next = stage.ready(2);
    assert_eq!(granted(asked).await.generation(), 2);
}

#[tokio::test(start_paused = true)]
async fn terminate_wins_over_an_idle_sleep_in_each_of_its_steps_and_hooks_are_told_once() {
    for step in [Phase::Counting, Phase::Committed, Phase::Stopping] {
        let mut stage = Stage::new();
        let mut late = None;
        let _guest = match step {
            Phase::Counting => {
                let (guest, count) = counting(&mut stage).await;
                late = Some(count);
                guest
            }
            Phase::Committed => committed(&mut stage).await,
            _ => stopping(&mut stage).await.0,
        };
        assert_eq!(stage.phase().await, step, "terminate meets the sleep here");
        let waiting = (step != Phase::Counting).then(|| stage.ask(Policy::Acquire));
        pass(seconds(1)).await;
        stage.send(Event::Terminate { reason: "a test".into() });
        if let Some(waiting) = waiting {
            assert_eq!(refused(waiting).await.to_string(), "the session is being terminated", "{step:?}");
        }
        assert_eq!(stage.owner.present().await.state, SessionState::Terminating, "{step:?}");
        assert_eq!(
            refused(stage.ask(Policy::Acquire)).await.to_string(),
            "the session is being terminated",
            "{step:?}"
        );
        // The engine's answer comes late, and changes nothing.
        if let Some(count) = late {
            stage.counted(count, Census { active: 1, ..Census::default() });
        }
        stage.hooked.send_replace(Hooked::Fine);
        if step != Phase::Stopping {
            assert!(matches!(stage.call().await, Call::ShutDown(_)), "{step:?}");
        }
        stage.send(Event::Terminate { reason: "again".into() });
        stage.exits(1, Exit::GuestShutdown);
        let ended = stage.becomes(Phase::Absent).await;
        assert_eq!(ended.state, SessionState::Terminated, "{step:?}");
        let end = ended.termination.expect("a reason");
        assert_eq!((end.reason, end.details.as_str()), (TerminationReason::Shutdown, "a test"), "{step:?}");
        let told = stage.told().await;
        assert_eq!(
            told,
            ["session-created", "vm-started 1", "vm-stopping 1", "session-stopping"],
            "{step:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_asked_for_the_sleep_hears_of_the_termination_instead() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    drop(lease);
    let owner = stage.owner.clone();
    let asked = tokio::spawn(async move { owner.sleep(None).await });
    assert!(matches!(stage.call().await, Call::Count(_)));
    stage.send(Event::Terminate { reason: "a test".into() });
    let failed = SleepAnswer::Failed { reason: "the session was terminated instead".to_owned() };
    assert_eq!(asked.await.unwrap(), failed);
}

#[tokio::test(start_paused = true)]
async fn what_must_survive_is_on_disk_before_the_order_that_uses_it() {
    let mut stage = Stage::new();
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(1));
    assert_eq!((stage.on_disk.generation.0, &stage.on_disk.vm), (1, &LastVm::Starting));
    let _guest = stage.ready(1);
    drop(granted(asked).await);
    stage.falls_asleep().await;
    assert!(
        matches!(stage.on_disk.vm, LastVm::Sleeping { then: Then::Absent, .. }),
        "the shutdown is ordered when the disk knows of it: {:?}",
        stage.on_disk
    );
    stage.exits(1, Exit::GuestShutdown);
    stage.becomes(Phase::Absent).await;
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(2));
    assert_eq!((stage.on_disk.generation.0, stage.on_disk.start_count), (2, 1));
    asked.abort();
    stage.send(Event::Terminate { reason: "a test".into() });
    assert_eq!(stage.call().await, Call::Cancel(2));
    assert!(matches!(stage.on_disk.vm, LastVm::Ending { .. }), "{:?}", stage.on_disk);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_has_to_go_puts_its_vm_to_sleep_whatever_holds_it() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    stage.send(Event::HostLeaving);
    assert_eq!(lease.ended().await, "the service is going down");
    assert!(matches!(stage.call().await, Call::ShutDown(_)));
    assert_eq!(refused(stage.ask(Policy::Acquire)).await.to_string(), "the session's host is going down");
    stage.exits(1, Exit::GuestShutdown);
    stage.becomes(Phase::Absent).await;
    assert_eq!(stage.history().await, ["start 1", "sleep 1"]);
}

#[tokio::test(start_paused = true)]
async fn short_commands_with_no_grace_period_lose_nothing_in_any_window() {
    let mut stage = Stage::with(Config { grace: Grace::After(seconds(0)), ..Config::default() });
    let (lease, mut guest) = stage.up().await;
    drop(lease);
    let mut met = std::collections::BTreeMap::new();
    let mut generation = 1;
    for round in 0..40 {
        // One request hits Counting, the next Committed, the next Stopping, and so on.
        let count = stage.call().await;
        let phase = match round % 3 {
            0 => Phase::Counting,
            1 => {
                stage.hooked.send_replace(Hooked::Hang);
                stage.counted(count, Census::default());
                stage.becomes(Phase::Committed).await.vm.phase
            }
            _ => {
                stage.counted(count, Census::default());
                assert!(matches!(stage.call().await, Call::ShutDown(_)));
                Phase::Stopping
            }
        };
        assert_eq!(stage.phase().await, phase);
        *met.entry(round % 3).or_insert(0) += 1;
        let asked = stage.ask(Policy::Acquire);
        if phase != Phase::Counting {
            pass(seconds(1)).await;
            if phase == Phase::Committed {
                stage.hooked.send_replace(Hooked::Fine);
                assert!(matches!(stage.call().await, Call::ShutDown(_)));
            }
            stage.exits(generation, Exit::GuestShutdown);
            generation += 1;
            assert_eq!(stage.call().await, Call::Start(generation));
            guest = stage.ready(generation);
        }
        assert_eq!(granted(asked).await.generation(), generation, "round {round}");
    }
    drop(guest);
    assert!(met.values().all(|times| *times >= 5), "{met:?}");
    let starts = stage.told().await.iter().filter(|told| told.starts_with("vm-started")).count();
    assert_eq!(starts as u64, generation);
}

/// ... up to the order to suspend.
async fn suspending(stage: &mut Stage) -> (Guest, Ask) {
    let (guest, count) = counting(stage).await;
    stage.counted(count, Census::default());
    let Call::Suspend(ask) = stage.call().await else { panic!("it is suspended") };
    (guest, ask)
}

fn suspends() -> Stage {
    Stage::with(Config { idle_action: SleepHow::Suspend, ..Config::default() })
}

#[tokio::test(start_paused = true)]
async fn a_suspend_that_fails_in_time_runs_on_for_who_waited_and_hooks_are_told() {
    let mut stage = suspends();
    let _guest = committed(&mut stage).await;
    // A hook has a lease of its own, which ends with the sleep.
    let hook = granted(stage.ask(Policy::ExistingOnly)).await;
    let waiting = stage.ask(Policy::Acquire);
    pass(seconds(1)).await;
    stage.hooked.send_replace(Hooked::Fine);
    let Call::Suspend(ask) = stage.call().await else { panic!("it is suspended") };
    assert_eq!(hook.ended().await, "the VM goes to sleep");
    assert!(!waiting.is_finished());
    let (vm, reason) = (AfterFailure::RunsOn, "no space".into());
    stage.send(Event::SuspendFailed { ask, vm, reason });
    let lease = granted(waiting).await;
    assert_eq!(lease.generation(), 1, "the same VM serves on");
    assert_eq!(granted(stage.ask(Policy::Acquire)).await.generation(), 1);
    assert_eq!(stage.told().await, ["session-created", "vm-started 1", "vm-stopping 1", "vm-sleep-failed 1"]);
    drop(lease);
    // The next try is put off, and is a stop: nothing runs that a suspend would keep.
    let (ask, time) = took(stage.falls_asleep()).await;
    assert!(time >= seconds(59) && time <= seconds(61), "{time:?}");
    assert_eq!(ask.generation.0, 1);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_is_revived_after_a_failed_suspend_is_reached_over_its_new_channel() {
    let mut stage = suspends();
    let (old, ask) = suspending(&mut stage).await;
    let waiting = stage.ask(Policy::Acquire);
    pass(seconds(1)).await;
    let revived = Guest::with(&["running"]);
    let generation = ask.generation;
    stage.inbox().send(Message::Revived { generation, agent: revived.agent() });
    let (vm, reason) = (AfterFailure::RunsOn, "no space".into());
    stage.send(Event::SuspendFailed { ask, vm, reason });
    drop(old);
    let lease = granted(waiting).await;
    let mut stream = lease.dial(dormouse_agent_proto::Target::Engine).await.unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with(r#"[{"Id":"0","State":"running"}]"#), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn a_suspended_session_wakes_from_its_snapshot_and_a_lost_one_from_the_kernel() {
    let mut stage = suspends();
    let (_guest, ask) = suspending(&mut stage).await;
    stage.exits(1, Exit::GuestShutdown);
    stage.send(Event::SleepDone { ask });
    stage.becomes(Phase::Absent).await;
    let waiting = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Wake(2));
    let _guest = stage.ready_as(2, StartHow::Resume);
    drop(granted(waiting).await);
    let info = stage.owner.present().await;
    assert_eq!((info.vm.start_count, info.vm.boots), (2, 1), "the same guest kernel");
    let count = stage.call().await;
    stage.counted(count, Census::default());
    let Call::Suspend(ask) = stage.call().await else { panic!("it is suspended") };
    let (vm, reason) = (AfterFailure::Lost, "the device state broke off".into());
    stage.send(Event::SuspendFailed { ask, vm, reason });
    assert_eq!(stage.call().await, Call::Kill(2));
    stage.exits(2, Exit::Crashed("killed".into()));
    stage.becomes(Phase::Absent).await;
    let slept = stage.owner.history().await.pop().unwrap();
    assert_eq!((slept.what.as_str(), slept.reason.as_str()), ("sleep", "the device state broke off"));
    let waiting = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(3), "there is no snapshot");
    waiting.abort();
}

#[tokio::test(start_paused = true)]
async fn a_suspend_that_loses_the_memory_leaves_only_doors_of_who_starts_again() {
    for (policy, stay) in [("no", 0), ("always", 1)] {
        let mut stage = suspends();
        let (_guest, ask) = suspending(&mut stage).await;
        let engine = published::Engine { policy, ..published::Engine::tcp(published::free()).running() };
        engine.compared(&stage.face.ports).await;
        let (vm, reason) = (AfterFailure::Lost, "the device state broke off".into());
        stage.send(Event::SuspendFailed { ask, vm, reason });
        assert_eq!(stage.call().await, Call::Kill(1));
        stage.exits(1, Exit::Crashed("killed".into()));
        stage.becomes(Phase::Absent).await;
        assert_eq!(stage.face.ports.duplicates().len(), stay, "{policy}");
    }
}

/// What the engine says in the sleep of the first VM is kept, with containers in these states.
async fn captured(stage: &Stage, states: &[&'static str]) {
    let agent = Guest::with(states).agent();
    let dial =
        || async { agent.dial(dormouse_agent_proto::Target::Engine).await.map_err(std::io::Error::other) };
    stage.face.asleep.capture(dial, 1).await;
}

/// Is a client answered while the first VM sleeps?
fn is_answered(stage: &Stage) -> bool {
    let ping = parse_request("GET /_ping HTTP/1.1\r\n\r\n".into()).unwrap();
    stage.face.asleep.answer(&ping, 1).is_some()
}

#[tokio::test(start_paused = true)]
async fn of_containers_that_a_stop_ends_nothing_is_told_asleep() {
    for runs in [true, false] {
        let states: &[&'static str] = if runs { &["running"] } else { &[] };
        let mut stage = Stage::new();
        let (_lease, _guest) = stage.up().await;
        stage.send(Event::HostLeaving);
        assert!(matches!(stage.call().await, Call::ShutDown(_)));
        captured(&stage, states).await;
        stage.exits(1, Exit::GuestShutdown);
        stage.becomes(Phase::Absent).await;
        assert_eq!(is_answered(&stage), !runs);
    }
}

#[tokio::test(start_paused = true)]
async fn of_containers_whose_memory_a_termination_drops_nothing_is_told_asleep() {
    for meets_the_suspend in [true, false] {
        let terminate = || Event::Terminate { reason: "a test".into() };
        let mut stage = suspends();
        let (_guest, ask) = suspending(&mut stage).await;
        captured(&stage, &["running"]).await;
        if meets_the_suspend {
            stage.send(terminate());
        }
        stage.exits(1, Exit::GuestShutdown);
        stage.send(Event::SleepDone { ask });
        stage.becomes(Phase::Absent).await;
        assert_eq!(is_answered(&stage), !meets_the_suspend);
        stage.send(terminate());
        assert_eq!(stage.owner.present().await.state, SessionState::Terminated);
        assert!(!is_answered(&stage) && !stage.folder.path().join("asleep.json").exists());
    }
}
