//! The quick scopes break no rule and catch every planted bug; `cargo run --release -p dormouse-lifecycle-model` walks
//! all scopes.

use dormouse_lifecycle::Flaw;
use dormouse_lifecycle_model::report::Report;
use dormouse_lifecycle_model::scope;

#[test]
fn the_quick_scopes_break_no_rule() {
    let mut report = Report::default();
    for scope in scope::quick() {
        let name = scope.name;
        if let Err(violation) = report.exhaust(scope) {
            panic!("{name}: {violation:#?}");
        }
    }
}

#[test]
fn every_planted_bug_is_caught_in_a_quick_scope() {
    let mut report = Report::default();
    report.plant_all();
    assert_eq!(report.missed, []);
    assert_eq!(report.caught.len(), Flaw::ALL.len());
}

#[test]
fn a_scope_that_is_larger_than_allowed_is_no_success() {
    use dormouse_lifecycle_model::{checker, world::Lifecycle};
    let scope = scope::quick().remove(0);
    let violation = checker::walk(&mut Lifecycle::new(scope, None), 100).expect_err("there are more states");
    assert!(violation.rule.contains("isn't exhausted"), "{}", violation.rule);
}
