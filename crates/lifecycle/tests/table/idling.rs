//! What keeps a VM up, and when it begins to sleep.

use std::time::Duration;

use dormouse_lifecycle::*;

use crate::desk::*;

const GRACE: Duration = Duration::from_secs(30);

#[test]
fn the_grace_period_runs_from_the_last_hold_and_any_activity_restarts_it() {
    let mut desk = Desk::running(Config::default());
    assert_eq!(desk.session.next_deadline(), None, "a lease holds");
    desk.release(1);
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(GRACE)));
    desk.wait(Duration::from_secs(29));
    desk.ask(2);
    assert_eq!(desk.session.next_deadline(), None);
    desk.release(2);
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(GRACE)));
}

fn look(desk: &mut Desk, lease: u64) -> Vec<Action> {
    desk.ask_as(lease, HoldKind::Read, Policy::Acquire)
}

#[test]
fn whoever_polls_does_not_put_the_sleep_off() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    let deadline = desk.now.after(GRACE);
    for lease in 2..8 {
        desk.wait(Duration::from_secs(4));
        assert_eq!(look(&mut desk, lease), [granted(lease, 1)]);
        assert_eq!(desk.session.next_deadline(), None, "nothing is due while it is answered");
        desk.release(lease);
        assert_eq!(desk.session.next_deadline(), Some(deadline));
    }
    desk.due();
    assert_eq!((desk.phase(), desk.now), (PhaseName::Counting, deadline));
}

#[test]
fn no_sleep_begins_under_a_look_and_it_begins_when_the_last_one_ends() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    look(&mut desk, 2);
    desk.wait(GRACE * 2);
    assert_eq!(desk.act(Event::DeadlineReached), []);
    look(&mut desk, 3);
    assert_eq!(desk.release(2), []);
    let ask = Ask { generation: g(1), sequence: 1 };
    assert_eq!(desk.release(3), [Action::CountContainers { ask, bound: Duration::from_secs(5) }]);
}

#[test]
fn a_look_calls_no_count_off_and_is_waited_for_before_the_commit() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    desk.due();
    assert_eq!(look(&mut desk, 2), [granted(2, 1)]);
    assert_eq!(desk.phase(), PhaseName::Counting);
    assert_eq!(desk.counted(1, NOTHING), []);
    assert_eq!(desk.phase(), PhaseName::Running, "it is still being answered");
    desk.release(2);
    assert_eq!(desk.phase(), PhaseName::Counting, "no grace period is given for it");
    look(&mut desk, 3);
    desk.release(3);
    hooks_ask(&desk.counted(2, NOTHING));
    assert_eq!(desk.phase(), PhaseName::Committed);
}

#[test]
fn the_grace_period_begins_with_the_end_of_the_last_use_whoever_looks_meanwhile() {
    let mut desk = Desk::running(Config::default());
    look(&mut desk, 2);
    desk.wait(Duration::from_secs(5));
    desk.release(1);
    let deadline = desk.now.after(GRACE);
    desk.wait(Duration::from_secs(5));
    desk.release(2);
    assert_eq!(desk.session.next_deadline(), Some(deadline));
    // Whoever uses it starts it anew, also while somebody looks.
    look(&mut desk, 3);
    desk.ask(4);
    desk.release(4);
    desk.release(3);
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(GRACE)));
}

#[test]
fn a_look_at_a_vm_that_dozes_is_answered_and_then_it_dozes_on_to_the_same_end() {
    let mut desk = dozing();
    let end = desk.session.next_deadline();
    for sequence in 2..5 {
        desk.wait(Duration::from_secs(100));
        let actions = look(&mut desk, 2);
        assert_eq!(actions, [Action::Rouse { generation: g(1) }, granted(2, 1)]);
        assert!(matches!(desk.release(2)[..], [Action::CountContainers { .. }]));
        assert_eq!(desk.counted(sequence, NOTHING), [Action::Doze { generation: g(1) }]);
        assert_eq!((desk.phase(), desk.session.next_deadline()), (PhaseName::Dozing, end));
    }
    // One that is looked at when it should have been put to sleep is so after that.
    look(&mut desk, 2);
    desk.wait(Duration::from_secs(600));
    desk.release(2);
    hooks_ask(&desk.counted(5, NOTHING));
    assert_eq!(desk.phase(), PhaseName::Committed);
}

#[test]
fn a_look_wakes_a_vm_which_gets_a_grace_period() {
    let mut desk = Desk::new(Config::default());
    look(&mut desk, 1);
    desk.ready(1);
    desk.release(1);
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(GRACE)));
}

#[test]
fn a_vm_that_is_never_to_fall_asleep_stays_up_though_somebody_looked_while_the_engine_was_asked() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    desk.due();
    look(&mut desk, 2);
    desk.act(Event::GraceChanged(Grace::Never));
    desk.counted(1, NOTHING);
    assert_eq!(desk.release(2), []);
    assert_eq!((desk.phase(), desk.session.next_deadline()), (PhaseName::Running, None));
}

#[test]
fn settings_that_change_under_a_look_count_from_when_the_grace_period_began() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    let since = desk.now;
    desk.wait(Duration::from_secs(10));
    look(&mut desk, 2);
    desk.act(Event::GraceChanged(Grace::After(Duration::from_secs(90))));
    desk.release(2);
    assert_eq!(desk.session.next_deadline(), Some(since.after(Duration::from_secs(90))));
}

#[test]
fn an_idle_vm_is_counted_then_told_then_stopped() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    let ask = Ask { generation: g(1), sequence: 1 };
    assert_eq!(desk.due(), [Action::CountContainers { ask, bound: Duration::from_secs(5) }]);
    assert_eq!(desk.phase(), PhaseName::Counting);
    let hooks = hooks_ask(&desk.counted(1, NOTHING));
    let actions = desk.act(Event::HooksDone { ask: hooks });
    let sleep = sleep_ask(&actions);
    assert_eq!(
        actions,
        [Action::BeginSleep { ask: sleep, how: SleepHow::Stop, bound: Duration::from_secs(60) }]
    );
    assert_eq!(desk.act(Event::SleepDone { ask: sleep }), []);
    assert_eq!((desk.phase(), desk.session.next_deadline()), (PhaseName::Absent, None));
}

#[test]
fn a_lease_calls_the_count_off_and_the_late_answer_counts_for_nothing() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    desk.due();
    assert_eq!(desk.ask(2), [granted(2, 1)]);
    assert_eq!(desk.phase(), PhaseName::Running);
    assert_eq!(desk.counted(1, NOTHING), []);
    desk.release(2);
    desk.due();
    assert_eq!(desk.counted(1, NOTHING), [], "an answer to the question before");
    assert_eq!(desk.phase(), PhaseName::Counting);
}

#[test]
fn a_container_that_was_counted_keeps_the_vm_up_until_it_ends() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    desk.due();
    assert_eq!(desk.counted(1, RUNNING), []);
    assert_eq!((desk.phase(), desk.session.next_deadline()), (PhaseName::Running, None));
    desk.act(Event::ContainersChanged { generation: g(1), census: NOTHING });
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(GRACE)));
}

#[test]
fn containers_hold_by_what_a_stop_would_cut_short() {
    use ContainerState::*;
    for (state, holds) in [
        (Created, false),
        (Running, true),
        (Paused, true),
        (Restarting, true),
        (Removing, true),
        (Exited, false),
        (Dead, false),
    ] {
        let mut desk = Desk::running(Config::default());
        desk.release(1);
        desk.act(Event::ContainersChanged { generation: g(1), census: Census::of([state, Exited]) });
        assert_eq!(desk.session.next_deadline().is_none(), holds, "{state:?}");
    }
}

#[test]
fn an_exec_holds_even_where_running_containers_may_be_suspended() {
    let mut desk = Desk::running(Config { running: RunningContainers::Suspend, ..suspending() });
    desk.release(1);
    desk.act(Event::ContainersChanged { generation: g(1), census: RUNNING });
    assert!(desk.session.next_deadline().is_some());
    assert!(desk.session.holds().iter().all(|hold| hold.weak));
    desk.act(Event::ContainersChanged { generation: g(1), census: Census { execs: 1, ..RUNNING } });
    assert_eq!(desk.session.next_deadline(), None);
}

#[test]
fn an_exec_holds_whatever_is_said_of_its_container() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    desk.act(Event::ContainersChanged { generation: g(1), census: Census { execs: 1, ..NOTHING } });
    assert_eq!(desk.session.next_deadline(), None);
}

#[test]
fn the_end_of_the_last_container_is_not_the_end_of_the_operation_that_waits_for_it() {
    let mut desk = Desk::running(Config::default());
    desk.act(Event::ContainersChanged { generation: g(1), census: RUNNING });
    desk.act(Event::ContainersChanged { generation: g(1), census: NOTHING });
    assert_eq!((desk.session.view().leases, desk.session.next_deadline()), (1, None));
}

#[test]
fn containers_of_a_later_vm_hold_like_those_of_the_first() {
    let mut desk = Desk::running(Config::default());
    desk.exited(1);
    desk.ask(2);
    desk.ready(2);
    desk.release(2);
    desk.act(Event::ContainersChanged { generation: g(2), census: RUNNING });
    assert_eq!(desk.session.next_deadline(), None);
}

#[test]
fn running_containers_hold_where_the_vm_would_be_stopped() {
    let mut desk = Desk::running(Config { running: RunningContainers::Suspend, ..Config::default() });
    desk.release(1);
    desk.act(Event::ContainersChanged { generation: g(1), census: RUNNING });
    assert_eq!(desk.session.next_deadline(), None);
}

#[test]
fn an_engine_that_never_says_what_runs_is_dead() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    desk.due();
    for sequence in 2..=3 {
        let ask = Ask { generation: g(1), sequence };
        assert_eq!(desk.due(), [Action::CountContainers { ask, bound: Duration::from_secs(5) }]);
    }
    let actions = desk.due();
    assert!(kills(&actions, 1), "{actions:?}");
    desk.exited(1);
    let termination = desk.session.termination().unwrap();
    assert_eq!((termination.reason, termination.cause), (TerminationReason::Crashed, Cause::EngineSilent));
}

#[test]
fn a_pin_holds_a_vm_that_is_up_and_starts_none() {
    let mut desk = Desk::new(Config::default());
    let pin = |until| Event::PinSet { pin: PinId(1), owner: "me".into(), reason: "demo".into(), until };
    assert_eq!(desk.act(pin(None)), []);
    assert_eq!(desk.phase(), PhaseName::Absent);
    desk.ask(1);
    desk.ready(1);
    desk.release(1);
    assert_eq!(desk.session.next_deadline(), None);
    desk.act(Event::PinRemoved { pin: PinId(1) });
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(GRACE)));
}

#[test]
fn a_pin_ends_when_its_time_has_come_and_the_grace_period_follows() {
    let mut desk = Desk::running(Config::default());
    let until = Some(desk.now.after(Duration::from_secs(7200)));
    desk.act(Event::PinSet { pin: PinId(1), owner: "me".into(), reason: "demo".into(), until });
    desk.release(1);
    assert_eq!(desk.session.next_deadline(), until);
    desk.due();
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(GRACE)));
    assert_eq!(desk.persisted.pins, []);
}

#[test]
fn a_pin_calls_a_count_off_but_comes_too_late_for_a_commit() {
    let pin = Event::PinSet { pin: PinId(1), owner: "me".into(), reason: "demo".into(), until: None };
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    desk.due();
    desk.act(pin.clone());
    assert_eq!((desk.phase(), desk.session.next_deadline()), (PhaseName::Running, None));
    let (mut desk, _) = Desk::committed(Config::default());
    assert_eq!(desk.act(pin), []);
    assert_eq!(desk.phase(), PhaseName::Committed);
}

#[test]
fn a_weak_hold_is_listed_and_outlives_the_vm_but_keeps_nothing_awake() {
    let mut desk = Desk::running(Config::default());
    desk.act(Event::WeakAdded {
        weak: WeakId(1),
        kind: HoldKind::Events,
        owner: "docker".into(),
        reason: "/events".into(),
    });
    desk.release(1);
    desk.due();
    let ask = hooks_ask(&desk.counted(1, NOTHING));
    let ask = sleep_ask(&desk.act(Event::HooksDone { ask }));
    desk.act(Event::SleepDone { ask });
    assert_eq!(desk.phase(), PhaseName::Absent);
    assert_eq!(desk.session.holds().len(), 1);
    desk.act(Event::WeakRemoved { weak: WeakId(1) });
    assert_eq!(desk.session.holds(), []);
}

#[test]
fn the_grace_period_can_be_changed_while_it_runs() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    let idle_since = desk.now;
    desk.wait(Duration::from_secs(20));
    desk.act(Event::GraceChanged(Grace::After(Duration::from_secs(60))));
    assert_eq!(desk.session.next_deadline(), Some(idle_since.after(Duration::from_secs(60))));
    desk.act(Event::GraceChanged(Grace::Never));
    assert_eq!(desk.session.next_deadline(), None);
    desk.act(Event::GraceChanged(Grace::After(Duration::ZERO)));
    assert_eq!(desk.session.next_deadline(), Some(idle_since), "due already");
    assert!(matches!(desk.due()[..], [Action::CountContainers { .. }]));
}

#[test]
fn an_ephemeral_session_is_never_put_to_sleep() {
    let mut desk = Desk::running(Config { storage: Storage::Ephemeral, ..Config::default() });
    desk.release(1);
    assert_eq!(desk.session.next_deadline(), None);
    let request = RequestId(1);
    assert_eq!(
        desk.act(Event::SleepRequested { request, how: None }),
        [Action::AnswerSleep { request, outcome: SleepOutcome::Disabled }]
    );
}

#[test]
fn a_request_to_sleep_is_answered_with_what_happened() {
    let request = RequestId(7);
    let sleep = Event::SleepRequested { request, how: None };
    let answer = |outcome| Action::AnswerSleep { request, outcome };
    let mut desk = Desk::new(Config { grace: Grace::Never, ..Config::default() });
    assert_eq!(desk.act(sleep.clone()), [answer(SleepOutcome::NoVm)]);
    desk.ask(1);
    assert_eq!(desk.act(sleep.clone()), [answer(SleepOutcome::Busy)]);
    desk.ready(1);
    assert_eq!(desk.act(sleep.clone()), [answer(SleepOutcome::Busy)]);
    desk.release(1);
    assert!(matches!(desk.act(sleep.clone())[..], [Action::CountContainers { .. }]));
    assert_eq!(desk.counted(1, RUNNING), [answer(SleepOutcome::Busy)]);
    desk.act(Event::ContainersChanged { generation: g(1), census: NOTHING });
    desk.act(sleep.clone());
    assert_eq!(desk.ask(2), [granted(2, 1), answer(SleepOutcome::Busy)]);
    desk.release(2);
    desk.act(sleep);
    let ask = hooks_ask(&desk.counted(3, NOTHING));
    let ask = sleep_ask(&desk.act(Event::HooksDone { ask }));
    let outcome = SleepOutcome::Asleep { generation: g(1), how: SleepHow::Stop };
    assert_eq!(desk.act(Event::SleepDone { ask }), [answer(outcome)]);
}

#[test]
fn a_sleep_is_by_the_means_that_was_asked_for_and_no_container_is_stopped() {
    let request = RequestId(7);
    let asked = |how| Event::SleepRequested { request, how: Some(how) };
    let hows = |actions: &[Action]| -> Vec<StopHow> {
        let how = |action: &Action| match action {
            Action::RunStoppingHooks { how, .. } => Some(*how),
            _ => None,
        };
        actions.iter().filter_map(how).collect()
    };
    for (config, how) in [(suspending(), SleepHow::Stop), (Config::default(), SleepHow::Suspend)] {
        let mut desk = Desk::running(Config { grace: Grace::Never, ..config });
        desk.release(1);
        desk.act(asked(how));
        assert_eq!(hows(&desk.counted(1, NOTHING)), [StopHow::Sleep(how)]);
    }
    let mut desk = Desk::running(Config { running: RunningContainers::Suspend, ..suspending() });
    desk.release(1);
    desk.act(asked(SleepHow::Stop));
    assert_eq!(desk.counted(1, RUNNING), [Action::AnswerSleep { request, outcome: SleepOutcome::Busy }]);
    desk.act(asked(SleepHow::Suspend));
    assert_eq!(hows(&desk.counted(2, RUNNING)), [StopHow::Sleep(SleepHow::Suspend)]);
}

#[test]
fn what_goes_on_in_containers_holds_but_against_a_suspend_that_is_asked_for_by_name() {
    let mut desk = Desk::running(Config { running: RunningContainers::Suspend, ..suspending() });
    desk.act(Event::ContainersChanged { generation: g(1), census: RUNNING });
    desk.ask_as(2, HoldKind::Activity, Policy::ExistingOnly);
    desk.release(1);
    assert_eq!(desk.session.next_deadline(), None);
    let asked = |how| Event::SleepRequested { request: RequestId(7), how };
    let busy = [Action::AnswerSleep { request: RequestId(7), outcome: SleepOutcome::Busy }];
    assert_eq!(desk.act(asked(None)), busy);
    assert_eq!(desk.act(asked(Some(SleepHow::Stop))), busy);
    assert!(matches!(desk.act(asked(Some(SleepHow::Suspend)))[..], [Action::CountContainers { .. }]));
    // It may come and go while the engine is asked; a client's hold is another matter.
    desk.release(2);
    desk.ask_as(3, HoldKind::Activity, Policy::ExistingOnly);
    assert_eq!(desk.phase(), PhaseName::Counting);
    assert_eq!(desk.ask(4), [granted(4, 1), busy[0].clone()]);
    desk.release(4);
    desk.act(asked(Some(SleepHow::Suspend)));
    let hooks = desk.counted(2, RUNNING);
    assert!(
        hooks.iter().any(|action| matches!(
            action,
            Action::RunStoppingHooks { how: StopHow::Sleep(SleepHow::Suspend), .. }
        )),
        "{hooks:?}"
    );
}

#[test]
fn a_vm_paused_by_an_io_error_is_tried_again_and_serves_nobody_new() {
    let mut desk = Desk::running(Config::default());
    let paused = Event::VmPaused { generation: g(1), reason: "no space".into() };
    assert_eq!(desk.act(paused), []);
    assert_eq!(desk.ask(2), [refused(2, Refusal::IoPaused { reason: "no space".into() })]);
    for _ in 0..10 {
        assert_eq!(desk.due(), [Action::ResumeVm { generation: g(1) }]);
    }
    desk.act(Event::VmResumed { generation: g(1) });
    assert_eq!(desk.ask(3), [granted(3, 1)]);
    assert_eq!(desk.session.next_deadline(), None);
}

#[test]
fn a_vm_that_stays_paused_is_given_up_as_crashed() {
    let mut desk = Desk::running(Config::default());
    let begin = desk.now;
    desk.act(Event::VmPaused { generation: g(1), reason: "no space".into() });
    let tries: Vec<_> = (0..60).map(|_| desk.due()).collect();
    let (actions, tries) = tries.split_last().unwrap();
    assert!(tries.iter().all(|actions| *actions == [Action::ResumeVm { generation: g(1) }]), "{tries:?}");
    assert_eq!(desk.now.since(begin), Duration::from_secs(300));
    assert!(kills(actions, 1), "{actions:?}");
    desk.exited(1);
    assert_eq!(
        desk.session.termination().map(|end| (end.cause, &*end.details)),
        Some((Cause::IoError, "no space"))
    );
}

#[test]
fn what_is_only_listed_starts_a_vm_like_any_request_and_then_keeps_nothing_awake() {
    let mut desk = Desk::new(Config::default());
    let stream = claim(HoldKind::Events, Policy::Acquire);
    let actions = desk.act(Event::LeaseRequested { lease: LeaseId(1), claim: stream.clone() });
    assert!(matches!(actions.as_slice(), [Action::StartVm { .. }]), "{actions:?}");
    desk.ready(1);
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(GRACE)), "it is idle from the start");
    assert!(desk.session.holds().iter().all(|hold| hold.weak));
    desk.due();
    // Another one is granted, and calls nothing off.
    let actions = desk.act(Event::LeaseRequested { lease: LeaseId(2), claim: stream });
    assert_eq!(actions, [granted(2, 1)]);
    assert_eq!(desk.phase(), PhaseName::Counting);
    let hooks = hooks_ask(&desk.counted(1, NOTHING));
    let actions = desk.act(Event::HooksDone { ask: hooks });
    let ended = Action::EndLeases { generation: g(1), reason: EndReason::Sleeping };
    assert_eq!(actions.first(), Some(&ended), "they end with the VM");
}

#[test]
fn an_engine_that_refuses_to_say_what_runs_has_as_long_as_one_that_is_silent() {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    for sequence in 1..=3 {
        let ask = Ask { generation: g(1), sequence };
        assert_eq!(desk.due(), [Action::CountContainers { ask, bound: Duration::from_secs(5) }]);
        assert_eq!(desk.act(Event::ContainersCounted { ask, census: None }), []);
        assert_eq!(desk.phase(), PhaseName::Counting);
        assert_eq!(desk.session.next_deadline(), Some(desk.now.after(Duration::from_secs(5))));
    }
    assert!(kills(&desk.due(), 1), "then it is dead");
}

/// A session that is to doze and whose first VM does.
fn dozing() -> Desk {
    let mut desk = Desk::running(Config { doze: Some(Duration::from_secs(600)), ..suspending() });
    desk.release(1);
    desk.due();
    assert_eq!(desk.counted(1, NOTHING), [Action::Doze { generation: g(1) }]);
    assert_eq!(desk.phase(), PhaseName::Dozing);
    desk
}

const ROUSED: Action = Action::Rouse { generation: Generation(1) };

#[test]
fn a_vm_dozes_for_its_time_and_is_counted_again_before_it_is_put_to_sleep() {
    let mut desk = dozing();
    assert_eq!(desk.session.next_deadline(), Some(desk.now.after(Duration::from_secs(600))));
    let ask = Ask { generation: g(1), sequence: 2 };
    assert_eq!(desk.due(), [ROUSED, Action::CountContainers { ask, bound: Duration::from_secs(5) }]);
    let hooks = hooks_ask(&desk.counted(2, NOTHING));
    sleep_ask(&desk.act(Event::HooksDone { ask: hooks }));
    assert_eq!(desk.phase(), PhaseName::Stopping);
}

#[test]
fn whoever_needs_a_vm_that_dozes_has_it_run_on_first() {
    for kind in [HoldKind::Request, HoldKind::Events] {
        for policy in [Policy::Acquire, Policy::ExistingOnly] {
            let mut desk = dozing();
            assert_eq!(desk.ask_as(2, kind, policy), [ROUSED, granted(2, 1)], "{kind:?} {policy:?}");
            assert_eq!(desk.phase(), PhaseName::Running);
            assert_eq!(
                desk.session.next_deadline().is_some(),
                kind.is_weak(),
                "the grace period begins anew"
            );
        }
    }
    let pin = Event::PinSet { pin: PinId(1), owner: "".into(), reason: "".into(), until: None };
    let started = Event::ContainersChanged { generation: g(1), census: RUNNING };
    for event in [pin, started, Event::GraceChanged(Grace::Never)] {
        let mut desk = dozing();
        assert_eq!(desk.act(event.clone()), [ROUSED], "{event:?}");
        assert_eq!((desk.phase(), desk.session.next_deadline()), (PhaseName::Running, None), "{event:?}");
    }
}

#[test]
fn a_vm_that_dozes_runs_on_for_its_end_and_one_that_is_gone_does_not() {
    let mut desk = dozing();
    let actions = desk.act(Event::SleepRequested { request: RequestId(1), how: None });
    assert!(matches!(actions[..], [ROUSED, Action::CountContainers { .. }]), "{actions:?}");
    let actions = dozing().act(Event::Terminate { reason: "asked".into() });
    assert!(matches!(actions[..], [ROUSED, Action::RunStoppingHooks { .. }]), "{actions:?}");
    let actions = dozing().act(Event::HostLeaving);
    assert!(matches!(actions[..], [ROUSED, Action::RunStoppingHooks { .. }]), "{actions:?}");
    let mut desk = dozing();
    assert!(!desk.exited(1).contains(&ROUSED));
    assert_eq!(desk.phase(), PhaseName::Terminated);
}

#[test]
fn somebody_who_wants_the_sleep_while_the_engine_is_asked_gets_it_without_a_doze() {
    let mut desk = Desk::running(Config { doze: Some(Duration::from_secs(600)), ..suspending() });
    desk.release(1);
    desk.due();
    desk.act(Event::SleepRequested { request: RequestId(1), how: None });
    hooks_ask(&desk.counted(1, NOTHING));
    assert_eq!(desk.phase(), PhaseName::Committed);
}

#[test]
fn weak_holds_and_containers_that_hold_nothing_let_a_vm_doze_on() {
    let mut desk = dozing();
    let weak = WeakId(1);
    let kind = HoldKind::Connection;
    assert_eq!(desk.act(Event::WeakAdded { weak, kind, owner: "".into(), reason: "".into() }), []);
    let created = Census { active: 0, inactive: 1, execs: 0 };
    assert_eq!(desk.act(Event::ContainersChanged { generation: g(1), census: created }), []);
    assert_eq!(desk.phase(), PhaseName::Dozing);
    assert_eq!(desk.persisted.vm, LastVm::Up { how: StartHow::Cold }, "a new host takes it over");
}

#[test]
fn a_vm_that_is_never_to_fall_asleep_by_itself_does_not_doze_though_the_engine_was_asked() {
    let mut desk = Desk::running(Config { doze: Some(Duration::from_secs(600)), ..suspending() });
    desk.release(1);
    desk.due();
    desk.act(Event::GraceChanged(Grace::Never));
    assert_eq!(desk.counted(1, NOTHING), []);
    assert_eq!((desk.phase(), desk.session.next_deadline()), (PhaseName::Running, None));
}
