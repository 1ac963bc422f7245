//! Checksums of snapshots, made in the background.
//!
//! A checksum writes hundreds of megabytes out and reads them. Whoever wakes the VM in the first moments of its sleep would wait
//! for the disk behind that, and needs none of it; so it is put off a little, unless the host has to go.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long a snapshot is left alone first. A VM that was just put to sleep is the likeliest to be woken.
const PUT_OFF: Duration = Duration::from_secs(2);

/// How much the making of a checksum yields to others, see nice(2).
const NICENESS: i32 = 19;

/// Those of one session.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sums {
    making: TaskTracker,
    at_once: CancellationToken,
}

impl Sums {
    /// Has a checksum made by `make`, in a thread of its own that yields to all others.
    pub(super) fn begin(&self, make: impl FnOnce() + Send + 'static) {
        let at_once = self.at_once.clone();
        let token = self.making.token();
        self.making.spawn(async move {
            tokio::select! {
                () = sleep(PUT_OFF) => {}
                () = at_once.cancelled() => {}
            }
            let thread = std::thread::Builder::new().name("checksum".to_owned()).spawn(move || {
                let _token = token;
                yield_to_others();
                make();
            });
            if let Err(error) = thread {
                tracing::warn!(%error, "no checksum of the memory");
            }
        });
    }

    /// Waits until all are made, of which none is put off any more. Returns whether they were within the bound.
    pub(crate) async fn finish(&self, bound: Duration) -> bool {
        self.at_once.cancel();
        self.making.close();
        timeout(bound, self.making.wait()).await.is_ok()
    }
}

/// From now on whatever else runs comes before this thread, for the processors and for the disk.
fn yield_to_others() {
    // On Linux the calling thread's alone, see setpriority(2); the disk follows, see ioprio_set(2).
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::debug!(%error, "can't be nice");
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_checksum_is_put_off_and_then_made() {
        let (sender, mut made) = oneshot::channel();
        let sums = Sums::default();
        let begun = Instant::now();
        sums.begin(move || sender.send(()).unwrap());
        let early = timeout(PUT_OFF - Duration::from_millis(10), &mut made).await;
        assert!(early.is_err(), "whoever wakes the VM now waits for it");
        made.await.unwrap();
        assert!(begun.elapsed() >= PUT_OFF);
    }

    #[tokio::test]
    async fn a_host_that_has_to_go_puts_no_checksum_off() {
        let (sender, mut made) = oneshot::channel();
        let sums = Sums::default();
        let begun = Instant::now();
        sums.begin(move || sender.send(()).unwrap());
        assert!(sums.finish(PUT_OFF * 10).await);
        assert!(begun.elapsed() < PUT_OFF, "it is put off though the host has to go");
        made.try_recv().expect("the host goes without it");
    }
}
