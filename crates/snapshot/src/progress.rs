//! How far something has come that takes long on a slow disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Written by who does it, read now and then by who tells of it.
#[derive(Debug, Default)]
pub struct Progress {
    step: Mutex<Option<&'static str>>,
    /// Bytes that are done, of how many.
    pub(crate) done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// Another step begins, of so many bytes; 0 when that isn't known.
    pub(crate) fn begin(&self, step: &'static str, total: u64) {
        *self.step.lock().unwrap_or_else(PoisonError::into_inner) = Some(step);
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// The present step and how much of it is done, in words; `None` before the first.
    #[must_use]
    pub fn words(&self) -> Option<String> {
        let step = (*self.step.lock().unwrap_or_else(PoisonError::into_inner))?;
        let (done, total) = (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        let percent = done.saturating_mul(100).checked_div(total);
        // What is copied may have grown since it was looked at.
        Some(percent.map_or_else(|| step.to_owned(), |percent| format!("{step}, {} %", percent.min(100))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_told_with_its_part_where_that_is_known() {
        let progress = Progress::default();
        assert_eq!(progress.words(), None);
        progress.begin("checking", 0);
        assert_eq!(progress.words().as_deref(), Some("checking"));
        progress.begin("copying", 200);
        progress.done.fetch_add(50, Ordering::Relaxed);
        assert_eq!(progress.words().as_deref(), Some("copying, 25 %"));
        progress.done.fetch_add(500, Ordering::Relaxed);
        assert_eq!(progress.words().as_deref(), Some("copying, 100 %"));
    }
}
