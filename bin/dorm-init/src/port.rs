//! A virtio-serial port as a byte stream.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The device node of the port with this name.
pub(crate) fn find(name: &str) -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("there are no virtio-serial ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim() == name) {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    anyhow::bail!("there is no virtio-serial port named {name}")
}

/// An open port with a host at its other end. A host that goes is an end of file, after which the port must be opened
/// again: that the host hung up sticks to the open file.
#[derive(Debug)]
pub(crate) struct Port {
    file: AsyncFd<File>,
}

impl Port {
    /// Opens the port if a host is connected to it; `None` if none is.
    pub(crate) fn open(path: &PathBuf) -> Result<Option<Self>> {
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        let mut state = [PollFd::new(&file, PollFlags::IN)];
        poll(&mut state, Some(&rustix::event::Timespec::default()))?;
        if state[0].revents().contains(PollFlags::HUP) {
            return Ok(None);
        }
        #[expect(unsafe_code, reason = "registering is only sound for a descriptor that stays the same")]
        // SAFETY: a `File` is one descriptor from its opening to its drop, and `AsyncFd` owns this one.
        let file = unsafe { AsyncFd::register(file) }?;
        Ok(Some(Self { file }))
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.file.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            match ready.try_io(|file| file.get_ref().read(unfilled)) {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.file.poll_write_ready(context))?;
            if let Ok(written) = ready.try_io(|file| file.get_ref().write(bytes)) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
