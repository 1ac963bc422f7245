//! Length-prefixed JSON: a big-endian `u32`, then that many bytes.

use serde::{Serialize, de::DeserializeOwned};

/// Longest JSON frame, in bytes. Argument lists and environments are the longest honest ones.
pub const JSON_BYTES_MAX: usize = 256 * 1024;

/// Why a frame was refused.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length is above [`JSON_BYTES_MAX`].
    #[error("frame of {0} bytes is over the limit of {JSON_BYTES_MAX}")]
    TooLong(usize),
    /// The bytes are not the JSON that was expected.
    #[error("frame is not what the protocol says")]
    Json(#[from] serde_json::Error),
}

/// Encodes `message` with its length in front.
///
/// # Errors
/// [`FrameError::TooLong`] when the message doesn't fit into one frame.
pub fn encode_json<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|length| *length as usize <= JSON_BYTES_MAX);
    let length = length.ok_or(FrameError::TooLong(body.len()))?;
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Takes one frame from the front of `buffer`. `None`: more bytes are needed.
///
/// # Errors
/// A length over the limit (seen before the bytes arrive), or bytes that aren't a `T`.
pub fn decode_json<T: DeserializeOwned>(buffer: &[u8]) -> Result<Option<(T, usize)>, FrameError> {
    let Some((prefix, rest)) = buffer.split_first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*prefix) as usize;
    if length > JSON_BYTES_MAX {
        return Err(FrameError::TooLong(length));
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    Ok(Some((serde_json::from_slice(body)?, 4 + length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Request;

    #[test]
    fn a_frame_survives_the_way_there_and_back() {
        let frame = encode_json(&Request::Sync).unwrap();
        let (request, used) = decode_json::<Request>(&frame).unwrap().unwrap();
        assert_eq!((request, used), (Request::Sync, frame.len()));
    }

    #[test]
    fn every_proper_prefix_asks_for_more() {
        let frame = encode_json(&Request::Watch).unwrap();
        for end in 0..frame.len() {
            assert!(decode_json::<Request>(&frame[..end]).unwrap().is_none());
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_arrive() {
        assert!(matches!(decode_json::<Request>(&u32::MAX.to_be_bytes()), Err(FrameError::TooLong(_))));
    }
}
