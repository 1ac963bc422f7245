//! Two QMP monitors: QEMU serves one client on each, and neither `dormd` nor the session host is to wait for the other.

use super::{Arguments, ChildFd};

pub(super) fn add(arguments: &mut Arguments) {
    for (id, fd) in [("host", ChildFd::HostMonitor), ("dormd", ChildFd::ServiceMonitor)] {
        arguments.listening(id, fd);
        arguments.option("-mon", format!("chardev={id},mode=control"));
    }
}
