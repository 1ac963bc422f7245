//! The guest's serial console: drained at all times, so that the guest never waits for a reader, into a ring of lines.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

/// How much text is kept, without what it takes to keep it.
pub const CONSOLE_BYTES_MAX: usize = 1024 * 1024;
/// A longer line is cut into several.
pub const CONSOLE_LINE_BYTES_MAX: usize = 4096;
/// What an empty line counts for, so that a flood of them is bounded too.
const LINE_OVERHEAD: usize = 32;

/// What the guest wrote. Clones share it; it can be read on after the VM's end.
#[derive(Debug, Clone)]
pub struct Console {
    ring: Arc<Mutex<Ring>>,
    state: watch::Receiver<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// This many lines were written in all.
    Open(u64),
    /// No more will be.
    Ended(u64),
}

impl State {
    const fn written(self) -> u64 {
        match self {
            Self::Open(written) | Self::Ended(written) => written,
        }
    }
}

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<String>,
    /// Number of the first line in `lines`, counted from the start of the console.
    first: u64,
    bytes: usize,
}

impl Ring {
    /// Appends a line; tells how many were written in all.
    fn push(&mut self, line: &[u8]) -> u64 {
        // A guest's text ends up on a terminal: no control character of its reaches that.
        let line: String = String::from_utf8_lossy(line)
            .chars()
            .map(|letter| if letter.is_control() && letter != '\t' { '\u{fffd}' } else { letter })
            .collect();
        self.bytes += line.len() + LINE_OVERHEAD;
        self.lines.push_back(line);
        while self.bytes > CONSOLE_BYTES_MAX {
            let Some(oldest) = self.lines.pop_front() else { break };
            self.bytes -= oldest.len() + LINE_OVERHEAD;
            self.first += 1;
        }
        self.first + self.lines.len() as u64
    }
}

impl Console {
    /// Connects to a VM's console. Connect before the vCPUs run: what is written while nobody is connected is lost.
    ///
    /// # Errors
    /// When nobody listens.
    pub async fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self::drain(UnixStream::connect(socket).await?))
    }

    /// Drains any stream.
    pub fn drain(stream: impl AsyncRead + Unpin + Send + 'static) -> Self {
        let ring = Arc::new(Mutex::new(Ring::default()));
        let (told, state) = watch::channel(State::Open(0));
        tokio::spawn(fill(stream, Arc::clone(&ring), told));
        Self { ring, state }
    }

    /// The last lines, at most `count`, oldest first.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let ring = lock(&self.ring);
        let skipped = ring.lines.len().saturating_sub(count);
        ring.lines.iter().skip(skipped).cloned().collect()
    }

    /// A reader that begins with the oldest line there is.
    #[must_use]
    pub fn follow(&self) -> ConsoleReader {
        ConsoleReader { console: self.clone(), next: 0 }
    }
}

/// Reads a console line by line.
#[derive(Debug)]
pub struct ConsoleReader {
    console: Console,
    next: u64,
}

/// What a [`ConsoleReader`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleLine {
    /// A line without its end.
    Line(String),
    /// This many lines were dropped before they were read.
    Lost(u64),
}

impl ConsoleReader {
    /// The next line if there is one already.
    #[must_use]
    pub fn ready(&mut self) -> Option<ConsoleLine> {
        let ring = lock(&self.console.ring);
        if self.next < ring.first {
            let lost = ring.first - self.next;
            self.next = ring.first;
            return Some(ConsoleLine::Lost(lost));
        }
        let index = usize::try_from(self.next - ring.first).ok()?;
        let line = ring.lines.get(index)?.clone();
        self.next += 1;
        Some(ConsoleLine::Line(line))
    }

    /// The next line; `None` once the console has ended and everything was read. Cancel-safe.
    pub async fn next(&mut self) -> Option<ConsoleLine> {
        loop {
            let state = *self.console.state.borrow_and_update();
            if let Some(line) = self.ready() {
                return Some(line);
            }
            let ended = matches!(state, State::Ended(written) if self.next >= written);
            // The writer is gone without a last word only if its runtime is.
            if ended || self.console.state.changed().await.is_err() {
                return None;
            }
        }
    }
}

fn lock(ring: &Mutex<Ring>) -> MutexGuard<'_, Ring> {
    ring.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn fill(mut stream: impl AsyncRead + Unpin, ring: Arc<Mutex<Ring>>, told: watch::Sender<State>) {
    let mut chunk = vec![0; 4096];
    let mut line = Vec::new();
    loop {
        let read = tokio::select! {
            read = stream.read(&mut chunk) => read,
            // Nobody will ever ask what was written. Disconnected, QEMU throws it away by itself.
            () = told.closed() => return,
        };
        let Ok(length @ 1..) = read else { break };
        let mut ring = lock(&ring);
        let before = told.borrow().written();
        let mut written = before;
        for &byte in &chunk[..length] {
            match byte {
                b'\n' => {
                    written = ring.push(&line);
                    line.clear();
                }
                b'\r' => {}
                _ => {
                    line.push(byte);
                    if line.len() == CONSOLE_LINE_BYTES_MAX {
                        written = ring.push(&line);
                        line.clear();
                    }
                }
            }
        }
        drop(ring);
        if written > before {
            told.send_replace(State::Open(written));
        }
    }
    let mut written = told.borrow().written();
    if !line.is_empty() {
        written = lock(&ring).push(&line);
    }
    told.send_replace(State::Ended(written));
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn a_follower_sees_every_line_and_the_end() {
        let (mut guest, host) = tokio::io::duplex(64);
        let console = Console::drain(host);
        let mut reader = console.follow();
        guest.write_all(b"first\r\nsec").await.unwrap();
        assert_eq!(reader.next().await, Some(ConsoleLine::Line("first".into())));
        guest.write_all(b"ond\nlast without end").await.unwrap();
        assert_eq!(reader.next().await, Some(ConsoleLine::Line("second".into())));
        drop(guest);
        assert_eq!(reader.next().await, Some(ConsoleLine::Line("last without end".into())));
        assert_eq!(reader.next().await, None);
        assert_eq!(console.last_lines(2), ["second", "last without end"]);
    }

    #[tokio::test]
    async fn a_flood_without_readers_is_drained_and_bounded_and_a_late_reader_told_what_it_missed() {
        let (mut guest, host) = tokio::io::duplex(4096);
        let console = Console::drain(host);
        let count = 3 * CONSOLE_BYTES_MAX / 1000;
        for _ in 0..count {
            guest.write_all(&[b'x'; 999]).await.unwrap();
            guest.write_all(b"\n").await.unwrap();
        }
        drop(guest);
        // Waits for the end before the first line is read.
        let mut state = console.state.clone();
        state.wait_for(|state| matches!(state, State::Ended(_))).await.unwrap();
        let mut reader = console.follow();
        let Some(ConsoleLine::Lost(lost)) = reader.next().await else { panic!("nothing was lost") };
        let mut read = 0;
        while let Some(line) = reader.next().await {
            assert_eq!(line, ConsoleLine::Line("x".repeat(999)));
            read += 1;
        }
        assert_eq!(lost + read, count as u64);
        assert!(read * 1000 <= CONSOLE_BYTES_MAX as u64);
    }

    #[tokio::test]
    async fn empty_lines_are_bounded_too() {
        let lines = CONSOLE_BYTES_MAX;
        let console = Console::drain(std::io::Cursor::new(vec![b'\n'; lines]));
        let mut state = console.state.clone();
        state.wait_for(|state| *state == State::Ended(lines as u64)).await.unwrap();
        assert!(console.last_lines(usize::MAX).len() <= CONSOLE_BYTES_MAX / LINE_OVERHEAD);
    }

    #[tokio::test]
    async fn escape_sequences_of_the_guest_reach_no_terminal() {
        let console = Console::drain(&b"\x1b[2Jclean\ttab\n"[..]);
        assert_eq!(console.follow().next().await, Some(ConsoleLine::Line("\u{fffd}[2Jclean\ttab".into())));
    }

    #[tokio::test]
    async fn a_line_without_end_is_cut() {
        let console = Console::drain(std::io::Cursor::new(vec![b'x'; CONSOLE_LINE_BYTES_MAX + 1]));
        let mut reader = console.follow();
        assert_eq!(reader.next().await, Some(ConsoleLine::Line("x".repeat(CONSOLE_LINE_BYTES_MAX))));
        assert_eq!(reader.next().await, Some(ConsoleLine::Line("x".into())));
    }
}
