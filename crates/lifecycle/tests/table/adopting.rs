//! A host process that comes after another.

use dormouse_lifecycle::*;

use crate::desk::*;

#[test]
fn a_vm_that_was_up_is_taken_over_with_its_holds_and_not_announced_again() {
    let desk = Desk::running(Config::default());
    let mut desk = Desk::restored(Config::default(), desk.persisted);
    assert_eq!(desk.phase(), PhaseName::Starting);
    assert_eq!(desk.ask(2), [], "who asks meanwhile waits");
    let holds = vec![(LeaseId(1), claim(HoldKind::RootProcess, Policy::Acquire))];
    assert_eq!(desk.act(Event::VmAdopted { generation: g(1), census: NOTHING, holds }), [granted(2, 1)]);
    desk.release(2);
    assert_eq!(desk.session.next_deadline(), None, "the root process holds");
    desk.release(1);
    assert!(desk.session.next_deadline().is_some());
}

#[test]
fn a_vm_that_was_up_and_died_with_nobody_watching_is_a_crash() {
    let desk = Desk::running(Config::default());
    let mut desk = Desk::restored(Config::default(), desk.persisted);
    desk.ask(2);
    let actions = desk.exited(1);
    assert!(matches!(actions[0], Action::RunStoppingHooks { how: StopHow::Crash, .. }), "{actions:?}");
    assert_eq!(starts(&actions).map(|start| start.0), Some(2));
    assert_eq!(desk.session.view().incarnation, Incarnation(2));
}

#[test]
fn a_vm_that_had_no_host_for_long_and_shut_itself_down_went_to_sleep() {
    let desk = Desk::running(Config::default());
    let mut desk = Desk::restored(Config::default(), desk.persisted);
    desk.ask(2);
    let actions = desk.act(Event::VmExited { generation: g(1), exit: Exit::GuestShutdown });
    hooks_ask(&actions);
    assert_eq!(starts(&actions).map(|start| start.0), Some(2));
    assert_eq!(desk.session.view().incarnation, Incarnation(1));
}

#[test]
fn a_vm_that_does_not_answer_its_new_host_is_killed() {
    let desk = Desk::running(Config::default());
    let mut desk = Desk::restored(Config::default(), desk.persisted);
    assert!(kills(&desk.due(), 1));
    desk.exited(1);
    assert_eq!(desk.session.termination().map(|end| end.reason), Some(TerminationReason::Unknown));
}

#[test]
fn who_waits_for_a_vm_that_does_not_answer_its_new_host_is_refused_if_the_session_stays_terminated() {
    let strict = Config { crash: CrashPolicy::Terminate, ..Config::default() };
    let mut desk = Desk::restored(strict, Desk::running(strict).persisted);
    desk.ask(2);
    assert!(desk.due().contains(&refused(2, Refusal::Terminating)));
}

#[test]
fn a_start_that_lost_its_host_is_given_up_before_the_next() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    let mut desk = Desk::restored(Config::default(), desk.persisted);
    assert_eq!(desk.ask(2), []);
    assert_eq!(desk.due(), [Action::KillVm { generation: g(1) }]);
    assert_eq!(starts(&desk.exited(1)), Some((2, StartFrom::Fresh)));
}

#[test]
fn a_sleep_that_lost_its_host_is_carried_on_without_telling_the_hooks_twice() {
    for desk in [Desk::committed(suspending()).0, Desk::stopping(suspending()).0] {
        let mut desk = Desk::restored(suspending(), desk.persisted);
        let actions = desk.due();
        assert!(matches!(actions[..], [Action::BeginSleep { how: SleepHow::Suspend, .. }]), "{actions:?}");
        desk.act(Event::SleepDone { ask: sleep_ask(&actions) });
        assert_eq!((desk.phase(), desk.session.view().snapshot), (PhaseName::Absent, Some(g(1))));
    }
}

#[test]
fn a_termination_that_lost_its_host_arrives() {
    let mut desk = Desk::running(Config::default());
    desk.act(Event::Terminate { reason: "asked".into() });
    let mut desk = Desk::restored(Config::default(), desk.persisted);
    assert_eq!(desk.ask(2), [refused(2, Refusal::Terminating)]);
    let ask = sleep_ask(&desk.due());
    assert_eq!(
        desk.act(Event::SleepDone { ask }),
        [Action::AnnounceTerminated { incarnation: Incarnation(1) }]
    );
    let desk = Desk::restored(Config::default(), desk.persisted);
    assert_eq!(desk.session.termination().map(|end| &*end.details), Some("asked"));
}

#[test]
fn a_termination_that_lost_its_host_while_a_vm_was_brought_up_arrives() {
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    desk.act(Event::Terminate { reason: "asked".into() });
    let mut desk = Desk::restored(Config::default(), desk.persisted);
    assert_eq!(desk.ask(2), [refused(2, Refusal::Terminating)]);
    assert_eq!(desk.due(), [Action::KillVm { generation: g(1) }]);
    desk.exited(1);
    assert_eq!(desk.session.termination().map(|end| &*end.details), Some("asked"));
}

#[test]
fn a_vm_that_could_not_be_killed_is_remembered() {
    let (mut desk, _) = Desk::stopping(Config::default());
    for _ in 0..=Limits::KILLS {
        desk.due();
    }
    assert_eq!(desk.session.next_deadline(), None, "it is given up");
    let mut desk = Desk::restored(Config::default(), desk.persisted);
    assert_eq!(desk.ask(2), [refused(2, Refusal::VmStuck { generation: g(1) })]);
    desk.exited(1);
    assert_eq!(starts(&desk.ask(3)).map(|start| start.0), Some(2));
}

#[test]
fn generations_pins_and_crashes_survive_the_host() {
    let mut desk = Desk::new(Config::default());
    for generation in 1..=3 {
        desk.ask(generation);
        desk.ready(generation);
        desk.exited(generation);
    }
    desk.act(Event::PinSet { pin: PinId(1), owner: "me".into(), reason: "demo".into(), until: None });
    let mut desk = Desk::restored(Config::default(), desk.persisted);
    assert_eq!(desk.session.view().generation, g(3));
    assert_eq!(desk.session.holds().len(), 1);
    assert!(matches!(desk.ask(4)[..], [Action::Refuse { refusal: Refusal::CrashBackoff { .. }, .. }]));
}
