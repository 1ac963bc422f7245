//! Leases: the only way to the guest.

use std::fmt;
use std::future::Future;

use dormouse_agent_proto::{RunProcess, Target};
use dormouse_api::{ApiError, ErrorCode};
use dormouse_lifecycle::{EndReason, Event, Generation, LeaseId, Refusal};
use dormouse_mux::{Agent, AgentError, RootProcess, Stream};
use tokio::sync::watch;

use crate::clock::to_wall;
use crate::owner::{Inbox, Message};

/// A proof that the VM is up, and stays up until this is dropped.
#[derive(Debug)]
pub struct Lease {
    pub(crate) _claim: LeaseClaim,
    pub(crate) generation: Generation,
    pub(crate) agent: Agent,
    pub(crate) ended: watch::Receiver<Option<EndReason>>,
    pub(crate) warnings: Vec<String>,
}

/// A lease that was asked for. Dropped, it is given back, granted or not: so neither a client that goes away while it
/// waits nor one that was just granted leaks a hold (H22).
#[derive(Debug)]
pub(crate) struct LeaseClaim {
    pub(crate) id: LeaseId,
    pub(crate) inbox: Inbox,
}

impl Drop for LeaseClaim {
    fn drop(&mut self) {
        self.inbox.send(Message::Event(Event::LeaseDropped { lease: self.id }));
    }
}

impl Lease {
    /// The VM that it is for.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.0
    }

    /// What was not as it should be when the VM was woken for this lease, for the client that has it and nobody else
    /// (H63).
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Connects to a socket in the guest.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn dial(&self, target: Target) -> Result<Stream, AgentError> {
        self.agent.dial(target).await
    }

    /// Connects to a published port's container, over the channel for forwards.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn forward(&self, target: Target) -> Result<Stream, AgentError> {
        self.agent.forward(target).await
    }

    /// Starts a root process.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn run(&self, process: RunProcess) -> Result<RootProcess, AgentError> {
        self.agent.run(process).await
    }

    /// Waits until the VM is taken away although this is held, and says why.
    pub fn ended(&self) -> impl Future<Output = String> + Send + 'static {
        let mut ended = self.ended.clone();
        async move {
            match ended.wait_for(Option::is_some).await {
                Ok(reason) => match &*reason {
                    Some(EndReason::Crashed(details)) => format!("the VM crashed: {details}"),
                    Some(EndReason::Terminating) => "the session is being terminated".to_owned(),
                    Some(EndReason::Sleeping) => "the VM goes to sleep".to_owned(),
                    Some(EndReason::HostLeaving) | None => "the service is going down".to_owned(),
                },
                Err(_) => "the session's host is going down".to_owned(),
            }
        }
    }
}

/// Why there is no lease.
#[derive(Debug, Clone)]
pub struct Refused(pub(crate) Refusal);

impl Refused {
    /// As the API says it.
    #[must_use]
    pub fn to_api(&self) -> ApiError {
        let error = |code| ApiError::new(code, self);
        match &self.0 {
            Refusal::NotRunning => error(ErrorCode::VmNotRunning),
            Refusal::StartFailed { .. } | Refusal::VmStuck { .. } => {
                error(ErrorCode::StartFailed).hint("`dorm session logs --console` shows how far it came")
            }
            Refusal::Terminating => error(ErrorCode::Terminating),
            Refusal::Terminated(_) => {
                error(ErrorCode::Terminated).hint("`dorm session start` opens it again")
            }
            Refusal::CrashBackoff { .. } | Refusal::TooMany { .. } | Refusal::HostLeaving => {
                error(ErrorCode::Busy)
            }
            Refusal::IoPaused { .. } => {
                error(ErrorCode::Storage).hint("make room on the host's disk; the VM goes on by itself")
            }
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Refusal::NotRunning => f.write_str("the session's VM is not running"),
            Refusal::StartFailed { reason, .. } => {
                write!(f, "the session's VM could not be started: {reason}")
            }
            Refusal::Terminating => f.write_str("the session is being terminated"),
            Refusal::Terminated(end) => write!(f, "the session is terminated: {}", end.details),
            Refusal::CrashBackoff { details, until } => {
                write!(f, "the session's VM crashed too often ({details}); next try at {}", to_wall(*until))
            }
            Refusal::IoPaused { reason } => write!(f, "the session's VM is paused by its disk: {reason}"),
            Refusal::VmStuck { generation } => {
                write!(f, "the session's VM {generation} was killed and does not go away")
            }
            Refusal::HostLeaving => f.write_str("the session's host is going down"),
            Refusal::TooMany { limit } => write!(f, "more than {limit} requests at once"),
        }
    }
}

impl std::error::Error for Refused {}
