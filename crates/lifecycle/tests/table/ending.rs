//! Crashes, terminations, and a host that has to go.

use std::time::Duration;

use dormouse_lifecycle::*;

use crate::desk::*;

fn terminate() -> Event {
    Event::Terminate { reason: "dorm session terminate".into() }
}

fn announces(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::AnnounceTerminated { .. }))
}

#[test]
fn a_crash_ends_the_incarnation_and_the_next_request_opens_another() {
    let mut desk = Desk::running(Config::default());
    let actions = desk.exited(1);
    assert_eq!(
        actions[0],
        Action::EndLeases { generation: g(1), reason: EndReason::Crashed("signal 9".into()) }
    );
    assert!(matches!(actions[1], Action::RunStoppingHooks { how: StopHow::Crash, .. }));
    assert_eq!(actions[2], Action::AnnounceTerminated { incarnation: Incarnation(1) });
    assert_eq!(desk.session.termination().map(|end| end.reason), Some(TerminationReason::Crashed));
    assert_eq!(desk.exited(1), [], "decided once");
    assert_eq!(desk.ask_existing(2), [refused(2, Refusal::NotRunning)]);
    assert_eq!(starts(&desk.ask(3)), Some((2, StartFrom::Fresh)));
    assert_eq!(desk.session.view().incarnation, Incarnation(2));
}

#[test]
fn after_a_crash_a_session_may_have_to_be_started_by_name() {
    let mut desk = Desk::running(Config { crash: CrashPolicy::Terminate, ..Config::default() });
    desk.exited(1);
    let termination = desk.session.termination().unwrap().clone();
    assert_eq!(desk.ask(2), [refused(2, Refusal::Terminated(termination))]);
    assert_eq!(desk.act(Event::StartRequested), []);
    assert_eq!(starts(&desk.ask(3)), Some((2, StartFrom::Fresh)));
}

#[test]
fn three_crashes_within_five_minutes_put_off_the_next_try() {
    let mut desk = Desk::new(Config::default());
    let first = desk.now;
    for generation in 1..=3 {
        assert_eq!(starts(&desk.ask(generation)).map(|start| start.0), Some(generation));
        desk.ready(generation);
        desk.exited(generation);
        desk.wait(Duration::from_secs(60));
    }
    let until = first.after(Duration::from_secs(300));
    assert_eq!(desk.ask(4), [refused(4, Refusal::CrashBackoff { details: "signal 9".into(), until })]);
    desk.now = until;
    assert_eq!(starts(&desk.ask(5)).map(|start| start.0), Some(4));
}

#[test]
fn a_crash_is_forgotten_after_five_minutes() {
    let mut desk = Desk::running(Config::default());
    desk.exited(1);
    desk.ask(2);
    desk.ready(2);
    desk.wait(Duration::from_secs(300));
    desk.exited(2);
    assert_eq!(desk.persisted.crashes.len(), 1, "{:?}", desk.persisted.crashes);
}

#[test]
fn a_start_by_name_does_not_wait_for_the_back_off() {
    let mut desk = Desk::new(Config::default());
    for generation in 1..=3 {
        desk.ask(generation);
        desk.ready(generation);
        desk.exited(generation);
    }
    desk.act(Event::StartRequested);
    assert!(starts(&desk.ask(4)).is_some());
}

#[test]
fn a_dead_engine_is_a_crash_of_its_vm() {
    let mut desk = Desk::running(Config::default());
    let actions = desk.act(Event::EngineDied { generation: g(1), reason: "twice in a minute".into() });
    assert!(kills(&actions, 1) && !announces(&actions), "{actions:?}");
    assert_eq!(desk.session.view().state, State::Terminating);
    assert_eq!(desk.ask(2), [], "waits for the next incarnation");
    let actions = desk.exited(1);
    assert!(announces(&actions));
    assert_eq!(starts(&actions), Some((2, StartFrom::Fresh)));
}

#[test]
fn terminate_arrives_from_every_phase_and_grants_nothing_after_it() {
    let mut begun: Vec<(&str, Desk)> = vec![
        ("absent", Desk::new(Config::default())),
        ("running", Desk::running(Config::default())),
        ("committed", Desk::committed(Config::default()).0),
        ("stopping", Desk::stopping(Config::default()).0),
        ("suspending", Desk::stopping(suspending()).0),
    ];
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    begun.push(("starting", desk));
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    desk.due();
    begun.push(("counting", desk));
    for (phase, mut desk) in begun {
        let mut announced = usize::from(announces(&desk.act(terminate())));
        announced += usize::from(announces(&desk.act(terminate())));
        assert!(!desk.ask(8).contains(&granted(8, 1)), "{phase}");
        assert!(!desk.ask_existing(9).contains(&granted(9, 1)), "{phase}");
        assert_eq!(desk.session.view().queued, 0, "{phase}");
        for _ in 0..10 {
            if desk.session.next_deadline().is_some() {
                announced += usize::from(announces(&desk.due()));
            }
        }
        assert_eq!((desk.phase(), announced), (PhaseName::Terminated, 1), "{phase}");
        let termination = desk.session.termination().unwrap().clone();
        assert_eq!(termination.reason, TerminationReason::Shutdown, "{phase}");
        assert_eq!(desk.ask(10), [refused(10, Refusal::Terminated(termination))], "{phase}");
    }
}

#[test]
fn terminate_fails_work_in_flight_and_those_who_wait() {
    let mut desk = Desk::running(Config::default());
    let actions = desk.act(terminate());
    assert_eq!(actions[0], Action::EndLeases { generation: g(1), reason: EndReason::Terminating });
    let (mut desk, _) = Desk::stopping(Config::default());
    desk.ask(2);
    assert_eq!(desk.act(terminate()), [refused(2, Refusal::Terminating)]);
    assert_eq!(desk.ask(3), [refused(3, Refusal::Terminating)]);
}

#[test]
fn terminate_cancels_a_bring_up_and_tells_no_hooks() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    let expected = [refused(1, Refusal::Terminating), Action::CancelStart { generation: g(1) }];
    assert_eq!(desk.act(terminate()), expected);
    let ended =
        Event::StartFailed { generation: g(1), reason: "cancelled".into(), snapshot: SnapshotFate::Void };
    assert_eq!(desk.act(ended), [Action::AnnounceTerminated { incarnation: Incarnation(1) }]);
}

#[test]
fn a_suspend_that_fails_under_a_terminate_becomes_a_stop() {
    let (mut desk, ask) = Desk::stopping(suspending());
    desk.act(terminate());
    let actions =
        desk.act(Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, reason: "disk full".into() });
    assert!(matches!(actions[..], [Action::BeginSleep { how: SleepHow::Stop, .. }]), "{actions:?}");
    assert!(announces(&desk.exited(1)));
}

#[test]
fn the_reason_of_a_crash_is_not_overwritten_by_the_kill_or_by_a_terminate() {
    let mut desk = Desk::running(Config::default());
    desk.act(Event::EngineDied { generation: g(1), reason: "twice in a minute".into() });
    desk.act(terminate());
    desk.exited(1);
    let termination = desk.session.termination().unwrap();
    assert_eq!((termination.cause, &*termination.details), (Cause::EngineDied, "twice in a minute"));
    assert_eq!(termination.reopen, Reopen::OnStart);
}

#[test]
fn a_crashed_session_that_is_terminated_has_to_be_started_by_name() {
    let mut desk = Desk::running(Config::default());
    desk.exited(1);
    assert_eq!(desk.act(terminate()), []);
    assert!(matches!(
        desk.ask(2)[..],
        [Action::Refuse {
            refusal: Refusal::Terminated(Termination { reason: TerminationReason::Crashed, .. }),
            ..
        }]
    ));
}

#[test]
fn a_snapshot_ends_with_its_incarnation() {
    let (mut desk, ask) = Desk::stopping(suspending());
    desk.act(Event::SleepDone { ask });
    assert_eq!(desk.session.view().snapshot, Some(g(1)));
    desk.act(terminate());
    desk.act(Event::StartRequested);
    assert_eq!(starts(&desk.ask(2)), Some((2, StartFrom::Fresh)));
}

#[test]
fn a_temporary_session_ends_with_the_connection_that_made_it() {
    let mut desk = Desk::new(Config { lifetime: Lifetime::Temporary, ..Config::default() });
    assert!(announces(&desk.act(Event::CreatorGone)));
    assert_eq!(desk.session.termination().map(|end| end.cause), Some(Cause::CreatorGone));
    let mut desk = Desk::running(Config::default());
    assert_eq!(desk.act(Event::CreatorGone), []);
    assert_eq!(desk.phase(), PhaseName::Running);
}

#[test]
fn a_host_that_has_to_go_puts_its_vm_to_sleep_whatever_holds() {
    let mut desk = Desk::running(suspending());
    let actions = desk.act(Event::HostLeaving);
    assert_eq!(actions[0], Action::EndLeases { generation: g(1), reason: EndReason::HostLeaving });
    let ask = hooks_ask(&actions);
    assert_eq!(desk.ask(2), [refused(2, Refusal::HostLeaving)]);
    let ask = sleep_ask(&desk.act(Event::HooksDone { ask }));
    let failed = Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, reason: "disk full".into() };
    let actions = desk.act(failed);
    assert!(matches!(actions[..], [Action::BeginSleep { how: SleepHow::Stop, .. }]), "{actions:?}");
    desk.exited(1);
    assert_eq!(desk.phase(), PhaseName::Absent);
    assert_eq!(desk.ask(3), [refused(3, Refusal::HostLeaving)]);
}

#[test]
fn a_host_that_has_to_go_cancels_a_start_and_refuses_those_who_wait() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    let expected = [refused(1, Refusal::HostLeaving), Action::CancelStart { generation: g(1) }];
    assert_eq!(desk.act(Event::HostLeaving), expected);
}

#[test]
fn an_ephemeral_session_ends_with_its_host() {
    let mut desk = Desk::running(Config { storage: Storage::Ephemeral, ..Config::default() });
    desk.act(Event::HostLeaving);
    desk.due();
    desk.exited(1);
    assert_eq!(desk.session.termination().map(|end| end.cause), Some(Cause::HostLeaving));
}
