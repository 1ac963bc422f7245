//! What goes wrong, as its user sees it: one line that says what failed and why, and a hint.

use std::fmt;
use std::io;

use dormouse_api::ApiError;
use dormouse_client::{ClientError, HomeError, ServiceStartError};

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The service said no, or can't be reached.
    Api(ApiError),
    /// Something on this side.
    Local(String),
    /// Nobody reads our output any more.
    BrokenPipe,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Api(error) => {
                write!(f, "error: {}", error.message)?;
                if let Some(details) = &error.details {
                    write!(f, "\n{details}")?;
                }
                match &error.hint {
                    Some(hint) => write!(f, "\n\nhint: {hint}"),
                    None => Ok(()),
                }
            }
            Self::Local(message) => write!(f, "error: {message}"),
            Self::BrokenPipe => f.write_str("error: nobody reads the output"),
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Api(error.into_api())
    }
}

impl From<HomeError> for Failure {
    fn from(error: HomeError) -> Self {
        Self::Local(error.to_string())
    }
}

impl From<ServiceStartError> for Failure {
    fn from(error: ServiceStartError) -> Self {
        Self::Local(error.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::Local(error.to_string()),
        }
    }
}
