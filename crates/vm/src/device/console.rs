//! The serial console. QEMU throws away what the guest writes while nobody is connected; a reader that is connected
//! must read on, or the guest's writes wait for it.

use super::{Arguments, ChildFd};

pub(super) fn add(arguments: &mut Arguments) {
    arguments.listening("console", ChildFd::Console);
    arguments.option("-device", "isa-serial,chardev=console,index=0");
}
