//! Bytes to lines to messages. Pure, bounded, and the target of the fuzzer: QEMU serves a hostile guest, so what it
//! says is not trusted either.

use serde::Deserialize;
use serde_json::Value;

use crate::event::Event;

/// Longest line that is accepted. The longest that QEMU sends, its answer to `query-qmp-schema`, has about 200 KiB.
pub const LINE_BYTES_MAX: usize = 1024 * 1024;

/// What makes a peer no QMP server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// More than [`LINE_BYTES_MAX`] bytes without an end of line.
    #[error("a line is longer than {LINE_BYTES_MAX} bytes")]
    LineTooLong,
    /// Not JSON, or JSON that is no message of the protocol.
    #[error("not a QMP message: {0}")]
    NotAMessage(String),
}

/// Splits what was read into lines.
#[derive(Debug, Default)]
pub struct LineDecoder {
    buffer: Vec<u8>,
    /// Bytes at the front of `buffer` that were given out as lines.
    consumed: usize,
    /// Bytes of `buffer` that are known to hold no end of line.
    searched: usize,
}

impl LineDecoder {
    /// Takes what was read. The caller asks for lines until there are none before it reads more, which bounds the
    /// buffer to one line and one read.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.consumed);
        self.searched -= self.consumed;
        self.consumed = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line without its end, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`CodecError::LineTooLong`], from then on every time.
    pub fn next_line(&mut self) -> Result<Option<&[u8]>, CodecError> {
        let start = self.consumed;
        let Some(length) = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n') else {
            self.searched = self.buffer.len();
            if self.searched - start > LINE_BYTES_MAX {
                return Err(CodecError::LineTooLong);
            }
            return Ok(None);
        };
        let end = self.searched + length;
        if end - start > LINE_BYTES_MAX {
            return Err(CodecError::LineTooLong);
        }
        self.consumed = end + 1;
        self.searched = self.consumed;
        Ok(Some(self.buffer[start..end].trim_ascii_end()))
    }
}

/// What QEMU says first.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Greeting {
    /// Which QEMU this is.
    pub version: Version,
}

/// A QEMU version as QMP tells it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Version {
    /// The upstream version.
    pub qemu: VersionTriple,
    /// What the distributor calls the package; may be empty.
    pub package: String,
}

/// The upstream version of a QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct VersionTriple {
    /// As in **7**.2.22.
    pub major: u32,
    /// As in 7.**2**.22.
    pub minor: u32,
    /// As in 7.2.**22**.
    pub micro: u32,
}

/// Why QEMU did not carry out a command.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct CommandFailure {
    /// `GenericError`, `CommandNotFound`, `DeviceNotFound`, ...
    pub class: String,
    /// For people.
    pub desc: String,
}

/// One line from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first line of a connection.
    Greeting(Greeting),
    /// The answer to the command with this id. QEMU leaves the id out when it could not parse the command.
    Reply {
        /// The id that came with the command.
        id: Option<u64>,
        /// What came of it.
        outcome: Result<Value, CommandFailure>,
    },
    /// Something happened.
    Event(Event),
}

#[derive(Deserialize)]
struct RawMessage {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    #[serde(default, rename = "return", deserialize_with = "present")]
    answer: Option<Value>,
    error: Option<CommandFailure>,
    id: Option<u64>,
    event: Option<String>,
    data: Option<Value>,
}

/// Keeps `"return": null` apart from no `return` at all.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl Message {
    /// Reads one line.
    ///
    /// # Errors
    /// [`CodecError::NotAMessage`].
    pub fn parse(line: &[u8]) -> Result<Self, CodecError> {
        let raw: RawMessage =
            serde_json::from_slice(line).map_err(|error| CodecError::NotAMessage(error.to_string()))?;
        match raw {
            RawMessage { event: Some(name), data, .. } => Event::parse(name, data).map(Self::Event),
            RawMessage { answer: Some(value), id, .. } => Ok(Self::Reply { id, outcome: Ok(value) }),
            RawMessage { error: Some(failure), id, .. } => Ok(Self::Reply { id, outcome: Err(failure) }),
            RawMessage { greeting: Some(greeting), .. } => Ok(Self::Greeting(greeting)),
            _ => Err(CodecError::NotAMessage("neither greeting, reply nor event".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::ShutdownReason;
    use proptest::prelude::*;

    #[test]
    fn a_greeting_tells_the_version() {
        let line = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
        let Ok(Message::Greeting(greeting)) = Message::parse(line) else { panic!("no greeting") };
        assert_eq!(greeting.version.qemu, VersionTriple { major: 7, minor: 2, micro: 22 });
    }

    #[test]
    fn replies_carry_their_id_and_failures_their_class() {
        assert_eq!(
            Message::parse(br#"{"return": {}, "id": 7}"#),
            Ok(Message::Reply { id: Some(7), outcome: Ok(serde_json::json!({})) })
        );
        assert_eq!(
            Message::parse(br#"{"return": null, "id": 8}"#),
            Ok(Message::Reply { id: Some(8), outcome: Ok(Value::Null) })
        );
        assert_eq!(
            Message::parse(br#"{"error": {"class": "GenericError", "desc": "no"}, "id": 9}"#),
            Ok(Message::Reply {
                id: Some(9),
                outcome: Err(CommandFailure { class: "GenericError".into(), desc: "no".into() })
            })
        );
    }

    #[test]
    fn an_event_is_typed() {
        let line = br#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#;
        assert_eq!(
            Message::parse(line),
            Ok(Message::Event(Event::Shutdown { guest: true, reason: ShutdownReason::GuestReset }))
        );
    }

    #[test]
    fn garbage_is_refused() {
        for line in ["", "null", "[]", "{", "{}", "{\"return\"", "{\"event\": 3}", "\u{fffd}", "7"] {
            assert!(matches!(Message::parse(line.as_bytes()), Err(CodecError::NotAMessage(_))), "{line}");
        }
        let deep = "[".repeat(100_000);
        assert!(Message::parse(deep.as_bytes()).is_err());
    }

    #[test]
    fn an_over_long_line_is_refused_with_and_without_its_end() {
        let mut decoder = LineDecoder::default();
        decoder.extend(&vec![b'x'; LINE_BYTES_MAX]);
        assert_eq!(decoder.next_line(), Ok(None));
        decoder.extend(b"x");
        assert_eq!(decoder.next_line(), Err(CodecError::LineTooLong));
        let mut decoder = LineDecoder::default();
        decoder.extend(&vec![b'x'; LINE_BYTES_MAX + 1]);
        decoder.extend(b"\n");
        assert_eq!(decoder.next_line(), Err(CodecError::LineTooLong));
    }

    proptest! {
        #[test]
        fn lines_come_out_the_same_however_the_bytes_are_cut(
            lines in proptest::collection::vec("[a-z ]{0,20}[a-z]", 0..8),
            cuts in proptest::collection::vec(1_usize..7, 1..40),
        ) {
            let bytes: Vec<u8> = lines.iter().flat_map(|line| format!("{line}\r\n").into_bytes()).collect();
            let mut decoder = LineDecoder::default();
            let mut seen = Vec::new();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (head, tail) = rest.split_at((*cut).min(rest.len()));
                decoder.extend(head);
                while let Some(line) = decoder.next_line().unwrap() {
                    seen.push(String::from_utf8(line.to_vec()).unwrap());
                }
                rest = tail;
            }
            prop_assert_eq!(seen, lines);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::parse(&bytes);
        }
    }
}
