//! A command's work in the engine.

use std::time::Duration;

use dormouse_api::{SessionInfo, TerminationInfo, TerminationReason};
use dormouse_client::{Endpoint, Engine, Upgraded};
use jiff::Timestamp;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::error::Failure;
use crate::output::warn;

/// Longest wait for the word why a VM is gone.
const REASON_WITHIN: Duration = Duration::from_secs(5);

/// What a command does in the engine, from before its first call until after its last byte.
#[derive(Debug)]
pub(crate) struct Operation {
    /// The session's engine.
    pub(crate) engine: Engine,
    control: Endpoint,
    began: Timestamp,
    /// Turns true when the VM is lost.
    lost: watch::Receiver<bool>,
    /// The operation token, or what tells the steps of a start that a reading request causes.
    _kept: AbortOnDropHandle<()>,
}

impl Operation {
    /// With a token: the VM is up and stays up.
    pub(crate) fn held(info: &SessionInfo, mut token: Upgraded) -> Self {
        let (tell, lost) = watch::channel(false);
        let kept = tokio::spawn(async move {
            let mut byte = [0];
            while let Ok(1..) = token.read(&mut byte).await {}
            let _ = tell.send(true);
        });
        Self::new(info, lost, AbortOnDropHandle::new(kept))
    }

    /// Of requests that only read: each is answered as it is, asleep if it can be.
    pub(crate) fn reading(info: &SessionInfo, steps: AbortOnDropHandle<()>) -> Self {
        Self::new(info, watch::channel(false).1, steps)
    }

    fn new(info: &SessionInfo, lost: watch::Receiver<bool>, kept: AbortOnDropHandle<()>) -> Self {
        Self {
            engine: Engine::new(&info.docker_socket).warning(warn),
            control: Endpoint::new(&info.control_socket),
            began: Timestamp::now(),
            lost,
            _kept: kept,
        }
    }

    /// Does the work; a loss of the VM meanwhile ends it with the reason.
    pub(crate) async fn during<T>(
        &self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let mut lost = self.lost.clone();
        tokio::select! {
            biased;
            done = work => match done {
                Err(failure @ Failure::Lost(_)) => Err(self.why().await.unwrap_or(failure)),
                done => done,
            },
            () = async {
                if lost.wait_for(|lost| *lost).await.is_err() {
                    // Nobody will tell.
                    std::future::pending::<()>().await;
                }
            } => Err(self.why().await.unwrap_or_else(|| Failure::new("the session's VM is gone"))),
        }
    }

    /// Why the VM is gone, if that is known in time.
    async fn why(&self) -> Option<Failure> {
        let ended = async {
            let mut changes = self.control.lines("/v1/session/watch").await.ok()?;
            while let Some(info) = changes.next::<SessionInfo>().await.ok()? {
                if let Some(end) = info.termination.filter(|end| end.at >= self.began) {
                    return Some(in_words(&end));
                }
            }
            None
        };
        timeout(REASON_WITHIN, ended).await.ok()?
    }
}

fn in_words(end: &TerminationInfo) -> Failure {
    let what = match end.reason {
        TerminationReason::Shutdown => "the session was terminated",
        TerminationReason::Crashed => "the session's VM crashed",
        TerminationReason::Unknown => "the session's VM is gone, and nobody knows why",
    };
    let (first, rest) = end.details.split_once('\n').unwrap_or((&end.details, ""));
    let failure = Failure::new(if first.is_empty() { what.to_owned() } else { format!("{what}: {first}") });
    failure.details(rest).hint("`dorm session inspect` tells more; the next command starts a new VM")
}
