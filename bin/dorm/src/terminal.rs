//! The terminal: modes that always end, its size and colours, and the keys that detach.

use std::io::{self, IsTerminal};
use std::panic;

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Standard input in another mode, for as long as this is kept; also a panic gives the terminal back, before its words.
#[derive(Debug)]
pub(crate) struct Mode {
    before: Termios,
}

impl Mode {
    /// What is typed is passed on as it is.
    pub(crate) fn raw() -> io::Result<Self> {
        Self::enter(Termios::make_raw)
    }

    /// What is typed isn't shown.
    pub(crate) fn silent() -> io::Result<Self> {
        Self::enter(|mode| mode.local_modes.remove(LocalModes::ECHO))
    }

    fn enter(change: impl FnOnce(&mut Termios)) -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut mode = before.clone();
        change(&mut mode);
        give_back_on_panic(before.clone());
        tcsetattr(io::stdin(), OptionalActions::Drain, &mode)?;
        Ok(Self { before })
    }
}

/// A mode is entered once or twice in a process's life, so hooks don't pile up.
fn give_back_on_panic(before: Termios) {
    let tell = panic::take_hook();
    panic::set_hook(Box::new(move |words| {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &before);
        tell(words);
    }));
}

/// A panic that a test plants where the terminal is in another mode. In what is released it can't be.
pub(crate) fn planted_panic() {
    #[cfg(debug_assertions)]
    assert!(std::env::var_os("DORM_TEST_PANIC").is_none(), "planted by a test");
}

/// Does whoever looks want colours there? Who wants none anywhere says so (<https://no-color.org>).
pub(crate) fn has_colours(terminal: &impl IsTerminal) -> bool {
    terminal.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

impl Drop for Mode {
    fn drop(&mut self) {
        // A terminal that is gone has no mode.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Rows and columns of the terminal that shows our output; `None` if it is none, or has no size.
pub(crate) fn size() -> Option<(u16, u16)> {
    if !io::stdout().is_terminal() {
        return None;
    }
    let size = tcgetwinsize(io::stdout()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// The same of the terminal that shows our errors.
pub(crate) fn size_of_errors() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stderr()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// The keys that leave a container running, and how many of them were typed so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetachKeys {
    keys: Vec<u8>,
    typed: usize,
}

impl Default for DetachKeys {
    /// ctrl-p, ctrl-q.
    fn default() -> Self {
        Self { keys: vec![0x10, 0x11], typed: 0 }
    }
}

impl std::str::FromStr for DetachKeys {
    type Err = String;

    /// `ctrl-p,ctrl-q`, `a,b`; nothing: no keys detach.
    fn from_str(text: &str) -> Result<Self, String> {
        let key = |key: &str| match (key.as_bytes(), key.strip_prefix("ctrl-").map(str::as_bytes)) {
            ([key], _) => Ok(*key),
            (_, Some([letter])) => match letter.to_ascii_lowercase() {
                letter @ b'a'..=b'z' => Ok(letter - b'a' + 1),
                b'@' => Ok(0),
                other @ b'['..=b'_' => Ok(other - b'[' + 27),
                _ => Err(format!("{key:?} is no key")),
            },
            _ => Err(format!("{key:?} is no key: try a letter, or ctrl- and a letter")),
        };
        let keys = if text.is_empty() { Ok(Vec::new()) } else { text.split(',').map(key).collect() };
        Ok(Self { keys: keys?, typed: 0 })
    }
}

/// What typed bytes come to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// These go on.
    Bytes(Vec<u8>),
    /// The keys were typed; these came before.
    Detach(Vec<u8>),
}

impl DetachKeys {
    /// No keys detach.
    pub(crate) fn none() -> Self {
        Self { keys: Vec::new(), typed: 0 }
    }

    /// Holds back what may become the sequence, and lets the rest go on.
    pub(crate) fn filter(&mut self, bytes: &[u8]) -> Typed {
        let mut passed = Vec::with_capacity(bytes.len());
        for byte in bytes {
            if self.keys.get(self.typed) == Some(byte) {
                self.typed += 1;
                if self.typed == self.keys.len() {
                    return Typed::Detach(passed);
                }
                continue;
            }
            passed.extend_from_slice(&self.keys[..self.typed]);
            self.typed = usize::from(self.keys.first() == Some(byte));
            if self.typed == 0 {
                passed.push(*byte);
            } else if self.keys.len() == 1 {
                return Typed::Detach(passed);
            }
        }
        Typed::Bytes(passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_are_found_wherever_reads_are_cut_and_nothing_else_is_lost() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.filter(b"ab\x10"), Typed::Bytes(b"ab".to_vec()));
        assert_eq!(keys.filter(b"c"), Typed::Bytes(b"\x10c".to_vec()));
        assert_eq!(keys.filter(b"\x10\x10"), Typed::Bytes(b"\x10".to_vec()));
        assert_eq!(keys.filter(b"\x11x"), Typed::Detach(Vec::new()));
        let mut keys: DetachKeys = "a".parse().unwrap();
        assert_eq!(keys.filter(b"xyab"), Typed::Detach(b"xy".to_vec()));
        let mut none: DetachKeys = "".parse().unwrap();
        assert_eq!(none.filter(b"\x10\x11"), Typed::Bytes(b"\x10\x11".to_vec()));
    }

    #[test]
    fn keys_are_written_as_docker_has_them() {
        assert_eq!("ctrl-p,ctrl-q".parse(), Ok(DetachKeys::default()));
        assert_eq!("ctrl-@,x,ctrl-_".parse::<DetachKeys>().unwrap().keys, [0, b'x', 31]);
        for bad in ["ctrl-", "ctrl-1", "abc", "a,,b", "ctrl-p, ctrl-q"] {
            assert!(bad.parse::<DetachKeys>().is_err(), "{bad}");
        }
    }
}
