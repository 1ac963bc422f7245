//! What can be seen of a session, and the bounds of what it keeps.

use std::time::Duration;

use dormouse_lifecycle::*;

use crate::desk::*;

/// Whether watchers are told to look, once and last.
fn is_published(desk: &mut Desk, event: Event) -> bool {
    let mut actions = Actions::new();
    desk.session.handle(desk.now, event, &mut actions);
    let all: Vec<_> = actions.drain().collect();
    let times = all.iter().filter(|action| **action == Action::Publish).count();
    assert!(times <= 1 && (times == 0 || all.last() == Some(&Action::Publish)), "{all:?}");
    times == 1
}

#[test]
fn watchers_look_again_once_after_what_changed_and_not_after_what_did_not() {
    let mut desk = Desk::running(Config::default());
    let ask = Event::LeaseRequested { lease: LeaseId(2), claim: claim(HoldKind::Request, Policy::Acquire) };
    assert!(is_published(&mut desk, ask));
    assert!(is_published(&mut desk, Event::LeaseDropped { lease: LeaseId(2) }));
    assert!(!is_published(&mut desk, Event::LeaseDropped { lease: LeaseId(2) }), "nothing changed");
    assert!(!is_published(&mut desk, Event::DeadlineReached), "nothing is due");
    let census = Event::ContainersChanged { generation: g(1), census: RUNNING };
    assert!(is_published(&mut desk, census));
    assert!(!is_published(&mut desk, Event::VmExited { generation: g(7), exit: Exit::GuestShutdown }));
}

#[test]
fn since_when_a_session_is_in_its_phase_counts_from_when_it_got_there() {
    let mut desk = Desk::running(Config::default());
    let begin = desk.now;
    desk.wait(Duration::from_secs(7));
    desk.ask(2);
    desk.release(2);
    assert_eq!(desk.session.view().since, begin, "it was running all the time");
    desk.release(1);
    desk.due();
    assert_eq!((desk.phase(), desk.session.view().since), (PhaseName::Counting, desk.now));
}

#[test]
fn no_more_is_listed_than_there_is_room_for() {
    let mut desk = Desk::running(Config::default());
    let listed = |desk: &Desk| desk.session.holds().len();
    for weak in 0..=Limits::WEAK as u64 {
        desk.act(Event::WeakAdded {
            weak: WeakId(weak),
            kind: HoldKind::Connection,
            owner: "a client".into(),
            reason: "it is there".into(),
        });
    }
    assert_eq!(listed(&desk), 1 + Limits::WEAK);
    desk.act(Event::WeakRemoved { weak: WeakId(0) });
    assert_eq!(listed(&desk), Limits::WEAK);
}

#[test]
fn a_pin_too_many_is_ignored_and_one_that_is_there_is_replaced() {
    let mut desk = Desk::new(Config::default());
    let pin = |number: u64, reason: &str| Event::PinSet {
        pin: PinId(number),
        owner: "me".into(),
        reason: reason.into(),
        until: None,
    };
    for number in 0..=Limits::PINS as u64 {
        desk.act(pin(number, "first"));
    }
    assert_eq!(desk.session.holds().len(), Limits::PINS);
    desk.act(pin(3, "second"));
    let reasons = desk.session.holds().into_iter().filter(|hold| &*hold.reason == "second").count();
    assert_eq!((desk.session.holds().len(), reasons), (Limits::PINS, 1));
}

#[test]
fn a_pin_ends_at_its_time_and_not_before() {
    let mut desk = Desk::new(Config::default());
    let until = desk.now.after(Duration::from_secs(60));
    desk.act(Event::PinSet { pin: PinId(1), owner: "me".into(), reason: "".into(), until: Some(until) });
    desk.wait(Duration::from_secs(59));
    desk.act(Event::DeadlineReached);
    assert_eq!(desk.session.holds().len(), 1);
    assert_eq!(desk.session.next_deadline(), Some(until));
    desk.due();
    assert_eq!(desk.session.holds().len(), 0);
    assert_eq!(desk.session.next_deadline(), None);
}

#[test]
fn what_runs_is_listed_with_its_number_and_whether_it_holds() {
    let listed = |config: Config, census: Census| {
        let mut desk = Desk::running(config);
        desk.release(1);
        desk.act(Event::ContainersChanged { generation: g(1), census });
        let entry = |hold: Hold| (hold.kind, hold.reason.to_string(), hold.weak);
        desk.session.holds().into_iter().map(entry).collect::<Vec<_>>()
    };
    let census = Census { active: 2, inactive: 5, execs: 1 };
    let (container, exec) = ((HoldKind::Container, "2 running".into()), (HoldKind::Exec, "1 running".into()));
    let entry = |(kind, reason): (HoldKind, String), weak| (kind, reason, weak);
    let strong = [entry(container.clone(), false), entry(exec, false)];
    assert_eq!(listed(Config::default(), census), strong);
    assert_eq!(listed(Config::default(), Census { inactive: 5, ..NOTHING }), []);
    let suspends = Config { running: RunningContainers::Suspend, ..suspending() };
    assert_eq!(listed(suspends, Census { execs: 0, ..census }), [entry(container, true)]);
    assert_eq!(listed(suspends, census), strong, "an exec keeps its container's VM awake");
}

#[test]
fn that_a_host_has_to_go_can_be_seen() {
    let mut desk = Desk::running(Config::default());
    assert!(!desk.session.view().leaving);
    desk.act(Event::HostLeaving);
    assert!(desk.session.view().leaving);
}

#[test]
fn times_are_told_in_milliseconds() {
    let time = Timestamp::from_millis(1_234).after(Duration::from_secs(2));
    assert_eq!(time.as_millis(), 3_234);
    assert_eq!(time.since(Timestamp::from_millis(234)), Duration::from_secs(3));
}
