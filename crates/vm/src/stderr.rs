//! The last words of a child: its stderr, drained into a bounded tail.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};

/// How much of the end is kept.
const TAIL_BYTES_MAX: usize = 8 * 1024;

/// What a child wrote last. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct StderrTail(Arc<Mutex<Vec<u8>>>);

impl StderrTail {
    /// Drains `stream` until it ends; the handle is done when it has.
    pub(crate) fn drain(
        stream: impl AsyncRead + Unpin + Send + 'static,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let tail = Self::default();
        let drained = tail.clone();
        let task = tokio::spawn(async move { drained.fill(stream).await });
        (tail, task)
    }

    /// Drains the stderr of a child that was started with a pipe there.
    pub(crate) fn of(child: &mut tokio::process::Child) -> (Self, tokio::task::JoinHandle<()>) {
        match child.stderr.take() {
            Some(stderr) => Self::drain(stderr),
            None => Self::drain(tokio::io::empty()),
        }
    }

    async fn fill(&self, mut stream: impl AsyncRead + Unpin) {
        let mut chunk = [0; 1024];
        while let Ok(length @ 1..) = stream.read(&mut chunk).await {
            let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            tail.extend_from_slice(&chunk[..length]);
            let surplus = tail.len().saturating_sub(TAIL_BYTES_MAX);
            tail.drain(..surplus);
        }
    }

    /// The text so far, without the lines that say nothing about this VM.
    #[must_use]
    pub fn text(&self) -> String {
        let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&tail);
        let lines: Vec<&str> =
            text.lines().map(str::trim_end).filter(|line| !line.is_empty() && !is_noise(line)).collect();
        lines.join("\n")
    }
}

/// QEMU packages without the graphical modules complain of it at every start, and a card without a network of what it
/// is; passt complains of a missing syslog.
fn is_noise(line: &str) -> bool {
    line.starts_with("qemu: module ui-")
        || line.ends_with("warning: hub 0 is not connected to host network")
        || (line.starts_with("Failed to send ") && line.ends_with(" syslog"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_end_is_kept_and_noise_left_out() {
        let mut text = "x".repeat(3 * TAIL_BYTES_MAX);
        text.push_str("\nqemu: module ui-ui-gtk not found, do you want to install it?\nlast words\n");
        let (tail, task) = StderrTail::drain(std::io::Cursor::new(text.into_bytes()));
        task.await.unwrap();
        let text = tail.text();
        assert!(text.len() <= TAIL_BYTES_MAX && text.ends_with("xx\nlast words"), "{text}");
    }
}
