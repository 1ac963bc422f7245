//! The quick scopes hold, and catch every planted bug.

use dormouse_lifecycle::Flaw;
use dormouse_lifecycle_model::checker::walk;
use dormouse_lifecycle_model::scope;
use dormouse_lifecycle_model::world::Lifecycle;

/// More states than any quick scope has.
const LIMIT: usize = 200_000;

#[test]
fn the_quick_scopes_break_no_rule() {
    for scope in scope::quick() {
        let name = scope.name;
        match walk(&mut Lifecycle::new(scope, None), LIMIT) {
            Ok(walk) => println!("{name}: {walk:?}"),
            Err(violation) => panic!("{name}: {violation:#?}"),
        }
    }
}

#[test]
fn every_planted_bug_is_caught_in_a_quick_scope() {
    let missed: Vec<&str> = Flaw::ALL
        .iter()
        .filter(|flaw| {
            !scope::quick().into_iter().any(|scope| {
                let name = scope.name;
                match walk(&mut Lifecycle::new(scope, Some(**flaw)), LIMIT) {
                    Ok(_) => false,
                    Err(violation) => {
                        println!(
                            "{}: {name}: {} ({} moves)",
                            flaw.name(),
                            violation.rule,
                            violation.path.len()
                        );
                        true
                    }
                }
            })
        })
        .map(|flaw| flaw.name())
        .collect();
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
