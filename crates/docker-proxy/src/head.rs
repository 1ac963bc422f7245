//! Heads of requests and responses: found, bounded, parsed, and kept as they came.
//!
//! A head is passed on byte for byte, so everything that two parsers could read differently is refused here: bare
//! line feeds, folded lines, blanks before a colon (RFC 9112, section 2.2 and 5).

use bytes::{Buf, Bytes, BytesMut};

use crate::framing::{BodyFraming, FramingError, FramingHeaders};
use crate::target::Target;

/// Most bytes of one head, its empty line included. `X-Registry-Config` brings a token for each registry that a client
/// knows.
pub const HEAD_BYTES_MAX: usize = 256 * 1024;

/// Most header lines of one head.
pub const HEADERS_MAX: usize = 256;

/// Why a head was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// More than [`HEAD_BYTES_MAX`] bytes without an end.
    #[error("head is over the limit of {HEAD_BYTES_MAX} bytes")]
    TooLong,
    /// More than [`HEADERS_MAX`] header lines.
    #[error("head is over the limit of {HEADERS_MAX} header lines")]
    TooManyHeaders,
    /// A line ends with a line feed alone.
    #[error("head has a line that doesn't end with CR LF")]
    BareLineFeed,
    /// What is asked for can't be told for certain.
    #[error("the target can't be understood")]
    Target,
    /// Not HTTP/1.0 or HTTP/1.1.
    #[error("not HTTP/1.1: {0}")]
    Syntax(httparse::Error),
    /// The end of the body can't be told for certain.
    #[error("body length is ambiguous")]
    Framing(#[from] FramingError),
}

/// A request's head.
#[derive(Debug, Clone)]
pub struct RequestHead {
    /// As it came, the empty line included; with the body behind it if that was read as well.
    pub bytes: Bytes,
    /// `GET`, `POST`, ...
    pub method: String,
    /// Path and query, as sent.
    pub target: String,
    /// Where the body ends.
    pub framing: BodyFraming,
    /// HTTP/1.1, not 1.0.
    pub is_http_1_1: bool,
    /// The connection may carry another request after this one.
    pub keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
}

impl RequestHead {
    /// The same request with this body, of a plain length, right behind its head.
    pub(crate) fn with_body(mut self, body: &[u8]) -> Self {
        self.bytes = with_body(&self.bytes, body);
        self.framing = BodyFraming::Empty;
        self.expects_continue = false;
        self
    }
}

/// A head and this body behind it, of a plain length.
fn with_body(head: &[u8], body: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(head.len() + body.len());
    for line in head.split_inclusive(|byte| *byte == b'\n') {
        let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
        let says_how = ["content-length", "transfer-encoding", "trailer", "expect"]
            .iter()
            .any(|framing| name.eq_ignore_ascii_case(framing.as_bytes()));
        if line == b"\r\n" {
            bytes.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
        } else if !says_how {
            bytes.extend_from_slice(line);
        }
    }
    bytes.extend_from_slice(body);
    bytes.freeze()
}

/// A response's head.
#[derive(Debug, Clone)]
pub struct ResponseHead {
    /// As it came, the empty line included; with the body behind it if that was read as well.
    pub bytes: Bytes,
    /// The status code.
    pub status: u16,
    /// Where the body ends.
    pub framing: BodyFraming,
    /// The connection may carry another response after this one.
    pub keep_alive: bool,
}

impl ResponseHead {
    /// The same response with these lines, which end with a line end each, at the end of its head.
    pub(crate) fn with_lines(mut self, lines: &[u8]) -> Self {
        let (head, end) = self.bytes.split_at(self.bytes.len() - 2);
        self.bytes = [head, lines, end].concat().into();
        self
    }

    /// The same response with this body, of a plain length, right behind its head.
    pub(crate) fn with_body(mut self, body: &[u8]) -> Self {
        self.bytes = with_body(&self.bytes, body);
        self.framing = BodyFraming::Empty;
        self
    }

    /// The same response with its body, as it came, right behind its head.
    pub(crate) fn with_raw_body(mut self, body: &[u8]) -> Self {
        self.bytes = [&self.bytes, body].concat().into();
        self.framing = BodyFraming::Empty;
        self
    }

    /// A head before the actual one, such as `100 Continue`. `101` is no such: after it the protocol changes.
    #[must_use]
    pub fn is_interim(&self) -> bool {
        (100..200).contains(&self.status) && self.status != 101
    }
}

/// Looks for the end of a head while its bytes arrive, each byte once.
#[derive(Debug, Default)]
pub struct HeadScanner {
    scanned: usize,
    line_start: usize,
}

impl HeadScanner {
    /// Takes a complete head from the front of `buffer`. `None`: more bytes are needed.
    ///
    /// # Errors
    /// [`HeadError::TooLong`] and [`HeadError::BareLineFeed`], as soon as they show.
    pub fn take(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, HeadError> {
        while let Some(offset) = buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
            let line_feed = self.scanned + offset;
            self.scanned = line_feed + 1;
            if line_feed == self.line_start || buffer[line_feed - 1] != b'\r' {
                return Err(HeadError::BareLineFeed);
            }
            let is_empty_line = line_feed - 1 == self.line_start;
            self.line_start = self.scanned;
            if self.scanned > HEAD_BYTES_MAX {
                return Err(HeadError::TooLong);
            }
            if is_empty_line {
                let head = buffer.split_to(self.scanned).freeze();
                *self = Self::default();
                return Ok(Some(head));
            }
        }
        self.scanned = buffer.len();
        if buffer.len() >= HEAD_BYTES_MAX { Err(HeadError::TooLong) } else { Ok(None) }
    }
}

/// Drops empty lines in front of a request, which RFC 9112 (2.2) asks servers to ignore.
pub fn skip_empty_lines(buffer: &mut BytesMut) {
    while buffer.starts_with(b"\r\n") {
        buffer.advance(2);
    }
}

/// Parses a complete request head, as [`HeadScanner::take`] gives it.
///
/// # Errors
/// Whatever isn't plainly HTTP/1.0 or HTTP/1.1 with a body whose end is certain.
pub fn parse_request(bytes: Bytes) -> Result<RequestHead, HeadError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    expect_complete(request.parse(&bytes))?;
    let is_http_1_1 = request.version == Some(1);
    let fields = Fields::read(request.headers, is_http_1_1)?;
    let framing = fields.framing.of_request()?;
    let method = request.method.unwrap_or_default().to_owned();
    let target = request.path.unwrap_or_default().to_owned();
    if Target::parse(&target).is_none() {
        return Err(HeadError::Target);
    }
    let (keep_alive, expects_continue) = (fields.keep_alive, fields.expects_continue);
    Ok(RequestHead { bytes, method, target, framing, is_http_1_1, keep_alive, expects_continue })
}

/// Parses a complete response head. `method` is the request's: it decides whether a body follows.
///
/// # Errors
/// Whatever isn't plainly HTTP/1.0 or HTTP/1.1 with a body whose end is certain.
pub fn parse_response(bytes: Bytes, method: &str) -> Result<ResponseHead, HeadError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    expect_complete(response.parse(&bytes))?;
    let fields = Fields::read(response.headers, response.version == Some(1))?;
    let status = response.code.unwrap_or_default();
    let framing = fields.framing.of_response(method, status)?;
    let keep_alive = fields.keep_alive && framing != BodyFraming::UntilClose;
    Ok(ResponseHead { bytes, status, framing, keep_alive })
}

fn expect_complete(parsed: httparse::Result<usize>) -> Result<(), HeadError> {
    match parsed {
        Ok(httparse::Status::Complete(_)) => Ok(()),
        // The empty line is there, so a parser that wants more saw another head than we did.
        Ok(httparse::Status::Partial) => Err(HeadError::Syntax(httparse::Error::NewLine)),
        Err(httparse::Error::TooManyHeaders) => Err(HeadError::TooManyHeaders),
        Err(error) => Err(HeadError::Syntax(error)),
    }
}

/// What a head's lines say about the connection and the body.
struct Fields<'a> {
    framing: FramingHeaders<'a>,
    keep_alive: bool,
    expects_continue: bool,
}

impl<'a> Fields<'a> {
    fn read(headers: &[httparse::Header<'a>], is_http_1_1: bool) -> Result<Self, FramingError> {
        let mut framing = FramingHeaders::new(is_http_1_1);
        let mut keep_alive = is_http_1_1;
        let mut expects_continue = false;
        for header in headers {
            let name = header.name;
            if name.eq_ignore_ascii_case("content-length") {
                framing.content_length(header.value)?;
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                framing.transfer_encoding(header.value)?;
            } else if name.eq_ignore_ascii_case("connection") {
                if has_token(header.value, "close") {
                    keep_alive = false;
                } else if !is_http_1_1 && has_token(header.value, "keep-alive") {
                    keep_alive = true;
                }
            } else if name.eq_ignore_ascii_case("expect") {
                // HTTP/1.0 knows no answer before the answer.
                expects_continue = is_http_1_1 && has_token(header.value, "100-continue");
            }
        }
        Ok(Self { framing, keep_alive, expects_continue })
    }
}

fn has_token(value: &[u8], token: &str) -> bool {
    value.split(|byte| *byte == b',').any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Result<RequestHead, HeadError> {
        let mut buffer = BytesMut::from(text);
        let bytes = HeadScanner::default().take(&mut buffer)?.expect("a complete head");
        parse_request(bytes)
    }

    #[test]
    fn a_request_head_is_kept_as_it_came() {
        let text = "POST /v1.45/build?t=a%20b HTTP/1.1\r\nhOsT:  x \r\nTransfer-Encoding: CHUNKED\r\n\r\n";
        let head = request(text).unwrap();
        assert_eq!(head.bytes, text.as_bytes());
        assert_eq!((head.method.as_str(), head.target.as_str()), ("POST", "/v1.45/build?t=a%20b"));
        assert_eq!(head.framing, BodyFraming::Chunked);
        assert!(head.keep_alive && !head.expects_continue);
    }

    #[test]
    fn a_head_is_found_however_its_bytes_are_cut() {
        let text = b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\nrest";
        for cut in 0..text.len() - 4 {
            let mut buffer = BytesMut::from(&text[..cut]);
            let mut scanner = HeadScanner::default();
            assert_eq!(scanner.take(&mut buffer), Ok(None), "cut at {cut}");
            buffer.extend_from_slice(&text[cut..]);
            let head = scanner.take(&mut buffer).unwrap().unwrap();
            assert_eq!((head.as_ref(), buffer.as_ref()), (&text[..text.len() - 4], b"rest".as_slice()));
        }
    }

    #[test]
    fn what_two_parsers_could_read_differently_is_refused() {
        for (text, why) in [
            ("GET / HTTP/1.1\nHost: x\n\n", "bare line feeds"),
            ("GET / HTTP/1.1\r\nHost: x\n\r\n", "one bare line feed"),
            ("GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", "a folded line"),
            ("GET / HTTP/1.1\r\nA : b\r\n\r\n", "a blank before the colon"),
            ("GET / HTTP/1.1\r\nA\r\n\r\n", "no colon"),
            ("GET /a b HTTP/1.1\r\n\r\n", "a blank in the target"),
            ("GET info HTTP/1.1\r\n\r\n", "a target without a slash"),
            ("GET http:/info HTTP/1.1\r\n\r\n", "a target without an authority"),
            ("GET /%zz HTTP/1.1\r\n\r\n", "an escape that is none"),
            ("GET / HTTP/2.0\r\n\r\n", "another version"),
            ("GET /\r\n\r\n", "no version"),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "two framings"),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", "two lengths"),
        ] {
            assert!(request(text).is_err(), "{why} passed");
        }
    }

    #[test]
    fn a_head_without_an_end_is_refused_at_the_limit() {
        let mut buffer = BytesMut::from(&b"GET / HTTP/1.1\r\nA: "[..]);
        buffer.resize(HEAD_BYTES_MAX, b'a');
        assert_eq!(HeadScanner::default().take(&mut buffer), Err(HeadError::TooLong));
    }

    #[test]
    fn one_header_line_over_the_limit_is_refused() {
        let lines = |count| "A: b\r\n".repeat(count);
        assert!(request(&format!("GET / HTTP/1.1\r\n{}\r\n", lines(HEADERS_MAX))).is_ok());
        let over = request(&format!("GET / HTTP/1.1\r\n{}\r\n", lines(HEADERS_MAX + 1)));
        assert_eq!(over.unwrap_err(), HeadError::TooManyHeaders);
    }

    #[test]
    fn the_version_and_the_connection_header_decide_about_keep_alive() {
        for (text, keep_alive) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: Upgrade, close\r\n\r\n", false),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", true),
        ] {
            assert_eq!(request(text).unwrap().keep_alive, keep_alive, "{text}");
        }
    }

    #[test]
    fn only_a_client_of_http_1_1_can_wait_to_be_told_to_continue() {
        let expects = |version| {
            let text = format!("POST / HTTP/{version}\r\nContent-Length: 1\r\nExpect: 100-Continue\r\n\r\n");
            request(&text).unwrap().expects_continue
        };
        assert!(expects("1.1") && !expects("1.0"));
    }

    #[test]
    fn a_response_that_ends_with_the_connection_closes_it() {
        let head = parse_response(Bytes::from_static(b"HTTP/1.1 200 OK\r\n\r\n"), "GET").unwrap();
        assert_eq!((head.framing, head.keep_alive), (BodyFraming::UntilClose, false));
        let head = parse_response(Bytes::from_static(b"HTTP/1.1 200 OK\r\n\r\n"), "HEAD").unwrap();
        assert_eq!((head.framing, head.keep_alive), (BodyFraming::Empty, true));
    }

    #[test]
    fn only_switching_protocols_is_a_final_head_among_the_1xx() {
        let status =
            |line: &'static str| parse_response(Bytes::from_static(line.as_bytes()), "POST").unwrap();
        assert!(status("HTTP/1.1 100 Continue\r\n\r\n").is_interim());
        assert!(!status("HTTP/1.1 101 UPGRADED\r\n\r\n").is_interim());
    }
}
