//! Two disks: `vda`, the read-only root, and `vdb`, the session's data.

use std::path::Path;

use serde_json::json;

use super::Arguments;

/// Block node of the data disk.
pub(crate) const DATA_NODE: &str = "data";

pub(super) fn add(arguments: &mut Arguments, root: &Path, data: &Path) {
    arguments.json(
        "-blockdev",
        &json!({"driver": "raw", "node-name": "root", "read-only": true,
                "file": {"driver": "file", "filename": root}}),
    );
    arguments.option("-device", "virtio-blk-pci,id=vda,drive=root,serial=root,addr=0x1");
    arguments.json(
        "-blockdev",
        &json!({"driver": "raw", "node-name": DATA_NODE, "discard": "unmap", "detect-zeroes": "unmap",
                "file": {"driver": "file", "filename": data}}),
    );
    // A full host disk stops the VM (`werror=enospc`, QEMU's default, said here because we count on it): the write is
    // repeated once there is space. Other errors are the guest's to handle.
    arguments.option(
        "-device",
        "virtio-blk-pci,id=vdb,drive=data,serial=data,addr=0x2,werror=enospc,rerror=report",
    );
}
