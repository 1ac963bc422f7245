//! A look at what goes on in the containers: their control groups, their TCP connections, and the marks they left.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use dormouse_agent_proto::{Activity, BUSY_DIR, CONTAINERS_MAX, ContainerActivity};

use crate::agent::uptime_nanos;

const CONTROL_GROUPS: &str = "/sys/fs/cgroup";

/// How deep a container's control group lies at most: `--cgroup-parent` can put it below others.
const DEPTH_MAX: usize = 5;

/// The way out of the guest. Every other interface leads to a network of the engine's.
const WAY_OUT: &str = "eth0";

/// Looks at all containers that run.
pub(crate) fn look() -> Activity {
    let mut groups = Vec::new();
    find_groups(Path::new(CONTROL_GROUPS), DEPTH_MAX, &mut groups);
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let inside = Networks::read(&read("/proc/net/route"), &read("/proc/net/ipv6_route"));
    Activity {
        uptime_nanos: uptime_nanos(),
        containers: groups.iter().filter_map(|group| look_at(group, &inside)).collect(),
        mark: mark(),
    }
}

/// The engine names a container's control group after its id: 64 hexadecimal digits.
fn find_groups(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if found.len() == CONTAINERS_MAX || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = entry.file_name();
        let is_container = name.len() == 64 && name.as_encoded_bytes().iter().all(u8::is_ascii_hexdigit);
        if is_container {
            found.push(entry.path());
        } else if depth > 1 {
            find_groups(&entry.path(), depth - 1, found);
        }
    }
}

/// `None` of one that has just ended.
fn look_at(group: &Path, inside: &Networks) -> Option<ContainerActivity> {
    let id = group.file_name()?.to_str()?.to_owned();
    let cpu_micros = cpu_micros(&fs::read_to_string(group.join("cpu.stat")).ok()?)?;
    let process = any_process(group, DEPTH_MAX)?;
    let read = |name| fs::read_to_string(format!("/proc/{process}/net/{name}")).unwrap_or_default();
    let connection = outgoing(&(read("tcp") + &read("tcp6")), inside);
    Some(ContainerActivity { id, cpu_micros, connection: connection.map(|far| far.to_string()) })
}

fn cpu_micros(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?.trim().parse().ok()
}

/// A process of the group, or of one below it: an init system in a container moves itself away.
fn any_process(group: &Path, depth: usize) -> Option<u32> {
    let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    if let Some(process) = processes.lines().next() {
        return process.parse().ok();
    }
    let below = fs::read_dir(group).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    below.take(if depth > 1 { CONTAINERS_MAX } else { 0 }).find_map(|group| any_process(&group, depth - 1))
}

/// The first mark by name.
fn mark() -> Option<String> {
    let names = fs::read_dir(BUSY_DIR).ok()?.take(CONTAINERS_MAX).flatten().map(|entry| entry.file_name());
    names.map(|name| name.to_string_lossy().into_owned()).min()
}

/// The far end of the first established connection that one of these sockets has opened to somewhere outside.
fn outgoing(sockets: &str, inside: &Networks) -> Option<SocketAddr> {
    let sockets: Vec<_> = sockets.lines().filter_map(Socket::parse).collect();
    let is_listening = |socket: &&Socket| socket.state == Socket::LISTENING;
    let listening: BTreeSet<_> =
        sockets.iter().filter(is_listening).map(|socket| socket.near.port()).collect();
    let leads_out = |socket: &&Socket| {
        socket.state == Socket::ESTABLISHED
            && !listening.contains(&socket.near.port())
            && !inside.has(socket.far.ip())
    };
    sockets.iter().find(leads_out).map(|socket| socket.far)
}

/// A line of `/proc/net/tcp` or `/proc/net/tcp6`, see proc_net_tcp in the kernel's documentation.
#[derive(Debug)]
struct Socket {
    near: SocketAddr,
    far: SocketAddr,
    state: u8,
}

impl Socket {
    const ESTABLISHED: u8 = 1;
    const LISTENING: u8 = 10;

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (near, far) = (address(words.next()?)?, address(words.next()?)?);
        Some(Self { near, far, state: u8::from_str_radix(words.next()?, 16).ok()? })
    }
}

/// `0100007F:1F90`: words of the address as the processor has them in memory, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let address = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let bytes = std::array::from_fn(|index| words[index / 4][index % 4]);
            Ipv6Addr::from_octets(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

/// The networks inside of the guest, each with the length of its prefix.
#[derive(Debug, Default)]
struct Networks(Vec<(IpAddr, u32)>);

impl Networks {
    /// From `/proc/net/route` and `/proc/net/ipv6_route`: those that are reached without a gateway and not by the way out.
    fn read(routes4: &str, routes6: &str) -> Self {
        let routes4 = routes4.lines().filter_map(|line| {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            let number = |index: usize| Some(u32::from_str_radix(words.get(index)?, 16).ok()?.to_ne_bytes());
            let mask = u32::from_be_bytes(number(7)?);
            (words[0] != WAY_OUT && mask != 0).then_some(())?;
            Some((IpAddr::V4(Ipv4Addr::from(number(1)?)), mask.leading_ones()))
        });
        let routes6 = routes6.lines().filter_map(|line| {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            let network = Ipv6Addr::from_bits(u128::from_str_radix(words.first()?, 16).ok()?);
            let length = u32::from_str_radix(words.get(1)?, 16).ok()?;
            (*words.last()? != WAY_OUT && length != 0).then_some((IpAddr::V6(network), length))
        });
        Self(routes4.chain(routes6).collect())
    }

    fn has(&self, address: IpAddr) -> bool {
        let is_link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        address.is_loopback()
            || is_link_local
            || self.0.iter().any(|(network, length)| match (network, address) {
                (IpAddr::V4(network), IpAddr::V4(address)) => {
                    let differing = network.to_bits() ^ address.to_bits();
                    differing.leading_zeros() >= *length
                }
                (IpAddr::V6(network), IpAddr::V6(address)) => {
                    let differing = network.to_bits() ^ address.to_bits();
                    differing.leading_zeros() >= *length
                }
                _ => false,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
    const ROUTES6: &str = "fd000000000000010000000000000000 40 00000000000000000000000000000000 00 \
         00000000000000000000000000000000 00000100 00000001 00000000 00000001 br-1\n\
         00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
         00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n";

    /// A line of the kernel's table: near end, far end, state.
    fn socket(near: &str, far: &str, state: &str) -> String {
        format!("   0: {near} {far} {state} 00000000:00000000 00:00000000 00000000     0        0 1 1 0\n")
    }

    #[test]
    fn only_a_connection_that_was_opened_to_somewhere_outside_counts() {
        let inside = Networks::read(ROUTES, ROUTES6);
        let near = "020011AC:C350";
        for (sockets, expected) in [
            (socket(near, "22D8B85D:01BB", "01"), Some("93.184.216.34:443")),
            // The guest's own network leads out as well.
            (socket(near, "0302000A:0050", "01"), Some("10.0.2.3:80")),
            // Closing, or not open yet.
            (socket(near, "22D8B85D:01BB", "06"), None),
            (socket(near, "22D8B85D:01BB", "02"), None),
            // To another container, and to itself.
            (socket(near, "030011AC:1538", "01"), None),
            (socket("0100007F:C350", "0100007F:1538", "01"), None),
            // Somebody's who came: the near port is one that listens.
            (
                socket("00000000:0050", "00000000:0000", "0A")
                    + &socket("020011AC:0050", "22D8B85D:D431", "01"),
                None,
            ),
            // An IPv4 address in an IPv6 socket, and IPv6.
            (
                socket(
                    "0000000000000000FFFF0000020011AC:C350",
                    "0000000000000000FFFF000022D8B85D:01BB",
                    "01",
                ),
                Some("93.184.216.34:443"),
            ),
            (
                socket(
                    "000000FD010000000000000002000000:C350",
                    "000000FD010000000000000003000000:01BB",
                    "01",
                ),
                None,
            ),
            (
                socket(
                    "000000FD010000000000000002000000:C350",
                    "000000FD020000000000000003000000:01BB",
                    "01",
                ),
                Some("[fd00:0:0:2::3]:443"),
            ),
            ("sl  local_address rem_address   st\n".to_owned(), None),
            ("nonsense 0100007F:zz\n".to_owned(), None),
        ] {
            let found = outgoing(&sockets, &inside).map(|far| far.to_string());
            assert_eq!(found.as_deref(), expected, "{sockets}");
        }
    }

    #[test]
    fn cpu_time_is_read_from_the_control_group() {
        assert_eq!(cpu_micros("usage_usec 1234\nuser_usec 1000\nsystem_usec 234\n"), Some(1234));
        assert_eq!(cpu_micros("user_usec 1000\n"), None);
    }
}
