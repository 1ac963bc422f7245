//! VMs with real QEMU, emulated, whose guests are a few bytes of machine code: no guest image is needed.
#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

mod exit;
mod guest;
mod probe;
mod spawn;
mod support;
