//! What flows on a stream of a root process: one byte of kind, a big-endian `u32` length, the payload.

/// Longest payload of one frame, in bytes.
pub const PROCESS_PAYLOAD_MAX: usize = 64 * 1024;

const HEADER_BYTES: usize = 5;

/// One frame of a root process's stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessFrame {
    /// Host to guest: bytes for stdin; empty closes it.
    Stdin(Vec<u8>),
    /// Guest to host: bytes from stdout (or the terminal).
    Stdout(Vec<u8>),
    /// Guest to host: bytes from stderr.
    Stderr(Vec<u8>),
    /// Host to guest: the terminal has a new size (rows, columns).
    Resize(u16, u16),
    /// Host to guest: send this signal.
    Signal(i32),
    /// Guest to host, last: the exit status, or 128 + the signal that ended it.
    Exit(i32),
}

/// Why a frame was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProcessFrameError {
    /// An unknown kind.
    #[error("unknown kind of process frame: {0}")]
    Kind(u8),
    /// The length doesn't fit the kind, or is over [`PROCESS_PAYLOAD_MAX`].
    #[error("process frame of kind {kind} with {length} bytes")]
    Length {
        /// The kind of frame.
        kind: u8,
        /// The length that it gave.
        length: usize,
    },
}

impl ProcessFrame {
    /// Encodes the frame. Payloads over [`PROCESS_PAYLOAD_MAX`] are the caller's to split.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut number = [0; 4];
        let (kind, payload): (u8, &[u8]) = match self {
            Self::Stdin(bytes) => (0, bytes),
            Self::Stdout(bytes) => (1, bytes),
            Self::Stderr(bytes) => (2, bytes),
            Self::Resize(rows, columns) => {
                number[..2].copy_from_slice(&rows.to_be_bytes());
                number[2..].copy_from_slice(&columns.to_be_bytes());
                (3, &number)
            }
            Self::Signal(signal) => {
                number = signal.to_be_bytes();
                (4, &number)
            }
            Self::Exit(status) => {
                number = status.to_be_bytes();
                (5, &number)
            }
        };
        debug_assert!(payload.len() <= PROCESS_PAYLOAD_MAX, "the caller splits payloads");
        let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
        frame.push(kind);
        frame.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    /// Takes one frame from the front of `buffer`. `None`: more bytes are needed.
    ///
    /// # Errors
    /// As soon as the header shows that no valid frame can follow.
    pub fn decode(buffer: &[u8]) -> Result<Option<(Self, usize)>, ProcessFrameError> {
        let Some((&[kind, a, b, c, d], rest)) = buffer.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let fits = match kind {
            0..=2 => length <= PROCESS_PAYLOAD_MAX,
            3..=5 => length == 4,
            _ => return Err(ProcessFrameError::Kind(kind)),
        };
        if !fits {
            return Err(ProcessFrameError::Length { kind, length });
        }
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let number = || payload.first_chunk::<4>().copied().unwrap_or_default();
        let frame = match kind {
            0 => Self::Stdin(payload.to_vec()),
            1 => Self::Stdout(payload.to_vec()),
            2 => Self::Stderr(payload.to_vec()),
            3 => {
                let [a, b, c, d] = number();
                Self::Resize(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
            }
            4 => Self::Signal(i32::from_be_bytes(number())),
            _ => Self::Exit(i32::from_be_bytes(number())),
        };
        Ok(Some((frame, HEADER_BYTES + length)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_survives_the_way_there_and_back() {
        let frames = [
            ProcessFrame::Stdin(vec![]),
            ProcessFrame::Stdout(vec![1; PROCESS_PAYLOAD_MAX]),
            ProcessFrame::Stderr(b"x".to_vec()),
            ProcessFrame::Resize(24, 80),
            ProcessFrame::Signal(15),
            ProcessFrame::Exit(-1),
        ];
        for frame in frames {
            let bytes = frame.encode();
            assert_eq!(ProcessFrame::decode(&bytes), Ok(Some((frame, bytes.len()))));
            assert_eq!(ProcessFrame::decode(&bytes[..bytes.len() - 1]).unwrap_or(None), None);
        }
    }

    #[test]
    fn a_bad_header_is_refused_before_its_payload_arrives() {
        assert_eq!(ProcessFrame::decode(&[9, 0, 0, 0, 0]), Err(ProcessFrameError::Kind(9)));
        assert_eq!(
            ProcessFrame::decode(&[1, 0xff, 0, 0, 0]),
            Err(ProcessFrameError::Length { kind: 1, length: 0xff00_0000 })
        );
        assert_eq!(
            ProcessFrame::decode(&[5, 0, 0, 0, 3]),
            Err(ProcessFrameError::Length { kind: 5, length: 3 })
        );
    }
}
