//! Bring-ups, and what goes wrong with them.

use dormouse_agent_proto::RunningProcess;
use dormouse_api::{HoldKind, Phase, SessionState};
use dormouse_lifecycle::{
    Census, Config, Event, Exit, Generation, LastVm, Policy, RunningContainers, SleepHow, StartHow,
};

use super::stage::{Call, Guest, Stage, granted, pass, refused, seconds, took};
use crate::owner::Message;

#[tokio::test(start_paused = true)]
async fn many_knocks_start_one_vm() {
    let mut stage = Stage::new();
    let asked: Vec<_> = (0..50).map(|_| stage.ask(Policy::Acquire)).collect();
    assert_eq!(stage.call().await, Call::Start(1));
    stage.is_quiet_for(seconds(10)).await;
    let _guest = stage.ready(1);
    let mut leases = Vec::new();
    for asked in asked {
        leases.push(granted(asked).await);
    }
    assert!(leases.iter().all(|lease| lease.generation() == 1));
    assert_eq!(stage.owner.present().await.vm.start_count, 1);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_ends_while_it_is_brought_up_is_a_failed_start_and_the_next_request_tries_again() {
    let mut stage = Stage::new();
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(1));
    assert_eq!(stage.phase().await, Phase::Starting, "it ends during the bring-up");
    stage.exits(1, Exit::Crashed("signal 9".into()));
    let words = refused(asked).await.to_string();
    assert_eq!(words, "the session's VM could not be started: signal 9");
    let info = stage.owner.present().await;
    assert_eq!((info.state, info.incarnation), (SessionState::Running, 1), "it is no crash");
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(2));
    let _guest = stage.ready(2);
    assert_eq!(granted(asked).await.generation(), 2);
    assert_eq!(stage.told().await, ["session-created", "vm-started 2"]);
    assert_eq!(stage.history().await, ["start_failed 1", "start 2"]);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_takes_too_long_is_given_up_and_its_vm_goes_before_the_next() {
    let mut stage = Stage::new();
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(1));
    let (words, time) = took(refused(asked)).await;
    assert_eq!(words.to_string(), "the session's VM could not be started: the VM wasn't ready in time");
    assert!(time >= seconds(299) && time <= seconds(301), "{time:?}");
    assert_eq!(stage.call().await, Call::Cancel(1));
    let next = stage.ask(Policy::Acquire);
    stage.is_quiet_for(seconds(5)).await;
    // It becomes ready after all: too late.
    let _late = stage.ready(1);
    stage.is_quiet_for(seconds(1)).await;
    stage.start_fails(1, "it was called off");
    assert_eq!(stage.call().await, Call::Start(2));
    let _guest = stage.ready(2);
    assert_eq!(granted(next).await.generation(), 2);
    assert_eq!(stage.told().await, ["session-created", "vm-started 2"]);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_bring_up_that_does_not_end_is_killed() {
    let mut stage = Stage::new();
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(1));
    stage.send(Event::Terminate { reason: "a test".into() });
    assert_eq!(refused(asked).await.to_string(), "the session is being terminated");
    assert_eq!(stage.call().await, Call::Cancel(1));
    let (call, time) = took(stage.call()).await;
    assert_eq!(call, Call::Kill(1));
    assert!(time >= seconds(9) && time <= seconds(11), "{time:?}");
    // A VM that comes up now is announced to nobody.
    let _late = stage.ready(1);
    pass(seconds(1)).await;
    stage.exits(1, Exit::Crashed("killed".into()));
    assert_eq!(stage.becomes(Phase::Absent).await.state, SessionState::Terminated);
    assert_eq!(stage.told().await, ["session-created", "session-stopping"]);
}

#[tokio::test(start_paused = true)]
async fn starts_that_fail_again_and_again_are_tried_ever_less_often() {
    let mut stage = Stage::new();
    for generation in 1..=3 {
        let asked = stage.ask(Policy::Acquire);
        assert_eq!(stage.call().await, Call::Start(generation));
        stage.start_fails(generation, "no memory");
        let words = refused(asked).await.to_string();
        assert_eq!(words, "the session's VM could not be started: no memory");
        if generation > 1 {
            assert_eq!(refused(stage.ask(Policy::Acquire)).await.to_string(), words, "too early");
            pass(seconds(generation)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_gives_its_lease_back_at_once() {
    let mut stage = Stage::new();
    let (gone, stays) = (stage.ask(Policy::Acquire), stage.ask(Policy::Acquire));
    assert_eq!(stage.call().await, Call::Start(1));
    gone.abort();
    pass(seconds(1)).await;
    let _guest = stage.ready(1);
    let lease = granted(stays).await;
    assert_eq!(stage.owner.present().await.holds.len(), 1);
    drop(lease);
    assert_eq!(stage.owner.present().await.holds.len(), 0);
    stage.falls_asleep().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_told_of_an_earlier_vm_does_nothing_to_the_present_one() {
    let mut stage = Stage::new();
    let (lease, _first) = stage.up().await;
    drop(lease);
    stage.falls_asleep().await;
    let asked = stage.ask(Policy::Acquire);
    stage.exits(1, Exit::GuestShutdown);
    assert_eq!(stage.call().await, Call::Start(2));
    // Readiness and a list of containers of the first one, while the second is being made.
    let stale = stage.ready(1);
    pass(seconds(1)).await;
    assert_eq!(stage.phase().await, Phase::Starting, "the second one isn't ready");
    assert!(!asked.is_finished());
    let second = stage.ready(2);
    let lease = granted(asked).await;
    assert_eq!(lease.generation(), 2);
    // All there is to be told of a VM.
    let generation = Generation(1);
    let busy = Census { active: 3, ..Census::default() };
    stage.send(Event::VmReady { generation, how: StartHow::Cold, census: busy });
    stage.send(Event::ContainersChanged { generation, census: busy });
    stage.send(Event::VmPaused { generation, reason: "no space".into() });
    stage.send(Event::EngineDied { generation, reason: "it died".into() });
    stage.exits(1, Exit::Crashed("again".into()));
    stage.start_fails(1, "again");
    let _late = stage.ready(1);
    stage.is_quiet_for(seconds(5)).await;
    assert_eq!(stage.phase().await, Phase::Running);
    assert_eq!(stage.owner.present().await.holds.len(), 1, "nothing of the first counts");
    // The channel that leases get is still the second one's.
    *second.containers.lock().unwrap() = vec!["running"];
    drop(stale);
    let other = granted(stage.ask(Policy::Acquire)).await;
    assert_eq!(other.generation(), 2);
    assert_eq!(list(&other).await, r#"[{"Id":"0","State":"running"}]"#);
}

async fn list(lease: &crate::lease::Lease) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = lease.dial(dormouse_agent_proto::Target::Engine).await.unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split("\r\n\r\n").nth(1).unwrap_or_default().to_owned()
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_outlived_its_host_is_taken_over_with_what_runs_in_it() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    let mut stage = stage.host_dies().await;
    drop(lease);
    assert_eq!(stage.call().await, Call::Adopt(1));
    assert!(matches!(stage.on_disk.vm, LastVm::Up { .. }));
    let asked = stage.ask(Policy::Acquire);
    stage.is_quiet_for(seconds(5)).await;
    let guest = Guest::with(&["running"]);
    stage.comes_up(1, StartHow::Cold, &guest, Vec::new());
    let lease = granted(asked).await;
    assert_eq!(lease.generation(), 1);
    drop(lease);
    stage.is_quiet_for(seconds(3600)).await;
    let info = stage.owner.present().await;
    assert_eq!((info.vm.generation, info.vm.start_count, info.holds.len()), (1, 1, 1), "its container holds");
    assert_eq!(stage.history().await, ["start 1", "adopt 1"]);
    assert_eq!(stage.told().await, [] as [&str; 0], "hooks were told by the host that started it");
}

fn left_over(pid: u32, command: &str) -> RunningProcess {
    RunningProcess { pid, command: command.to_owned() }
}

/// What holds, as kind and reason.
async fn holds(stage: &Stage) -> Vec<(HoldKind, String)> {
    stage.owner.present().await.holds.into_iter().map(|hold| (hold.kind, hold.reason)).collect()
}

#[tokio::test(start_paused = true)]
async fn root_processes_and_execs_of_an_earlier_host_hold_the_vm_that_is_taken_over() {
    // Running containers alone would not hold it.
    let (running, idle_action) = (RunningContainers::Suspend, SleepHow::Suspend);
    let mut stage = Stage::with(Config { running, idle_action, ..Config::default() });
    let (lease, _guest) = stage.up().await;
    let mut stage = stage.host_dies().await;
    drop(lease);
    assert_eq!(stage.call().await, Call::Adopt(1));
    let guest = Guest::with(&["running"]);
    *guest.execs.lock().unwrap() = vec![false, true];
    stage.comes_up(1, StartHow::Cold, &guest, vec![left_over(7, "make all"), left_over(8, "sleep 9")]);
    stage.becomes(Phase::Running).await;
    let expected = [
        (HoldKind::RootProcess, "make all".to_owned()),
        (HoldKind::RootProcess, "sleep 9".to_owned()),
        (HoldKind::Container, "1 running".to_owned()),
        (HoldKind::Exec, "1 running".to_owned()),
    ];
    assert_eq!(holds(&stage).await, expected);
    // A new lease is none of theirs.
    drop(granted(stage.ask(Policy::Acquire)).await);
    assert_eq!(holds(&stage).await, expected);
    let ended = |generation, pid| Message::ProcessEnded { generation: Generation(generation), pid };
    stage.inbox().send(ended(1, 7));
    assert_eq!(holds(&stage).await, expected[1..]);
    for nobody in [ended(1, 7), ended(0, 8), ended(2, 8)] {
        stage.inbox().send(nobody);
    }
    assert_eq!(holds(&stage).await, expected[1..]);
    stage.inbox().send(ended(1, 8));
    stage.is_quiet_for(seconds(3600)).await;
    assert_eq!(holds(&stage).await, expected[2..], "the exec holds");
    let (taken, is_taken) = tokio::sync::oneshot::channel();
    stage.inbox().send(Message::Engine { generation: Generation(1), events: Vec::new(), execs: 0, taken });
    is_taken.await.unwrap();
    let census = Census { active: 1, ..Census::default() };
    stage.send(Event::ContainersChanged { generation: Generation(1), census });
    let count = stage.call().await;
    assert!(matches!(count, Call::Count(_)), "{count:?}");
}

#[tokio::test(start_paused = true)]
async fn a_root_process_that_was_suspended_with_its_vm_holds_it_when_it_is_woken() {
    let mut stage = Stage::new();
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(1));
    let guest = Guest::with(&[]);
    stage.comes_up(1, StartHow::Resume, &guest, vec![left_over(7, "make all")]);
    drop(granted(asked).await);
    stage.is_quiet_for(seconds(3600)).await;
    assert_eq!(holds(&stage).await, [(HoldKind::RootProcess, "make all".to_owned())]);
    stage.inbox().send(Message::ProcessEnded { generation: Generation(1), pid: 7 });
    stage.falls_asleep().await;
}

#[tokio::test(start_paused = true)]
async fn a_start_that_its_host_did_not_live_to_see_is_cleared_away() {
    let mut stage = Stage::new();
    let asked = stage.ask(Policy::Acquire);
    assert_eq!(stage.call().await, Call::Start(1));
    let mut stage = stage.host_dies().await;
    drop(asked);
    assert_eq!(stage.call().await, Call::Kill(1));
    let asked = stage.ask(Policy::Acquire);
    stage.is_quiet_for(seconds(5)).await;
    stage.exits(1, Exit::Unknown("it was gone".into()));
    assert_eq!(stage.call().await, Call::Start(2));
    let _guest = stage.ready(2);
    assert_eq!(granted(asked).await.generation(), 2);
}
