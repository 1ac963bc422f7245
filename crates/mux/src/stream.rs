//! One stream of a connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

/// A stream: tokio's traits, half-close kept. Dropped, it is over both ways, and the peer hears of that.
#[derive(Debug)]
pub struct Stream {
    // In this order: the owner of the connection is told when the stream is gone.
    inner: Compat<yamux::Stream>,
    farewell: Farewell,
    /// Our side was ended.
    is_shut: bool,
}

/// A stream that was dropped, for the connection's owner.
#[derive(Debug)]
pub(crate) struct Left {
    /// Its place, to be given back once yamux counts it no more.
    pub(crate) _permit: Option<OwnedSemaphorePermit>,
    /// Its number, if the peer still has to be told that it is over.
    pub(crate) reset: Option<u32>,
}

/// Tells the owner when it is dropped.
#[derive(Debug)]
struct Farewell {
    permit: Option<OwnedSemaphorePermit>,
    reset: Option<u32>,
    owner: mpsc::UnboundedSender<Left>,
}

impl Stream {
    pub(crate) fn new(
        stream: yamux::Stream,
        permit: Option<OwnedSemaphorePermit>,
        owner: mpsc::UnboundedSender<Left>,
    ) -> Self {
        let farewell = Farewell { permit, reset: None, owner };
        Self { inner: stream.compat(), farewell, is_shut: false }
    }

    /// Has the peer dropped the stream, or has the connection ended? What had come before can still be read. Not told of a
    /// stream whose own side was ended: that the peer ended its own as well looks the same.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.farewell.owner.is_closed() || !self.is_shut && self.inner.get_ref().is_closed()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // yamux tells the peer of a stream that is dropped while it is open. Of one whose own side was ended it says nothing
        // more, and a peer that is silent would never learn that nobody listens.
        let stream = self.inner.get_ref();
        self.farewell.reset = stream.is_write_closed().then(|| stream.id().val());
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        let (permit, reset) = (self.permit.take(), self.reset);
        if permit.is_some() || reset.is_some() {
            let _ = self.owner.send(Left { _permit: permit, reset });
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.is_shut = true;
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
