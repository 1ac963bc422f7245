//! What a guest can reach through passt. The "guest" is this test: it writes frames as root in a guest could, with
//! addresses that no orderly network stack would use.
//!
//! The test runs itself again in a network namespace of its own, so that no frame leaves it.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use super::*;
use crate::address::{DNS_V4, GATEWAY_V4, GATEWAY_V6, GUEST_V4, GUEST_V6, host_part};

const INSIDE: &str = "DORM_TEST_NETWORK_NAMESPACE";
/// An address of the host that is no loopback address: a guest may reach it, as its owner can.
const HOST_V4: &str = "192.0.2.7";
const HOST_V6: &str = "2001:db8::7";

/// For hangs only: a loaded machine takes a multiple of what a quiet one does.
const SOON: Duration = Duration::from_secs(60);

const TCP: u8 = 6;
const UDP: u8 = 17;

#[test]
fn a_guest_reaches_what_its_owner_can_but_not_the_hosts_loopback() {
    if std::env::var_os(INSIDE).is_none() {
        return in_network_namespace(
            "network::tests::a_guest_reaches_what_its_owner_can_but_not_the_hosts_loopback",
        );
    }
    for setup in [
        vec!["link", "set", "lo", "up"],
        vec!["addr", "add", HOST_V4, "dev", "lo"],
        // Without a search for duplicates: until that is over, nobody can bind to the address.
        vec!["addr", "add", HOST_V6, "dev", "lo", "nodad"],
        // passt takes part in IPv6 only where the interface has a link-local address.
        vec!["addr", "add", "fe80::1/64", "dev", "lo", "nodad"],
    ] {
        assert!(Command::new("ip").args(&setup).status().unwrap().success(), "{setup:?}");
    }
    let loopback: Vec<Listener> = ["127.0.0.1", "127.1.2.3", "::1"].map(Listener::on).into();
    let forbidden: Vec<(IpAddr, u16)> = [
        "127.0.0.1",
        "127.1.2.3",
        GATEWAY_V4,
        DNS_V4,
        host_part(GUEST_V4),
        "0.0.0.0",
        "::1",
        "::ffff:127.0.0.1",
        GATEWAY_V6,
        host_part(GUEST_V6),
        "::",
        "fe80::1",
    ]
    .iter()
    .flat_map(|target| loopback.iter().map(move |listener| (target.parse().unwrap(), listener.port)))
    .collect();
    let open = [Listener::on(HOST_V4), Listener::on(HOST_V6)];

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut passt, helper) = runtime.block_on(async { Passt::start(Path::new("passt"), None).unwrap() });
    let (mut guest, guest_side) = UnixStream::pair().unwrap();
    let filter = std::thread::spawn(|| crate::frames::relay(guest_side, helper));
    guest.set_read_timeout(Some(SOON)).unwrap();
    for &(target, port) in &forbidden {
        send(&mut guest, target, port, TCP);
        send(&mut guest, target, port, UDP);
    }
    // Frames are handled in order: once these are answered, everything before them was handled too.
    for (listener, target) in open.iter().zip([HOST_V4, HOST_V6]) {
        send(&mut guest, target.parse().unwrap(), listener.port, UDP);
        send(&mut guest, target.parse().unwrap(), listener.port, TCP);
        assert!(listener.was_reached(SOON), "the frames of this test reach nothing at all");
    }
    let reached: Vec<String> = loopback
        .iter()
        .filter(|listener| listener.was_reached(Duration::ZERO))
        .map(|listener| listener.address.to_string())
        .collect();
    drop(guest);
    filter.join().unwrap().unwrap();
    runtime.block_on(async {
        let ended = tokio::time::timeout(SOON, passt.child.wait()).await;
        assert!(ended.is_ok(), "passt outlives its guest");
    });
    assert_eq!(reached, Vec::<String>::new(), "the guest reaches the host's loopback");
}

#[test]
fn names_are_resolved_where_the_host_does_it_also_on_its_loopback() {
    if std::env::var_os(INSIDE).is_none() {
        return in_network_namespace(
            "network::tests::names_are_resolved_where_the_host_does_it_also_on_its_loopback",
        );
    }
    // As systemd-resolved has it.
    let directory = tempfile::tempdir().unwrap();
    let resolver = directory.path().join("resolv.conf");
    std::fs::write(&resolver, "nameserver 127.0.0.53\n").unwrap();
    let mut mount = Command::new("mount");
    mount.arg("--bind").args([resolver.as_os_str(), "/etc/resolv.conf".as_ref()]);
    assert!(mount.status().unwrap().success());
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    let listener = UdpSocket::bind("127.0.0.53:53").unwrap();
    listener.set_read_timeout(Some(SOON)).unwrap();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut passt, helper) = runtime.block_on(async { Passt::start(Path::new("passt"), None).unwrap() });
    let (mut guest, guest_side) = UnixStream::pair().unwrap();
    let filter = std::thread::spawn(|| crate::frames::relay(guest_side, helper));
    send(&mut guest, DNS_V4.parse().unwrap(), 53, UDP);
    let mut query = [0; 16];
    assert_eq!(listener.recv(&mut query).unwrap(), 4);
    assert_eq!(&query[..4], b"dorm");
    drop(guest);
    filter.join().unwrap().unwrap();
    runtime.block_on(passt.child.wait()).unwrap();
}

#[test]
fn a_passt_that_does_not_start_says_how_it_ended() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut passt, _helper) = Passt::start(Path::new("/bin/false"), None).unwrap();
        let status = passt.child.wait().await.unwrap();
        assert_eq!(passt.last_words(status).await, "passt: exit status: 1");
    });
}

/// Runs the named test once more, in a namespace of its own.
fn in_network_namespace(name: &str) {
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.arg("--map-root-user");
    }
    let status = unshare
        .args(["--net", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success());
}

/// Something on the host that listens, TCP and UDP, on one address and the same port.
struct Listener {
    address: SocketAddr,
    port: u16,
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Listener {
    fn on(address: &str) -> Self {
        let address: IpAddr = address.parse().unwrap();
        let udp = UdpSocket::bind((address, 0)).unwrap();
        let address = udp.local_addr().unwrap();
        let tcp = TcpListener::bind(address).unwrap();
        Self { address, port: address.port(), tcp, udp }
    }

    /// Did a connection or a datagram arrive? Waits so long for the connection.
    fn was_reached(&self, patience: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let timeout = Timespec::try_from(patience).unwrap();
        let sockets = &mut [PollFd::new(&self.tcp, PollFlags::IN), PollFd::new(&self.udp, PollFlags::IN)];
        poll(sockets, Some(&timeout)).unwrap() > 0
    }
}

/// Sends one frame: a TCP SYN or a datagram. Each frame is led by its length, as on QEMU's stream sockets.
fn send(guest: &mut UnixStream, target: IpAddr, port: u16, protocol: u8) {
    let frame = frame(target, port, protocol);
    guest.write_all(&u32::try_from(frame.len()).unwrap().to_be_bytes()).unwrap();
    guest.write_all(&frame).unwrap();
    // Whatever comes back is read away, so that passt never waits for us.
    guest.set_nonblocking(true).unwrap();
    while let Ok(1..) = guest.read(&mut [0; 65536]) {}
    guest.set_nonblocking(false).unwrap();
}

fn frame(target: IpAddr, port: u16, protocol: u8) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend_from_slice(&40_000_u16.to_be_bytes());
    segment.extend_from_slice(&port.to_be_bytes());
    if protocol == TCP {
        segment.extend_from_slice(&1_u32.to_be_bytes()); // sequence
        segment.extend_from_slice(&0_u32.to_be_bytes()); // acknowledged
        segment.extend_from_slice(&[0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]); // 20 bytes, SYN, window, checksum
    } else {
        segment.extend_from_slice(&12_u16.to_be_bytes());
        segment.extend_from_slice(&[0, 0]);
        segment.extend_from_slice(b"dorm");
    }
    let length = u16::try_from(segment.len()).unwrap();
    let (ether_type, addresses, mut packet) = match target {
        IpAddr::V4(target) => {
            let source: std::net::Ipv4Addr = host_part(GUEST_V4).parse().unwrap();
            let addresses = [source.octets(), target.octets()].concat();
            let mut header = vec![0x45, 0];
            header.extend_from_slice(&(20 + length).to_be_bytes());
            header.extend_from_slice(&[0, 0, 0x40, 0, 64, protocol, 0, 0]);
            header.extend_from_slice(&addresses);
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            ([0x08, 0x00], addresses, header)
        }
        IpAddr::V6(target) => {
            let source: std::net::Ipv6Addr = host_part(GUEST_V6).parse().unwrap();
            let addresses = [source.octets(), target.octets()].concat();
            let mut header = vec![0x60, 0, 0, 0];
            header.extend_from_slice(&length.to_be_bytes());
            header.extend_from_slice(&[protocol, 64]);
            header.extend_from_slice(&addresses);
            ([0x86, 0xdd], addresses, header)
        }
    };
    let mut summed = addresses;
    summed.extend_from_slice(&[0, protocol]);
    summed.extend_from_slice(&length.to_be_bytes());
    summed.extend_from_slice(&segment);
    let at = if protocol == TCP { 16 } else { 6 };
    segment[at..at + 2].copy_from_slice(&checksum(&summed).to_be_bytes());

    let mut frame = vec![0x52, 0x54, 0, 0x64, 0x6f, 0x01, 0x52, 0x54, 0, 0x64, 0x6f, 0x72];
    frame.extend_from_slice(&ether_type);
    frame.append(&mut packet);
    frame.append(&mut segment);
    frame
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}
