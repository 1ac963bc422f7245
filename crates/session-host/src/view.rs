//! The session as the API tells it.

use std::path::Path;
use std::time::Duration;

use dormouse_api::link::HostSettings;
use dormouse_api::{
    CrashPolicy, Fact, HistoryEntry, HoldInfo, HoldKind, How, IdleAction, IdleInfo, IdleTimeout, NetworkInfo,
    NetworkKind, Phase, RunningContainers, SessionInfo, SessionState, SnapshotInfo, StorageInfo,
    TerminationInfo, TerminationReason, VmEnd, VmInfo,
};
use dormouse_lifecycle::{
    self as core, Config, Grace, Incarnation, PhaseName, Record, Session, SleepHow, StartHow, State, StopHow,
};
use dormouse_vm::VmRecord;

use crate::clock::to_wall;
use crate::owner::Facts;

/// The data disk's name in the session's storage.
const DISK: &str = "data.raw";

pub(crate) fn info(facts: &Facts, session: &Session, config: Config) -> SessionInfo {
    let view = session.view();
    let settings = &facts.settings;
    let record = VmRecord::read(&facts.runtime_dir).ok().flatten();
    let mut info = SessionInfo {
        name: settings.name.clone(),
        id: settings.id.clone(),
        owner: settings.owner,
        state: match view.state {
            State::Running => SessionState::Running,
            State::Terminating => SessionState::Terminating,
            State::Terminated => SessionState::Terminated,
        },
        incarnation: view.incarnation.0,
        vm: VmInfo {
            phase: phase(view.phase),
            generation: view.generation.0,
            boot: (view.boot.0 > 0).then(|| view.boot.to_string()),
            how: view.how.or(view.latest.start.as_ref().map(|(_, how, _)| *how)).map(how),
            start_count: view.start_count,
            boots: view.boot.0,
            since: to_wall(view.since),
            deadline: view.deadline.map(to_wall),
            step: view.progress.map(ToString::to_string),
            acceleration: record.as_ref().map(|record| record.key.acceleration.clone()),
            cpus: settings.cpus,
            memory_mib: settings.memory_mib,
        },
        holds: holds(session),
        idle: IdleInfo {
            timeout_seconds: match config.grace {
                Grace::After(grace) => IdleTimeout::Seconds(grace.as_secs()),
                Grace::Never => IdleTimeout::Never,
            },
            doze_seconds: config.doze.map_or(0, |doze| doze.as_secs()),
            action: idle_action(config.idle_action),
            running: match config.running {
                core::RunningContainers::Hold => RunningContainers::Hold,
                core::RunningContainers::Suspend => RunningContainers::Suspend,
            },
        },
        crash: match config.crash {
            core::CrashPolicy::Reopen => CrashPolicy::Reopen,
            core::CrashPolicy::Terminate => CrashPolicy::Terminate,
        },
        network: network(settings),
        storage: storage(&settings.storage, settings.storage_bytes),
        snapshot: None,
        wakes: Vec::new(),
        termination: view.termination.map(|end| TerminationInfo {
            reason: reason(end.reason),
            details: end.details.to_string(),
            at: to_wall(view.since),
        }),
        docker_socket: facts.runtime_dir.join("docker.sock"),
        control_socket: facts.runtime_dir.join("control.sock"),
    };
    info.snapshot = snapshot(facts, &info.vm);
    info
}

/// What a VM that sleeps will wake from.
pub(crate) fn snapshot(facts: &Facts, vm: &VmInfo) -> Option<SnapshotInfo> {
    (vm.phase == Phase::Absent).then(|| dormouse_snapshot::info(&facts.settings.storage, None)).flatten()
}

/// The API's word for a means of sleeping.
pub(crate) fn idle_action(how: SleepHow) -> IdleAction {
    match how {
        SleepHow::Stop => IdleAction::Stop,
        SleepHow::Suspend => IdleAction::Suspend,
    }
}

/// The core's word for a means of sleeping.
pub(crate) fn sleep_how(action: IdleAction) -> SleepHow {
    match action {
        IdleAction::Stop => SleepHow::Stop,
        IdleAction::Suspend => SleepHow::Suspend,
    }
}

/// The core's word for how long a VM dozes.
pub(crate) fn doze(seconds: u64) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

fn reason(reason: core::TerminationReason) -> TerminationReason {
    match reason {
        core::TerminationReason::Shutdown => TerminationReason::Shutdown,
        core::TerminationReason::Crashed => TerminationReason::Crashed,
        core::TerminationReason::Unknown => TerminationReason::Unknown,
    }
}

/// The core's word for a grace period.
pub(crate) fn grace(timeout: IdleTimeout) -> Grace {
    match timeout {
        IdleTimeout::Seconds(seconds) => Grace::After(Duration::from_secs(seconds)),
        IdleTimeout::Never => Grace::Never,
    }
}

/// The core's word for what follows a crash.
pub(crate) fn crash(policy: CrashPolicy) -> core::CrashPolicy {
    match policy {
        CrashPolicy::Reopen => core::CrashPolicy::Reopen,
        CrashPolicy::Terminate => core::CrashPolicy::Terminate,
    }
}

/// How a VM ends, for hooks.
pub(crate) fn vm_end(how: StopHow) -> VmEnd {
    match how {
        StopHow::Sleep(SleepHow::Stop) => VmEnd::Stop,
        StopHow::Sleep(SleepHow::Suspend) => VmEnd::Suspend,
        StopHow::Crash => VmEnd::Crash,
    }
}

/// The end of an incarnation, for hooks. `None` for one that is not the latest which ended.
pub(crate) fn session_stopping(session: &Session, incarnation: Incarnation) -> Option<Fact> {
    let (_, ended, end) = session.view().latest.termination.as_ref()?;
    (*ended == incarnation).then(|| Fact::SessionStopping {
        incarnation: incarnation.0,
        reason: reason(end.reason),
        details: end.details.to_string(),
    })
}

fn phase(name: PhaseName) -> Phase {
    match name {
        PhaseName::Absent | PhaseName::Terminated => Phase::Absent,
        PhaseName::Starting => Phase::Starting,
        PhaseName::Running => Phase::Running,
        PhaseName::Counting => Phase::Counting,
        PhaseName::Dozing => Phase::Dozing,
        PhaseName::Committed => Phase::Committed,
        PhaseName::Stopping => Phase::Stopping,
    }
}

pub(crate) fn how(how: StartHow) -> How {
    match how {
        StartHow::Cold => How::Cold,
        StartHow::Clone => How::Clone,
        StartHow::Resume => How::Resume,
    }
}

fn network(settings: &HostSettings) -> NetworkInfo {
    NetworkInfo {
        kind: settings.network,
        host_loopback: settings.network == NetworkKind::User,
        publish_address: settings.publish_address,
        registries: settings.registries.clone(),
    }
}

fn storage(path: &Path, size_bytes: u64) -> StorageInfo {
    let used_bytes = dormouse_vm::allocated_bytes(&path.join(DISK)).unwrap_or_default();
    StorageInfo { path: path.to_owned(), size_bytes, used_bytes }
}

pub(crate) fn holds(session: &Session) -> Vec<HoldInfo> {
    let hold = |hold: core::Hold| HoldInfo {
        kind: match hold.kind {
            core::HoldKind::Request => HoldKind::Request,
            core::HoldKind::Read => HoldKind::Read,
            core::HoldKind::Operation => HoldKind::Operation,
            core::HoldKind::RootProcess => HoldKind::RootProcess,
            core::HoldKind::Exec => HoldKind::Exec,
            core::HoldKind::Container => HoldKind::Container,
            core::HoldKind::Activity => HoldKind::Activity,
            core::HoldKind::Pin => HoldKind::Pin,
            core::HoldKind::Events | core::HoldKind::Connection => HoldKind::Connection,
        },
        owner: hold.owner.to_string(),
        reason: hold.reason.to_string(),
        since: to_wall(hold.since),
        weak: hold.weak,
    };
    session.holds().into_iter().map(hold).collect()
}

/// What isn't the core's to know.
pub(crate) fn entry(what: &str, generation: u64, reason: String) -> HistoryEntry {
    let (at, how) = (jiff::Timestamp::now(), String::new());
    HistoryEntry { at, what: what.to_owned(), generation, how, duration_ms: 0, reason }
}

/// An entry of the history as the API tells it.
pub(crate) fn history_entry(record: &Record) -> HistoryEntry {
    let entry =
        |what: &str, generation: core::Generation, how: &str, took: Duration, reason: &str| HistoryEntry {
            at: jiff::Timestamp::now(),
            what: what.to_owned(),
            generation: generation.0,
            how: how.to_owned(),
            duration_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            reason: reason.to_owned(),
        };
    let (none, at_once) = (core::Generation(0), Duration::ZERO);
    match record {
        Record::Opened { incarnation } => {
            entry("open", none, "", at_once, &format!("incarnation {incarnation}"))
        }
        Record::Started { generation, how, took } => entry("start", *generation, how.as_str(), *took, ""),
        Record::Adopted { generation } => entry("adopt", *generation, "", at_once, ""),
        Record::StartFailed { generation, reason, took } => {
            entry("start_failed", *generation, "", *took, reason)
        }
        Record::Slept { generation, how, took, trouble } => {
            entry("sleep", *generation, how.as_str(), *took, trouble.as_deref().unwrap_or(""))
        }
        Record::SleepFailed { generation, reason } => {
            entry("sleep_failed", *generation, "suspend", at_once, reason)
        }
        Record::Crashed { generation, details } => entry("crash", *generation, "", at_once, details),
        Record::Terminated { incarnation, termination } => entry(
            "terminate",
            none,
            "",
            at_once,
            &format!("incarnation {incarnation}: {}", termination.details),
        ),
    }
}
