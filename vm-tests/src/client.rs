//! A client that shows every byte of an answer, which the docker client doesn't.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::BytesMut;
use dormouse_docker_proxy::{BodyScanner, HeadScanner, parse_response};

/// Longest wait for an answer, which may have to wake a VM first.
const ANSWER_WITHIN: Duration = Duration::from_secs(300);

/// An answer, without its coding.
#[derive(Debug, Clone)]
pub struct Response {
    /// HTTP's.
    pub status: u16,
    /// The whole head.
    pub head: String,
    /// What is in it, without chunks.
    pub body: String,
}

impl Response {
    /// Was it given without the engine?
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        self.head.contains("Dormouse-Answered: asleep\r\n")
    }

    /// The head's lines that don't depend on the moment, or on how the body was cut.
    #[must_use]
    pub fn steady_lines(&self) -> Vec<&str> {
        let varies = ["Date:", "Content-Length:", "Transfer-Encoding:", "Dormouse-Answered:"];
        self.head.lines().filter(|line| !varies.iter().any(|name| line.starts_with(name))).collect()
    }
}

/// A keep-alive connection to a session's docker socket.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    bytes: BytesMut,
}

impl Client {
    /// Connects to a session's docker socket.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        Ok(Self { stream, bytes: BytesMut::new() })
    }

    /// Asks something that has no body.
    ///
    /// # Errors
    /// When no whole answer comes.
    pub fn ask(&mut self, method: &str, target: &str) -> Result<Response> {
        write!(self.stream, "{method} {target} HTTP/1.1\r\nHost: docker\r\n\r\n")?;
        let mut scanner = HeadScanner::default();
        let head = loop {
            if let Some(head) = scanner.take(&mut self.bytes)? {
                break parse_response(head, method)?;
            }
            self.fill()?;
        };
        let (mut scanner, mut body) = (BodyScanner::new(head.framing), Vec::new());
        loop {
            let used = scanner.advance(&self.bytes, |part| body.extend_from_slice(part))?;
            let _ = self.bytes.split_to(used);
            if scanner.is_done() {
                break;
            }
            self.fill()?;
        }
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).context("an answer isn't text");
        Ok(Response { status: head.status, head: text(head.bytes.to_vec())?, body: text(body)? })
    }

    fn fill(&mut self) -> Result<()> {
        let mut buffer = [0; 64 * 1024];
        let count = self.stream.read(&mut buffer)?;
        ensure!(count > 0, "the connection ended within an answer");
        self.bytes.extend_from_slice(&buffer[..count]);
        Ok(())
    }
}
