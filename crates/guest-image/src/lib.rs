//! Guest images by content: what a VM boots from, and the proof that it is what was built.
//!
//! An image is a folder named by the hash of its manifest, and the manifest names each file's hash. So an image can't
//! change under its name: a file that differs from the manifest is damage, and [`ImageStore::open`] refuses it.
//!
//! ```text
//! <store>/newest                   the hash of the image that new VMs boot
//! <store>/<hash>/manifest.json
//! <store>/<hash>/vmlinux           an uncompressed kernel, which QEMU starts by its PVH entry
//! <store>/<hash>/initramfs         `dorm-init`, and the modules it needs to mount the root
//! <store>/<hash>/root.erofs        the engine, read-only
//! <store>/<hash>/verified          what the files looked like when they were last hashed
//! ```

mod manifest;
mod store;

pub use manifest::{FileEntry, MANIFEST_FORMAT, Manifest, hash_file};
pub use store::{GuestImage, ImageError, ImageHash, ImageStore, STORE_VARIABLE, SYSTEM_STORE};
