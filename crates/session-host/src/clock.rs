//! The core's clock: milliseconds of `CLOCK_BOOTTIME`, which counts the time for which the host itself slept.

use dormouse_lifecycle::Timestamp;
use rustix::time::{ClockId, clock_gettime};

/// Now, for the core.
pub(crate) fn now() -> Timestamp {
    let time = clock_gettime(ClockId::Boottime);
    Timestamp::from_millis(time.tv_sec.cast_unsigned() * 1000 + time.tv_nsec.cast_unsigned() / 1_000_000)
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
