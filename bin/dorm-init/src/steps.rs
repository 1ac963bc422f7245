//! The steps of the bring-up, as they begin: for progress, and for timings.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::agent::uptime_nanos;
use crate::console;

/// Who tells of them. Clones tell to the same listeners.
#[derive(Debug, Clone)]
pub(crate) struct Steps(Arc<watch::Sender<Vec<(String, u64)>>>);

impl Steps {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::channel(Vec::new()).0))
    }

    /// All so far, and their changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Vec<(String, u64)>> {
        self.0.subscribe()
    }

    /// One begins.
    pub(crate) fn begin(&self, name: &str) {
        let now = uptime_nanos();
        console::say(&format!("step {name} at {:.3}", Duration::from_nanos(now).as_secs_f64()));
        self.0.send_modify(|steps| steps.push((name.to_owned(), now)));
    }
}
