//! Length-prefixed JSON on a stream.

use std::io;

use dormouse_agent_proto::{FrameError, JSON_BYTES_MAX, decode_json, encode_json};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Why a frame didn't come or go.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// The stream broke or ended.
    #[error("the stream broke: {0}")]
    Io(#[from] io::Error),
    /// What came isn't what the protocol says.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Reads one frame, and not a byte more.
///
/// # Errors
/// See [`JsonError`]; a stream that ends is an `UnexpectedEof`.
pub async fn read_json<T: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> Result<T, JsonError> {
    let mut frame = vec![0; 4];
    stream.read_exact(&mut frame).await?;
    let length = frame.first_chunk::<4>().map_or(0, |prefix| u32::from_be_bytes(*prefix) as usize);
    if length > JSON_BYTES_MAX {
        return Err(FrameError::TooLong(length).into());
    }
    frame.resize(4 + length, 0);
    stream.read_exact(&mut frame[4..]).await?;
    match decode_json(&frame)? {
        Some((message, _)) => Ok(message),
        None => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    }
}

/// Writes one frame.
///
/// # Errors
/// See [`JsonError`].
pub async fn write_json<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> Result<(), JsonError> {
    stream.write_all(&encode_json(message)?).await?;
    Ok(stream.flush().await?)
}
