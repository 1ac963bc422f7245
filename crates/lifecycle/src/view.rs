//! What `inspect` and `why` show. Reading it wakes nothing and counts as nothing.

use alloc::format;
use alloc::vec::Vec;
use core::time::Duration;

use crate::action::{Action, Record, SleepHow, StartHow};
use crate::hold::{Claim, HoldKind, Text};
use crate::id::{Boot, Generation, Incarnation};
use crate::phase::{Disk, Phase, Termination, Then};
use crate::session::{Mode, Session, Step};
use crate::time::Timestamp;

/// The phases' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[allow(missing_docs, reason = "described in the crate's documentation")]
pub enum PhaseName {
    Absent,
    Starting,
    Running,
    Counting,
    Dozing,
    Committed,
    Stopping,
    Terminated,
}

impl PhaseName {
    /// All of them, in the order of a VM's life.
    pub const ALL: [Self; 8] = [
        Self::Absent,
        Self::Starting,
        Self::Running,
        Self::Counting,
        Self::Dozing,
        Self::Committed,
        Self::Stopping,
        Self::Terminated,
    ];

    /// The word that users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Counting => "counting",
            Self::Dozing => "dozing",
            Self::Committed => "committed",
            Self::Stopping => "stopping",
            Self::Terminated => "terminated",
        }
    }
}

/// What the API calls a session. A session whose VM is asleep is running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Requests are served.
    Running,
    /// The incarnation is about to end.
    Terminating,
    /// The incarnation is over.
    Terminated,
}

impl State {
    /// The word that users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Terminating => "terminating",
            Self::Terminated => "terminated",
        }
    }
}

/// A session at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View<'a> {
    /// The phase.
    pub phase: PhaseName,
    /// Since when.
    pub since: Timestamp,
    /// When this phase ends by itself.
    pub deadline: Option<Timestamp>,
    /// What the API calls it.
    pub state: State,
    /// The present incarnation, or the last one.
    pub incarnation: Incarnation,
    /// The present VM, or the last one; zero if there never was one.
    pub generation: Generation,
    /// The latest guest kernel; zero if there never was one.
    pub boot: Boot,
    /// How the present VM was started.
    pub how: Option<StartHow>,
    /// How the present VM is put to sleep.
    pub sleep: Option<SleepHow>,
    /// VMs started so far, successfully.
    pub start_count: u64,
    /// The step that a start has reached, in words.
    pub progress: Option<&'a Text>,
    /// The request that woke the present VM.
    pub woken_by: Option<&'a Claim>,
    /// Leases that are out.
    pub leases: usize,
    /// Requests that wait for a VM.
    pub queued: usize,
    /// Weak holds that are listed.
    pub weak: usize,
    /// The error that keeps the VM paused, in words.
    pub io_error: Option<&'a Text>,
    /// The generation whose memory is kept in a snapshot.
    pub snapshot: Option<Generation>,
    /// A VM that was killed and never seen to exit.
    pub remains: Option<Generation>,
    /// Whether this host process was told to go.
    pub leaving: bool,
    /// Why the incarnation is over.
    pub termination: Option<&'a Termination>,
    /// The latest start, sleep, and failure of either.
    pub latest: &'a Latest,
}

/// The latest of each kind of history entry that `why` tells of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Latest {
    /// The latest successful start: when, how, how long it took.
    pub start: Option<(Timestamp, StartHow, Duration)>,
    /// The latest sleep: when, how, how long it took, and what went wrong on the way.
    pub sleep: Option<(Timestamp, SleepHow, Duration, Option<Text>)>,
    /// The latest start that failed: when, why.
    pub start_failure: Option<(Timestamp, Text)>,
    /// The latest suspend that failed: when, why.
    pub sleep_failure: Option<(Timestamp, Text)>,
    /// The latest crash: when, why.
    pub crash: Option<(Timestamp, Text)>,
    /// The latest incarnation that ended: when, which, why. Stays while the next one runs.
    pub termination: Option<(Timestamp, Incarnation, Termination)>,
}

/// One line of the answer to "why is it awake".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// What it is.
    pub kind: HoldKind,
    /// Who, in words.
    pub owner: Text,
    /// What for, in words.
    pub reason: Text,
    /// Since when.
    pub since: Timestamp,
    /// When it ends by itself.
    pub until: Option<Timestamp>,
    /// Whether it is only listed and keeps nothing awake.
    pub weak: bool,
}

impl Session {
    /// The session as it is now.
    pub fn view(&self) -> View<'_> {
        let vm = self.phase.vm();
        View {
            phase: self.phase.name(),
            since: self.entered.1,
            deadline: self.phase.deadline(),
            state: self.state(),
            incarnation: self.incarnation,
            generation: self.generation,
            boot: Boot(self.boots),
            how: vm.map(|vm| vm.how),
            sleep: match &self.phase {
                Phase::Committed(committed) => Some(committed.by),
                Phase::Stopping(stopping) => stopping.by(),
                Phase::Absent
                | Phase::Starting(_)
                | Phase::Running(_)
                | Phase::Counting(_)
                | Phase::Dozing(_)
                | Phase::Terminated(_) => None,
            },
            start_count: self.start_count,
            progress: match &self.phase {
                Phase::Starting(starting) => starting.progress.as_ref(),
                Phase::Absent
                | Phase::Running(_)
                | Phase::Counting(_)
                | Phase::Dozing(_)
                | Phase::Committed(_)
                | Phase::Stopping(_)
                | Phase::Terminated(_) => None,
            },
            woken_by: vm.and_then(|vm| vm.woken_by.as_ref()),
            leases: vm.map_or(0, |vm| vm.leases.len()),
            queued: self.phase.queue().map_or(0, |queue| queue.len()),
            weak: self.weak.len(),
            io_error: vm.and_then(|vm| match &vm.disk {
                Disk::Failing(reason) => Some(reason),
                Disk::Writable => None,
            }),
            snapshot: self.snapshot,
            remains: self.remains,
            leaving: self.mode == Mode::Leaving,
            termination: self.termination(),
            latest: &self.latest,
        }
    }

    /// What the API calls this session. A crash that opens again by itself is no end that anybody waits for.
    fn state(&self) -> State {
        match &self.phase {
            Phase::Committed(crate::phase::Committed { then: Then::Terminated(_), .. })
            | Phase::Stopping(crate::phase::Stopping { then: Then::Terminated(_), .. }) => State::Terminating,
            Phase::Terminated(_) => State::Terminated,
            Phase::Absent
            | Phase::Starting(_)
            | Phase::Running(_)
            | Phase::Counting(_)
            | Phase::Dozing(_)
            | Phase::Committed(_)
            | Phase::Stopping(_) => State::Running,
        }
    }

    /// Everything that holds or is listed: leases, requests that wait, containers, pins, weak holds.
    pub fn holds(&self) -> Vec<Hold> {
        let vm = self.phase.vm();
        let leases = vm.into_iter().flat_map(|vm| vm.leases.values());
        let queued = self.phase.queue().into_iter().flat_map(|queue| queue.values());
        let mut holds: Vec<Hold> = leases
            .chain(queued)
            .map(|held| Hold {
                kind: held.claim.kind,
                owner: held.claim.owner.clone(),
                reason: held.claim.reason.clone(),
                since: held.since,
                until: None,
                weak: held.claim.kind.is_weak(),
            })
            .collect();
        if let Some(vm) = vm {
            for (kind, count) in [(HoldKind::Container, vm.census.active), (HoldKind::Exec, vm.census.execs)]
            {
                if count > 0 {
                    holds.push(Hold {
                        kind,
                        owner: "engine".into(),
                        reason: format!("{count} running").into(),
                        since: vm.census_since,
                        until: None,
                        weak: kind == HoldKind::Container && !vm.census.holds(self.running_containers()),
                    });
                }
            }
        }
        holds.extend(self.pins.values().map(|pin| Hold {
            kind: HoldKind::Pin,
            owner: pin.owner.clone(),
            reason: pin.reason.clone(),
            since: pin.since,
            until: pin.until,
            weak: false,
        }));
        holds.extend(self.weak.values().map(|weak| Hold {
            kind: weak.kind,
            owner: weak.owner.clone(),
            reason: weak.reason.clone(),
            since: weak.since,
            until: None,
            weak: true,
        }));
        holds
    }

    /// Adds to the history, and remembers what `why` tells of.
    pub(crate) fn record(&mut self, step: &mut Step<'_>, record: Record) {
        let now = step.now;
        match &record {
            Record::Started { how, took, .. } => self.latest.start = Some((now, *how, *took)),
            Record::StartFailed { reason, .. } => self.latest.start_failure = Some((now, reason.clone())),
            Record::Slept { how, took, trouble, .. } => {
                self.latest.sleep = Some((now, *how, *took, trouble.clone()));
            }
            Record::SleepFailed { reason, .. } => self.latest.sleep_failure = Some((now, reason.clone())),
            Record::Crashed { details, .. } => self.latest.crash = Some((now, details.clone())),
            Record::Terminated { incarnation, termination } => {
                self.latest.termination = Some((now, *incarnation, termination.clone()));
            }
            Record::Opened { .. } | Record::Adopted { .. } => {}
        }
        step.act(Action::Record(record));
    }
}

impl Phase {
    pub(crate) fn name(&self) -> PhaseName {
        match self {
            Self::Absent => PhaseName::Absent,
            Self::Starting(_) => PhaseName::Starting,
            Self::Running(_) => PhaseName::Running,
            Self::Counting(_) => PhaseName::Counting,
            Self::Dozing(_) => PhaseName::Dozing,
            Self::Committed(_) => PhaseName::Committed,
            Self::Stopping(_) => PhaseName::Stopping,
            Self::Terminated(_) => PhaseName::Terminated,
        }
    }
}
