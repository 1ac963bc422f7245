//! A connection that has become a byte stream, and how long anybody is waited for.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::client::{BUFFER_BYTES, Broken, until_hung_up};
use crate::engine::Lease;
use crate::relay::{QUIET_AFTER, STALLED_AFTER};

/// How long the engine may take to read the last bytes of a client that has gone.
const LAST_BYTES_WITHIN: Duration = Duration::from_secs(10);

/// Knows whether anybody is waited for longer than a VM is to be kept awake for.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    /// How many are.
    overdue: watch::Sender<usize>,
}

/// Somebody who is waited for too long, until this is dropped.
#[derive(Debug)]
pub(crate) struct Overdue<'a>(&'a Patience);

impl Drop for Overdue<'_> {
    fn drop(&mut self) {
        self.0.overdue.send_modify(|count| *count -= 1);
    }
}

/// How an engine is held for a request.
enum Held<L> {
    Strong(L),
    Weak(L),
    /// It is going, and the request ends with it.
    Over,
}

impl Patience {
    /// Does `work`, however long it takes; if that is longer than `limit`, patience is lost until it is done.
    pub(crate) async fn of<T>(&self, limit: Duration, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = sleep(limit) => {}
        }
        let _overdue = self.lose();
        work.await
    }

    /// Patience is lost for as long as this is kept.
    pub(crate) fn lose(&self) -> Overdue<'_> {
        self.overdue.send_modify(|count| *count += 1);
        Overdue(self)
    }

    /// Holds the engine for a request until this is dropped; weakly while patience is lost.
    pub(crate) async fn keep<L: Lease>(&self, lease: L) -> Infallible {
        let mut overdue = self.overdue.subscribe();
        let mut held = Held::Strong(lease);
        loop {
            // Waiting fails without a sender only, which is here.
            held = match held {
                Held::Strong(lease) => {
                    let _ = overdue.wait_for(|count| *count > 0).await;
                    lease.weaken().await.map_or(Held::Over, Held::Weak)
                }
                Held::Weak(lease) => {
                    let _ = overdue.wait_for(|count| *count == 0).await;
                    lease.strengthen().await.map_or(Held::Over, Held::Strong)
                }
                Held::Over => pending().await,
            };
        }
    }
}

/// Bytes both ways, each direction to its own end. `pending` is what the client has sent already.
pub(crate) async fn splice(
    reader: &mut ReadHalf<'_>,
    writer: &mut WriteHalf<'_>,
    pending: &mut BytesMut,
    from_engine: &mut (impl AsyncRead + Unpin),
    to_engine: &mut (impl AsyncWrite + Unpin),
    patience: &Patience,
) -> Result<(), Broken> {
    let client = reader.as_ref().as_fd().try_clone_to_owned()?;
    let mut up = Up { bytes: pending, reader, engine: to_engine };
    let client_gone = async {
        let sent = up.run();
        tokio::pin!(sent);
        tokio::select! {
            // An engine that reads no more may still have much to say: only its own end is the end.
            _ = &mut sent => until_hung_up(&client).await,
            gone = until_hung_up(&client) => {
                let _ = timeout(LAST_BYTES_WITHIN, sent).await;
                gone
            }
        }
    };
    let down = async {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = from_engine.read(&mut buffer).await?;
            if count == 0 {
                break;
            }
            patience.of(STALLED_AFTER, writer.write_all(&buffer[..count])).await?;
        }
        Ok::<_, Broken>(writer.shutdown().await?)
    };
    let done = tokio::select! {
        done = down => done,
        gone = client_gone => return Err(gone),
    };
    if let Err(error) = done {
        // Who can't be written to any more may have said something before.
        let _ = timeout(LAST_BYTES_WITHIN, up.rest()).await;
        return Err(error);
    }
    tokio::select! {
        () = up.rest() => Ok(()),
        gone = until_hung_up(&client) => {
            let _ = timeout(LAST_BYTES_WITHIN, up.rest()).await;
            Err(gone)
        }
    }
}

/// The client's direction of a stream. What it does can be broken off at any time, and nothing is lost.
struct Up<'a, 'client, W> {
    bytes: &'a mut BytesMut,
    reader: &'a mut ReadHalf<'client>,
    engine: &'a mut W,
}

impl<W: AsyncWrite + Unpin> Up<'_, '_, W> {
    /// Sends all on until the client has sent its last.
    async fn run(&mut self) -> io::Result<()> {
        while self.part().await? {}
        Ok(())
    }

    /// The same for an engine that has said its last, and that still reads, or is gone; which of the two only the attempt
    /// to write tells. So a client that has nothing to send for some time is through as well.
    async fn rest(&mut self) {
        while let Ok(Ok(true)) = timeout(QUIET_AFTER, self.part()).await {}
    }

    /// Sends on what there is, and waits for more. `false`: there was no more.
    async fn part(&mut self) -> io::Result<bool> {
        self.engine.write_all_buf(self.bytes).await?;
        self.engine.flush().await?;
        self.bytes.reserve(BUFFER_BYTES);
        if self.reader.read_buf(self.bytes).await? > 0 {
            return Ok(true);
        }
        self.engine.shutdown().await?;
        Ok(false)
    }
}
