//! What goes wrong, as its user sees it: one line that says what failed and why, and a hint.

use std::fmt;
use std::io;
use std::process::ExitCode;

use dormouse_api::{ApiError, ErrorCode};
use dormouse_client::{ClientError, EngineError, HomeError, ServiceStartError};

use crate::output::say;

/// What a command comes to: its exit status, or why it failed.
pub(crate) type Done = Result<u8, Failure>;

/// The status of a command that did what it was asked for.
pub(crate) const SUCCESS: u8 = 0;

/// The status of a command that did not.
pub(crate) const FAILED: u8 = 1;

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What there is to say of it.
    Said(Box<Said>),
    /// The engine's connection broke; whoever knows why says so instead.
    Lost(String),
    /// Nobody reads our output any more: nothing is left to say.
    BrokenPipe,
}

/// The words of a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    /// One line: what failed and why.
    pub(crate) message: String,
    /// What to try.
    pub(crate) hint: Option<String>,
    /// Longer evidence.
    pub(crate) details: Option<String>,
    /// The process's exit status.
    pub(crate) code: u8,
}

impl Failure {
    /// A failure in one line, with status 1.
    pub(crate) fn new(message: impl fmt::Display) -> Self {
        let message = message.to_string();
        Self::Said(Box::new(Said { message, hint: None, details: None, code: FAILED }))
    }

    /// What broke off, because the engine's connection broke; or what couldn't be sent, which is told at once.
    pub(crate) fn lost(what: &str, error: ClientError) -> Self {
        match error {
            ClientError::Body(error) => Self::new(error),
            error => Self::Lost(format!("{what}: {error}")),
        }
    }

    /// Adds what to try, unless there is a hint already.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl fmt::Display) -> Self {
        if let Self::Said(said) = &mut self {
            said.hint.get_or_insert_with(|| hint.to_string());
        }
        self
    }

    /// Adds longer evidence, if there is any.
    #[must_use]
    pub(crate) fn details(mut self, details: &str) -> Self {
        if let Self::Said(said) = &mut self
            && !details.trim().is_empty()
        {
            said.details = Some(details.to_owned());
        }
        self
    }

    /// The same with another status.
    #[must_use]
    pub(crate) fn code(self, code: u8) -> Self {
        match self {
            Self::Said(mut said) => {
                said.code = code;
                Self::Said(said)
            }
            Self::Lost(message) => Self::new(message).code(code),
            Self::BrokenPipe => Self::BrokenPipe,
        }
    }

    /// What failed and why, in one line.
    pub(crate) fn message(&self) -> &str {
        match self {
            Self::Said(said) => &said.message,
            Self::Lost(message) => message,
            Self::BrokenPipe => "nobody reads the output",
        }
    }

    /// Tells it on standard error.
    pub(crate) fn report(&self) {
        match self {
            Self::Said(said) => say(said),
            Self::Lost(message) => say(format_args!("error: {message}")),
            // Whoever reads our output has read enough.
            Self::BrokenPipe => {}
        }
    }

    /// Tells it, and gives the process's status.
    pub(crate) fn exit(&self) -> ExitCode {
        self.report();
        match self {
            Self::Said(said) => ExitCode::from(said.code),
            Self::Lost(_) => ExitCode::from(FAILED),
            Self::BrokenPipe => ExitCode::SUCCESS,
        }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        if let Some(details) = &self.details {
            write!(f, "\n{details}")?;
        }
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        let hint = error.hint.or_else(|| usual_hint(error.code).map(str::to_owned));
        Self::Said(Box::new(Said { message: error.message, hint, details: error.details, code: FAILED }))
    }
}

/// What to try where the service had no better idea.
fn usual_hint(code: ErrorCode) -> Option<&'static str> {
    match code {
        ErrorCode::NotFound => Some("`dorm session ls` lists what there is"),
        ErrorCode::StartFailed => Some("`dorm doctor` looks for what is missing"),
        ErrorCode::Crashed => Some("`dorm session inspect` tells why; the next command starts a new VM"),
        ErrorCode::Terminated => Some("`dorm session start` opens it again"),
        _ => None,
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        error.into_api().into()
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Refused { message, .. } => Self::new(message.trim().replace('\n', " ")),
            EngineError::Lost(error) => Self::lost("the engine went away", error),
        }
    }
}

impl From<HomeError> for Failure {
    fn from(error: HomeError) -> Self {
        Self::new(error)
    }
}

impl From<ServiceStartError> for Failure {
    fn from(error: ServiceStartError) -> Self {
        Self::new(error).hint("`dorm doctor` looks for what is missing")
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::new(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_and_a_hint_and_the_first_hint_stays() {
        let failure = Failure::new("no").hint("try this").hint("or that");
        let Failure::Said(said) = failure else { panic!("it has words") };
        assert_eq!(said.to_string(), "error: no\nhint: try this");
    }

    #[test]
    fn what_couldnt_be_sent_is_no_engine_that_went_away() {
        let error = io::Error::other("can't read x: Permission denied");
        let failure = Failure::from(EngineError::Lost(ClientError::Body(error)));
        assert!(matches!(failure, Failure::Said(_)));
        assert_eq!(failure.message(), "can't read x: Permission denied");
        let failure = Failure::from(EngineError::Lost(ClientError::Answer("no".to_owned())));
        assert!(matches!(failure, Failure::Lost(_)));
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(matches!(failure, Failure::BrokenPipe));
    }
}
