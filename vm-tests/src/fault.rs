//! Points of a sleep and of a wake at which a test holds a session: `crates/session-host/src/fault.rs`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_api::{Hold, Phase, SessionInfo};
use dormouse_client::Endpoint;
use tokio::task::JoinHandle;

use crate::root_process::guest_output;
use crate::stage::{STATE_WITHIN, Stage, fall_asleep, inspect, runtime, until};

/// Longest wait for a point of a suspend or a resume.
const POINT_WITHIN: Duration = Duration::from_secs(120);

/// Longest time from the end of a VM to everybody's knowing of it.
const CRASH_WITHIN: Duration = Duration::from_secs(10);

/// Every point, in order.
pub const POINTS: [&str; 10] = [
    "suspend.begun",
    "suspend.frozen",
    "suspend.saved",
    "suspend.quit",
    "suspend.sealed",
    "resume.made",
    "resume.loaded",
    "resume.broken",
    "resume.running",
    "resume.greeted",
];

/// A session that is held at a point.
#[derive(Debug)]
pub struct Held {
    reached: PathBuf,
    /// Whoever had it sleep or wake.
    client: JoinHandle<()>,
}

impl Held {
    /// Has a session sleep, or sleep and wake, up to this point.
    ///
    /// # Errors
    /// When the point is never reached.
    pub async fn at(stage: &Stage, session: &SessionInfo, point: &str) -> Result<Self> {
        let fault = runtime(stage, session).join("fault");
        let is_wake = point.starts_with("resume.");
        if is_wake {
            fall_asleep(session).await?;
        }
        std::fs::write(&fault, point)?;
        let session = session.clone();
        // What it is told is whatever becomes of it.
        let client = tokio::spawn(async move {
            let _ = if is_wake { wake(&session).await } else { fall_asleep(&session).await };
        });
        let reached = fault.with_extension("reached");
        until_there(&reached).await.with_context(|| format!("{point} was never reached"))?;
        Ok(Self { reached, client })
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When it went on already.
    pub fn let_go(&self) -> Result<()> {
        Ok(std::fs::remove_file(&self.reached)?)
    }

    /// Waits until whoever had it sleep or wake was told what came of it.
    ///
    /// # Errors
    /// When nobody tells.
    pub async fn told(self) -> Result<()> {
        Ok(tokio::time::timeout(STATE_WITHIN, self.client)
            .await
            .context("nobody tells what came of it")??)
    }

    /// Nobody waits for it any more.
    pub fn abandon(self) {
        self.client.abort();
    }
}

async fn wake(session: &SessionInfo) -> Result<()> {
    let hold = Hold { reason: "wake".to_owned() };
    Endpoint::new(&session.control_socket).hold(&hold).await?;
    Ok(())
}

/// What a command in the guest prints that is the next to be asked for. If the VM breaks down in that moment, it is the one
/// after that: whoever comes while nobody knows of it yet fails with it.
///
/// # Errors
/// When neither is served.
pub async fn next_answer(session: &SessionInfo, command: &str) -> Result<String> {
    let answered = async {
        loop {
            match guest_output(session, command).await {
                Ok(output) => return Ok(output),
                // It goes on by itself, once there is room.
                Err(error) if format!("{error:#}").contains("paused by its disk") => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(_) => break,
            }
        }
        let generation = inspect(session).await?.vm.generation;
        let is_gone =
            |info: &SessionInfo| info.vm.phase != Phase::Running || info.vm.generation != generation;
        let _ = tokio::time::timeout(CRASH_WITHIN, until(session, is_gone)).await;
        guest_output(session, command).await
    };
    tokio::time::timeout(STATE_WITHIN, answered).await.context("nobody is served")?
}

/// Waits for a file.
///
/// # Errors
/// When it never comes.
pub async fn until_there(path: &Path) -> Result<()> {
    let mut look = tokio::time::interval(Duration::from_millis(5));
    let there = async {
        while !path.exists() {
            look.tick().await;
        }
    };
    Ok(tokio::time::timeout(POINT_WITHIN, there).await?)
}
