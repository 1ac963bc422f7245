//! PID 1 of the guest.
//!
//! Two processes of this one program:
//!
//! ```text
//! PID 1   mounts the root, starts the second, reaps orphans ── second ended ──► sync, power off
//!           └─ dorm-init serve    disk, network, containerd, dockerd, the agent channel
//! ```
//!
//! So that reaping every orphan of the guest can't take a child's status from who waits for it, and so that whatever
//! happens to the second process, the disk is synced and the power goes off in order.
//!
//! A third, `dorm-init tell-changes`, is run by the host while folders are shared. By the name of one of a few other
//! programs it becomes that one (`fixed`).
//!
//! Parameters of the kernel's command line:
//!
//! | parameter | means |
//! |---|---|
//! | `dorm.hostname=NAME` | the guest's host name |
//! | `dorm.ip4=ADDRESS/LENGTH`, `dorm.gw4=ADDRESS` | `eth0`'s address and the way out |
//! | `dorm.ip6=ADDRESS/LENGTH`, `dorm.gw6=ADDRESS` | the same for IPv6 |
//! | `dorm.dns=ADDRESS[,ADDRESS...]` | name servers |
//! | `dorm.lonely=SECONDS` | so long without a host, and the guest powers off; ten minutes unless it is given |

mod activity;
mod agent;
mod connections;
mod console;
mod datagrams;
mod disk;
mod engine;
mod fixed;
mod freeze;
mod identity;
mod limits;
mod mounts;
mod network;
mod parameters;
mod port;
mod process;
mod reap;
mod serve;
mod sockets;
mod steps;
mod tell;

use std::process::ExitCode;

fn main() -> ExitCode {
    let started_as = std::env::args_os().next().unwrap_or_default();
    if let Some(program) = fixed::meant(&started_as) {
        return told(fixed::become_program(program));
    }
    let served = match std::env::args().nth(1).as_deref() {
        Some("serve") => serve::run(),
        Some("tell-changes") => return told(tell::run()),
        _ if std::process::id() == 1 => reap::run(),
        _ => {
            eprintln!("dorm-init is PID 1 of a Dormouse guest; it does nothing elsewhere");
            return ExitCode::from(2);
        }
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::say(&format!("failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// What goes wrong is to be known by who runs this.
fn told(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
