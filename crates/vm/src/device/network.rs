//! One network card, with whatever is behind it.

use super::{Arguments, ChildFd};
use crate::address::{DNS_V4, GATEWAY_V4, GATEWAY_V6, GUEST_V4, MAC, PREFIX_V6, host_part};
use crate::config::NetworkKind;

pub(super) fn add(arguments: &mut Arguments, kind: NetworkKind) {
    let backend = match kind {
        NetworkKind::Passt => format!("stream,id=net,server=off,addr.type=fd,addr.str={}", ChildFd::Network),
        NetworkKind::UserUnsafe => format!(
            "user,id=net,net=10.0.2.0/24,host={GATEWAY_V4},dns={DNS_V4},dhcpstart={},ipv6-prefix={},ipv6-host={GATEWAY_V6}",
            host_part(GUEST_V4),
            host_part(PREFIX_V6),
        ),
        // A hub with a single port: the card is there, as in every VM, and leads nowhere.
        NetworkKind::None => "hubport,id=net,hubid=0".to_owned(),
    };
    arguments.option("-netdev", backend);
    arguments.option("-device", format!("virtio-net-pci,id=eth0,netdev=net,mac={MAC},romfile=,addr=0x3"));
}
