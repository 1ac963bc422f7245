//! Which event happened in which phase, and how often.

use std::collections::BTreeMap;
use std::fmt;

use dormouse_lifecycle::{Event, PhaseName};

/// The names of all events, in the order of their declaration.
pub const EVENTS: [&str; 27] = [
    "LeaseRequested",
    "LeaseDropped",
    "WeakAdded",
    "WeakRemoved",
    "PinSet",
    "PinRemoved",
    "GraceChanged",
    "Configured",
    "VmProgress",
    "VmReady",
    "VmAdopted",
    "StartFailed",
    "VmExited",
    "VmPaused",
    "VmResumed",
    "EngineDied",
    "ContainersChanged",
    "ContainersCounted",
    "HooksDone",
    "SleepDone",
    "SuspendFailed",
    "DeadlineReached",
    "Terminate",
    "StartRequested",
    "SleepRequested",
    "CreatorGone",
    "HostLeaving",
];

/// Cells of the table that can't be reached, each with the reason.
pub const IMPOSSIBLE: &[(PhaseName, &str, &str)] = &[];

/// How often each event happened in each phase.
#[derive(Debug, Clone, Default)]
pub struct Coverage(BTreeMap<(PhaseName, usize), u64>);

impl Coverage {
    /// Counts one.
    pub fn count(&mut self, phase: PhaseName, event: &Event) {
        *self.0.entry((phase, number(event))).or_default() += 1;
    }

    /// Adds another table.
    pub fn add(&mut self, other: &Self) {
        for (cell, count) in &other.0 {
            *self.0.entry(*cell).or_default() += count;
        }
    }

    /// The count of one cell.
    pub fn get(&self, phase: PhaseName, event: usize) -> u64 {
        self.0.get(&(phase, event)).copied().unwrap_or_default()
    }

    /// Cells that were never reached and aren't listed as impossible, and cells that are listed and were reached.
    pub fn surprises(&self) -> Vec<String> {
        let mut surprises = Vec::new();
        for phase in PhaseName::ALL {
            for (event, name) in EVENTS.iter().enumerate() {
                let listed = IMPOSSIBLE.iter().any(|cell| cell.0 == phase && cell.1 == *name);
                match (self.get(phase, event), listed) {
                    (0, false) => surprises.push(format!("{name} never happened in {}", phase.as_str())),
                    (1.., true) => surprises.push(format!("{name} did happen in {}", phase.as_str())),
                    (0, true) | (1.., false) => {}
                }
            }
        }
        surprises
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "| event |")?;
        for phase in PhaseName::ALL {
            write!(f, " {} |", phase.as_str())?;
        }
        write!(f, "\n|---|")?;
        PhaseName::ALL.iter().try_for_each(|_| write!(f, "---:|"))?;
        for (event, name) in EVENTS.iter().enumerate() {
            write!(f, "\n| {name} |")?;
            PhaseName::ALL.iter().try_for_each(|phase| write!(f, " {} |", self.get(*phase, event)))?;
        }
        writeln!(f)
    }
}

fn number(event: &Event) -> usize {
    match event {
        Event::LeaseRequested { .. } => 0,
        Event::LeaseDropped { .. } => 1,
        Event::WeakAdded { .. } => 2,
        Event::WeakRemoved { .. } => 3,
        Event::PinSet { .. } => 4,
        Event::PinRemoved { .. } => 5,
        Event::GraceChanged(_) => 6,
        Event::Configured(_) => 7,
        Event::VmProgress { .. } => 8,
        Event::VmReady { .. } => 9,
        Event::VmAdopted { .. } => 10,
        Event::StartFailed { .. } => 11,
        Event::VmExited { .. } => 12,
        Event::VmPaused { .. } => 13,
        Event::VmResumed { .. } => 14,
        Event::EngineDied { .. } => 15,
        Event::ContainersChanged { .. } => 16,
        Event::ContainersCounted { .. } => 17,
        Event::HooksDone { .. } => 18,
        Event::SleepDone { .. } => 19,
        Event::SuspendFailed { .. } => 20,
        Event::DeadlineReached => 21,
        Event::Terminate { .. } => 22,
        Event::StartRequested => 23,
        Event::SleepRequested { .. } => 24,
        Event::CreatorGone => 25,
        Event::HostLeaving => 26,
    }
}
