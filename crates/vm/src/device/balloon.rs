//! The balloon, above all for free page reporting: what the guest frees becomes a hole in the memory file.

use super::Arguments;

pub(super) fn add(arguments: &mut Arguments) {
    arguments
        .option("-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on,deflate-on-oom=on,addr=0x6");
}
