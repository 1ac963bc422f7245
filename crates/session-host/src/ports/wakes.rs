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
    sources: BTreeMap<IpAddr, Source>,
}

/// One that woke the VM.
#[derive(Debug)]
struct Source {
    since: Instant,
    count: u32,
    /// The latest VM after which it came.
    generation: u64,
}

impl Wakes {
    /// May this source wake the VM that follows this one? Of all that it opens at once, none is more of a wake than the first.
    pub(super) fn allow(&mut self, source: IpAddr, generation: u64, now: Instant) -> bool {
        self.sources.retain(|_, source| now.duration_since(source.since) < WINDOW);
        if self.sources.len() >= SOURCES_MAX && !self.sources.contains_key(&source) {
            return false;
        }
        let source = self.sources.entry(source).or_insert(Source { since: now, count: 0, generation });
        if source.count == 0 || source.generation != generation {
            source.count += 1;
            source.generation = generation;
        }
        source.count <= WAKES_MAX
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
        for generation in 0..u64::from(WAKES_MAX) {
            assert!(wakes.allow(source(1), generation, begun));
        }
        assert!(!wakes.allow(source(1), 6, begun + WINDOW / 2));
        assert!(!wakes.allow(source(1), 6, begun + WINDOW / 2));
        assert!(wakes.allow(source(2), 6, begun + WINDOW / 2));
        assert!(wakes.allow(source(1), 6, begun + WINDOW));
    }

    #[test]
    fn connections_that_come_at_once_are_one_wake() {
        let (mut wakes, begun) = (Wakes::default(), Instant::now());
        for generation in 0..u64::from(WAKES_MAX) {
            assert!((0..50).all(|_| wakes.allow(source(1), generation, begun)), "{generation}");
        }
        assert!(!wakes.allow(source(1), u64::from(WAKES_MAX), begun));
    }

    #[test]
    fn many_sources_take_no_more_memory_than_some() {
        let (mut wakes, begun) = (Wakes::default(), Instant::now());
        let allowed = (0..5000).filter(|number| wakes.allow(source(*number), 0, begun)).count();
        assert_eq!(allowed, SOURCES_MAX);
        assert!(wakes.allow(source(9999), 0, begun + WINDOW));
    }
}
