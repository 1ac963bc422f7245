//! Random numbers from the host.

use super::Arguments;

pub(super) fn add(arguments: &mut Arguments) {
    arguments.option("-object", "rng-random,id=random,filename=/dev/urandom");
    arguments.option("-device", "virtio-rng-pci,rng=random,addr=0x5");
}
