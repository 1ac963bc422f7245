//! docs/lifecycle-hazards.md says of every hazard how it is planted, or why it can't be.

use dormouse_lifecycle::Flaw;

const TABLE: &str = include_str!("../../../docs/lifecycle-hazards.md");

/// Hazards that may be declared impossible to express; more would hide what isn't tested.
const EXCUSES_MAX: usize = 20;

#[test]
fn every_hazard_is_planted_or_explained_and_every_bug_is_in_the_table() {
    let row = |hazard: &str| {
        let rows: Vec<&str> =
            TABLE.lines().filter(|line| line.starts_with(&format!("| {hazard} |"))).collect();
        assert_eq!(rows.len(), 1, "{hazard} has one row");
        rows[0]
    };
    let mut excuses = 0;
    for number in 1..=66 {
        let hazard = format!("H{number}");
        let planted = Flaw::ALL.iter().any(|flaw| flaw.name() == hazard);
        let excused = row(&hazard).contains("*not expressible*: ");
        assert!(planted != excused, "{hazard} is either planted or explained");
        excuses += usize::from(excused);
    }
    assert!(excuses <= EXCUSES_MAX, "{excuses} hazards are explained away");
    for flaw in Flaw::ALL {
        assert!(row(flaw.name()).contains(flaw.words()), "{} is described as it is", flaw.name());
    }
}
