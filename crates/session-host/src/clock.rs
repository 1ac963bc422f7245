//! The core's clock: milliseconds of `CLOCK_BOOTTIME`, which counts the time for which the host itself slept.
//!
//! It runs on tokio's clock, so that it stands still wherever a test has stopped that one.

use std::sync::LazyLock;
use std::time::Duration;

use dormouse_lifecycle::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, sleep};

/// tokio's timers don't count the time for which the host sleeps: so none is longer than this, and a deadline that
/// passed meanwhile is seen so soon after the host woke.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// One moment: on tokio's clock, on the core's, and how long the host had slept by then.
static ORIGIN: LazyLock<(Instant, Duration, Duration)> =
    LazyLock::new(|| (Instant::from_std(std::time::Instant::now()), read(ClockId::Boottime), slept()));

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    let (seconds, nanos) = (time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned());
    Duration::from_secs(seconds) + Duration::from_nanos(nanos)
}

/// For how long the host has slept since it was booted.
fn slept() -> Duration {
    read(ClockId::Boottime).saturating_sub(read(ClockId::Monotonic))
}

/// Now, for the core.
pub(crate) fn now() -> Timestamp {
    let (origin, boottime, slept_before) = *ORIGIN;
    let now = Instant::now();
    let awake = boottime + now.saturating_duration_since(origin) - origin.saturating_duration_since(now);
    let now = awake + slept().saturating_sub(slept_before);
    Timestamp::from_millis(u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// Waits until a deadline has come; for ever if there is none.
pub(crate) async fn due(deadline: Option<Timestamp>) {
    let Some(deadline) = deadline else { return std::future::pending().await };
    loop {
        let left = deadline.since(now());
        if left.is_zero() {
            return;
        }
        sleep(left.min(LOOK_EVERY)).await;
    }
}

/// A point of the core's time as a point of the wall clock's.
pub(crate) fn to_wall(time: Timestamp) -> jiff::Timestamp {
    let distance = i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
        - i64::try_from(now().as_millis()).unwrap_or(i64::MAX);
    let wall = jiff::Timestamp::now().as_millisecond().saturating_add(distance);
    jiff::Timestamp::from_millisecond(wall).unwrap_or(jiff::Timestamp::MAX)
}

/// A point of the wall clock's time as a point of the core's; what lies before the host's boot is its boot.
pub(crate) fn from_wall(wall: jiff::Timestamp) -> Timestamp {
    let distance = wall.as_millisecond() - jiff::Timestamp::now().as_millisecond();
    Timestamp::from_millis(now().as_millis().saturating_add_signed(distance))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_is_the_same_to_the_millisecond_or_two() {
        let later = Timestamp::from_millis(now().as_millis() + 90_000);
        let back = from_wall(to_wall(later));
        assert!(back.as_millis().abs_diff(later.as_millis()) <= 2);
    }
}
