//! `lo`, `eth0`, names.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use crate::identity;
use crate::parameters::Parameters;

/// Brings the network up as the host wished. A guest without a network card has only `lo`.
pub(crate) async fn configure(parameters: &Parameters) -> Result<()> {
    if let Some(hostname) = &parameters.hostname {
        identity::set_hostname(hostname)?;
    }
    let servers: String =
        parameters.name_servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    fs::write("/etc/resolv.conf", servers)?;
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    identity::set_machine_id(&id)?;

    let (connection, handle, _) = rtnetlink::new_connection().context("can't speak netlink")?;
    tokio::spawn(connection);
    up(&handle, index("lo")?).await?;
    // A card that leads nowhere stays down: what is sent to nobody is never sent, and the kernel would complain for ever.
    let leads_somewhere = parameters.address4.is_some() || parameters.address6.is_some();
    if leads_somewhere && let Ok(card) = index("eth0") {
        up(&handle, card).await?;
        addresses(&handle, card, parameters).await?;
    }
    Ok(())
}

async fn up(handle: &Handle, index: u32) -> Result<()> {
    handle
        .link()
        .set(LinkUnspec::new_with_index(index).up().build())
        .execute()
        .await
        .context("can't bring a link up")
}

async fn addresses(handle: &Handle, card: u32, parameters: &Parameters) -> Result<()> {
    if let Some((address, length)) = parameters.address4 {
        handle
            .address()
            .add(card, address.into(), length)
            .execute()
            .await
            .context("can't set the IPv4 address")?;
    }
    if let Some((address, length)) = parameters.address6 {
        handle
            .address()
            .add(card, address.into(), length)
            .execute()
            .await
            .context("can't set the IPv6 address")?;
    }
    if let Some(gateway) = parameters.gateway4 {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(card).build();
        handle.route().add(route).execute().await.context("can't set the IPv4 route")?;
    }
    if let Some(gateway) = parameters.gateway6 {
        let route = RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway).output_interface(card).build();
        handle.route().add(route).execute().await.context("can't set the IPv6 route")?;
    }
    Ok(())
}

fn index(link: &str) -> Result<u32> {
    Ok(fs::read_to_string(format!("/sys/class/net/{link}/ifindex"))?.trim().parse()?)
}
