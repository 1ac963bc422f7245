//! Spare root ports, for devices that are plugged in while the VM runs: folders and volumes.

use super::Arguments;

/// Buses that a device may be plugged into, one device each.
pub const SPARE_PORTS: [&str; 4] = ["spare0", "spare1", "spare2", "spare3"];

pub(super) fn add(arguments: &mut Arguments) {
    for (number, id) in SPARE_PORTS.into_iter().enumerate() {
        let slot = number + 1;
        arguments.option(
            "-device",
            format!("pcie-root-port,id={id},chassis={slot},slot={slot},addr={:#x}", 0x10 + number),
        );
    }
}
