//! From no VM to one that serves, and how that can fail.

use std::time::Duration;

use dormouse_lifecycle::*;

use crate::desk::*;

#[test]
fn the_first_request_starts_a_vm_and_is_granted_when_it_is_ready() {
    let mut desk = Desk::new(Config::default());
    assert_eq!(desk.session.next_deadline(), None);
    assert_eq!(starts(&desk.ask(1)), Some((1, StartFrom::Fresh)));
    assert_eq!(desk.ask(2), []);
    assert_eq!(
        desk.ready(1),
        [Action::AnnounceStarted { generation: g(1), how: StartHow::Cold }, granted(1, 1), granted(2, 1)]
    );
    assert_eq!(desk.ask(3), [granted(3, 1)]);
}

#[test]
fn an_existing_only_request_never_starts_a_vm_and_never_waits_for_one() {
    let mut desk = Desk::new(Config::default());
    assert_eq!(desk.ask_existing(1), [refused(1, Refusal::NotRunning)]);
    desk.ask(2);
    assert_eq!(desk.ask_existing(3), [refused(3, Refusal::NotRunning)]);
    desk.ready(1);
    assert_eq!(desk.ask_existing(4), [granted(4, 1)]);
}

#[test]
fn a_request_that_is_abandoned_while_it_waits_is_never_granted() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    desk.ask(2);
    desk.release(1);
    assert!(!desk.ready(1).contains(&granted(1, 1)));
    assert_eq!(desk.session.view().leases, 1);
}

#[test]
fn a_failed_start_is_told_to_all_who_wait_and_the_next_request_tries_again_at_once() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    desk.ask(2);
    let failed = |generation| Event::StartFailed {
        generation: g(generation),
        reason: "no space".into(),
        snapshot: SnapshotFate::Intact,
    };
    let refusal = Refusal::StartFailed { reason: "no space".into(), retry_at: desk.now };
    assert_eq!(desk.act(failed(1)), [refused(1, refusal.clone()), refused(2, refusal)]);
    assert_eq!(desk.phase(), PhaseName::Absent);
    assert_eq!(starts(&desk.ask(3)), Some((2, StartFrom::Fresh)));
    // From the second failure in a row on, the next try has to wait.
    desk.act(failed(2));
    let refusal =
        Refusal::StartFailed { reason: "no space".into(), retry_at: desk.now.after(Duration::from_secs(1)) };
    assert_eq!(desk.ask(4), [refused(4, refusal)]);
    desk.wait(Duration::from_secs(1));
    assert_eq!(starts(&desk.ask(5)), Some((3, StartFrom::Fresh)));
}

#[test]
fn the_wait_after_failed_starts_grows_to_a_minute_and_a_success_ends_it() {
    let mut desk = Desk::new(Config::default());
    for (failure, wait) in [0, 1, 2, 4, 8, 16, 32, 60, 60].into_iter().enumerate() {
        let generation = failure as u64 + 1;
        assert_eq!(starts(&desk.ask(generation)).map(|start| start.0), Some(generation));
        let refusal = Refusal::StartFailed {
            reason: "signal 9".into(),
            retry_at: desk.now.after(Duration::from_secs(wait)),
        };
        assert_eq!(desk.exited(generation), [refused(generation, refusal)]);
        desk.wait(Duration::from_secs(wait));
    }
    desk.ask(50);
    desk.ready(10);
    desk.release(50);
    desk.exited(10);
    desk.ask(51);
    let retry_at = desk.now;
    assert_eq!(
        desk.exited(11),
        [refused(51, Refusal::StartFailed { reason: "signal 9".into(), retry_at })],
        "failures before a success are forgotten"
    );
}

#[test]
fn an_exit_while_starting_is_a_failed_start_and_no_crash() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    let actions = desk.feed(Event::VmExited { generation: g(1), exit: Exit::Crashed("signal 11".into()) });
    assert!(!actions.iter().any(|action| matches!(action, Action::Record(Record::Crashed { .. }))));
    assert_eq!(desk.phase(), PhaseName::Absent);
    assert_eq!(desk.session.termination(), None);
}

#[test]
fn a_start_that_takes_too_long_is_given_up_and_its_vm_is_gone_before_the_next() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    desk.now = desk.now.after(Duration::from_secs(299));
    assert_eq!(desk.act(Event::DeadlineReached), []);
    let actions = desk.due();
    let retry_at = desk.now;
    let refusal = Refusal::StartFailed { reason: "the VM wasn't ready in time".into(), retry_at };
    assert_eq!(actions, [refused(1, refusal), Action::CancelStart { generation: g(1) }]);
    assert_eq!(desk.ask(2), [], "the next request waits for the old VM's end");
    assert_eq!(desk.ready(1), [], "a VM that was given up is not announced");
    assert_eq!(starts(&desk.exited(1)), Some((2, StartFrom::Fresh)));
}

#[test]
fn a_bring_up_that_ignores_its_cancellation_is_killed() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    desk.due();
    for _ in 0..Limits::KILLS {
        assert_eq!(desk.due(), [Action::KillVm { generation: g(1) }]);
    }
    desk.due();
    assert_eq!(desk.session.next_deadline(), None);
    assert_eq!(desk.ask(2), [refused(2, Refusal::VmStuck { generation: g(1) })]);
    desk.exited(1);
    assert_eq!(starts(&desk.ask(3)), Some((2, StartFrom::Fresh)));
}

#[test]
fn reports_of_an_older_generation_change_nothing() {
    for phase in [PhaseName::Starting, PhaseName::Running] {
        let (mut desk, ask) = Desk::stopping(Config::default());
        desk.act(Event::SleepDone { ask });
        desk.ask(2);
        if phase == PhaseName::Running {
            desk.ready(2);
        }
        let before = desk.session.clone();
        for event in [
            Event::VmExited { generation: g(1), exit: Exit::Crashed("late".into()) },
            Event::VmReady { generation: g(1), how: StartHow::Cold, census: RUNNING },
            Event::StartFailed { generation: g(1), reason: "late".into(), snapshot: SnapshotFate::Void },
            Event::VmPaused { generation: g(1), reason: "late".into() },
            Event::VmResumed { generation: g(1) },
            Event::EngineDied { generation: g(1), reason: "late".into() },
            Event::ContainersChanged { generation: g(1), census: RUNNING },
            Event::ContainersCounted { ask, census: None },
            Event::HooksDone { ask },
            Event::SleepDone { ask },
            Event::SuspendFailed { ask, vm: AfterFailure::RunsOn, reason: "late".into() },
            Event::VmProgress { generation: g(1), step: "late".into() },
            Event::VmAdopted { generation: g(1), census: RUNNING, holds: Vec::new() },
        ] {
            assert_eq!(desk.feed(event.clone()), [], "{event:?}");
            assert_eq!((desk.phase(), &desk.session), (phase, &before), "{event:?}");
        }
    }
}

#[test]
fn the_same_report_twice_is_the_same_as_once() {
    let mut desk = Desk::running(Config::default());
    assert_eq!(desk.ready(1), []);
    assert_eq!(desk.session.view().start_count, 1);
    assert_eq!(desk.ask(1), [], "a request that is known already");
}

#[test]
fn more_requests_than_may_wait_are_refused() {
    let limits = Limits { queued: 2, leases: 3, ..Limits::default() };
    let mut desk = Desk::new(Config { limits, ..Config::default() });
    desk.ask(1);
    desk.ask(2);
    assert_eq!(desk.ask(3), [refused(3, Refusal::TooMany { limit: 2 })]);
    desk.ready(1);
    assert_eq!(desk.ask(4), [granted(4, 1)]);
    assert_eq!(desk.ask(5), [refused(5, Refusal::TooMany { limit: 3 })]);
}

#[test]
fn the_progress_of_a_start_can_be_seen() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    desk.act(Event::VmProgress { generation: g(1), step: "engine".into() });
    assert_eq!(desk.session.view().progress.map(|step| &**step), Some("engine"));
}

#[test]
fn a_vm_is_announced_however_it_was_started() {
    for how in [StartHow::Cold, StartHow::Clone, StartHow::Resume] {
        let mut desk = Desk::new(Config::default());
        desk.ask(1);
        let actions = desk.act(Event::VmReady { generation: g(1), how, census: NOTHING });
        assert!(actions.contains(&Action::AnnounceStarted { generation: g(1), how }), "{actions:?}");
        assert_eq!(desk.session.view().boot.0, u64::from(how != StartHow::Resume));
    }
}
