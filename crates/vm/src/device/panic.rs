//! pvpanic: a guest kernel's panic is told as such, and QEMU ends by it.

use super::Arguments;

pub(super) fn add(arguments: &mut Arguments) {
    arguments.option("-device", "pvpanic-pci,addr=0x7");
}
