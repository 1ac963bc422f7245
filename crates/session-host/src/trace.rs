//! The last events of the lifecycle core, kept where a crash of this process can still write them.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use dormouse_lifecycle::{Event, Session, Timestamp, Trace};

/// The file that a crash leaves in the session's folder.
pub(crate) const CRASH_FILE: &str = "trace.json";

/// A trace that the owner notes in and anybody may read. Clones are the same trace.
#[derive(Debug, Clone)]
pub(crate) struct SharedTrace {
    trace: Arc<Mutex<Trace>>,
    /// Where a crash leaves it.
    path: Arc<Path>,
}

impl SharedTrace {
    pub(crate) fn new(session: &Session, folder: &Path) -> Self {
        let trace = Arc::new(Mutex::new(Trace::new(session, Trace::EVENTS)));
        Self { trace, path: folder.join(CRASH_FILE).into() }
    }

    /// What an earlier host left that crashed.
    pub(crate) fn left_by_a_crash(&self) -> io::Result<Vec<u8>> {
        fs::read(&self.path)
    }

    pub(crate) fn note(&self, now: Timestamp, event: &Event) {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).note(now, event);
    }

    /// A copy, to be written without keeping the owner waiting.
    pub(crate) fn copy(&self) -> Trace {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes the trace when this process panics, before whatever else happens then.
    pub(crate) fn write_on_panic(&self) {
        let trace = self.clone();
        let then = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if let Err(error) = trace.write() {
                tracing::error!(%error, "the trace can't be written");
            }
            then(panic);
        }));
    }

    pub(crate) fn write(&self) -> io::Result<()> {
        // The panic may be the owner's own, in the middle of a note.
        let trace = match self.trace.try_lock() {
            Ok(trace) => trace,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(io::Error::other("it is being written to")),
        };
        fs::write(&self.path, serde_json::to_vec(&*trace)?)
    }
}
