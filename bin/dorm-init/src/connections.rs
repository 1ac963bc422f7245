//! TCP connections that lead out of the guest, over a suspend.
//!
//! What carries them outside ends with the VM's QEMU, and what carries the next one's knows nothing of them: a program that
//! waits for an answer would wait until it gives up. So they are noted when a suspend is near, and ended when the VM runs on
//! in another QEMU. The kernel then tells each program that its connection was aborted, and most connect anew.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::console;
use crate::sockets::{Networks, Socket};

/// Network namespaces that are looked into: there is one for each container.
const NAMESPACES_MAX: usize = 1024;

/// Connections of one namespace that are noted.
const CONNECTIONS_MAX: usize = 4096;

/// So long the look takes at most: the disk is frozen meanwhile. The guest's own network comes first.
const LOOK_WITHIN: Duration = Duration::from_secs(1);

/// From the near end to the far one.
type Connection = (SocketAddr, SocketAddr);

/// Connections of one network namespace.
#[derive(Debug)]
struct Noted {
    namespace: File,
    connections: Vec<Connection>,
}

/// What led out of the guest when it was last about to be suspended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Connections(Arc<Mutex<Vec<Noted>>>);

impl Connections {
    /// Notes those that there are. Reads tables of the kernel's.
    pub(crate) fn note(&self) {
        let noted = look();
        if !noted.is_empty() {
            // The kernel loads what ends connections when it is first asked to: now is a better time than after the wake.
            let nowhere = SocketAddr::from(([0; 4], 0));
            let _ = diagnostics().and_then(|socket| abort(&socket, (nowhere, nowhere)));
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = noted;
    }

    /// Ends what was noted, in a thread of its own: a thread that has been in another namespace is good for nothing else.
    pub(crate) fn end(&self) {
        let noted = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if noted.is_empty() {
            return;
        }
        let ending = move || {
            for Noted { namespace, connections } in noted {
                if let Err(error) = end_all(&namespace, &connections) {
                    console::say(&format!("connections from before the suspend stay: {error}"));
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("connections".to_owned()).spawn(ending) {
            console::say(&format!("connections from before the suspend stay: {error}"));
        }
    }
}

/// The connections of each namespace in which a process runs.
fn look() -> Vec<Noted> {
    let begun = Instant::now();
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let inside = Networks::read(&read("/proc/net/route"), &read("/proc/net/ipv6_route"));
    let mut namespaces = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Of one that has just ended there is nothing to note.
        let Ok(namespace) = fs::metadata(format!("/proc/{process}/ns/net")) else { continue };
        if namespaces.len() < NAMESPACES_MAX {
            namespaces.entry(namespace.ino()).or_insert(process);
        }
    }
    let look_at = |process: u32| {
        let table = read(&format!("/proc/{process}/net/tcp")) + &read(&format!("/proc/{process}/net/tcp6"));
        let connections: Vec<_> = leading_out(&table, &inside).take(CONNECTIONS_MAX).collect();
        let namespace = File::open(format!("/proc/{process}/ns/net")).ok()?;
        (!connections.is_empty()).then_some(Noted { namespace, connections })
    };
    let in_time = namespaces.into_values().take_while(|_| begun.elapsed() < LOOK_WITHIN);
    in_time.filter_map(look_at).collect()
}

/// Whoever opened them: nobody comes into the guest but from within it.
fn leading_out(table: &str, inside: &Networks) -> impl Iterator<Item = Connection> {
    let is_open = |socket: &Socket| !matches!(socket.state, Socket::LISTENING | Socket::TIME_WAIT);
    let sockets = table.lines().filter_map(Socket::parse);
    let out = sockets.filter(move |socket| is_open(socket) && !inside.has(socket.far.ip()));
    out.map(|socket| (socket.near, socket.far))
}

fn end_all(namespace: &File, connections: &[Connection]) -> io::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    let socket = diagnostics()?;
    for connection in connections {
        // One that isn't there any more has ended by itself.
        if let Err(error) = abort(&socket, *connection)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
    }
    Ok(())
}

/// Where the kernel is asked for the sockets of the thread's namespace, see sock_diag(7).
fn diagnostics() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?)
}

/// Has the kernel abort a connection. The answer is there when the question was sent.
fn abort(diagnostics: &OwnedFd, connection: Connection) -> io::Result<()> {
    send(diagnostics, &question(connection), SendFlags::empty())?;
    let mut answer = [0; 256];
    let (length, _) = recv(diagnostics, &mut answer, RecvFlags::DONTWAIT)?;
    outcome(&answer[..length])
}

/// `SOCK_DESTROY` of linux/sock_diag.h, with a `struct inet_diag_req_v2`.
fn question((near, far): Connection) -> Vec<u8> {
    const SOCK_DESTROY: u16 = 21;
    const REQUEST_WITH_ANSWER: u16 = 1 | 4;
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    const TCP: u8 = 6;
    const LENGTH: u32 = 72;
    let family = if near.is_ipv4() && far.is_ipv4() { AF_INET } else { AF_INET6 };
    let any_state = u32::MAX;
    let (interface, any_cookie) = (0_u32, u64::MAX);
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(SOCK_DESTROY.to_ne_bytes());
    bytes.extend(REQUEST_WITH_ANSWER.to_ne_bytes());
    // Number and sender: nobody else asks over this socket.
    bytes.extend([0; 8]);
    bytes.extend([family, TCP, 0, 0]);
    bytes.extend(any_state.to_ne_bytes());
    bytes.extend(near.port().to_be_bytes());
    bytes.extend(far.port().to_be_bytes());
    bytes.extend(sixteen(near.ip(), family == AF_INET));
    bytes.extend(sixteen(far.ip(), family == AF_INET));
    bytes.extend(interface.to_ne_bytes());
    bytes.extend(any_cookie.to_ne_bytes());
    bytes
}

/// An address as the kernel takes it: of IPv4 the first four bytes count.
fn sixteen(address: IpAddr, as_v4: bool) -> [u8; 16] {
    match address {
        IpAddr::V4(address) if as_v4 => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&address.octets());
            bytes
        }
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// From an `NLMSG_ERROR`: 0, or a negative error number, behind 16 bytes.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let number = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match number {
        Some(0) => Ok(()),
        Some(number) => Err(io::Error::from_raw_os_error(number.wrapping_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::sockets::tests::{ROUTES, socket};

    #[test]
    fn every_open_connection_to_somewhere_outside_is_noted_whoever_opened_it() {
        let inside = Networks::read(ROUTES, "");
        let outside = "22D8B85D:01BB";
        let table = socket("00000000:0050", "00000000:0000", "0A")
            + &socket("0F02000A:0050", outside, "01")
            + &socket("0F02000A:C350", outside, "02")
            + &socket("0F02000A:C351", outside, "06")
            + &socket("020011AC:C352", "030011AC:1538", "01")
            + &socket("0100007F:C353", "0100007F:1538", "01");
        let noted: Vec<_> = leading_out(&table, &inside).map(|(near, far)| format!("{near} {far}")).collect();
        assert_eq!(noted, ["10.0.2.15:80 93.184.216.34:443", "10.0.2.15:50000 93.184.216.34:443"]);
    }

    /// It takes a kernel that does this (`CONFIG_INET_DIAG_DESTROY`) and the right to: elsewhere its refusal is looked at.
    #[test]
    fn a_connection_that_is_ended_is_aborted_at_both_ends_and_one_that_is_not_there_is_not_found() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut far, _) = listener.accept().unwrap();
            let connection = (near.local_addr().unwrap(), near.peer_addr().unwrap());
            let socket = diagnostics().unwrap();
            match abort(&socket, connection) {
                Ok(()) => {
                    assert_eq!(near.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
                    assert_eq!(far.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
                    assert_eq!(abort(&socket, connection).unwrap_err().kind(), io::ErrorKind::NotFound);
                }
                Err(error) => {
                    let refused = [
                        io::ErrorKind::PermissionDenied,
                        io::ErrorKind::Unsupported,
                        io::ErrorKind::NotFound,
                    ];
                    assert!(refused.contains(&error.kind()), "{error}");
                }
            }
        }
    }
}
