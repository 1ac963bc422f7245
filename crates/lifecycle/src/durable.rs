//! What survives the host process.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::action::{SleepHow, StartHow};
use crate::config::Config;
use crate::hold::{Census, Claims, Pin, Text};
use crate::id::{Generation, Incarnation};
use crate::phase::{Committed, Killed, Phase, Source, Stage, Starting, Stopping, Termination, Then, Vm};
use crate::session::{Mode, Session};
use crate::time::Timestamp;

/// What must survive a crash of the host process (rule 13). The driver writes it on each
/// [`crate::Action::Persist`], with wall-clock times, and gives it to [`Session::new`] when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Durable {
    /// The present incarnation, or the last one.
    pub incarnation: Incarnation,
    /// The latest VM.
    pub generation: Generation,
    /// Guest kernels booted so far.
    pub boots: u64,
    /// VMs started so far, successfully.
    pub start_count: u64,
    /// How far the latest VM had got.
    pub vm: LastVm,
    /// The generation whose suspend made the snapshot that can be resumed.
    pub snapshot: Option<Generation>,
    /// A VM that was killed and never seen to exit. Once the driver knows that it is gone it says so with
    /// [`crate::Event::VmExited`].
    pub remains: Option<Generation>,
    /// Pins that are set.
    pub pins: Vec<Pin>,
    /// Crashes that aren't forgotten yet.
    pub crashes: Vec<Crash>,
    /// Why the last incarnation is over; `None` while one is open.
    pub termination: Option<Termination>,
}

/// How far a session's latest VM had got when it was last written down.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum LastVm {
    /// It is gone, or there never was one.
    Gone,
    /// It was being made. A new host gives it up.
    Starting,
    /// It was up, and announced. A new host takes it over.
    Up {
        /// How it was started.
        how: StartHow,
    },
    /// It was being put to sleep, and the hooks were told. A new host carries on with the sleep: if it finds that
    /// the snapshot is sealed it answers `SleepDone`, if the VM is merely gone, `VmExited`.
    Sleeping {
        /// How it was started.
        how: StartHow,
        /// By what means.
        by: SleepHow,
        /// What follows.
        then: Then,
    },
    /// It was to be ended by force. A new host does that.
    Ending {
        /// What follows.
        then: Then,
    },
}

/// A crash that counts towards the back-off.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Crash {
    /// Details in words.
    pub details: Text,
    /// When it is forgotten.
    pub until: Timestamp,
}

impl Default for Durable {
    /// A session that was just created.
    fn default() -> Self {
        Self {
            incarnation: Incarnation(1),
            generation: Generation::default(),
            boots: 0,
            start_count: 0,
            vm: LastVm::Gone,
            snapshot: None,
            remains: None,
            pins: Vec::new(),
            crashes: Vec::new(),
            termination: None,
        }
    }
}

impl Session {
    /// A session as an earlier host process left it; `Durable::default()` for one that was just created.
    ///
    /// What is left to be done for its VM is due at once: the driver asks [`Session::next_deadline`] as ever. If
    /// a VM was up ([`LastVm::Up`]), the session begins as if starting: the driver looks for the VM and reports
    /// `VmAdopted` or `VmExited`.
    pub fn new(config: Config, durable: Durable, now: Timestamp) -> Self {
        let Durable {
            incarnation,
            generation,
            boots,
            start_count,
            vm,
            mut snapshot,
            remains,
            pins,
            crashes,
            termination,
        } = durable;
        if vm == LastVm::Starting {
            // It may have run on from its snapshot, and nobody knows.
            snapshot = None;
        }
        let phase = match termination {
            Some(termination) => Phase::Terminated(termination),
            None => restored_phase(&config, generation, vm, now),
        };
        Self {
            config,
            mode: Mode::Serving,
            entered: (phase.name(), now),
            phase,
            incarnation,
            generation,
            boots,
            start_count,
            snapshot,
            remains,
            pins: pins.into_iter().map(|pin| (pin.id, pin)).collect(),
            weak: BTreeMap::new(),
            failure: None,
            crashes,
            latest: crate::view::Latest::default(),
            #[cfg(feature = "model")]
            flaw: None,
        }
    }

    /// What must survive the host process at this moment.
    pub fn durable(&self) -> Durable {
        let vm = match &self.phase {
            Phase::Absent | Phase::Terminated(_) => LastVm::Gone,
            Phase::Starting(Starting { source: Source::Left(how), .. }) => LastVm::Up { how: *how },
            Phase::Starting(Starting { source: Source::Made(_), .. }) => LastVm::Starting,
            Phase::Running(running) => LastVm::Up { how: running.vm.how },
            Phase::Counting(counting) => LastVm::Up { how: counting.vm.how },
            // A new host runs it on.
            Phase::Dozing(dozing) => LastVm::Up { how: dozing.vm.how },
            Phase::Committed(Committed { vm, by, then, .. }) => {
                LastVm::Sleeping { how: vm.how, by: *by, then: then.clone() }
            }
            Phase::Stopping(stopping) => last_of(stopping),
        };
        let termination = match &self.phase {
            Phase::Terminated(termination) => Some(termination.clone()),
            Phase::Absent
            | Phase::Starting(_)
            | Phase::Running(_)
            | Phase::Counting(_)
            | Phase::Dozing(_)
            | Phase::Committed(_)
            | Phase::Stopping(_) => None,
        };
        Durable {
            incarnation: self.incarnation,
            generation: self.generation,
            boots: self.boots,
            start_count: self.start_count,
            vm,
            snapshot: self.snapshot,
            remains: self.remains,
            pins: self.pins.values().cloned().collect(),
            crashes: self.crashes.clone(),
            termination,
        }
    }
}

/// Where a session begins whose latest VM was left like this. Deadlines that are due make the first step happen.
fn restored_phase(config: &Config, generation: Generation, vm: LastVm, now: Timestamp) -> Phase {
    match vm {
        LastVm::Gone => Phase::Absent,
        LastVm::Starting => ending(generation, Then::Absent, Killed::BringUp, now),
        LastVm::Up { how } => Phase::Starting(Starting {
            generation,
            source: Source::Left(how),
            progress: None,
            since: now,
            deadline: now.after(config.limits.boot),
            woken_by: None,
            queue: Claims::new(),
        }),
        LastVm::Sleeping { how, by, then } => Phase::Committed(Committed {
            vm: Vm::new(generation, how, now, Census::default()),
            by,
            then,
            since: now,
            deadline: now,
            queue: Claims::new(),
            requests: Vec::new(),
        }),
        LastVm::Ending { then } => ending(generation, then, Killed::Crash, now),
    }
}

fn ending(generation: Generation, then: Then, was: Killed, now: Timestamp) -> Phase {
    Phase::Stopping(Stopping {
        generation,
        stage: Stage::Killing { tries: 0, was },
        then,
        since: now,
        deadline: now,
        trouble: None,
        queue: Claims::new(),
        requests: Vec::new(),
    })
}

fn last_of(stopping: &Stopping) -> LastVm {
    let then = stopping.then.clone();
    match &stopping.stage {
        Stage::Suspending(vm) => LastVm::Sleeping { how: vm.how, by: SleepHow::Suspend, then },
        Stage::Sealing { how, .. } => LastVm::Sleeping { how: *how, by: SleepHow::Suspend, then },
        Stage::ShuttingDown { how, .. } => LastVm::Sleeping { how: *how, by: SleepHow::Stop, then },
        Stage::Cancelling | Stage::Killing { was: Killed::BringUp, .. } if then == Then::Absent => {
            LastVm::Starting
        }
        Stage::Cancelling | Stage::Killing { .. } => LastVm::Ending { then },
    }
}
