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
/// again: that the host hung up sticks to what is known of the open file. It must never be asked twice then, since a
/// port without a host says "later" to a write for ever, and "ready" to whoever waits for that.
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
        Ok(Some(Self::new(file)?))
    }

    fn new(file: File) -> io::Result<Self> {
        #[expect(unsafe_code, reason = "registering is only sound for a descriptor that stays the same")]
        // SAFETY: a `File` is one descriptor from its opening to its drop, and `AsyncFd` owns this one.
        let file = unsafe { AsyncFd::register(file) }?;
        Ok(Self { file })
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
            let has_hung_up = ready.ready().is_read_closed();
            let unfilled = buffer.initialize_unfilled();
            match ready.try_io(|file| file.get_ref().read(unfilled)) {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                // There is nothing left of the host that hung up.
                Err(_would_block) if has_hung_up => return Poll::Ready(Ok(())),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.file.poll_write_ready(context))?;
            let has_hung_up = ready.ready().is_write_closed();
            match ready.try_io(|file| file.get_ref().write(bytes)) {
                Ok(written) => return Poll::Ready(written),
                Err(_would_block) if has_hung_up => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Err(_would_block) => {}
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A pipe with a name: like a port it can lose its other end, get another one, and then say "later".
    struct Pipe(tempfile::TempDir);

    impl Pipe {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mode = Mode::RUSR | Mode::WUSR;
            mknodat(CWD, folder.path().join("pipe"), FileType::Fifo, mode, 0).unwrap();
            Self(folder)
        }

        fn open(&self, write: bool) -> File {
            let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
            let path = self.0.path().join("pipe");
            OpenOptions::new().read(!write).write(write).custom_flags(flags).open(path).unwrap()
        }
    }

    /// Fails instead of waiting for a future that never lets its thread go.
    fn ends<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(20)).expect("it spins, or panicked");
    }

    #[test]
    fn a_host_that_hung_up_is_the_end_for_a_reader_though_another_has_come() {
        ends(async || {
            let pipe = Pipe::new();
            let mut port = Port::new(pipe.open(false)).unwrap();
            let mut host = pipe.open(true);
            host.write_all(b"last").unwrap();
            drop(host);
            let mut text = [0; 4];
            port.read_exact(&mut text).await.unwrap();
            assert_eq!(port.read(&mut text).await.unwrap(), 0);
            let _next = pipe.open(true);
            assert_eq!(port.read(&mut text).await.unwrap(), 0);
        });
    }

    #[test]
    fn a_host_that_hung_up_is_an_error_for_a_writer_though_another_has_come() {
        ends(async || {
            let pipe = Pipe::new();
            let host = pipe.open(false);
            let mut port = Port::new(pipe.open(true)).unwrap();
            drop(host);
            while !port.file.writable().await.unwrap().ready().is_write_closed() {}
            let _next = pipe.open(false);
            let filled = port.write_all(&vec![0; 1024 * 1024]).await;
            assert_eq!(filled.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        });
    }
}
