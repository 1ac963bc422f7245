//! The scopes: what may happen in each, and how much of it.

use std::time::Duration;

use dormouse_lifecycle::{
    Config, CrashPolicy, HoldKind, Lifetime, Policy, RunningContainers, SleepHow, Storage,
};

/// What may happen in a scope, besides requests, releases, answers, silence, deaths that were ordered, and reports
/// that are late, repeated or about an earlier VM.
#[derive(Debug, Clone, Copy, Default)]
#[allow(clippy::struct_excessive_bools, reason = "a table of what is switched on")]
pub struct World {
    /// VMs die unasked.
    pub deaths: bool,
    /// Starts fail.
    pub start_failures: bool,
    /// The session is terminated and started again.
    pub terminate: bool,
    /// Containers come and go, and are counted.
    pub containers: bool,
    /// Pins are set, expire and are removed.
    pub pins: bool,
    /// Weak holds come and go.
    pub weak: bool,
    /// Somebody asks for the sleep.
    pub sleep_requests: bool,
    /// The disk fails and recovers.
    pub io_errors: bool,
    /// The engine dies.
    pub engine_deaths: bool,
    /// The host process dies, between steps and within one.
    pub host_deaths: bool,
    /// The host process is told to go.
    pub leaving: bool,
    /// The grace period is changed to never and back.
    pub settings: bool,
    /// The connection that made the session closes.
    pub creator: bool,
}

/// A scope with its bounds.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Its name.
    pub name: &'static str,
    /// The session's settings.
    pub config: Config,
    /// So many clients, each with at most one lease at a time.
    pub clients: usize,
    /// What a client may ask for.
    pub claims: &'static [(HoldKind, Policy)],
    /// What else may happen.
    pub world: World,
}

const ACQUIRE: &[(HoldKind, Policy)] = &[(HoldKind::Request, Policy::Acquire)];
const BOTH: &[(HoldKind, Policy)] =
    &[(HoldKind::Request, Policy::Acquire), (HoldKind::Request, Policy::ExistingOnly)];
const KINDS: &[(HoldKind, Policy)] = &[
    (HoldKind::Request, Policy::Acquire),
    (HoldKind::Operation, Policy::Acquire),
    (HoldKind::RootProcess, Policy::Acquire),
    (HoldKind::Read, Policy::Acquire),
    (HoldKind::Events, Policy::Acquire),
    (HoldKind::Request, Policy::ExistingOnly),
];

const ACTIVITY: &[(HoldKind, Policy)] =
    &[(HoldKind::Request, Policy::Acquire), (HoldKind::Activity, Policy::ExistingOnly)];

const KINDS_AND_ACTIVITY: &[(HoldKind, Policy)] = &[
    (HoldKind::Request, Policy::Acquire),
    (HoldKind::Read, Policy::Acquire),
    (HoldKind::Events, Policy::Acquire),
    (HoldKind::Activity, Policy::ExistingOnly),
];

fn stop() -> Config {
    Config::default()
}

fn suspend() -> Config {
    Config { idle_action: SleepHow::Suspend, ..Config::default() }
}

fn doze() -> Config {
    Config { doze: Some(Duration::from_secs(60)), ..suspend_all() }
}

fn suspend_all() -> Config {
    Config { running: RunningContainers::Suspend, ..suspend() }
}

/// The scopes in which every planted bug is caught; seconds in all.
pub fn quick() -> Vec<Scope> {
    let w = World::default();
    vec![
        scope("quick: leases", stop(), 2, BOTH, World { weak: true, ..w }),
        scope("quick: kinds", stop(), 1, KINDS, World { containers: true, sleep_requests: true, ..w }),
        scope("quick: suspend", suspend(), 1, BOTH, World { deaths: true, start_failures: true, ..w }),
        scope(
            "quick: exits",
            stop(),
            2,
            BOTH,
            World { deaths: true, terminate: true, engine_deaths: true, ..w },
        ),
        scope(
            "quick: ephemeral",
            Config { storage: Storage::Ephemeral, ..stop() },
            1,
            ACQUIRE,
            World { sleep_requests: true, ..w },
        ),
        scope(
            "quick: asked to sleep",
            suspend_all(),
            1,
            ACTIVITY,
            World { containers: true, sleep_requests: true, ..w },
        ),
        scope("quick: dozes", doze(), 1, BOTH, World { containers: true, pins: true, ..w }),
        scope("quick: adoption", stop(), 1, ACQUIRE, World { host_deaths: true, terminate: true, ..w }),
    ]
}

/// All scopes that `dormouse-lifecycle-model` exhausts.
pub fn all() -> Vec<Scope> {
    [quick(), of_use(), of_ends(), of_hosts(), of_lives()].concat()
}

const fn scope(
    name: &'static str,
    config: Config,
    clients: usize,
    claims: &'static [(HoldKind, Policy)],
    world: World,
) -> Scope {
    Scope { name, config, clients, claims, world }
}

/// Who uses a VM, and how it falls asleep.
fn of_use() -> Vec<Scope> {
    let w = World::default();
    vec![
        scope(
            "leases + sleep + hooks",
            stop(),
            6,
            BOTH,
            World { weak: true, pins: true, sleep_requests: true, ..w },
        ),
        scope("kinds of leases", stop(), 5, KINDS, World { sleep_requests: true, containers: true, ..w }),
        scope(
            "containers + recount",
            stop(),
            3,
            BOTH,
            World {
                containers: true,
                pins: true,
                weak: true,
                sleep_requests: true,
                engine_deaths: true,
                settings: true,
                ..w
            },
        ),
        scope(
            "dozes: who comes and goes",
            doze(),
            2,
            KINDS_AND_ACTIVITY,
            World { containers: true, pins: true, weak: true, sleep_requests: true, settings: true, ..w },
        ),
    ]
}

/// How a VM, and a sleep, comes to its end.
fn of_ends() -> Vec<Scope> {
    let w = World::default();
    vec![
        scope(
            "exits + crash + terminate",
            stop(),
            5,
            BOTH,
            World {
                deaths: true,
                start_failures: true,
                terminate: true,
                engine_deaths: true,
                sleep_requests: true,
                io_errors: true,
                ..w
            },
        ),
        scope(
            "suspend that fails",
            suspend(),
            4,
            BOTH,
            World {
                deaths: true,
                start_failures: true,
                terminate: true,
                sleep_requests: true,
                io_errors: true,
                ..w
            },
        ),
        scope(
            "suspend with containers",
            suspend_all(),
            3,
            BOTH,
            World {
                containers: true,
                deaths: true,
                engine_deaths: true,
                io_errors: true,
                terminate: true,
                ..w
            },
        ),
        scope(
            "dozes: how it ends",
            doze(),
            1,
            BOTH,
            World {
                deaths: true,
                terminate: true,
                io_errors: true,
                engine_deaths: true,
                host_deaths: true,
                leaving: true,
                creator: true,
                ..w
            },
        ),
    ]
}

/// Hosts that die, and hosts that have to go.
fn of_hosts() -> Vec<Scope> {
    let w = World::default();
    vec![
        scope(
            "adoption after a host's death, stop",
            stop(),
            3,
            BOTH,
            World { host_deaths: true, terminate: true, deaths: true, pins: true, containers: true, ..w },
        ),
        scope(
            "adoption after a host's death, suspend",
            suspend(),
            3,
            BOTH,
            World {
                host_deaths: true,
                deaths: true,
                start_failures: true,
                terminate: true,
                engine_deaths: true,
                ..w
            },
        ),
        scope(
            "a host that has to go",
            suspend(),
            2,
            BOTH,
            World {
                leaving: true,
                host_deaths: true,
                terminate: true,
                io_errors: true,
                engine_deaths: true,
                ..w
            },
        ),
    ]
}

/// Sessions of another kind, and all of it together.
fn of_lives() -> Vec<Scope> {
    let w = World::default();
    let temporary = Config { lifetime: Lifetime::Temporary, ..stop() };
    let strict = Config { crash: CrashPolicy::Terminate, ..stop() };
    let ephemeral = Config { storage: Storage::Ephemeral, ..stop() };
    vec![
        scope(
            "after a crash by name only",
            strict,
            3,
            BOTH,
            World {
                deaths: true,
                terminate: true,
                engine_deaths: true,
                start_failures: true,
                io_errors: true,
                host_deaths: true,
                ..w
            },
        ),
        scope(
            "temporary",
            temporary,
            3,
            BOTH,
            World { creator: true, deaths: true, terminate: true, settings: true, host_deaths: true, ..w },
        ),
        scope(
            "ephemeral",
            ephemeral,
            3,
            BOTH,
            World {
                terminate: true,
                sleep_requests: true,
                leaving: true,
                deaths: true,
                settings: true,
                host_deaths: true,
                ..w
            },
        ),
        scope(
            "everything but weak holds",
            suspend_all(),
            2,
            BOTH,
            World {
                deaths: true,
                start_failures: true,
                terminate: true,
                containers: true,
                pins: true,
                weak: false,
                sleep_requests: true,
                io_errors: true,
                engine_deaths: true,
                host_deaths: true,
                leaving: true,
                settings: true,
                creator: true,
            },
        ),
    ]
}
