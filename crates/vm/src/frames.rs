//! Keeps a guest's frames from the host's loopback.
//!
//! passt maps no address of ours to the host's loopback when it is told so; but a root in the guest can write frames
//! whose destination *is* 127.0.0.1 or ::1, and passt (seen with that of Debian 12) connects to it like to any other.
//! So every frame passes here, on its way from QEMU to passt: those to the host itself are dropped.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

/// Longest frame that QEMU sends (its `NET_BUFSIZE`).
const FRAME_BYTES_MAX: usize = 4096 + 65536;
/// Each frame is led by its length, 4 bytes, big-endian.
const LENGTH_BYTES: usize = 4;
const BUFFER_BYTES: usize = 4 * (LENGTH_BYTES + FRAME_BYTES_MAX);

/// May this frame of the guest's leave it? Everything that passt would not even look at may.
#[must_use]
pub fn may_leave(frame: &[u8]) -> bool {
    let Some((ether_type, packet)) = frame.get(12..14).zip(frame.get(14..)) else { return true };
    match ether_type {
        [0x08, 0x00] => destination(packet, 16).is_none_or(|bytes| !is_host_v4(Ipv4Addr::from(bytes))),
        [0x86, 0xdd] => destination(packet, 24).is_none_or(|bytes| !is_host_v6(Ipv6Addr::from(bytes))),
        _ => true,
    }
}

fn destination<const LENGTH: usize>(packet: &[u8], offset: usize) -> Option<[u8; LENGTH]> {
    packet.get(offset..)?.first_chunk().copied()
}

/// "This host" (RFC 1122): all of 127/8, and 0/8, which Linux connects to loopback.
fn is_host_v4(address: Ipv4Addr) -> bool {
    matches!(address.octets()[0], 0 | 127)
}

/// `::`, `::1`, and every form in which an IPv4 address can be written as one of IPv6 and be connected to as such.
fn is_host_v6(address: Ipv6Addr) -> bool {
    matches!(address.segments(), [0, 0, 0, 0, 0, 0 | 0xffff, ..])
}

/// Carries frames between a guest's QEMU and its network helper until either is gone. Blocks.
///
/// # Errors
/// When a socket fails, or QEMU sends what are no frames.
pub fn relay(guest: UnixStream, helper: UnixStream) -> io::Result<()> {
    let (ended, end) = mpsc::channel();
    let (mut from_helper, mut to_guest) = (helper.try_clone()?, guest.try_clone()?);
    let (from_guest, to_helper) = (guest.try_clone()?, helper.try_clone()?);
    std::thread::scope(|scope| {
        let back = ended.clone();
        scope.spawn(move || back.send(io::copy(&mut from_helper, &mut to_guest).map(drop)));
        scope.spawn(move || ended.send(filter(from_guest, to_helper)));
        let first = end.recv();
        // So that the other direction ends too.
        let _ = guest.shutdown(Shutdown::Both);
        let _ = helper.shutdown(Shutdown::Both);
        first
    })
    .unwrap_or(Ok(()))
    .or_else(|error| match error.kind() {
        // How a socket reports a peer that went with unread bytes in its buffer.
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error),
    })
}

/// Passes on the frames that may leave.
fn filter(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut filled = 0;
    loop {
        let length = match from.read(&mut buffer[filled..]) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        filled += length;
        let whole = pass_on(&buffer[..filled], &mut to)?;
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// Writes the whole frames in `bytes`, neighbours at once; tells how many bytes they are.
fn pass_on(bytes: &[u8], to: &mut impl Write) -> io::Result<usize> {
    let mut written = 0;
    let mut position = 0;
    while let Some(length) = bytes.get(position..).and_then(|rest| rest.first_chunk()) {
        let length = u32::from_be_bytes(*length) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(io::Error::new(ErrorKind::InvalidData, "a frame is too long"));
        }
        let start = position + LENGTH_BYTES;
        let Some(frame) = bytes.get(start..start + length) else { break };
        if !may_leave(frame) {
            to.write_all(&bytes[written..position])?;
            written = start + length;
        }
        position = start + length;
    }
    to.write_all(&bytes[written..position])?;
    Ok(position)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame_to(target: &str) -> Vec<u8> {
        let mut frame = vec![0x52; 12];
        match target.parse().unwrap() {
            std::net::IpAddr::V4(target) => {
                frame.extend_from_slice(&[0x08, 0x00]);
                frame.extend_from_slice(&[0x45; 16]);
                frame.extend_from_slice(&target.octets());
            }
            std::net::IpAddr::V6(target) => {
                frame.extend_from_slice(&[0x86, 0xdd]);
                frame.extend_from_slice(&[0x60; 24]);
                frame.extend_from_slice(&target.octets());
            }
        }
        frame
    }

    #[test]
    fn only_frames_to_the_host_itself_are_dropped() {
        for target in ["127.0.0.1", "127.255.255.255", "0.0.0.0", "0.1.2.3", "::1", "::", "::ffff:127.0.0.1"]
        {
            assert!(!may_leave(&frame_to(target)), "{target}");
        }
        for target in ["10.0.2.2", "192.0.2.7", "255.255.255.255", "128.0.0.1", "fe80::1", "2001:db8::1"] {
            assert!(may_leave(&frame_to(target)), "{target}");
        }
    }

    #[test]
    fn a_frame_that_is_too_long_ends_the_relay() {
        let bytes = [u32::MAX.to_be_bytes().as_slice(), &[0; 64]].concat();
        assert_eq!(filter(&bytes[..], Vec::new()).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    /// Gives bytes in pieces of these sizes.
    struct Pieces<'a>(&'a [u8], std::iter::Cycle<std::vec::IntoIter<usize>>);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let size = self.1.next().unwrap_or(1).min(self.0.len()).min(buffer.len());
            let (head, tail) = self.0.split_at(size);
            buffer[..size].copy_from_slice(head);
            self.0 = tail;
            Ok(size)
        }
    }

    proptest! {
        #[test]
        fn what_comes_out_are_exactly_the_frames_that_may_leave_however_they_are_cut(
            frames in proptest::collection::vec(
                prop_oneof![
                    Just(frame_to("127.0.0.1")),
                    Just(frame_to("::1")),
                    Just(frame_to("192.0.2.7")),
                    proptest::collection::vec(any::<u8>(), 0..60),
                ],
                0..20,
            ),
            sizes in proptest::collection::vec(1_usize..100, 1..20),
        ) {
            let stream = |frames: &mut dyn Iterator<Item = &Vec<u8>>| -> Vec<u8> {
                frames.flat_map(|frame| [&(frame.len() as u32).to_be_bytes()[..], frame].concat()).collect()
            };
            let mut out = Vec::new();
            filter(Pieces(&stream(&mut frames.iter()), sizes.into_iter().cycle()), &mut out).unwrap();
            prop_assert_eq!(out, stream(&mut frames.iter().filter(|frame| may_leave(frame))));
        }
    }
}
