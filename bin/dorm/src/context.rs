//! What every command works with: the session that was named, its service, its VM.

use dormouse_api::{ErrorCode, Hold, Phase, SessionInfo, SessionName, SessionState, TerminationReason};
use dormouse_client::{ClientError, Endpoint, Home, Service, Upgraded};
use tokio_util::task::AbortOnDropHandle;

use crate::error::Failure;
use crate::operation::Operation;
use crate::output::warn;
use crate::progress::tell_steps;

/// The session of a command line. Nothing is asked of anybody before it is needed.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    session: SessionName,
}

impl Context {
    pub(crate) fn new(session: SessionName) -> Self {
        Self { session }
    }

    /// The session that a command names, else that of the command line.
    pub(crate) fn pick(&self, name: Option<SessionName>) -> SessionName {
        name.unwrap_or_else(|| self.session.clone())
    }

    /// The per-user service, started when none listens.
    pub(crate) async fn service(&self) -> Result<Service, Failure> {
        Ok(Service::connect_or_start(&Home::from_env()?).await?)
    }

    /// What is known of a session. Wakes nothing; the default session is made on its first use.
    pub(crate) async fn open(&self, name: &SessionName) -> Result<SessionInfo, Failure> {
        let service = self.service().await?;
        match service.open(name).await {
            Ok(info) => Ok(info),
            Err(error) => Err(self.unknown(&service, name, error).await),
        }
    }

    /// A session whose engine is wanted. The default one, which its user has terminated, is opened again: it is that of
    /// whoever names none.
    pub(crate) async fn serving(&self, name: &SessionName) -> Result<SessionInfo, Failure> {
        let info = self.open(name).await?;
        let was_asked_for =
            info.termination.as_ref().is_some_and(|end| end.reason == TerminationReason::Shutdown);
        match info.state {
            SessionState::Terminated if name.is_default() && was_asked_for => {
                Ok(Endpoint::new(&info.control_socket).post("/v1/session/start").await?)
            }
            SessionState::Running | SessionState::Terminating | SessionState::Terminated => Ok(info),
        }
    }

    /// What is known of a session, without making it.
    pub(crate) async fn inspect(&self, name: &SessionName) -> Result<SessionInfo, Failure> {
        let service = self.service().await?;
        match service.inspect(name).await {
            Ok(info) => Ok(info),
            Err(error) => Err(self.unknown(&service, name, error).await),
        }
    }

    /// The session's own service. A knock there starts its host, not its VM.
    pub(crate) async fn control(&self, name: &SessionName) -> Result<Endpoint, Failure> {
        Ok(Endpoint::new(self.open(name).await?.control_socket))
    }

    /// An operation in the session of the command line: the VM is started if need be, and stays up until it is dropped.
    /// The steps of a start are told unless it is to be quiet.
    pub(crate) async fn operation(
        &self,
        reason: impl Into<String>,
        quiet: bool,
    ) -> Result<Operation, Failure> {
        let info = self.serving(&self.session).await?;
        let token = self.hold(&info, reason.into(), quiet).await?;
        Ok(Operation::held(&info, token))
    }

    /// Requests that only read, in the session of the command line.
    pub(crate) async fn reading(&self) -> Result<Operation, Failure> {
        let info = self.serving(&self.session).await?;
        let steps = match info.vm.phase {
            // Whether a request wakes it or is answered asleep is for the session's host to say.
            Phase::Absent | Phase::Starting | Phase::Stopping | Phase::Committed => {
                tell_steps(Service::watch(&info).await?)
            }
            Phase::Running | Phase::Counting | Phase::Dozing => {
                AbortOnDropHandle::new(tokio::spawn(async {}))
            }
        };
        Ok(Operation::reading(&info, steps))
    }

    /// Takes an operation token: the VM is started if need be, and stays up until the token is dropped.
    pub(crate) async fn hold(
        &self,
        info: &SessionInfo,
        reason: String,
        quiet: bool,
    ) -> Result<Upgraded, Failure> {
        let steps = if quiet { None } else { Some(tell_steps(Service::watch(info).await?)) };
        let held = Endpoint::new(&info.control_socket).warning(warn).hold(&Hold { reason }).await;
        drop(steps);
        Ok(held?)
    }

    /// An error about a session, with the name that was probably meant.
    pub(crate) async fn unknown(&self, service: &Service, name: &SessionName, error: ClientError) -> Failure {
        let error = error.into_api();
        if error.code == ErrorCode::NotFound
            && let Ok(sessions) = service.sessions().await
            && let Some(near) = nearest(name.as_str(), sessions.iter().map(|info| info.name.as_str()))
        {
            return Failure::from(error.hint(format!("did you mean {near:?}?")));
        }
        error.into()
    }
}

/// The name that was probably meant by one that is unknown.
pub(crate) fn nearest<'a>(typed: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    /// Of Jaro and Winkler's measure: one slip in a short name passes, another word doesn't.
    const ALIKE: f64 = 0.8;
    known
        .map(|name| (strsim::jaro_winkler(typed, name), name))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_another_word_is_not() {
        let known = ["default", "work", "trial"];
        assert_eq!(nearest("defualt", known.into_iter()), Some("default"));
        assert_eq!(nearest("wrk", known.into_iter()), Some("work"));
        assert_eq!(nearest("banana", known.into_iter()), None);
        assert_eq!(nearest("x", [].into_iter()), None);
    }
}
