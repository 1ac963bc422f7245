//! Between QEMU and virtiofsd: what QEMU says is passed on and remembered, so that a second virtiofsd can take the place of
//! one that died.
//!
//! Without it requests on their way would never be answered, and Linux waits for their answers for ever, also before it
//! unmounts or lets the device go. The second one shares nothing and knows nothing of what the guest has open: it answers all
//! of it with errors. Requests and answers themselves don't come by here: they are in the guest's memory.
//!
//! The protocol is QEMU's (docs/interop/vhost-user). A message is a head of three numbers (what, flags, length), a payload,
//! and descriptors beside it.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

const HEAD_BYTES: usize = 12;

/// Longest payload: a table of as much memory as there can be has less.
const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// Most descriptors beside a message: the protocol's limit.
const FDS_MAX: usize = 8;

/// Messages that are remembered: some ten, and six for each of two queues.
const REMEMBERED_MAX: usize = 256;

/// Flags of a head: the sender waits for an answer.
const NEEDS_REPLY: u32 = 1 << 3;

const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const SET_VRING_ENABLE: u32 = 18;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// Those that are answered in any case: `GET_FEATURES`, `GET_PROTOCOL_FEATURES`, `GET_QUEUE_NUM`, `GET_CONFIG`,
/// `GET_MAX_MEM_SLOTS`.
const ANSWERED: [u32; 5] = [1, 15, 17, 24, 36];

/// A message.
#[derive(Debug)]
struct Message {
    what: u32,
    flags: u32,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    /// `None`: the other side is gone.
    fn read(stream: &UnixStream) -> io::Result<Option<Self>> {
        let mut head = [0; HEAD_BYTES];
        let mut fds = Vec::new();
        if read_exactly(stream, &mut head, &mut fds)?.is_none() {
            return Ok(None);
        }
        let number = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let length = number(8) as usize;
        if length > PAYLOAD_BYTES_MAX {
            return Err(io::Error::other("a message of the device is too long"));
        }
        let mut payload = vec![0; length];
        if length > 0 && read_exactly(stream, &mut payload, &mut fds)?.is_none() {
            return Ok(None);
        }
        Ok(Some(Self { what: number(0), flags: number(4), payload, fds }))
    }

    fn write(&self, stream: &UnixStream) -> io::Result<()> {
        let length = u32::try_from(self.payload.len()).map_err(io::Error::other)?;
        let mut bytes = [self.what, self.flags, length].map(u32::to_ne_bytes).concat();
        bytes.extend_from_slice(&self.payload);
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("a message of the device has too many descriptors"));
        }
        let mut sent = sendmsg(stream, &[IoSlice::new(&bytes)], &mut beside, SendFlags::NOSIGNAL)?;
        while sent < bytes.len() {
            let mut nothing = SendAncillaryBuffer::default();
            sent += sendmsg(stream, &[IoSlice::new(&bytes[sent..])], &mut nothing, SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    fn number(&self, at: usize) -> Option<u64> {
        Some(u64::from_ne_bytes(self.payload.get(at..at + 8)?.try_into().ok()?))
    }

    /// What it sets: a later one of the same makes this one void.
    fn subject(&self) -> (u32, u64) {
        let first = u64::from(self.payload.first().copied().unwrap_or_default());
        let of = match self.what {
            // The number of a queue comes first; a queue has few, so its first byte tells.
            SET_VRING_NUM | SET_VRING_ADDR | SET_VRING_BASE | SET_VRING_KICK | SET_VRING_CALL
            | SET_VRING_ERR | SET_VRING_ENABLE | GET_VRING_BASE => first,
            ADD_MEM_REG | REM_MEM_REG => self.number(8).unwrap_or_default(),
            _ => 0,
        };
        (self.what, of)
    }

    const fn is_answered(&self) -> bool {
        let mut index = 0;
        while index < ANSWERED.len() {
            if ANSWERED[index] == self.what {
                return true;
            }
            index += 1;
        }
        self.what == GET_VRING_BASE || self.flags & NEEDS_REPLY != 0
    }

    /// The pieces of the guest's memory that it tells of: where they are for QEMU, how long, and where in their files.
    fn regions(&self) -> Vec<Region> {
        let count = match self.what {
            SET_MEM_TABLE => usize::from(self.payload.first().copied().unwrap_or_default()),
            ADD_MEM_REG => 1,
            _ => 0,
        };
        let region = |index: usize| {
            let at = 8 + 32 * index;
            Some(Region {
                size: self.number(at + 8)?,
                address: self.number(at + 16)?,
                offset: self.number(at + 24)?,
                file: File::from(self.fds.get(index)?.try_clone().ok()?),
            })
        };
        (0..count).filter_map(region).collect()
    }
}

struct Region {
    size: u64,
    address: u64,
    offset: u64,
    file: File,
}

/// Reads all of it, and what descriptors come along. `None`: the other side is gone.
fn read_exactly(stream: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<Option<()>> {
    let mut read = 0;
    while read < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut rest = [IoSliceMut::new(&mut bytes[read..])];
        let count = match recvmsg(stream, &mut rest, &mut beside, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::CONNRESET) => 0,
            Err(error) => return Err(error.into()),
        };
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if count == 0 {
            return Ok(None);
        }
        read += count;
    }
    Ok(Some(()))
}

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// A message was passed on.
    Passed,
    /// The side that it was to come from is gone.
    Gone,
}

/// Both connections, and what QEMU said.
#[derive(Debug)]
pub(crate) struct Proxy {
    qemu: UnixStream,
    virtiofsd: UnixStream,
    said: Vec<Message>,
    /// What QEMU waits for an answer to.
    asked: Option<(u32, u64)>,
}

impl Proxy {
    pub(crate) const fn new(qemu: UnixStream, virtiofsd: UnixStream) -> Self {
        Self { qemu, virtiofsd, said: Vec::new(), asked: None }
    }

    pub(crate) const fn qemu(&self) -> &UnixStream {
        &self.qemu
    }

    pub(crate) const fn virtiofsd(&self) -> &UnixStream {
        &self.virtiofsd
    }

    /// Passes on what QEMU says.
    pub(crate) fn hear_qemu(&mut self) -> io::Result<Step> {
        let Some(message) = Message::read(&self.qemu)? else { return Ok(Step::Gone) };
        self.asked = message.is_answered().then(|| message.subject());
        // One that died meanwhile is told by its successor.
        let _ = message.write(&self.virtiofsd);
        self.remember(message)?;
        Ok(Step::Passed)
    }

    /// Passes on what virtiofsd answers.
    pub(crate) fn hear_virtiofsd(&mut self) -> io::Result<Step> {
        let Ok(Some(message)) = Message::read(&self.virtiofsd) else { return Ok(Step::Gone) };
        self.asked = None;
        message.write(&self.qemu)?;
        Ok(Step::Passed)
    }

    fn remember(&mut self, message: Message) -> io::Result<()> {
        let subject = message.subject();
        match message.what {
            // The queue is stopped: nobody may touch it before it is set up again.
            GET_VRING_BASE => {
                self.said.retain(|said| {
                    let (what, of) = said.subject();
                    !(of == subject.1 && matches!(what, SET_VRING_KICK | SET_VRING_ENABLE | SET_VRING_BASE))
                });
                return Ok(());
            }
            REM_MEM_REG => {
                self.said.retain(|said| said.subject() != (ADD_MEM_REG, subject.1));
                return Ok(());
            }
            _ => {}
        }
        match self.said.iter().position(|said| said.subject() == subject) {
            Some(index) => self.said[index] = message,
            None if self.said.len() < REMEMBERED_MAX => self.said.push(message),
            None => return Err(io::Error::other("the device has too much to say")),
        }
        Ok(())
    }

    /// Has another virtiofsd take the place of the one that died, where that left off.
    pub(crate) fn replace(&mut self, virtiofsd: UnixStream) -> io::Result<()> {
        self.virtiofsd = virtiofsd;
        for said in &self.said {
            match said.what {
                SET_VRING_BASE => self.left_off(said).write(&self.virtiofsd)?,
                _ => said.write(&self.virtiofsd)?,
            }
            if !said.is_answered() {
                continue;
            }
            let Some(answer) = Message::read(&self.virtiofsd)? else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            if self.asked.take_if(|asked| *asked == said.subject()).is_some() {
                answer.write(&self.qemu)?;
            }
        }
        Ok(())
    }

    /// Where a queue is to be read from: behind what was answered, which the queue itself tells (virtio 1.2, 2.7.8).
    fn left_off(&self, base: &Message) -> Message {
        let queue = base.subject().1;
        let answered = || {
            let ring = self.said.iter().find(|said| said.subject() == (SET_VRING_ADDR, queue))?;
            let index = ring.number(16)? + 2;
            let regions = self.said.iter().flat_map(Message::regions);
            let around = |region: &Region| (region.address..region.address + region.size).contains(&index);
            let region = { regions }.find(around)?;
            let mut answered = [0; 2];
            region.file.read_exact_at(&mut answered, region.offset + (index - region.address)).ok()?;
            Some(u32::from(u16::from_le_bytes(answered)))
        };
        let mut payload = base.payload.clone();
        if let (Some(answered), Some(place)) = (answered(), payload.get_mut(4..8)) {
            place.copy_from_slice(&answered.to_ne_bytes());
        }
        Message { what: base.what, flags: base.flags, payload, fds: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(what: u32, flags: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Message {
        Message { what, flags, payload: payload.to_vec(), fds }
    }

    fn numbers(numbers: &[u64]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
    }

    fn state(queue: u32, value: u32) -> Vec<u8> {
        [queue, value].map(u32::to_ne_bytes).concat()
    }

    fn told(stream: &UnixStream) -> (u32, Vec<u8>, usize) {
        let message = Message::read(stream).unwrap().unwrap();
        (message.what, message.payload, message.fds.len())
    }

    #[test]
    fn another_takes_the_place_of_one_that_died_where_that_left_off() {
        let (qemu, ours) = UnixStream::pair().unwrap();
        let (first, to_first) = UnixStream::pair().unwrap();
        let mut proxy = Proxy::new(ours, to_first);
        // 1 MiB of the guest's memory, at 0x7000_0000 for QEMU, 4096 bytes into its file; a queue has answered 5 requests.
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(1 << 20).unwrap();
        memory.write_all_at(&5_u16.to_le_bytes(), 4096 + 0x202).unwrap();
        let kick = OwnedFd::from(tempfile::tempfile().unwrap());
        let table = numbers(&[1, 0, 1 << 20, 0x7000_0000, 4096]);
        let ring = numbers(&[0, 0x7000_0000, 0x7000_0200, 0x7000_0400, 0]);
        let said = [
            message(1, 1, &[], vec![]),
            message(SET_MEM_TABLE, 1, &table, vec![memory.into()]),
            message(SET_VRING_BASE, 1, &state(0, 0), vec![]),
            message(SET_VRING_ADDR, 1, &ring, vec![]),
            message(SET_VRING_KICK, 1, &numbers(&[0]), vec![kick]),
            message(SET_VRING_ENABLE, 1, &state(0, 0), vec![]),
            message(SET_VRING_ENABLE, 1, &state(0, 1), vec![]),
        ];
        for said in &said {
            said.write(&qemu).unwrap();
            assert_eq!(proxy.hear_qemu().unwrap(), Step::Passed);
            assert_eq!(told(&first), (said.what, said.payload.clone(), said.fds.len()));
        }
        message(1, 5, &numbers(&[7]), vec![]).write(&first).unwrap();
        assert_eq!(proxy.hear_virtiofsd().unwrap(), Step::Passed);
        assert_eq!(told(&qemu), (1, numbers(&[7]), 0));
        // It dies while QEMU waits for an answer.
        message(17, 1, &[], vec![]).write(&qemu).unwrap();
        assert_eq!(proxy.hear_qemu().unwrap(), Step::Passed);
        drop(first);
        assert_eq!(proxy.hear_virtiofsd().unwrap(), Step::Gone);

        let (second, to_second) = UnixStream::pair().unwrap();
        for (what, answer) in [(1, 7), (17, 2)] {
            message(what, 5, &numbers(&[answer]), vec![]).write(&second).unwrap();
        }
        proxy.replace(to_second).unwrap();
        for (what, payload, fds) in [
            (1, vec![], 0),
            (SET_MEM_TABLE, table, 1),
            (SET_VRING_BASE, state(0, 5), 0),
            (SET_VRING_ADDR, ring, 0),
            (SET_VRING_KICK, numbers(&[0]), 1),
            (SET_VRING_ENABLE, state(0, 1), 0),
            (17, vec![], 0),
        ] {
            assert_eq!(told(&second), (what, payload, fds));
        }
        assert_eq!(told(&qemu), (17, numbers(&[2]), 0), "what it waited for is answered, and nothing twice");
        drop(qemu);
        assert_eq!(proxy.hear_qemu().unwrap(), Step::Gone);
    }

    #[test]
    fn a_queue_that_was_stopped_is_not_touched_again() {
        let (qemu, ours) = UnixStream::pair().unwrap();
        let (_first, to_first) = UnixStream::pair().unwrap();
        let mut proxy = Proxy::new(ours, to_first);
        for (what, payload) in
            [(SET_VRING_ENABLE, state(0, 1)), (SET_VRING_ENABLE, state(1, 1)), (GET_VRING_BASE, state(0, 0))]
        {
            message(what, 1, &payload, vec![]).write(&qemu).unwrap();
            proxy.hear_qemu().unwrap();
        }
        let left: Vec<_> = proxy.said.iter().map(Message::subject).collect();
        assert_eq!(left, [(SET_VRING_ENABLE, 1)]);
    }
}
