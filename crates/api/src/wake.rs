//! Wakes that are set beforehand.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Least time between two wakes of the same kind, in seconds.
pub const WAKE_EVERY_SECONDS_MIN: u64 = 60;

/// Most wakes that a session can have.
pub const WAKES_MAX: usize = 16;

/// When a session's VM is woken though nobody asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wake {
    /// By the wall clock; the next time, if there are several.
    pub at: Timestamp,
    /// And again each time after so many seconds; once when absent.
    #[serde(default)]
    pub every_seconds: Option<u64>,
}

impl Wake {
    /// Could it be kept?
    ///
    /// # Errors
    /// Why not, in words.
    pub fn check(&self) -> Result<(), String> {
        match self.every_seconds {
            Some(seconds) if seconds < WAKE_EVERY_SECONDS_MIN => Err(format!(
                "a VM can't be woken every {seconds} s: {WAKE_EVERY_SECONDS_MIN} s is the least time between two wakes"
            )),
            _ => Ok(()),
        }
    }

    /// What is left of it at `now`: those of its times that have come are over, however many they were.
    #[must_use]
    pub fn after(self, now: Timestamp) -> Option<Self> {
        if self.at > now {
            return Some(self);
        }
        let every = self.every_seconds.filter(|seconds| *seconds > 0)?;
        let late = u64::try_from(now.duration_since(self.at).as_secs()).unwrap_or(0);
        let step = Duration::from_secs((late / every + 1).checked_mul(every)?);
        Some(Self { at: self.at.checked_add(step).ok()?, ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    #[test]
    fn what_has_come_is_over_and_what_comes_again_is_set_for_the_next_time_that_is_to_come() {
        let once = Wake { at: at(10), every_seconds: None };
        assert_eq!(once.after(at(9)), Some(once));
        assert_eq!(once.after(at(10)), None);
        let hourly = Wake { at: at(0), every_seconds: Some(3600) };
        for (now, next) in [(-1, 0), (0, 3600), (3599, 3600), (3600, 7200), (10 * 3600 + 1, 11 * 3600)] {
            assert_eq!(hourly.after(at(now)).map(|wake| wake.at), Some(at(next)), "{now}");
        }
        let never_again = Wake { at: at(0), every_seconds: Some(u64::MAX) };
        assert_eq!(never_again.after(at(1)), None);
    }

    #[test]
    fn a_vm_is_not_woken_all_the_time() {
        for (seconds, is_fine) in [(0, false), (59, false), (60, true), (86_400, true)] {
            let wake = Wake { at: at(0), every_seconds: Some(seconds) };
            assert_eq!(wake.check().is_ok(), is_fine, "{seconds}");
        }
    }
}
