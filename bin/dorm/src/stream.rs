//! The streams of a container or of a process in one, joined with our own.

use std::io::Read;
use std::thread;

use dormouse_client::{Engine, Target, Upgraded};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Stderr, Stdout, WriteHalf};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::error::Failure;
use crate::terminal::{DetachKeys, Typed, size};

/// Bytes that are read at once.
const CHUNK: usize = 32 * 1024;

/// What the engine sends of a process: plain bytes of a terminal, else frames of standard output and error.
#[derive(Debug)]
pub(crate) struct Output {
    frames: Option<Frames>,
    out: Stdout,
    err: Stderr,
}

impl Output {
    pub(crate) fn new(tty: bool) -> Self {
        let frames = if tty { None } else { Some(Frames::default()) };
        Self { frames, out: tokio::io::stdout(), err: tokio::io::stderr() }
    }

    /// Writes what came to where it belongs.
    pub(crate) async fn write(&mut self, mut bytes: &[u8]) -> Result<(), Failure> {
        let Some(frames) = &mut self.frames else {
            self.out.write_all(bytes).await?;
            return Ok(self.out.flush().await?);
        };
        while let Some((stream, piece)) = frames.next(&mut bytes) {
            if stream == 2 {
                self.err.write_all(piece).await?;
                self.err.flush().await?;
            } else {
                self.out.write_all(piece).await?;
                self.out.flush().await?;
            }
        }
        Ok(())
    }
}

/// Takes frames apart: one byte of stream, three of nothing, four of length, then so many bytes.
#[derive(Debug, Default)]
struct Frames {
    head: [u8; 8],
    head_len: usize,
    left: usize,
}

impl Frames {
    /// The next piece of a stream; `None` once `bytes` are used up.
    fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
        while self.left == 0 {
            if self.head_len == self.head.len() {
                self.head_len = 0;
            }
            let (first, rest) = bytes.split_first()?;
            *bytes = rest;
            self.head[self.head_len] = *first;
            self.head_len += 1;
            if self.head_len == self.head.len() {
                let [_, _, _, _, length @ ..] = self.head;
                self.left = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
            }
        }
        if bytes.is_empty() {
            return None;
        }
        let (piece, rest) = bytes.split_at(self.left.min(bytes.len()));
        *bytes = rest;
        self.left -= piece.len();
        Some((self.head[0], piece))
    }
}

/// Whose streams they are, as the engine's paths have it: `containers` or `exec`, and an id.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    pub(crate) kind: &'static str,
    pub(crate) id: String,
}

/// Streams that are to be joined.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) stream: Upgraded,
    pub(crate) subject: Subject,
    pub(crate) tty: bool,
    /// Is our standard input sent?
    pub(crate) input: bool,
    pub(crate) detach: DetachKeys,
    /// Are signals passed on to the container?
    pub(crate) proxy: bool,
}

/// How joined streams came apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The other side is done.
    Output,
    /// The detach keys were typed.
    Detached,
    /// This signal ended us.
    Signal(u8),
}

impl Attached {
    /// Joins them until the other side is done, or somebody detaches.
    pub(crate) async fn join(self, engine: &Engine) -> Result<Ended, Failure> {
        let Self { stream, subject, tty, input, detach, proxy } = self;
        crate::terminal::planted_panic();
        let (mut from, to) = tokio::io::split(stream);
        let output = async {
            let mut output = Output::new(tty);
            let mut buffer = vec![0; CHUNK];
            loop {
                match from.read(&mut buffer).await {
                    Ok(0) => return Ok(Ended::Output),
                    Ok(length) => output.write(&buffer[..length]).await?,
                    Err(error) => return Err(Failure::Lost(format!("the stream broke: {error}"))),
                }
            }
        };
        let input = async {
            if input && send_input(to, if tty { detach } else { DetachKeys::none() }).await {
                return Ended::Detached;
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            ended = output => ended,
            ended = input => Ok(ended),
            never = resize_with_terminal(engine, &subject, tty) => never,
            ended = signals(engine, &subject, tty, proxy) => ended,
        }
    }
}

/// Sends our standard input, then closes that half. True if the detach keys were typed.
async fn send_input(mut to: WriteHalf<Upgraded>, mut detach: DetachKeys) -> bool {
    let mut typed = input();
    while let Some(bytes) = typed.recv().await {
        let (bytes, detached) = match detach.filter(&bytes) {
            Typed::Bytes(bytes) => (bytes, false),
            Typed::Detach(bytes) => (bytes, true),
        };
        // Whoever reads it may have read enough: that is no error of ours, and the output goes on.
        if to.write_all(&bytes).await.is_err() || to.flush().await.is_err() {
            break;
        }
        if detached {
            return true;
        }
    }
    let _ = to.shutdown().await;
    // Dropping this half while the other one is read would be of no consequence; keeping it is as good.
    std::future::pending().await
}

/// Our standard input. A thread of its own reads it: a read can't be taken back, and the process must be able to end
/// without it.
pub(crate) fn input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(4);
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        while let Ok(length @ 1..) = std::io::stdin().lock().read(&mut buffer) {
            if sender.blocking_send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Tells the terminal's size now and whenever it changes.
async fn resize_with_terminal(engine: &Engine, subject: &Subject, tty: bool) -> Result<Ended, Failure> {
    if tty {
        let mut changed = signal(SignalKind::window_change())?;
        loop {
            resize(engine, subject).await;
            changed.recv().await;
        }
    }
    std::future::pending().await
}

/// Tells the terminal's size. A process that is not there yet, or no more, has none.
pub(crate) async fn resize(engine: &Engine, subject: &Subject) {
    if let Some((rows, columns)) = size() {
        let target = Target::of(subject.kind, &subject.id, "/resize")
            .with("h", rows.to_string())
            .with("w", columns.to_string());
        let _ = engine.post::<Value>(&target.text()).await;
    }
}

/// Passes signals on to the container. Where none are passed on, those that would end us with the terminal in raw mode
/// end us in order.
async fn signals(engine: &Engine, subject: &Subject, tty: bool, proxy: bool) -> Result<Ended, Failure> {
    let (sender, mut received) = mpsc::channel::<(&'static str, u8)>(8);
    let watched: &[(&str, SignalKind)] = match (proxy, tty) {
        (true, _) => &[
            ("HUP", SignalKind::hangup()),
            ("INT", SignalKind::interrupt()),
            ("QUIT", SignalKind::quit()),
            ("TERM", SignalKind::terminate()),
            ("USR1", SignalKind::user_defined1()),
            ("USR2", SignalKind::user_defined2()),
        ],
        (false, true) => &[("HUP", SignalKind::hangup()), ("TERM", SignalKind::terminate())],
        (false, false) => &[],
    };
    let mut watchers = Vec::new();
    for (name, kind) in watched.iter().copied() {
        let (sender, mut signals) = (sender.clone(), signal(kind)?);
        let number = u8::try_from(kind.as_raw_value()).unwrap_or(0);
        watchers.push(tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
            while signals.recv().await.is_some() && sender.send((name, number)).await.is_ok() {}
        })));
    }
    while let Some((name, number)) = received.recv().await {
        if !proxy {
            return Ok(Ended::Signal(number));
        }
        let target = Target::of(subject.kind, &subject.id, "/kill").with("signal", name);
        // A container that is gone needs no signal.
        let _ = engine.post::<Value>(&target.text()).await;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_told_apart_wherever_reads_are_cut() {
        let sent = b"\x01\0\0\0\0\0\0\x03out\x02\0\0\0\0\0\0\x00\x02\0\0\0\0\0\0\x03err\x01\0\0\0\0\0\0\x01!";
        for cut in 1..sent.len() {
            let mut frames = Frames::default();
            let (mut out, mut err) = (Vec::new(), Vec::new());
            for mut bytes in sent.chunks(cut) {
                while let Some((stream, piece)) = frames.next(&mut bytes) {
                    if stream == 2 { &mut err } else { &mut out }.extend_from_slice(piece);
                }
            }
            assert_eq!(
                (out.as_slice(), err.as_slice()),
                (b"out!".as_slice(), b"err".as_slice()),
                "cut at {cut}"
            );
        }
    }
}
