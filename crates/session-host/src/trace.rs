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
pub(crate) struct SharedTrace(Arc<Mutex<Trace>>);

impl SharedTrace {
    pub(crate) fn new(session: &Session) -> Self {
        Self(Arc::new(Mutex::new(Trace::new(session, Trace::EVENTS))))
    }

    pub(crate) fn note(&self, now: Timestamp, event: &Event) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).note(now, event);
    }

    /// A copy, to be written without keeping the owner waiting.
    pub(crate) fn copy(&self) -> Trace {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes the trace when this process panics, before whatever else happens then.
    pub(crate) fn write_on_panic(&self, folder: &Path) {
        let (trace, path) = (self.clone(), folder.join(CRASH_FILE));
        let then = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if let Err(error) = trace.write(&path) {
                tracing::error!(%error, "the trace can't be written");
            }
            then(panic);
        }));
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        // The panic may be the owner's own, in the middle of a note.
        let trace = match self.0.try_lock() {
            Ok(trace) => trace,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(io::Error::other("it is being written to")),
        };
        fs::write(path, serde_json::to_vec(&*trace)?)
    }
}
