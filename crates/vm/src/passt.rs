//! passt, which gives a guest the network of its owner without root and without the host's loopback.
//!
//! QEMU and passt are the two ends of a socket pair: there is no socket file to protect, and passt ends when QEMU
//! does, for whatever reason, because its end closes then.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use command_fds::CommandFdExt as _;
use command_fds::FdMapping;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::address::{DNS_V4, GATEWAY_V4, GATEWAY_V6, GUEST_V4, GUEST_V6, host_part};
use crate::config::Owner;
use crate::launch::{in_own_session, run_as};
use crate::stderr::StderrTail;

/// Where passt finds its end of the socket pair.
const SOCKET_FD: i32 = 10;

/// passt's side of the link, as the guest sees it.
const GATEWAY_MAC: &str = "52:54:00:64:6f:01";

/// A running passt.
#[derive(Debug)]
pub(crate) struct Passt {
    pub(crate) child: Child,
    /// QEMU's end, until QEMU has it.
    pub(crate) socket: Option<OwnedFd>,
    pub(crate) stderr: StderrTail,
    drained: JoinHandle<()>,
}

impl Passt {
    /// Waits until the stderr of a passt that has ended was read to its end.
    pub(crate) async fn drained(&mut self) {
        let _ = (&mut self.drained).await;
    }
}

/// Starts passt.
pub(crate) fn start(program: &Path, owner: Option<Owner>) -> io::Result<Passt> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(program);
    command.args(arguments(has_default_route()));
    // Without an owner a passt that is started by root becomes `nobody`: it never stays root.
    if let Some(owner) = owner {
        run_as(&mut command, owner);
    }
    in_own_session(&mut command);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mapping = FdMapping { parent_fd: OwnedFd::from(theirs), child_fd: SOCKET_FD };
    command.fd_mappings(vec![mapping]).map_err(|error| io::Error::other(error.to_string()))?;
    let mut child = command.spawn()?;
    // The command still holds passt's end: with it alive, QEMU would never see passt go.
    drop(command);
    let (stderr, drained) = StderrTail::of(&mut child);
    Ok(Passt { child, socket: Some(OwnedFd::from(ours)), stderr, drained })
}

fn arguments(has_default_route: bool) -> Vec<String> {
    let (guest_v4, prefix_v4) = GUEST_V4.split_once('/').unwrap_or((GUEST_V4, "24"));
    let mut arguments: Vec<String> = [
        "--foreground",
        "--quiet",
        "--stderr",
        // The gateway's address must not lead to the host's loopback.
        "--no-map-gw",
        // The guest's addresses stand on its kernel's command line.
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ra",
        // Ports are published by the session host.
        "--tcp-ports=none",
        "--udp-ports=none",
    ]
    .map(str::to_owned)
    .into();
    for (option, value) in [
        ("--mac-addr", GATEWAY_MAC),
        ("--address", guest_v4),
        ("--netmask", prefix_v4),
        ("--gateway", GATEWAY_V4),
        ("--address", host_part(GUEST_V6)),
        ("--gateway", GATEWAY_V6),
        ("--dns-forward", DNS_V4),
    ] {
        arguments.extend([option.to_owned(), value.to_owned()]);
    }
    if !has_default_route {
        // passt wants an interface to take addresses from, which it is given anyway; a host without a way out (yet)
        // has at least this one.
        arguments.extend(["--interface".to_owned(), "lo".to_owned()]);
    }
    arguments.extend(["--fd".to_owned(), SOCKET_FD.to_string()]);
    arguments
}

/// Does the host have a way out, v4 or v6?
fn has_default_route() -> bool {
    let default_v4 = std::fs::read_to_string("/proc/net/route").is_ok_and(|table| {
        table.lines().skip(1).any(|route| route.split_whitespace().nth(1) == Some("00000000"))
    });
    let default_v6 = std::fs::read_to_string("/proc/net/ipv6_route").is_ok_and(|table| {
        table.lines().any(|route| {
            let fields: Vec<&str> = route.split_whitespace().collect();
            // Destination and its prefix length are zero; the kernel's own reject route on `lo` isn't a way out.
            matches!(fields.as_slice(), [destination, "00", .., interface]
                if destination.bytes().all(|digit| digit == b'0') && *interface != "lo")
        })
    });
    default_v4 || default_v6
}
