//! The chunked coding of RFC 9112, section 7.1, followed without being taken apart.
//!
//! ```text
//!          ┌────────────────── CRLF ◄── DataEnd ◄── Data(left) ◄─┐
//!          ▼                                                     │ size > 0
//!        Size ── ";" or blank ──► Extension ── CR ──► SizeEnd ───┤
//!          └──────────── CR ─────────────────────────►           │ size = 0
//!                                                                ▼
//!        Done ◄── LF ── FinalEnd ◄── CR ── TrailerStart ◄──► TrailerName, TrailerLine
//! ```

/// Most bytes of extensions in one chunk's size line.
pub const EXTENSION_BYTES_MAX: u32 = 4096;

/// Most bytes of trailers after the last chunk.
pub const TRAILER_BYTES_MAX: u32 = 64 * 1024;

/// Why bytes aren't chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// No hexadecimal number where a size must be.
    #[error("chunk size is no hexadecimal number")]
    Size,
    /// A size of more than 64 bits.
    #[error("chunk size is over 64 bits")]
    TooLarge,
    /// CR LF is missing, or a control character is in a line.
    #[error("chunk line is malformed")]
    Line,
    /// Extensions over [`EXTENSION_BYTES_MAX`] or trailers over [`TRAILER_BYTES_MAX`].
    #[error("chunk extension or trailer is over its limit")]
    TooLong,
}

/// Finds the end of a chunked body.
#[derive(Debug, Default)]
pub struct ChunkScanner {
    state: State,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Size { value: u64, digits: u8 },
    Extension { size: u64, length: u32 },
    SizeEnd { size: u64 },
    Data { left: u64 },
    DataEnd,
    DataLineFeed,
    TrailerStart { length: u32 },
    TrailerName { length: u32 },
    TrailerLine { length: u32 },
    TrailerLineFeed { length: u32 },
    FinalEnd,
    Done,
}

impl Default for State {
    fn default() -> Self {
        Self::Size { value: 0, digits: 0 }
    }
}

impl ChunkScanner {
    /// The empty line after the trailers has passed.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Advances over `bytes`; gives how many of them belong to the body, and hands the chunks' data to `payload`.
    ///
    /// # Errors
    /// The first byte that can't be part of a chunked body.
    pub fn advance(&mut self, bytes: &[u8], mut payload: impl FnMut(&[u8])) -> Result<usize, ChunkError> {
        let mut used = 0;
        while used < bytes.len() {
            match self.state {
                State::Done => break,
                State::Data { left } => {
                    let rest = &bytes[used..];
                    let taken = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
                    payload(&rest[..taken]);
                    used += taken;
                    self.state = match left - taken as u64 {
                        0 => State::DataEnd,
                        left => State::Data { left },
                    };
                }
                line => {
                    self.state = line.after(bytes[used])?;
                    used += 1;
                }
            }
        }
        Ok(used)
    }
}

impl State {
    /// The state after one more byte outside the data.
    fn after(self, byte: u8) -> Result<Self, ChunkError> {
        match (self, byte) {
            (Self::Size { value, digits }, byte) => after_size(value, digits, byte),
            (Self::Extension { size, .. }, b'\r') => Ok(Self::SizeEnd { size }),
            (Self::Extension { size, length }, byte) => {
                Ok(Self::Extension { size, length: one_more(byte, length, EXTENSION_BYTES_MAX)? })
            }
            (Self::SizeEnd { size: 0 }, b'\n') => Ok(Self::TrailerStart { length: 0 }),
            (Self::SizeEnd { size }, b'\n') => Ok(Self::Data { left: size }),
            (Self::DataEnd, b'\r') => Ok(Self::DataLineFeed),
            (Self::DataLineFeed, b'\n') => Ok(Self::default()),
            (Self::TrailerStart { .. }, b'\r') => Ok(Self::FinalEnd),
            (Self::TrailerLine { length }, b'\r') => Ok(Self::TrailerLineFeed { length }),
            (Self::TrailerName { length }, b':') => {
                Ok(Self::TrailerLine { length: one_more(b':', length, TRAILER_BYTES_MAX)? })
            }
            (Self::TrailerStart { length } | Self::TrailerName { length }, byte) if is_token(byte) => {
                Ok(Self::TrailerName { length: one_more(byte, length, TRAILER_BYTES_MAX)? })
            }
            (Self::TrailerLine { length }, byte) => {
                Ok(Self::TrailerLine { length: one_more(byte, length, TRAILER_BYTES_MAX)? })
            }
            (Self::TrailerLineFeed { length }, b'\n') => Ok(Self::TrailerStart { length }),
            (Self::FinalEnd, b'\n') => Ok(Self::Done),
            _ => Err(ChunkError::Line),
        }
    }
}

fn after_size(value: u64, digits: u8, byte: u8) -> Result<State, ChunkError> {
    let digit = char::from(byte).to_digit(16);
    match (digit, byte) {
        (Some(_), _) if digits == 16 => Err(ChunkError::TooLarge),
        (Some(digit), _) => Ok(State::Size { value: value << 4 | u64::from(digit), digits: digits + 1 }),
        (None, _) if digits == 0 => Err(ChunkError::Size),
        (None, b'\r') => Ok(State::SizeEnd { size: value }),
        (None, b';' | b' ' | b'\t') => Ok(State::Extension { size: value, length: 1 }),
        (None, _) => Err(ChunkError::Size),
    }
}

/// RFC 9110, section 5.6.2: what a field's name is made of.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn one_more(byte: u8, length: u32, limit: u32) -> Result<u32, ChunkError> {
    if byte != b'\t' && byte.is_ascii_control() {
        Err(ChunkError::Line)
    } else if length == limit {
        Err(ChunkError::TooLong)
    } else {
        Ok(length + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8]) -> Result<(usize, bool, Vec<u8>), ChunkError> {
        let mut chunks = ChunkScanner::default();
        let mut data = Vec::new();
        let used = chunks.advance(bytes, |piece| data.extend_from_slice(piece))?;
        Ok((used, chunks.is_done(), data))
    }

    #[test]
    fn chunks_with_extensions_and_trailers_end_where_they_should() {
        let body = b"3;a=\"b\"\r\nabc\r\n0A \r\n0123456789\r\n000\r\nX: y\r\nZ: \tq\r\n\r\nGET";
        let (used, done, data) = decode(body).unwrap();
        assert_eq!((used, done, data.as_slice()), (body.len() - 3, true, b"abc0123456789".as_slice()));
    }

    #[test]
    fn malformed_chunks_are_refused() {
        for (bytes, error) in [
            (&b"\r\n"[..], ChunkError::Size),
            (b"x\r\n", ChunkError::Size),
            (b"-1\r\n", ChunkError::Size),
            (b"0x1\r\n", ChunkError::Size),
            (b"3\nabc", ChunkError::Size),
            (b"3\rabc", ChunkError::Line),
            (b"3;\n", ChunkError::Line),
            (b"3\r\nabcd", ChunkError::Line),
            (b"3\r\nabc\n", ChunkError::Line),
            (b"0\r\nA: b\n", ChunkError::Line),
            (b"0\r\n\rx", ChunkError::Line),
            (b"0\r\nno colon\r\n", ChunkError::Line),
            (b"0\r\nA\r\n\r\n", ChunkError::Line),
            (b"0\r\n: b\r\n\r\n", ChunkError::Line),
            (b"0\r\nA : b\r\n\r\n", ChunkError::Line),
            (b"00000000000000001\r\n", ChunkError::TooLarge),
        ] {
            assert_eq!(decode(bytes), Err(error), "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn extensions_and_trailers_are_bounded() {
        let extension = |length: usize| format!("1;{}", "e".repeat(length - 1));
        assert!(decode(extension(EXTENSION_BYTES_MAX as usize).as_bytes()).is_ok());
        assert_eq!(decode(extension(EXTENSION_BYTES_MAX as usize + 1).as_bytes()), Err(ChunkError::TooLong));
        let trailers = format!("0\r\n{}", "A: b\r\n".repeat(TRAILER_BYTES_MAX as usize / 4 + 1));
        assert_eq!(decode(trailers.as_bytes()), Err(ChunkError::TooLong));
    }

    proptest! {
        #[test]
        fn the_end_is_the_same_however_the_bytes_are_cut(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..6),
            cuts in proptest::collection::vec(1_usize..9, 1..80),
        ) {
            let mut body = Vec::new();
            for piece in &pieces {
                body.extend_from_slice(format!("{:X};q\r\n", piece.len()).as_bytes());
                body.extend_from_slice(piece);
                body.extend_from_slice(b"\r\n");
            }
            body.extend_from_slice(b"0\r\nT: v\r\n\r\n");
            let end = body.len();
            body.extend_from_slice(b"next request");

            let (mut chunks, mut data, mut at) = (ChunkScanner::default(), Vec::new(), 0);
            for cut in cuts.iter().cycle() {
                let piece = &body[at..body.len().min(at + cut)];
                at += chunks.advance(piece, |bytes| data.extend_from_slice(bytes)).unwrap();
                if chunks.is_done() {
                    break;
                }
            }
            prop_assert_eq!((at, data), (end, pieces.concat()));
        }

        #[test]
        fn any_bytes_are_read_alike_in_one_piece_and_byte_by_byte(
            bytes in proptest::collection::vec(
                prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'0'), Just(b'2'), Just(b';'), any::<u8>()], 0..40),
        ) {
            let mut chunks = ChunkScanner::default();
            let one_by_one = bytes.iter().try_fold(0, |used, byte| Ok(used + chunks.advance(&[*byte], |_| ())?));
            let whole = decode(&bytes).map(|(used, ..)| used);
            prop_assert_eq!(whole, one_by_one);
        }
    }
}
