//! Contradictions that no event leads to: the check finds them all the same, should a change ever do.

use dormouse_lifecycle::*;
use serde_json::{Value, json};

use crate::desk::*;

/// What the check says of a session that was changed by hand.
fn found(session: &Session, change: impl FnOnce(&mut Value)) -> Option<&'static str> {
    let mut state = serde_json::to_value(session).expect("a session can be written");
    change(&mut state);
    serde_json::from_value::<Session>(state).expect("and read").check().err()
}

fn counting() -> Desk {
    let mut desk = Desk::running(Config::default());
    desk.release(1);
    desk.due();
    assert_eq!(desk.phase(), PhaseName::Counting);
    desk
}

#[test]
fn a_vm_of_another_generation_or_of_none_is_a_contradiction() {
    let session = Desk::running(Config::default()).session;
    assert_eq!(found(&session, |_| {}), None);
    let latest = Some("the VM isn't of the latest generation");
    assert_eq!(found(&session, |state| state["generation"] = json!(2)), latest);
    let nameless = found(&session, |state| {
        state["generation"] = json!(0);
        state["phase"]["Running"]["vm"]["generation"] = json!(0);
    });
    assert_eq!(nameless, Some("a VM without a number"));
    assert_eq!(
        found(&session, |state| state["remains"] = json!(1)),
        Some("a VM beside the remains of another")
    );
}

#[test]
fn an_engine_that_was_asked_too_often_is_a_contradiction() {
    let session = counting().session;
    let asked = |times: u8| found(&session, |state| state["phase"]["Counting"]["unanswered"] = json!(times));
    assert_eq!(asked(Limits::COUNTS - 1), None);
    assert_eq!(asked(Limits::COUNTS), Some("asked too often"));
}

#[test]
fn whoever_waits_for_an_end_that_nothing_follows_is_a_contradiction() {
    let mut committed = Desk::committed(Config::default()).0;
    let mut stopping = Desk::stopping(Config::default()).0;
    for (desk, phase) in [(&mut committed, "Committed"), (&mut stopping, "Stopping")] {
        desk.ask(2);
        for (reopen, expected) in [("OnRequest", None), ("OnStart", Some("somebody waits for the end"))] {
            let end = json!({ "reason": "Crashed", "cause": "VmExited", "details": "", "reopen": reopen });
            let then = json!({ "Terminated": end });
            assert_eq!(found(&desk.session, |state| state["phase"][phase]["then"] = then), expected);
        }
    }
}

#[test]
fn a_vm_that_was_killed_too_often_is_a_contradiction() {
    let mut desk = Desk::stopping(Config::default()).0;
    desk.due();
    let killed = |tries: u8| {
        found(&desk.session, |state| state["phase"]["Stopping"]["stage"]["Killing"]["tries"] = json!(tries))
    };
    assert_eq!(killed(Limits::KILLS), None);
    assert_eq!(killed(Limits::KILLS + 1), Some("killed too often"));
}

#[test]
fn more_leases_than_there_may_be_are_a_contradiction() {
    let session = Desk::running(Config::default()).session;
    let limit = |leases: usize| found(&session, |state| state["config"]["limits"]["leases"] = json!(leases));
    assert_eq!((limit(1), limit(0)), (None, Some("too many leases")));
    let mut desk = Desk::new(Config::default());
    desk.ask(1);
    let limit =
        |queued: usize| found(&desk.session, |state| state["config"]["limits"]["queued"] = json!(queued));
    assert_eq!((limit(1), limit(0)), (None, Some("too many in the queue")));
}
