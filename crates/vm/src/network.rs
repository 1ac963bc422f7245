//! passt, which gives a guest the network of its owner without root, and the filter before it, which keeps the guest
//! from the host's loopback.
//!
//! ```text
//!   QEMU ◄── socket pair ──► dorm-frames ◄── socket pair ──► passt
//! ```
//!
//! There is no socket file to protect, and when QEMU ends, for whatever reason, its end closes: the filter ends by
//! that, and passt by the filter.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use command_fds::CommandFdExt as _;
use command_fds::FdMapping;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::address::{DNS_V4, GATEWAY_V4, GATEWAY_V6, GUEST_V4, GUEST_V6, host_part};
use crate::config::Owner;
use crate::launch::{outliving_us, run_as};
use crate::stderr::StderrTail;

/// Where passt finds its end of the socket pair.
const SOCKET_FD: i32 = 10;

/// passt's side of the link, as the guest sees it.
const GATEWAY_MAC: &str = "52:54:00:64:6f:01";

/// How long the helpers may take to notice that QEMU is gone.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);

/// The processes behind a guest's network card.
#[derive(Debug)]
pub(crate) struct Helpers {
    passt: Passt,
    filter: Child,
}

impl Helpers {
    /// Starts both; gives QEMU's end as well.
    pub(crate) fn start(passt: &Path, filter: &Path, owner: Option<Owner>) -> io::Result<(Self, OwnedFd)> {
        let (qemu, guest_side) = UnixStream::pair()?;
        let (passt, helper_side) = Passt::start(passt, owner)?;
        let filter = start_filter(filter, owner, guest_side, helper_side)?;
        Ok((Self { passt, filter }, qemu.into()))
    }

    /// How either of them has ended, if one has, and its last words.
    pub(crate) async fn ended(&mut self) -> io::Result<Option<String>> {
        if let Some(status) = self.passt.child.try_wait()? {
            return Ok(Some(self.passt.last_words(status).await));
        }
        Ok(self.filter.try_wait()?.map(|status| format!("dorm-frames: {status}")))
    }

    /// Kills both, without waiting for it.
    pub(crate) fn kill(&mut self) {
        let _ = self.passt.child.start_kill();
        let _ = self.filter.start_kill();
    }

    /// Reaps both, after QEMU is gone.
    pub(crate) async fn reap(&mut self) -> io::Result<()> {
        for child in [&mut self.filter, &mut self.passt.child] {
            if tokio::time::timeout(LEAVE_WITHIN, child.wait()).await.is_err() {
                tracing::warn!(pid = child.id(), "a network helper outlives its QEMU, killed");
                child.kill().await?;
            }
        }
        Ok(())
    }
}

fn start_filter(
    program: &Path,
    owner: Option<Owner>,
    guest: UnixStream,
    helper: UnixStream,
) -> io::Result<Child> {
    let mut command = Command::new(program);
    if let Some(owner) = owner {
        run_as(&mut command, owner);
    }
    outliving_us(&mut command);
    command.stdin(OwnedFd::from(guest)).stdout(OwnedFd::from(helper)).stderr(Stdio::null());
    command.spawn()
}

#[derive(Debug)]
struct Passt {
    child: Child,
    stderr: StderrTail,
    drained: JoinHandle<()>,
}

impl Passt {
    /// Starts passt; gives the other end of its socket as well.
    fn start(program: &Path, owner: Option<Owner>) -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(program);
        command.args(arguments(has_default_route()));
        // Without an owner a passt that is started by root becomes `nobody`: it never stays root.
        if let Some(owner) = owner {
            run_as(&mut command, owner);
        }
        outliving_us(&mut command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mapping = FdMapping { parent_fd: OwnedFd::from(theirs), child_fd: SOCKET_FD };
        command.fd_mappings(vec![mapping]).map_err(|error| io::Error::other(error.to_string()))?;
        let mut child = command.spawn()?;
        // The command still holds passt's end: with it alive, nobody would ever see passt go.
        drop(command);
        let (stderr, drained) = StderrTail::of(&mut child);
        Ok((Self { child, stderr, drained }, ours))
    }

    /// What a passt that has ended said.
    async fn last_words(&mut self, status: ExitStatus) -> String {
        let _ = (&mut self.drained).await;
        let words = self.stderr.text();
        if words.is_empty() { format!("passt: {status}") } else { words }
    }
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

#[cfg(test)]
mod tests;
