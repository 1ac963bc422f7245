//! What a step of the core costs, in instructions as callgrind counts them: unlike time they are the same on a busy machine.
//!
//! The test runs itself under valgrind: [`measured`] is the part that is counted.

use std::env;
use std::hint::black_box;
use std::process::Command;

use dormouse_lifecycle::*;

/// A lease that is granted and dropped, both steps together.
const INSTRUCTIONS_MAX: u64 = 2000;

/// The same after a million of them, but for an allocation here and there.
const GROWTH_MAX: u64 = 50;

/// Leases that are counted.
const MEASURED: u64 = 1000;

/// So many leases come before those that are counted.
const BEFORE: &str = "DORM_PACE_BEFORE";

#[test]
fn a_lease_costs_few_instructions_and_the_millionth_no_more_than_the_first() {
    let (first, later) = (instructions_after(0), instructions_after(1_000_000));
    println!("figure: core_lease_instructions = {first}");
    println!("figure: core_lease_instructions_after_a_million = {later}");
    assert!(first <= INSTRUCTIONS_MAX, "{first} instructions");
    assert!(later <= first + GROWTH_MAX, "{first} instructions at first, {later} after a million");
}

/// Instructions per lease, after so many of them.
fn instructions_after(leases: u64) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*measured*"])
        .arg(env::current_exe().expect("this test has a path"))
        .args(["--exact", "every_lease_is_granted_and_taken_back"])
        .env(BEFORE, leases.to_string())
        .output()
        .expect("valgrind runs: scripts/install-packages test");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stdout));
    let collected = text.lines().find_map(|line| line.split("Collected : ").nth(1));
    let total: u64 = collected.and_then(|number| number.trim().parse().ok()).expect("callgrind's total");
    assert!(total > 0, "nothing was counted: is the function still called `measured`?\n{text}");
    total / MEASURED
}

#[test]
fn every_lease_is_granted_and_taken_back() {
    let before = env::var(BEFORE).ok().and_then(|count| count.parse().ok()).unwrap_or(10);
    let now = Timestamp::from_millis(1);
    let mut session = Session::new(Config::default(), Durable::default(), now);
    let mut actions = Actions::new();
    let (owner, reason) = ("pid 1 (docker)".into(), "GET /containers/json".into());
    let claim = Claim { kind: HoldKind::Request, policy: Policy::Acquire, owner, reason };
    session.handle(now, Event::LeaseRequested { lease: LeaseId(0), claim: claim.clone() }, &mut actions);
    let (generation, how) = (Generation(1), StartHow::Cold);
    session.handle(now, Event::VmReady { generation, how, census: Census::default() }, &mut actions);
    session.handle(now, Event::LeaseDropped { lease: LeaseId(0) }, &mut actions);
    actions.drain().for_each(drop);
    let granted = leases(&mut session, &mut actions, &claim, 1, before);
    assert_eq!(granted, before);
    assert_eq!(measured(&mut session, &mut actions, &claim, before + 1), MEASURED);
    assert_eq!(session.view().leases, 0);
}

#[inline(never)]
fn measured(session: &mut Session, actions: &mut Actions, claim: &Claim, first: u64) -> u64 {
    leases(session, actions, claim, first, MEASURED)
}

/// Each lease makes an idle VM busy and idle again: the way with the most to be done. Returns how many were granted.
#[inline(never)]
fn leases(session: &mut Session, actions: &mut Actions, claim: &Claim, first: u64, count: u64) -> u64 {
    let mut granted = 0;
    for number in first..first + count {
        let (now, lease) = (Timestamp::from_millis(number), LeaseId(number));
        session.handle(now, Event::LeaseRequested { lease, claim: claim.clone() }, actions);
        session.handle(now, Event::LeaseDropped { lease }, actions);
        granted +=
            actions.drain().filter(|action| matches!(black_box(action), Action::Grant { .. })).count() as u64;
    }
    granted
}
