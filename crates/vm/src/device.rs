//! The devices of a VM, one module each, and the command line that they make.
//!
//! The list and the place of each device on the PCI bus are a file format: they stand in every template and snapshot.
//! Any change here needs a new [`DEVICE_LIST_VERSION`].

mod balloon;
mod console;
mod disk;
mod machine;
mod monitor;
mod network;
mod panic;
mod random;
mod root_port;
mod serial;

use std::fmt::Display;

use serde_json::Value;

use crate::config::{Start, VmConfig};
use crate::kernel::kernel_command_line;
use crate::probe::Qemu;

pub(crate) use disk::DATA_NODE;
pub(crate) use machine::{MACHINE, cpu_model};
pub use root_port::SPARE_PORTS;
pub(crate) use serial::{AGENT_PORT, PORTS_PORT};

/// Number of the device list that this build makes: part of every template's and snapshot's key.
pub const DEVICE_LIST_VERSION: u32 = 1;

/// Where the descriptors that QEMU inherits are, in QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChildFd {
    HostMonitor = 10,
    ServiceMonitor = 11,
    Console = 12,
    Agent = 13,
    Ports = 14,
    Network = 15,
}

impl Display for ChildFd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (*self as i32).fmt(f)
    }
}

/// QEMU's arguments, in order.
#[derive(Debug, Default)]
pub(crate) struct Arguments(Vec<String>);

impl Arguments {
    fn flag(&mut self, option: &str) {
        self.0.push(option.to_owned());
    }

    fn option(&mut self, option: &str, value: impl Into<String>) {
        self.0.push(option.to_owned());
        self.0.push(value.into());
    }

    /// For options that take JSON: no character of a path can mean anything else there.
    fn json(&mut self, option: &str, value: &Value) {
        self.option(option, value.to_string());
    }

    /// A listening socket as a character device.
    fn listening(&mut self, id: &str, fd: ChildFd) {
        self.option("-chardev", format!("socket,id={id},fd={fd},server=on,wait=off"));
    }
}

/// The arguments of the QEMU of `config`.
pub(crate) fn arguments(config: &VmConfig, qemu: &Qemu, uuid: &str) -> Vec<String> {
    let mut arguments = Arguments::default();
    machine::add(&mut arguments, config, qemu);
    arguments.option("-name", format!("dorm-{}", config.session));
    arguments.option("-uuid", uuid);
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    arguments.option("-kernel", path(&config.image.kernel));
    arguments.option("-initrd", path(&config.image.initramfs));
    arguments.option("-append", kernel_command_line(config, &qemu.acceleration));
    monitor::add(&mut arguments);
    console::add(&mut arguments);
    disk::add(&mut arguments, &config.image.root, &config.data_disk);
    network::add(&mut arguments, config.network);
    serial::add(&mut arguments);
    random::add(&mut arguments);
    balloon::add(&mut arguments);
    panic::add(&mut arguments);
    root_port::add(&mut arguments);
    if config.start == Start::Incoming {
        arguments.option("-incoming", "defer");
    }
    arguments.0
}
