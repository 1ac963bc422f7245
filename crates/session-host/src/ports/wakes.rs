//! How often one source may wake a VM.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// Wakes of one source within [`WINDOW`]. A scanner that comes again and again must not keep a VM awake.
const WAKES_MAX: u32 = 6;
const WINDOW: Duration = Duration::from_secs(60);

/// Sources that are remembered. If there are more, strangers wait until one is forgotten.
const SOURCES_MAX: usize = 1024;

/// Who woke the VM lately.
#[derive(Debug, Default)]
pub(super) struct Wakes {
    sources: BTreeMap<IpAddr, (Instant, u32)>,
}

impl Wakes {
    /// May this source wake the VM now?
    pub(super) fn allow(&mut self, source: IpAddr, now: Instant) -> bool {
        self.sources.retain(|_, (since, _)| now.duration_since(*since) < WINDOW);
        if self.sources.len() >= SOURCES_MAX && !self.sources.contains_key(&source) {
            return false;
        }
        let (_, count) = self.sources.entry(source).or_insert((now, 0));
        *count += 1;
        *count <= WAKES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn a_source_that_comes_too_often_has_to_wait_and_others_do_not() {
        let (mut wakes, begun) = (Wakes::default(), Instant::now());
        for _ in 0..WAKES_MAX {
            assert!(wakes.allow(source(1), begun));
        }
        assert!(!wakes.allow(source(1), begun + WINDOW / 2));
        assert!(wakes.allow(source(2), begun + WINDOW / 2));
        assert!(wakes.allow(source(1), begun + WINDOW));
    }

    #[test]
    fn many_sources_take_no_more_memory_than_some() {
        let (mut wakes, begun) = (Wakes::default(), Instant::now());
        let allowed = (0..5000).filter(|number| wakes.allow(source(*number), begun)).count();
        assert_eq!(allowed, SOURCES_MAX);
        assert!(wakes.allow(source(9999), begun + WINDOW));
    }
}
