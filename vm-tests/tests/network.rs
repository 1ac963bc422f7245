//! What root in a guest can reach of its host, with the real QEMU, passt and frame filter. The test runs itself again in
//! a network of its own, so that no packet leaves it.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dormouse_agent_proto::{EngineState, GuestEvent, Target};
use dormouse_mux::Agent;
use dormouse_vm::NetworkKind;
use dormouse_vm_tests::registry::{HOST_V4, give_host_an_address, ip};
use dormouse_vm_tests::{Home, in_network_namespace};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// As [`HOST_V4`].
const HOST_V6: &str = "2001:db8::7";

/// What stands for the host's loopback, or might: itself, the ways out, the resolver, and all of "any".
const LOOPBACK: [&str; 9] = [
    "10.0.2.2",
    "10.0.2.3",
    "10.0.2.15",
    "127.0.0.1",
    "0.0.0.0",
    "fd64:6f72:6d::2",
    "fd64:6f72:6d::15",
    "::1",
    "::ffff:127.0.0.1",
];

fn was_reached(listener: &TcpListener) -> Result<bool> {
    let timeout = Timespec::try_from(Duration::ZERO)?;
    Ok(poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout))? > 0)
}

#[test]
fn root_in_a_guest_reaches_what_its_owner_can_and_not_the_hosts_loopback() -> Result<()> {
    if in_network_namespace("root_in_a_guest_reaches_what_its_owner_can_and_not_the_hosts_loopback")? {
        return Ok(());
    }
    give_host_an_address()?;
    ip(&["addr", "add", HOST_V6, "dev", "lo", "nodad"])?;
    // passt takes part in IPv6 only where the interface has a link-local address.
    ip(&["addr", "add", "fe80::1/64", "dev", "lo", "nodad"])?;
    tokio::runtime::Runtime::new()?.block_on(reach())
}

async fn reach() -> Result<()> {
    let listen = |address: &str| TcpListener::bind((address.parse::<IpAddr>()?, 0)).context("can't listen");
    let loopback = [listen("127.0.0.1")?, listen("::1")?];
    let open = [listen(HOST_V4)?, listen(HOST_V6)?];
    let mut home = Home::new()?;
    home.network = NetworkKind::Passt;
    let machine = home.boot(1).await?;
    let outcome = async {
        // The guest answers before its network is up.
        let mut watch = machine.agent.watch().await?;
        while watch.next().await? != GuestEvent::Engine(EngineState::Ready) {}
        for listener in &open {
            let address = listener.local_addr()?;
            ensure!(connects(&machine.agent, address).await, "the guest reaches nothing, not even {address}");
            ensure!(was_reached(listener)?);
        }
        // All at once: each that leads nowhere takes its time.
        let mut tries = tokio::task::JoinSet::new();
        for listener in &loopback {
            for target in LOOPBACK {
                let address = SocketAddr::new(target.parse()?, listener.local_addr()?.port());
                let agent = machine.agent.clone();
                tries.spawn(async move { (address, connects(&agent, address).await) });
            }
        }
        while let Some(tried) = tries.join_next().await {
            let (address, connected) = tried?;
            ensure!(!connected, "the guest is connected to {address}");
        }
        for listener in &loopback {
            ensure!(!was_reached(listener)?, "the guest reaches {}", listener.local_addr()?);
        }
        Ok(())
    }
    .await;
    machine.end().await?;
    outcome
}

/// Does root in the guest get a connection?
async fn connects(agent: &Agent, address: SocketAddr) -> bool {
    agent.dial(Target::Tcp(address.to_string())).await.is_ok()
}
