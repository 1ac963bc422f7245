//! From the commit to a VM that is gone, or back.

use std::time::Duration;

use dormouse_lifecycle::*;

use crate::desk::*;

#[test]
fn a_request_after_the_commit_waits_for_the_next_vm_and_a_hooks_request_is_served() {
    let (mut desk, ask) = Desk::committed(Config::default());
    assert_eq!(desk.ask(2), []);
    assert_eq!(desk.ask_existing(3), [granted(3, 1)]);
    let actions = desk.act(Event::HooksDone { ask });
    assert_eq!(actions[0], Action::EndLeases { generation: g(1), reason: EndReason::Sleeping });
    assert_eq!(desk.ask_existing(4), [refused(4, Refusal::NotRunning)]);
    let actions = desk.act(Event::SleepDone { ask: sleep_ask(&actions) });
    assert_eq!(starts(&actions), Some((2, StartFrom::Fresh)));
    assert!(desk.ready(2).contains(&granted(2, 2)));
}

#[test]
fn whoever_comes_in_any_step_of_a_sleep_is_served_by_the_next_vm_in_the_order_of_coming() {
    let (mut desk, ask) = Desk::committed(Config::default());
    desk.ask(2);
    let actions = desk.act(Event::HooksDone { ask });
    desk.ask(3);
    desk.act(Event::SleepDone { ask: sleep_ask(&actions) });
    desk.ask(4);
    let ready = desk.ready(2);
    let grants: Vec<_> = ready.into_iter().filter(|action| matches!(action, Action::Grant { .. })).collect();
    assert_eq!(grants, [granted(2, 2), granted(3, 2), granted(4, 2)]);
}

#[test]
fn hooks_that_hang_are_not_waited_for_longer_than_their_bound() {
    let (mut desk, _) = Desk::committed(Config::default());
    let before = desk.now;
    assert!(matches!(desk.due()[..], [Action::BeginSleep { .. }]));
    assert_eq!(desk.now.since(before), Duration::from_secs(10));
}

#[test]
fn a_guest_that_ignores_the_shutdown_is_killed_and_one_that_cannot_be_killed_is_left() {
    let (mut desk, _) = Desk::stopping(Config::default());
    desk.ask(2);
    for _ in 0..Limits::KILLS {
        assert_eq!(desk.due(), [Action::KillVm { generation: g(1) }]);
    }
    assert_eq!(desk.due(), [refused(2, Refusal::VmStuck { generation: g(1) })]);
    assert_eq!(desk.session.view().remains, Some(g(1)));
    assert_eq!(desk.ask(3), [refused(3, Refusal::VmStuck { generation: g(1) })]);
    desk.exited(1);
    assert_eq!(starts(&desk.ask(4)), Some((2, StartFrom::Fresh)));
}

#[test]
fn a_vm_that_dies_while_hooks_are_told_has_gone_to_sleep_and_is_no_crash() {
    let (mut desk, ask) = Desk::committed(Config::default());
    let actions = desk.feed(Event::VmExited { generation: g(1), exit: Exit::Crashed("signal 6".into()) });
    assert!(matches!(&actions[..], [Action::Record(Record::Slept { trouble: Some(_), .. })]), "{actions:?}");
    assert_eq!(desk.act(Event::HooksDone { ask }), []);
    assert_eq!(desk.phase(), PhaseName::Absent);
}

#[test]
fn a_vm_that_dies_while_it_stops_has_stopped() {
    let (mut desk, _) = Desk::stopping(Config::default());
    desk.ask(2);
    assert_eq!(starts(&desk.exited(1)), Some((2, StartFrom::Fresh)));
}

#[test]
fn a_suspended_vm_is_resumed_from_its_snapshot_once() {
    let (mut desk, ask) = Desk::stopping(suspending());
    desk.exited(1);
    desk.ask(2);
    assert_eq!(desk.phase(), PhaseName::Stopping, "the snapshot isn't sealed yet");
    let actions = desk.act(Event::SleepDone { ask });
    assert_eq!(starts(&actions), Some((2, StartFrom::Snapshot(g(1)))));
    desk.act(Event::VmReady { generation: g(2), how: StartHow::Resume, census: NOTHING });
    assert_eq!((desk.session.view().boot, desk.session.view().snapshot), (Boot(1), None));
    desk.exited(2);
    assert_eq!(starts(&desk.ask(3)), Some((3, StartFrom::Fresh)));
    desk.ready(3);
    assert_eq!(desk.session.view().boot, Boot(2));
}

#[test]
fn a_snapshot_outlives_a_start_that_did_not_touch_it() {
    for (fate, from) in
        [(SnapshotFate::Intact, StartFrom::Snapshot(g(1))), (SnapshotFate::Void, StartFrom::Fresh)]
    {
        let (mut desk, ask) = Desk::stopping(suspending());
        desk.act(Event::SleepDone { ask });
        desk.ask(2);
        desk.act(Event::StartFailed { generation: g(2), reason: "no memory".into(), snapshot: fate });
        assert_eq!(starts(&desk.ask(3)), Some((3, from)), "{fate:?}");
    }
}

#[test]
fn a_snapshot_that_is_never_sealed_is_no_snapshot() {
    let (mut desk, ask) = Desk::stopping(suspending());
    desk.exited(1);
    assert_eq!(desk.due(), [Action::KillVm { generation: g(1) }]);
    assert_eq!(desk.act(Event::SleepDone { ask }), []);
    assert_eq!(starts(&desk.ask(2)), Some((2, StartFrom::Fresh)));
}

#[test]
fn a_suspend_that_fails_in_time_serves_those_who_waited_and_backs_off() {
    let (mut desk, ask) = Desk::stopping(suspending());
    desk.ask(2);
    desk.act(Event::SleepRequested { request: RequestId(1), how: None });
    let failed = Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, reason: "disk full".into() };
    assert_eq!(
        desk.act(failed.clone()),
        [
            Action::AnswerSleep { request: RequestId(1), outcome: SleepOutcome::Failed("disk full".into()) },
            Action::RunSleepFailedHooks { generation: g(1), reason: "disk full".into() },
            granted(2, 1),
        ]
    );
    assert_eq!(desk.act(failed), [], "the same report again");
    desk.release(2);
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(Duration::from_secs(60))));
    desk.due();
    let actions = desk.counted(4, NOTHING);
    assert!(
        matches!(actions[..], [Action::RunStoppingHooks { how: StopHow::Sleep(SleepHow::Stop), .. }]),
        "nothing runs in it, so it is stopped: {actions:?}"
    );
}

#[test]
fn a_suspend_that_failed_is_tried_again_after_a_growing_wait_while_containers_run() {
    let mut desk = Desk::running(Config { running: RunningContainers::Suspend, ..suspending() });
    desk.act(Event::ContainersChanged { generation: g(1), census: RUNNING });
    desk.release(1);
    for (failures, seconds) in [30, 60, 120, 240, 480, 960, 1920, 3600, 3600].into_iter().enumerate() {
        let wait = desk.session.next_deadline().unwrap().since(desk.now);
        assert_eq!(wait, Duration::from_secs(seconds), "after {failures} failures");
        desk.due();
        let sequence = 3 * failures as u32 + 1;
        let hooks = hooks_ask(&desk.counted(sequence, RUNNING));
        let ask = sleep_ask(&desk.act(Event::HooksDone { ask: hooks }));
        desk.act(Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, reason: "busy".into() });
    }
}

#[test]
fn a_suspend_that_fails_too_late_ends_the_vm() {
    let (mut desk, ask) = Desk::stopping(suspending());
    desk.ask(2);
    let failed = Event::SuspendFailed { ask, vm: AfterFailure::Lost, reason: "disk full".into() };
    assert_eq!(desk.act(failed), [Action::KillVm { generation: g(1) }]);
    assert_eq!(starts(&desk.exited(1)), Some((2, StartFrom::Fresh)));
}

#[test]
fn a_suspend_that_takes_too_long_is_killed_and_leaves_no_snapshot() {
    let (mut desk, ask) = Desk::stopping(suspending());
    assert_eq!(desk.due(), [Action::KillVm { generation: g(1) }]);
    assert_eq!(desk.act(Event::SleepDone { ask }), []);
    assert_eq!((desk.phase(), desk.session.view().snapshot), (PhaseName::Absent, None));
}

#[test]
fn a_vm_whose_engine_died_before_the_suspend_is_stopped_instead() {
    let (mut desk, ask) = Desk::committed(suspending());
    desk.act(Event::EngineDied { generation: g(1), reason: "twice".into() });
    let actions = desk.act(Event::HooksDone { ask });
    assert!(matches!(actions[..], [Action::BeginSleep { how: SleepHow::Stop, .. }]), "{actions:?}");
}

#[test]
fn a_vm_that_comes_back_from_a_failed_suspend_without_its_engine_has_crashed() {
    let (mut desk, ask) = Desk::stopping(suspending());
    desk.ask(2);
    desk.act(Event::EngineDied { generation: g(1), reason: "twice".into() });
    let actions =
        desk.act(Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, reason: "disk full".into() });
    assert!(kills(&actions, 1), "{actions:?}");
    assert_eq!(starts(&desk.exited(1)), Some((2, StartFrom::Fresh)), "who waited gets the next incarnation");
    assert_eq!(desk.session.view().incarnation, Incarnation(2));
}

#[test]
fn a_vm_that_comes_back_from_a_failed_suspend_paused_serves_nobody() {
    let (mut desk, ask) = Desk::stopping(suspending());
    desk.ask(2);
    desk.act(Event::VmPaused { generation: g(1), reason: "no space".into() });
    let actions = desk.act(Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, reason: "no space".into() });
    assert!(actions.contains(&refused(2, Refusal::IoPaused { reason: "no space".into() })), "{actions:?}");
}

#[test]
fn a_vm_that_is_paused_cannot_shut_down_and_is_killed() {
    let (mut desk, ask) = Desk::committed(Config::default());
    desk.act(Event::VmPaused { generation: g(1), reason: "no space".into() });
    assert_eq!(desk.ask_existing(2), [refused(2, Refusal::IoPaused { reason: "no space".into() })]);
    assert_eq!(desk.act(Event::HooksDone { ask }), [Action::KillVm { generation: g(1) }]);
}

#[test]
fn requests_to_sleep_that_come_late_join_the_sleep_under_way() {
    let (mut desk, ask) = Desk::committed(Config::default());
    let request = |number| Event::SleepRequested { request: RequestId(number), how: None };
    assert_eq!(desk.act(request(1)), []);
    let ask = sleep_ask(&desk.act(Event::HooksDone { ask }));
    for number in 2..=Limits::REQUESTS as u64 {
        assert_eq!(desk.act(request(number)), []);
    }
    let outcome = SleepOutcome::TooMany;
    assert_eq!(desk.act(request(99)), [Action::AnswerSleep { request: RequestId(99), outcome }]);
    assert_eq!(desk.act(Event::SleepDone { ask }).len(), Limits::REQUESTS);
}

#[test]
fn answers_to_earlier_orders_about_the_same_vm_are_not_taken_for_those_to_the_present_one() {
    let (mut desk, ask) = Desk::committed(Config::default());
    let earlier = Ask { sequence: ask.sequence - 1, ..ask };
    assert_eq!(desk.act(Event::HooksDone { ask: earlier }), []);
    assert_eq!(desk.phase(), PhaseName::Committed, "the hooks are still being told");
    let (mut desk, ask) = Desk::stopping(suspending());
    let earlier = Ask { sequence: ask.sequence - 1, ..ask };
    assert_eq!(desk.act(Event::SleepDone { ask: earlier }), []);
    let vm = AfterFailure::RunsOn;
    assert_eq!(desk.act(Event::SuspendFailed { ask: earlier, vm, reason: "late".into() }), []);
    assert_eq!(desk.phase(), PhaseName::Stopping);
}

fn start_failed(generation: u64, snapshot: SnapshotFate) -> Event {
    Event::StartFailed { generation: g(generation), reason: "called off".into(), snapshot }
}

#[test]
fn a_start_that_failed_is_not_the_end_of_a_stop() {
    let (mut desk, _) = Desk::stopping(Config::default());
    assert_eq!(desk.act(start_failed(1, SnapshotFate::Void)), []);
    assert_eq!(desk.phase(), PhaseName::Stopping, "the VM still shuts down");
}

/// A session with a snapshot of its first VM, whose second is called off.
fn called_off() -> Desk {
    let (mut desk, ask) = Desk::stopping(suspending());
    desk.act(Event::SleepDone { ask });
    desk.ask(2);
    desk.due();
    assert_eq!(desk.phase(), PhaseName::Stopping);
    desk
}

#[test]
fn a_bring_up_that_was_called_off_leaves_its_snapshot_or_has_used_it() {
    for (fate, left) in [(SnapshotFate::Intact, Some(g(1))), (SnapshotFate::Void, None)] {
        let mut desk = called_off();
        assert_eq!(desk.act(start_failed(1, fate)), [], "of an earlier VM");
        assert_eq!(desk.phase(), PhaseName::Stopping);
        desk.act(start_failed(2, fate));
        assert_eq!((desk.phase(), desk.session.view().snapshot), (PhaseName::Absent, left));
    }
}

#[test]
fn a_snapshot_that_is_not_sealed_in_time_is_none_and_its_vm_is_gone() {
    let (mut desk, _) = Desk::stopping(suspending());
    desk.exited(1);
    let begin = desk.now;
    assert!(kills(&desk.due(), 1));
    assert_eq!(desk.now.since(begin), Limits::default().seal);
    assert_eq!((desk.phase(), desk.session.view().snapshot), (PhaseName::Absent, None));
    let trouble = desk.session.view().latest.sleep.clone().and_then(|(.., trouble)| trouble);
    assert_eq!(trouble.as_deref(), Some("the snapshot wasn't sealed in time"));
}

#[test]
fn whoever_asked_for_the_sleep_of_a_vm_that_no_kill_ends_hears_that_it_failed() {
    let (mut desk, _) = Desk::stopping(Config::default());
    desk.act(Event::SleepRequested { request: RequestId(1), how: None });
    let actions: Vec<_> = (0..=Limits::KILLS).flat_map(|_| desk.due()).collect();
    let outcome = SleepOutcome::Failed("the VM was killed and didn't exit".into());
    assert!(actions.contains(&Action::AnswerSleep { request: RequestId(1), outcome }), "{actions:?}");
}
