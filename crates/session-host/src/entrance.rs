//! Where clients come in. It is closed before a host asks to leave: who comes then waits in the socket, for the next host.
//!
//! ```text
//! pass ─► accept ─► the client is counted ─► the pass is given back
//! close ─► nobody gets a pass ─► all that there were are back: whoever came in is counted
//! ```

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// More listeners than a session can have: each published port's, and its own two.
const LISTENERS_MAX: u32 = 4096;

/// The entrance of one host. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Entrance {
    open: Arc<watch::Sender<bool>>,
    passes: Arc<Semaphore>,
}

impl Default for Entrance {
    fn default() -> Self {
        Self {
            open: Arc::new(watch::channel(true).0),
            passes: Arc::new(Semaphore::new(LISTENERS_MAX as usize)),
        }
    }
}

/// As long as this is held, somebody may be coming in.
#[derive(Debug)]
pub(crate) struct Pass {
    open: watch::Receiver<bool>,
    _back: OwnedSemaphorePermit,
}

impl Entrance {
    /// Waits until it is open. `None`: it never will be.
    pub(crate) async fn pass(&self) -> Option<Pass> {
        let mut open = self.open.subscribe();
        loop {
            open.wait_for(|open| *open).await.ok()?;
            let back = Arc::clone(&self.passes).acquire_owned().await.ok()?;
            // Closed meanwhile: `close` may have counted the passes already.
            if *open.borrow() {
                return Some(Pass { open, _back: back });
            }
        }
    }

    /// From now on nobody comes in, and who did has been counted.
    pub(crate) async fn close(&self) {
        self.open.send_replace(false);
        let _ = self.passes.acquire_many(LISTENERS_MAX).await;
    }

    /// Lets clients come in again.
    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }
}

impl Pass {
    /// Does `coming`, unless the entrance is closed before it is done.
    pub(crate) async fn unless_closed<T>(&mut self, coming: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            came = coming => Some(came),
            _ = self.open.wait_for(|open| !open) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::task::yield_now;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn whoever_is_coming_in_when_it_closes_is_counted_before_it_is_closed() {
        let entrance = Entrance::default();
        let mut pass = entrance.pass().await.unwrap();
        assert_eq!(pass.unless_closed(async { 1 }).await, Some(1));
        let closing = tokio::spawn({
            let entrance = entrance.clone();
            async move { entrance.close().await }
        });
        assert_eq!(pass.unless_closed(std::future::pending::<()>()).await, None);
        yield_now().await;
        assert!(!closing.is_finished(), "somebody is still coming in");
        drop(pass);
        closing.await.unwrap();
        let waiting = timeout(Duration::from_secs(1), entrance.pass()).await;
        assert!(waiting.is_err(), "nobody comes in any more");
        entrance.open();
        assert!(entrance.pass().await.is_some());
    }
}
