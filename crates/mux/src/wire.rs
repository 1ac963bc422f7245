//! What lies under a connection: whether the peer takes what is sent, and frames that yamux has no call for.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The bytes below yamux.
#[derive(Debug)]
pub(crate) struct Wire<T> {
    io: T,
    sending: Sending,
}

/// How sending goes. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sending(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The last piece wasn't taken.
    is_stuck: bool,
    /// Our own frames, which go before what yamux sends next.
    own: Vec<u8>,
}

impl<T> Wire<T> {
    pub(crate) fn new(io: T, sending: Sending) -> Self {
        Self { io, sending }
    }
}

impl Sending {
    /// Has everything been taken that yamux had to send when it was last asked? Only then is no frame half-way.
    pub(crate) fn is_done(&self) -> bool {
        let state = self.state();
        !state.is_stuck && state.own.is_empty()
    }

    /// Ends a stream both ways, by yamux's specification: a data frame without data, with the flag RST. Goes with the next
    /// flush; only to be asked for when all is done.
    pub(crate) fn reset(&self, stream: u32) {
        let [a, b, c, d] = stream.to_be_bytes();
        self.state().own.extend([0, 0, 0, 8, a, b, c, d, 0, 0, 0, 0]);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: AsyncWrite + Unpin> Wire<T> {
    fn poll_own(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.sending.state();
        while !state.own.is_empty() {
            let count = ready!(Pin::new(&mut self.io).poll_write(context, &state.own))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            state.own.drain(..count);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Wire<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Wire<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = match self.poll_own(context)? {
            Poll::Ready(()) => Pin::new(&mut self.io).poll_write(context, bytes),
            Poll::Pending => Poll::Pending,
        };
        self.sending.state().is_stuck = written.is_pending();
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_own(context))?;
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_own(context))?;
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
