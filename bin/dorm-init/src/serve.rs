//! The second process: everything between the root file system and the power-off.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_agent_proto::{Boot, EngineState};
use tokio::sync::{mpsc, watch};

use crate::agent::{Channel, Guest, serve_port, uptime_nanos};
use crate::connections::Connections;
use crate::engine::Engine;
use crate::freeze::Freezer;
use crate::parameters::Parameters;
use crate::process::Processes;
use crate::steps::Steps;
use crate::{console, disk, limits, mounts, network, port};

/// A guest that no host has asked for so long ends itself, so that nothing is orphaned for ever. Guest time: a VM that
/// is suspended doesn't age.
const LONELY_AFTER: Duration = Duration::from_secs(10 * 60);

/// Brings the guest up and serves until somebody says power off.
pub(crate) fn run() -> Result<()> {
    console::hear_libraries();
    limits::raise()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve())
}

async fn serve() -> Result<()> {
    let steps = Steps::new();
    let parameters = Parameters::parse(&fs::read_to_string("/proc/cmdline")?)?;
    steps.begin("modules");
    mounts::load_modules("/usr/lib/dormouse/modules")?;
    steps.begin("mounts");
    mounts::mount_system()?;
    mounts::set_kernel_parameters()?;

    // The channel first: whatever fails from here on, the host is told.
    let (engine_state, engine) = watch::channel(EngineState::Starting);
    let (power_off, mut power_offs) = mpsc::channel(1);
    let (host_seen, seen) = watch::channel(uptime_nanos());
    let guest = Guest {
        boot: boot()?,
        engine,
        steps: steps.subscribe(),
        power_off,
        freezer: Freezer::new(disk::MOUNT_POINT),
        connections: Connections::default(),
        processes: Processes::default(),
        host_seen,
    };
    let guest = Arc::new(guest);
    for (name, channel) in [("agent", Channel::Agent), ("ports", Channel::Ports)] {
        tokio::spawn(serve_port(port::find(name)?, channel, Arc::clone(&guest)));
    }

    let engine = match prepare(&steps, &parameters).await {
        Ok(()) => Some(Engine::start(steps.clone())),
        Err(error) => {
            console::say(&format!("failed: {error:#}"));
            engine_state.send_replace(EngineState::Dead { details: format!("{error:#}") });
            None
        }
    };
    if let Some(engine) = &engine {
        tokio::spawn(forward(engine.state(), engine_state, steps));
    }
    let limit = parameters.lonely.map_or(LONELY_AFTER, Duration::from_secs);
    tokio::select! {
        _ = power_offs.recv() => console::say("powering off: asked to"),
        () = lonely(seen, limit) => console::say(&format!("powering off: no host for {} s", limit.as_secs())),
    }
    if let Some(engine) = engine {
        engine.stop().await;
    }
    disk::unmount_data();
    Ok(())
}

async fn prepare(steps: &Steps, parameters: &Parameters) -> Result<()> {
    steps.begin("network");
    network::configure(parameters).await?;
    steps.begin("disk");
    disk::mount_data()
}

/// Passes the engine's states on.
async fn forward(mut engine: watch::Receiver<EngineState>, guest: watch::Sender<EngineState>, steps: Steps) {
    loop {
        let state = engine.borrow_and_update().clone();
        if state == EngineState::Ready {
            steps.begin("ready");
        }
        guest.send_replace(state);
        if engine.changed().await.is_err() {
            return;
        }
    }
}

/// The kernel's own name for this boot.
fn boot() -> Result<Boot> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.replace('-', "");
    Ok(Boot(u128::from_str_radix(text.trim(), 16).context("the boot id makes no sense")?))
}

/// Ends when no host has been there for too long.
async fn lonely(seen: watch::Receiver<u64>, limit: Duration) {
    let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
    // Until now the guest had something else to do than to look for a host.
    let begin = uptime_nanos();
    loop {
        let alone = uptime_nanos().saturating_sub(begin.max(*seen.borrow()));
        if alone >= limit {
            return;
        }
        tokio::time::sleep(Duration::from_nanos(limit - alone)).await;
    }
}
