//! What was walked, reached and caught, as tables and as JSON.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use dormouse_lifecycle::Flaw;
use serde_json::{Value, json};

use crate::checker::{Violation, Walk, walk};
use crate::coverage::{Coverage, EVENTS};
use crate::scope::{self, Scope};
use crate::world::{Lifecycle, Move};

/// More states than any scope has: beyond, a scope isn't exhausted and that is a failure.
pub const STATES: usize = 4_000_000;

/// The longest time in which a quick scope catches a planted bug.
pub const QUICK: Duration = Duration::from_secs(5);

/// A scope that was exhausted.
#[derive(Debug)]
pub struct Exhausted {
    /// The scope.
    pub scope: Scope,
    /// Its size.
    pub walk: Walk,
    /// How long it took.
    pub took: Duration,
}

/// A planted bug that was caught.
#[derive(Debug)]
pub struct Caught {
    /// The bug.
    pub flaw: Flaw,
    /// In which scope.
    pub scope: &'static str,
    /// The rule that was found broken.
    pub rule: String,
    /// How many moves it took to break it.
    pub moves: usize,
    /// How long the scope took that caught it.
    pub took: Duration,
}

/// Everything that a run shows.
#[derive(Debug, Default)]
pub struct Report {
    /// The scopes.
    pub exhausted: Vec<Exhausted>,
    /// What happened in which phase, over all scopes.
    pub coverage: Coverage,
    /// The planted bugs that were caught.
    pub caught: Vec<Caught>,
    /// The planted bugs that no quick scope caught in time.
    pub missed: Vec<Flaw>,
}

impl Report {
    /// Exhausts a scope.
    ///
    /// # Errors
    ///
    /// The rule that is broken, and how.
    pub fn exhaust(&mut self, scope: Scope) -> Result<&Exhausted, Violation<Move>> {
        let begin = Instant::now();
        let mut model = Lifecycle::new(scope.clone(), None);
        let walk = walk(&mut model, STATES)?;
        self.coverage.add(&model.coverage);
        self.exhausted.push(Exhausted { scope, walk, took: begin.elapsed() });
        Ok(&self.exhausted[self.exhausted.len() - 1])
    }

    /// Plants each bug, and walks the quick scopes until one catches it.
    pub fn plant_all(&mut self) {
        for flaw in Flaw::ALL {
            match scope::quick().into_iter().find_map(|scope| catch(scope, *flaw)) {
                Some(caught) if caught.took <= QUICK => self.caught.push(caught),
                Some(_) | None => self.missed.push(*flaw),
            }
        }
    }

    /// All that isn't as it must be.
    pub fn faults(&self) -> Vec<String> {
        let missed = self.missed.iter().map(|flaw| format!("{} isn't caught: {}", flaw.name(), flaw.words()));
        missed.chain(self.coverage.surprises()).collect()
    }

    /// The tables, in Markdown.
    pub fn tables(&self) -> String {
        let mut text = String::from(
            "| scope | clients | states | moves | depth | seconds |\n|---|---:|---:|---:|---:|---:|\n",
        );
        let mut line = |name: &str, clients: String, walk: Walk, took: Duration| {
            let Walk { states, moves, depth } = walk;
            let _ = writeln!(
                text,
                "| {name} | {clients} | {states} | {moves} | {depth} | {:.1} |",
                took.as_secs_f64()
            );
        };
        let mut total = (Walk::default(), Duration::ZERO);
        for Exhausted { scope, walk, took } in &self.exhausted {
            line(scope.name, scope.clients.to_string(), *walk, *took);
            total.0.states += walk.states;
            total.0.moves += walk.moves;
            total.0.depth = total.0.depth.max(walk.depth);
            total.1 += *took;
        }
        line("all", String::new(), total.0, total.1);
        let _ =
            write!(text, "\n{}\n| planted | caught in | by | moves |\n|---|---|---|---:|\n", self.coverage);
        for Caught { flaw, scope, rule, moves, .. } in &self.caught {
            let _ = writeln!(text, "| {}: {} | {scope} | {rule} | {moves} |", flaw.name(), flaw.words());
        }
        text
    }

    /// The same as JSON, version 1: what `docs/results/lifecycle-model.json` holds.
    pub fn json(&self) -> Value {
        let scopes = self.exhausted.iter().map(|Exhausted { scope, walk, took }| {
            json!({
                "name": scope.name,
                "clients": scope.clients,
                "states": walk.states,
                "moves": walk.moves,
                "depth": walk.depth,
                "seconds": took.as_secs_f64(),
            })
        });
        let coverage = EVENTS.iter().enumerate().map(|(event, name)| {
            let phases = dormouse_lifecycle::PhaseName::ALL
                .iter()
                .map(|phase| (phase.as_str().to_owned(), self.coverage.get(*phase, event).into()));
            ((*name).to_owned(), Value::Object(phases.collect()))
        });
        let caught = self.caught.iter().map(|Caught { flaw, scope, rule, moves, took }| {
            json!({
                "hazard": flaw.name(),
                "planted": flaw.words(),
                "scope": scope,
                "rule": rule,
                "moves": moves,
                "seconds": took.as_secs_f64(),
            })
        });
        json!({
            "version": 1,
            "violations": 0,
            "states": self.exhausted.iter().map(|exhausted| exhausted.walk.states).sum::<usize>(),
            "scopes": scopes.collect::<Vec<_>>(),
            "coverage": Value::Object(coverage.collect()),
            "caught": caught.collect::<Vec<_>>(),
            "missed": self.missed.iter().map(|flaw| flaw.name()).collect::<Vec<_>>(),
        })
    }
}

fn catch(scope: Scope, flaw: Flaw) -> Option<Caught> {
    let begin = Instant::now();
    let name = scope.name;
    let violation = walk(&mut Lifecycle::new(scope, Some(flaw)), STATES).err()?;
    Some(Caught {
        flaw,
        scope: name,
        rule: violation.rule,
        moves: violation.path.len(),
        took: begin.elapsed(),
    })
}
