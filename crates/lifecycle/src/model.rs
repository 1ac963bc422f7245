//! What the model checker needs to see of a session: a form in which states that can't be told apart are equal.
//!
//! Time counts only as due or not: every point in time that the core compares with the clock is either in the past
//! or at [`FAR`], and every point that is merely shown is dropped. Numbers that only grow (generations, sequences)
//! are moved to where the present one is [`BASE`]; counts that only lengthen a wait are cut off.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::config::Grace;
use crate::flaw::Flaw;
use crate::hold::{Claims, Text};
use crate::id::{Ask, Generation, Incarnation, LeaseId};
use crate::phase::{Aim, Disk, Engine, Killed, Phase, Rest, Running, Stage, Stopping, Then, Vm};
use crate::session::Session;
use crate::time::Timestamp;
use crate::view::Latest;

/// The number of the present generation and of the latest ask in a normalised state.
pub const BASE: u32 = 100;

/// A point in time that hasn't come.
pub const FAR: Timestamp = Timestamp::from_millis(1 << 60);

impl Session {
    /// Plants a bug.
    pub fn plant(&mut self, flaw: Option<Flaw>) {
        self.flaw = flaw;
    }

    /// Brings the state into the form in which equal ones are equal; `relabel` gives leases new numbers.
    pub fn normalise(&mut self, now: Timestamp, relabel: &dyn Fn(LeaseId) -> LeaseId) {
        let none: Text = Arc::from("");
        let present = self.generation;
        let generation = |old: Generation| match old {
            Generation(0) => old,
            old if old == present => Generation(u64::from(BASE)),
            _ => Generation(u64::from(BASE) - 1),
        };
        for time in self.clocked() {
            *time = if *time > now { FAR } else { Timestamp::default() };
        }
        self.crashes.retain(|crash| crash.until == FAR);
        for crash in &mut self.crashes {
            crash.details = none.clone();
        }
        if let Some(failure) = &mut self.failure {
            failure.count = failure.count.min(2);
            failure.reason = none.clone();
        }
        for pin in self.pins.values_mut() {
            pin.since = Timestamp::default();
        }
        for weak in self.weak.values_mut() {
            weak.since = Timestamp::default();
        }
        self.entered = (self.phase.name(), Timestamp::default());
        self.incarnation = Incarnation(1);
        self.boots = 0;
        self.start_count = 0;
        self.latest = Latest::default();
        self.snapshot = self.snapshot.map(generation);
        self.remains = self.remains.map(generation);
        let grace = match self.config.grace {
            Grace::After(grace) => grace,
            Grace::Never => core::time::Duration::ZERO,
        };
        normalise_phase(&mut self.phase, &none, grace, &generation, relabel);
        self.generation = generation(self.generation);
    }

    /// All points in time that are compared with the clock.
    fn clocked(&mut self) -> Vec<&mut Timestamp> {
        let mut times: Vec<&mut Timestamp> = Vec::new();
        match &mut self.phase {
            Phase::Absent | Phase::Terminated(_) => {}
            Phase::Starting(starting) => times.push(&mut starting.deadline),
            Phase::Running(Running { rest, .. }) => match rest {
                Rest::Busy => {}
                Rest::Looked { deadline, then, .. } => {
                    times.extend(deadline.iter_mut().chain(dozes_until(then)))
                }
                Rest::Idle { deadline, .. } => times.extend(deadline),
                Rest::Paused { retry_at, give_up_at } => times.extend([retry_at, give_up_at]),
            },
            Phase::Counting(counting) => {
                times.push(&mut counting.deadline);
                times.extend(dozes_until(&mut counting.aim));
            }
            Phase::Dozing(dozing) => times.push(&mut dozing.deadline),
            Phase::Committed(committed) => times.push(&mut committed.deadline),
            Phase::Stopping(stopping) => times.push(&mut stopping.deadline),
        }
        times.extend(self.pins.values_mut().filter_map(|pin| pin.until.as_mut()));
        times.extend(self.failure.as_mut().map(|failure| &mut failure.retry_at));
        times.extend(self.crashes.iter_mut().map(|crash| &mut crash.until));
        times
    }

    /// How many points in time are still to come.
    pub fn pending(&mut self) -> usize {
        self.clocked().into_iter().filter(|time| **time == FAR).count()
    }

    /// Lets one of the points in time that are still to come be now.
    pub fn ripen(&mut self, index: usize, now: Timestamp) {
        if let Some(time) = self.clocked().into_iter().filter(|time| **time == FAR).nth(index) {
            *time = now;
        }
    }
}

fn dozes_until(aim: &mut Aim) -> Option<&mut Timestamp> {
    match aim {
        Aim::Doze(until) => until.as_mut(),
        Aim::Sleep(_) => None,
    }
}

fn normalise_phase(
    phase: &mut Phase,
    none: &Text,
    grace: core::time::Duration,
    generation: &dyn Fn(Generation) -> Generation,
    relabel: &dyn Fn(LeaseId) -> LeaseId,
) {
    let zero = Timestamp::default();
    if let Some(queue) = phase.queue_mut() {
        normalise_claims(queue, relabel);
    }
    if let Some(vm) = phase.vm_mut() {
        normalise_vm(vm, none, generation, relabel);
    }
    match phase {
        Phase::Absent => {}
        Phase::Starting(starting) => {
            starting.generation = generation(starting.generation);
            starting.since = zero;
            starting.progress = None;
            starting.woken_by = None;
            if let crate::phase::Source::Made(crate::action::StartFrom::Snapshot(from)) = &mut starting.source
            {
                *from = generation(*from);
            }
        }
        Phase::Running(running) => {
            if let Rest::Looked { since, .. } | Rest::Idle { since, .. } = &mut running.rest {
                // So that the deadline is still the grace period from here.
                *since = Timestamp::from_millis(FAR.as_millis() - grace.as_millis() as u64);
            }
        }
        Phase::Counting(_) | Phase::Dozing(_) => {}
        Phase::Committed(committed) => {
            committed.since = zero;
            normalise_then(&mut committed.then, none);
        }
        Phase::Stopping(stopping) => normalise_stopping(stopping, none, generation),
        Phase::Terminated(termination) => termination.details = none.clone(),
    }
}

fn normalise_stopping(stopping: &mut Stopping, none: &Text, generation: &dyn Fn(Generation) -> Generation) {
    stopping.generation = generation(stopping.generation);
    stopping.since = Timestamp::default();
    stopping.trouble = None;
    normalise_then(&mut stopping.then, none);
    match &mut stopping.stage {
        Stage::Sealing { ask, .. }
        | Stage::ShuttingDown { ask, .. }
        | Stage::Killing { was: Killed::Sleep(_, ask), .. } => {
            *ask = Ask { generation: generation(ask.generation), sequence: BASE };
        }
        Stage::Suspending(_)
        | Stage::Cancelling
        | Stage::Killing { was: Killed::BringUp | Killed::Crash, .. } => {}
    }
}

fn normalise_then(then: &mut Then, none: &Text) {
    if let Then::Terminated(termination) = then {
        termination.details = none.clone();
    }
}

fn normalise_vm(
    vm: &mut Vm,
    none: &Text,
    generation: &dyn Fn(Generation) -> Generation,
    relabel: &dyn Fn(LeaseId) -> LeaseId,
) {
    vm.generation = generation(vm.generation);
    vm.since = Timestamp::default();
    vm.woken_by = None;
    vm.census_since = Timestamp::default();
    vm.sequence = BASE;
    vm.failed_suspends = vm.failed_suspends.min(1);
    vm.not_before = Timestamp::default();
    if let Disk::Failing(reason) = &mut vm.disk {
        *reason = none.clone();
    }
    if let Engine::Dead(reason) = &mut vm.engine {
        *reason = none.clone();
    }
    normalise_claims(&mut vm.leases, relabel);
}

fn normalise_claims(claims: &mut Claims, relabel: &dyn Fn(LeaseId) -> LeaseId) {
    *claims = core::mem::take(claims)
        .into_iter()
        .map(|(lease, mut held)| {
            held.since = Timestamp::default();
            (relabel(lease), held)
        })
        .collect();
}
