//! The checker itself: what it must find, and what must not fool it.

use dormouse_lifecycle_model::checker::{Model, walk};

/// Numbers below a hundred, walked by rules that each test gives.
struct Numbers {
    moves: fn(u32) -> Vec<u32>,
    forbidden: Option<u32>,
    at_rest: fn(u32) -> bool,
    polite: fn(u32) -> bool,
    visits: usize,
}

impl Model for Numbers {
    type State = u32;
    type Move = u32;

    fn initial(&self) -> u32 {
        0
    }

    fn moves(&self, state: &u32, moves: &mut Vec<u32>) {
        moves.extend((self.moves)(*state));
    }

    fn step(&self, _state: &u32, made: &u32) -> Result<Option<u32>, String> {
        match self.forbidden {
            Some(forbidden) if forbidden == *made => Err("forbidden".to_owned()),
            Some(_) | None => Ok((*made < 100).then_some(*made)),
        }
    }

    fn check(&self, _state: &u32) -> Result<(), String> {
        Ok(())
    }

    fn is_polite(&self, _state: &u32, made: &u32) -> bool {
        (self.polite)(*made)
    }

    fn is_at_rest(&self, state: &u32) -> bool {
        (self.at_rest)(*state)
    }

    fn visit(&mut self, _state: &u32, _made: &u32) {
        self.visits += 1;
    }
}

const NUMBERS: Numbers = Numbers {
    moves: |number| vec![number + 1, number + 10],
    forbidden: None,
    at_rest: |number| number == 99,
    polite: |_| true,
    visits: 0,
};

#[test]
fn all_states_are_walked_and_all_moves_made() {
    let mut model = NUMBERS;
    let walk = walk(&mut model, 1000).expect("nothing is forbidden");
    assert_eq!((walk.states, walk.moves, model.visits), (100, 99 + 90, 99 + 90));
    assert_eq!(walk.depth, 18, "nine steps of ten and nine of one");
}

#[test]
fn a_broken_rule_is_found_by_a_shortest_path() {
    let mut model = Numbers { forbidden: Some(31), ..NUMBERS };
    let violation = walk(&mut model, 1000).expect_err("31 is reached");
    assert_eq!((violation.rule.as_str(), violation.path.len()), ("forbidden", 4));
    assert_eq!(violation.path.last(), Some(&31));
}

#[test]
fn a_cycle_without_a_way_out_is_found() {
    // From 50 on it goes round for ever; everything below could have gone to 40 and rested there.
    let moves = |number| match number {
        40 => vec![],
        50.. => vec![50 + (number + 1) % 10],
        _ => vec![number + 1, 50],
    };
    let mut model = Numbers { moves, at_rest: |number| number == 40, ..NUMBERS };
    let violation = walk(&mut model, 1000).expect_err("there is no way out of the cycle");
    assert!(violation.rule.contains("no way to rest"));
    assert_eq!(violation.path, [50]);
}

#[test]
fn a_way_out_that_only_an_ill_meaning_world_takes_is_none() {
    let moves = |number| vec![(number + 1) % 10];
    let at_rest = |number| number == 0;
    let mut model = Numbers { moves, at_rest, ..NUMBERS };
    assert!(walk(&mut model, 1000).is_ok());
    model.polite = |made| made != 7;
    assert!(walk(&mut model, 1000).is_err());
}

#[test]
fn more_states_than_allowed_are_no_success() {
    let mut model = NUMBERS;
    assert!(walk(&mut model, 99).is_err());
    assert!(walk(&mut model, 100).is_ok());
}
