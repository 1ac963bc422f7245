//! How sessions are named.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The session that `dorm` uses when none is named; made on its first use.
pub const DEFAULT_SESSION: &str = "default";

/// Longest session name, in bytes.
pub const NAME_BYTES_MAX: usize = 255;

const RESERVED_PREFIX: &str = "dorm-";

/// A session's name, as its user types it. Compared exactly.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionName(String);

/// Why a text is no session name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing was given.
    #[error("a session's name can't be empty")]
    Empty,
    /// Over [`NAME_BYTES_MAX`].
    #[error("a session's name has at most {NAME_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    /// Something else than letters, digits, `_`, `.` and `-`, or a first character that isn't a letter or digit.
    #[error(
        "a session's name is made of letters, digits, '_', '.' and '-' and begins with a letter or digit, so {0:?} is none"
    )]
    Character(String),
    /// `dorm-*` in any case.
    #[error("names that begin with {RESERVED_PREFIX:?} are reserved: {0:?}")]
    Reserved(String),
}

impl SessionName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Is it the session that `dorm` uses when none is named?
    #[must_use]
    pub fn is_default(&self) -> bool {
        self.0 == DEFAULT_SESSION
    }
}

impl Default for SessionName {
    fn default() -> Self {
        Self(DEFAULT_SESSION.to_owned())
    }
}

impl FromStr for SessionName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > NAME_BYTES_MAX {
            return Err(NameError::TooLong(text.len()));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if !text.bytes().all(plain) || !text.as_bytes()[0].is_ascii_alphanumeric() {
            return Err(NameError::Character(text.to_owned()));
        }
        if text.len() >= RESERVED_PREFIX.len()
            && text.as_bytes()[..RESERVED_PREFIX.len()].eq_ignore_ascii_case(RESERVED_PREFIX.as_bytes())
        {
            return Err(NameError::Reserved(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for SessionName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<SessionName> for String {
    fn from(name: SessionName) -> Self {
        name.0
    }
}

impl fmt::Display for SessionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A session's id: 16 hex digits, random, so that it is unique across machines and short enough for a socket's path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionId(String);

/// A text that isn't 16 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a session's id is 16 hex digits, so {0:?} is none")]
pub struct IdError(String);

impl SessionId {
    /// The id made of these random bits.
    #[must_use]
    pub fn from_random(bits: u64) -> Self {
        Self(format!("{bits:016x}"))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SessionId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() == 16 && text.bytes().all(hex) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError(text.to_owned()))
        }
    }
}

impl TryFrom<String> for SessionId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<SessionId> for String {
    fn from(id: SessionId) -> Self {
        id.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_pass() {
        for name in ["default", "a", "Work.2_x-y", &"n".repeat(NAME_BYTES_MAX)] {
            assert_eq!(name.parse::<SessionName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn bad_names_say_what_is_wrong() {
        let parse = |text: &str| text.parse::<SessionName>().unwrap_err();
        assert_eq!(parse(""), NameError::Empty);
        assert_eq!(parse(&"n".repeat(256)), NameError::TooLong(256));
        for name in ["a b", "../x", "-a", ".a", "ü", "a/b", "a\n"] {
            assert_eq!(parse(name), NameError::Character(name.into()));
        }
        for name in ["dorm-x", "DORM-x", "Dorm-"] {
            assert_eq!(parse(name), NameError::Reserved(name.into()));
        }
    }

    #[test]
    fn an_id_is_sixteen_lower_case_hex_digits() {
        assert_eq!(SessionId::from_random(7).as_str(), "0000000000000007");
        for id in ["", "000000000000000G", "000000000000000A", "00000000000000071"] {
            assert!(id.parse::<SessionId>().is_err());
        }
    }
}
