//! Where a body ends: RFC 9112, section 6, with everything ambiguous refused.

use crate::chunked::{ChunkError, ChunkScanner};

/// How the end of a body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFraming {
    /// No body.
    Empty,
    /// So many bytes.
    Length(u64),
    /// Chunks and trailers.
    Chunked,
    /// Everything until the sender closes. Responses only.
    UntilClose,
}

/// Why the end of a body can't be told for certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    /// Not one plain decimal number.
    #[error("content-length is not one decimal number")]
    ContentLength,
    /// Not `chunked` alone. Dockerd reads no other.
    #[error("transfer-encoding is not chunked alone")]
    TransferEncoding,
    /// Both headers: the classic way to smuggle a request.
    #[error("both content-length and transfer-encoding")]
    Both,
}

/// The header lines that decide about a body.
#[derive(Debug)]
pub(crate) struct FramingHeaders<'a> {
    is_http_1_1: bool,
    content_length: Option<u64>,
    transfer_encoding: Option<&'a [u8]>,
}

impl<'a> FramingHeaders<'a> {
    pub(crate) fn new(is_http_1_1: bool) -> Self {
        Self { is_http_1_1, content_length: None, transfer_encoding: None }
    }

    pub(crate) fn content_length(&mut self, value: &[u8]) -> Result<(), FramingError> {
        let digits = value.trim_ascii();
        let length = Some(digits)
            .filter(|digits| digits.iter().all(u8::is_ascii_digit))
            .and_then(|digits| str::from_utf8(digits).ok())
            .and_then(|digits| digits.parse().ok());
        match (length, self.content_length) {
            (Some(length), None) => self.content_length = Some(length),
            _ => return Err(FramingError::ContentLength),
        }
        Ok(())
    }

    pub(crate) fn transfer_encoding(&mut self, value: &'a [u8]) -> Result<(), FramingError> {
        match self.transfer_encoding.replace(value.trim_ascii()) {
            None => Ok(()),
            Some(_) => Err(FramingError::TransferEncoding),
        }
    }

    pub(crate) fn of_request(&self) -> Result<BodyFraming, FramingError> {
        Ok(self.explicit()?.unwrap_or(BodyFraming::Empty))
    }

    pub(crate) fn of_response(&self, method: &str, status: u16) -> Result<BodyFraming, FramingError> {
        let explicit = self.explicit()?;
        match status {
            // What follows is another protocol, not a body.
            101 => Ok(BodyFraming::UntilClose),
            200..300 if method == "CONNECT" => Ok(BodyFraming::UntilClose),
            100..200 | 204 | 304 => Ok(BodyFraming::Empty),
            _ if method == "HEAD" => Ok(BodyFraming::Empty),
            _ => Ok(explicit.unwrap_or(BodyFraming::UntilClose)),
        }
    }

    fn explicit(&self) -> Result<Option<BodyFraming>, FramingError> {
        match (self.transfer_encoding, self.content_length) {
            (None, None) => Ok(None),
            (None, Some(0)) => Ok(Some(BodyFraming::Empty)),
            (None, Some(length)) => Ok(Some(BodyFraming::Length(length))),
            (Some(_), Some(_)) => Err(FramingError::Both),
            (Some(coding), None) if self.is_http_1_1 && coding.eq_ignore_ascii_case(b"chunked") => {
                Ok(Some(BodyFraming::Chunked))
            }
            (Some(_), None) => Err(FramingError::TransferEncoding),
        }
    }
}

/// Follows a body while its bytes pass.
///
/// ```text
/// Length(n) ── n bytes ──► Done          Chunked ── last chunk, trailers ──► Done
/// UntilClose: ends with the stream alone, is never Done
/// ```
#[derive(Debug)]
pub struct BodyScanner {
    state: State,
}

#[derive(Debug)]
enum State {
    Done,
    Length(u64),
    Chunked(ChunkScanner),
    UntilClose,
}

impl BodyScanner {
    /// Starts at the first byte of a body.
    #[must_use]
    pub fn new(framing: BodyFraming) -> Self {
        let state = match framing {
            BodyFraming::Empty | BodyFraming::Length(0) => State::Done,
            BodyFraming::Length(length) => State::Length(length),
            BodyFraming::Chunked => State::Chunked(ChunkScanner::default()),
            BodyFraming::UntilClose => State::UntilClose,
        };
        Self { state }
    }

    /// The body's last byte has passed.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// The body ends with the stream, so an end of the stream is no error.
    #[must_use]
    pub fn is_until_close(&self) -> bool {
        matches!(self.state, State::UntilClose)
    }

    /// Advances over `bytes`; gives how many of them belong to the body, and hands its payload (chunk sizes and
    /// trailers taken out) to `payload`.
    ///
    /// # Errors
    /// Bytes that aren't chunks where chunks were announced.
    pub fn advance(&mut self, bytes: &[u8], mut payload: impl FnMut(&[u8])) -> Result<usize, ChunkError> {
        let used = match &mut self.state {
            State::Done => 0,
            State::Length(left) => {
                let used = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                payload(&bytes[..used]);
                *left -= used as u64;
                if *left == 0 {
                    self.state = State::Done;
                }
                used
            }
            State::Chunked(chunks) => {
                let used = chunks.advance(bytes, payload)?;
                if chunks.is_done() {
                    self.state = State::Done;
                }
                used
            }
            State::UntilClose => {
                payload(bytes);
                bytes.len()
            }
        };
        Ok(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers<'a>(length: &[&str], coding: &[&'a str]) -> Result<FramingHeaders<'a>, FramingError> {
        let mut headers = FramingHeaders::new(true);
        length.iter().try_for_each(|value| headers.content_length(value.as_bytes()))?;
        coding.iter().try_for_each(|value| headers.transfer_encoding(value.as_bytes()))?;
        Ok(headers)
    }

    #[test]
    fn a_request_without_framing_has_no_body_and_a_response_ends_with_the_connection() {
        let none = headers(&[], &[]).unwrap();
        assert_eq!(none.of_request(), Ok(BodyFraming::Empty));
        assert_eq!(none.of_response("GET", 200), Ok(BodyFraming::UntilClose));
    }

    #[test]
    fn ambiguous_lengths_are_refused() {
        for length in ["", "+1", "-1", "1, 1", "0x1", "1.0", "18446744073709551616", "1 1"] {
            assert_eq!(headers(&[length], &[]).unwrap_err(), FramingError::ContentLength, "{length:?}");
        }
        assert_eq!(headers(&["7", "7"], &[]).unwrap_err(), FramingError::ContentLength);
    }

    #[test]
    fn codings_other_than_chunked_alone_are_refused() {
        for coding in ["gzip", "gzip, chunked", "chunked, chunked", "identity", "xchunked", ""] {
            let error = headers(&[], &[coding]).unwrap().of_request().unwrap_err();
            assert_eq!(error, FramingError::TransferEncoding, "{coding:?}");
        }
        assert_eq!(headers(&[], &["chunked", "chunked"]).unwrap_err(), FramingError::TransferEncoding);
        assert_eq!(headers(&["1"], &["chunked"]).unwrap().of_request(), Err(FramingError::Both));
    }

    #[test]
    fn some_answers_have_no_body_whatever_their_headers_say() {
        let length = headers(&["5"], &[]).unwrap();
        for (method, status) in [("HEAD", 200), ("GET", 204), ("GET", 304), ("POST", 100)] {
            assert_eq!(length.of_response(method, status), Ok(BodyFraming::Empty), "{method} {status}");
        }
        assert_eq!(length.of_response("GET", 200), Ok(BodyFraming::Length(5)));
        assert_eq!(length.of_response("POST", 101), Ok(BodyFraming::UntilClose));
    }

    #[test]
    fn a_length_takes_its_bytes_and_no_more() {
        let mut body = BodyScanner::new(BodyFraming::Length(5));
        let mut seen = Vec::new();
        assert_eq!(body.advance(b"abc", |bytes| seen.extend_from_slice(bytes)), Ok(3));
        assert_eq!(body.advance(b"defgh", |bytes| seen.extend_from_slice(bytes)), Ok(2));
        assert!(body.is_done() && seen == b"abcde");
        assert_eq!(body.advance(b"fgh", |_| ()), Ok(0));
    }
}
