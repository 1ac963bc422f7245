//! Numbers for ports whose clients named none.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};

/// Numbers below those that Linux gives to outgoing connections, cut into blocks: sessions of different seeds mostly
/// have blocks of their own.
const FIRST: u16 = 20_000;
const BLOCK: u16 = 100;
const BLOCKS: u16 = 120;

/// A session's block, given out in turn, so that a number that was just given isn't given again.
#[derive(Debug)]
pub(super) struct FreePorts {
    first: u16,
    next: u16,
}

impl FreePorts {
    pub(super) fn new(seed: u64) -> Self {
        let block = u16::try_from(seed % u64::from(BLOCKS)).unwrap_or_default();
        Self { first: FIRST + block * BLOCK, next: 0 }
    }

    /// The next number that nobody has on this host, of those that are `unused` here.
    pub(super) fn next(&mut self, unused: impl Fn(u16) -> bool) -> Option<u16> {
        for _ in 0..BLOCK {
            let port = self.first + self.next;
            self.next = (self.next + 1) % BLOCK;
            let address = (Ipv4Addr::UNSPECIFIED, port);
            if unused(port) && TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
                return Some(port);
            }
        }
        None
    }
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
    }
}
