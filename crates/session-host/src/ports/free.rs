//! Numbers for ports whose clients named none, or several.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;

/// Numbers below those that Linux gives to outgoing connections, cut into blocks: sessions of different seeds mostly
/// have blocks of their own.
const FIRST: u16 = 20_000;
const BLOCK: u16 = 100;
const BLOCKS: u16 = 120;

/// Ranges in which the last number is remembered.
const RANGES_MAX: usize = 256;

/// A session's block, given out in turn, so that a number that was just given isn't given again. So are the numbers of each
/// range that a client names, as an engine does it.
#[derive(Debug)]
pub(super) struct FreePorts {
    first: u16,
    next: u16,
    /// By first and last number: the one that was given last.
    given: BTreeMap<(u16, u16), u16>,
}

impl FreePorts {
    pub(super) fn new(seed: u64) -> Self {
        let block = u16::try_from(seed % u64::from(BLOCKS)).unwrap_or_default();
        Self { first: FIRST + block * BLOCK, next: 0, given: BTreeMap::new() }
    }

    /// The next number that nobody has on this host, of those that are `unused` here; one of another block if the session's own
    /// has none.
    pub(super) fn next(&mut self, unused: impl Fn(u16) -> bool) -> Option<u16> {
        let is_free = |port: &u16| unused(*port) && is_free(Ipv4Addr::UNSPECIFIED.into(), *port);
        for _ in 0..BLOCK {
            let port = self.first + self.next;
            self.next = (self.next + 1) % BLOCK;
            if is_free(&port) {
                return Some(port);
            }
        }
        (self.first + BLOCK..FIRST + BLOCKS * BLOCK).chain(FIRST..self.first).find(is_free)
    }

    /// The next number of these that nobody has at this address, of those that are `unused` here. If there is none, one that
    /// nobody has now: whose it is doesn't run. If there is none of these either, the first: whoever wants it is told at its
    /// start why it can't be had.
    pub(super) fn among(
        &mut self,
        range: RangeInclusive<u16>,
        address: IpAddr,
        unused: impl Fn(u16) -> bool,
    ) -> u16 {
        let (first, last) = range.into_inner();
        let after = match self.given.get(&(first, last)) {
            Some(&given) if given < last => given + 1,
            _ => first,
        };
        let in_turn = || (after..=last).chain(first..after);
        let port = in_turn()
            .find(|port| unused(*port) && is_free(address, *port))
            .or_else(|| in_turn().find(|port| is_free(address, *port)))
            .unwrap_or(first);
        if self.given.len() >= RANGES_MAX {
            self.given.clear();
        }
        self.given.insert((first, last), port);
        port
    }
}

fn is_free(address: IpAddr, port: u16) -> bool {
    TcpListener::bind((address, port)).is_ok() && UdpSocket::bind((address, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_in_turn_and_none_that_is_taken() {
        let mut free = FreePorts::new(u64::from(std::process::id()));
        let first = free.next(|_| true).unwrap();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, first + 1));
        let second = free.next(|port| port != first + 2).unwrap();
        assert!(second > first + 2 || taken.is_err(), "{first} {second}");
        let mut round: Vec<_> = (0..BLOCK).filter_map(|_| free.next(|_| true)).collect();
        round.dedup();
        assert!(round.len() > usize::from(BLOCK / 2), "{round:?}");
        assert!(round.iter().all(|port| (FIRST..32_768).contains(port)));
        assert_eq!(free.next(|_| false), None);
        let others = |port| !(free.first..free.first + BLOCK).contains(&port);
        let other = FreePorts::new(u64::from(std::process::id())).next(others).unwrap();
        assert!(others(other) && (FIRST..FIRST + BLOCKS * BLOCK).contains(&other), "{other}");
    }

    #[test]
    fn numbers_of_a_range_come_in_turn_and_none_that_is_taken() {
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let mut free = FreePorts::new(0);
        let (first, taken) = (1..100)
            .find_map(|_| {
                let taken = TcpListener::bind((local, 0)).ok()?;
                let first = taken.local_addr().ok()?.port() - 1;
                (is_free(local, first) && is_free(local, first + 2)).then_some((first, taken))
            })
            .unwrap();
        let range = first..=first + 2;
        let mut given = || free.among(range.clone(), local, |_| true);
        assert_eq!([given(), given(), given()], [first, first + 2, first]);
        drop(taken);
        assert_eq!(given(), first + 1);
        assert_eq!(free.among(range, local, |_| false), first + 2, "whose it is doesn't run");
        let taken = TcpListener::bind((local, first)).unwrap();
        assert_eq!(free.among(first..=first, local, |_| true), first, "with none to give it is the first");
        drop(taken);
    }
}
