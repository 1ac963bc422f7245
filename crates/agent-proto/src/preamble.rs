//! The first line on a port, by which host and guest find each other among stale bytes.

use std::fmt;

/// Longest preamble line, line end included, in bytes.
pub const PREAMBLE_LINE_MAX: usize = 128;

const MAGIC: &str = "DORM/1 ";
const GO: &str = "go";
const READY: &str = "ready";

/// Names one connection of the host to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub u128);

/// Names one guest kernel: the same over a resume, new after every boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boot(pub u128);

/// A line that isn't a preamble. Such lines are dropped: they are an earlier peer's last bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a preamble")]
pub struct PreambleError;

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Nonce {
    /// The host's line.
    #[must_use]
    pub fn to_guest(self) -> String {
        // The line end before the magic closes whatever an earlier peer left half-written.
        format!("\n{MAGIC}{self}\n")
    }

    /// The host's last line: what follows in this direction is yamux.
    #[must_use]
    pub fn go(self) -> String {
        format!("\n{MAGIC}{self} {GO}\n")
    }

    /// The guest's last line: what follows in this direction is yamux.
    #[must_use]
    pub fn ready(self) -> String {
        format!("\n{MAGIC}{self} {READY}\n")
    }

    /// Is this line, without its line end, the host's last one?
    #[must_use]
    pub fn is_go(self, line: &[u8]) -> bool {
        strip(line).is_ok_and(|text| text == format!("{self} {GO}"))
    }

    /// Is this line, without its line end, the guest's last one?
    #[must_use]
    pub fn is_ready(self, line: &[u8]) -> bool {
        strip(line).is_ok_and(|text| text == format!("{self} {READY}"))
    }

    /// The guest's answer.
    #[must_use]
    pub fn to_host(self, boot: Boot) -> String {
        format!("\n{MAGIC}{self} {boot}\n")
    }

    /// Reads the host's line, without its line end.
    ///
    /// # Errors
    /// Anything else.
    pub fn from_host(line: &[u8]) -> Result<Self, PreambleError> {
        hex(strip(line)?).map(Nonce)
    }

    /// Reads the guest's answer to this nonce, without its line end.
    ///
    /// # Errors
    /// Anything else, an answer to another nonce included.
    pub fn from_guest(self, line: &[u8]) -> Result<Boot, PreambleError> {
        let (nonce, boot) = strip(line)?.split_once(' ').ok_or(PreambleError)?;
        if hex(nonce)? != self.0 {
            return Err(PreambleError);
        }
        hex(boot).map(Boot)
    }
}

/// The text after the magic.
fn strip(line: &[u8]) -> Result<&str, PreambleError> {
    let text = std::str::from_utf8(line).map_err(|_| PreambleError)?;
    text.strip_prefix(MAGIC).ok_or(PreambleError)
}

fn hex(digits: &str) -> Result<u128, PreambleError> {
    if digits.len() != 32 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(PreambleError);
    }
    u128::from_str_radix(digits, 16).map_err(|_| PreambleError)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_are_understood_by_the_other_side() {
        let (nonce, boot) = (Nonce(7), Boot(u128::MAX));
        assert_eq!(Nonce::from_host(nonce.to_guest().trim().as_bytes()), Ok(nonce));
        assert_eq!(nonce.from_guest(nonce.to_host(boot).trim().as_bytes()), Ok(boot));
        assert!(nonce.is_go(nonce.go().trim().as_bytes()) && !nonce.is_go(nonce.ready().trim().as_bytes()));
        assert!(
            nonce.is_ready(nonce.ready().trim().as_bytes())
                && !Nonce(8).is_ready(nonce.ready().trim().as_bytes())
        );
    }

    #[test]
    fn an_answer_to_another_nonce_is_refused() {
        assert_eq!(Nonce(1).from_guest(Nonce(2).to_host(Boot(3)).trim().as_bytes()), Err(PreambleError));
    }

    #[test]
    fn foreign_bytes_are_refused() {
        for line in
            [&b""[..], b"DORM/1", b"DORM/1 xyz", b"\xff\xfe", b"DORM/1 +0000000000000000000000000000007"]
        {
            assert_eq!(Nonce::from_host(line), Err(PreambleError));
        }
    }
}
