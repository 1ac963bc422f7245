//! A look at what goes on in the containers: their control groups, their TCP connections, and the marks they left.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use dormouse_agent_proto::{Activity, BUSY_DIR, CONTAINERS_MAX, ContainerActivity};

use crate::agent::uptime_nanos;
use crate::sockets::{Networks, Socket};

const CONTROL_GROUPS: &str = "/sys/fs/cgroup";

/// How deep a container's control group lies at most: `--cgroup-parent` can put it below others.
const DEPTH_MAX: usize = 5;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sockets::tests::{ROUTES, ROUTES6, socket};

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
