//! The one shape of an error on the wire.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What went wrong, for programs (`code`) and for people (`message`, `hint`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// One of a closed set.
    pub code: ErrorCode,
    /// What failed and why: one line, no full stop.
    pub message: String,
    /// What to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Longer evidence, e.g. the console's last lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<String>,
}

/// The closed set of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// A value of the request makes no sense.
    Invalid,
    /// No session of that name, no such endpoint.
    NotFound,
    /// The name is taken, or reserved.
    Exists,
    /// The session's storage can't be used: missing, unreadable, not a store, in use, full.
    Storage,
    /// The caller may not do this.
    Forbidden,
    /// An `ExistingOnly` request met no running VM.
    VmNotRunning,
    /// The VM could not be started; the next request tries again.
    StartFailed,
    /// The session is being terminated.
    Terminating,
    /// The session is terminated; `dorm session start` opens a new incarnation.
    Terminated,
    /// The VM crashed while the request was in flight.
    Crashed,
    /// Too many at once, or too soon after crashes: try again later.
    Busy,
    /// A fault in Dormouse itself.
    Internal,
}

impl ErrorCode {
    /// The HTTP status that goes with the code.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::Exists | Self::Storage | Self::Terminated => 409,
            Self::Crashed => 502,
            Self::VmNotRunning | Self::StartFailed | Self::Terminating | Self::Busy => 503,
            Self::Internal => 500,
        }
    }
}

impl ApiError {
    /// An error without hint or details.
    pub fn new(code: ErrorCode, message: impl fmt::Display) -> Self {
        Self { code, message: message.to_string(), hint: None, details: None }
    }

    /// Adds what to try.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// Adds longer evidence.
    #[must_use]
    pub fn details(mut self, details: impl fmt::Display) -> Self {
        self.details = Some(details.to_string());
        self
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}
