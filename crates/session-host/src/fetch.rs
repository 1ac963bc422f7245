//! Single questions to the engine, and their whole answers.

use std::io;

use bytes::BytesMut;
use dormouse_docker_proxy::{BodyScanner, HeadScanner, ResponseHead, parse_response};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Asks, and reads the answer to its end; one that is longer than `limit` is an error.
pub(crate) async fn ask(
    engine: &mut (impl AsyncRead + AsyncWrite + Unpin),
    method: &str,
    target: &str,
    limit: usize,
) -> io::Result<(ResponseHead, Vec<u8>)> {
    engine.write_all(format!("{method} {target} HTTP/1.1\r\nHost: docker\r\n\r\n").as_bytes()).await?;
    engine.flush().await?;
    let mut bytes = BytesMut::new();
    let head = head(engine, method, &mut bytes).await?;
    let (mut scanner, mut body) = (BodyScanner::new(head.framing), Vec::new());
    loop {
        let used = scanner.advance(&bytes, |part| body.extend_from_slice(part)).map_err(io::Error::other)?;
        let _ = bytes.split_to(used);
        if scanner.is_done() {
            return Ok((head, body));
        }
        if body.len() > limit {
            return Err(io::Error::other("the answer is too long"));
        }
        if engine.read_buf(&mut bytes).await? == 0 {
            return match scanner.is_until_close() {
                true => Ok((head, body)),
                false => Err(io::ErrorKind::UnexpectedEof.into()),
            };
        }
    }
}

/// Reads an answer's head. What came beyond it stays in `bytes`.
pub(crate) async fn head(
    engine: &mut (impl AsyncRead + Unpin),
    method: &str,
    bytes: &mut BytesMut,
) -> io::Result<ResponseHead> {
    let mut scanner = HeadScanner::default();
    loop {
        if let Some(head) = scanner.take(bytes).map_err(io::Error::other)? {
            return parse_response(head, method).map_err(io::Error::other);
        }
        if engine.read_buf(bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
