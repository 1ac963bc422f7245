//! The channel to `dorm-init`: a virtio-serial bus with two ports, so that a flood on one never starves the other.

use super::{Arguments, ChildFd};

/// Name of the port for control, and id of its device.
pub(crate) const AGENT_PORT: &str = "agent";
/// Name of the port for forwards, and id of its device.
pub(crate) const PORTS_PORT: &str = "ports";

pub(super) fn add(arguments: &mut Arguments) {
    arguments.option("-device", "virtio-serial-pci,id=channel,max_ports=3,addr=0x4");
    for (number, name, fd) in [(1, AGENT_PORT, ChildFd::Agent), (2, PORTS_PORT, ChildFd::Ports)] {
        let chardev = format!("{name}-socket");
        arguments.listening(&chardev, fd);
        arguments.option(
            "-device",
            format!("virtserialport,id={name},bus=channel.0,nr={number},chardev={chardev},name={name}"),
        );
    }
}
