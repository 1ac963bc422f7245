//! Guest images of a few bytes, for what needs a VM and no engine in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use dormouse_guest_image::{ImageHash, ImageStore, MANIFEST_FORMAT, Manifest, hash_file};

/// Where the code is loaded.
const CODE_ADDRESS: u32 = 0x0010_0000;
const HEADER_BYTES: u32 = 32;

/// Says `boo`, a line, on the serial port, and then nothing for ever.
const SAYS_BOO: &[u8] = &[
    0xbe, 0x40, 0x00, 0x10, 0x00, // mov esi, text (0x100000 + 32 + 32)
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xac, // next: lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz halt
    0xee, // out dx, al
    0xeb, 0xf8, // jmp next
    0xf4, // halt: hlt
    0xeb, 0xfd, // jmp halt
    0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, // up to 32
    b'b', b'o', b'o', b'\n', 0,
];

/// Makes a store with one image in it, whose guest says `boo` and nothing else.
///
/// # Errors
/// When it can't be written.
pub fn publish(store: &Path) -> Result<ImageHash> {
    let built = store.join("built");
    fs::create_dir_all(&built)?;
    fs::write(built.join("vmlinux"), multiboot_kernel(SAYS_BOO)?)?;
    fs::write(built.join("initramfs"), "none")?;
    fs::write(built.join("root.erofs"), vec![0; 1 << 20])?;
    let mut files = BTreeMap::new();
    for name in ["vmlinux", "initramfs", "root.erofs"] {
        files.insert(name.to_owned(), hash_file(&built.join(name))?);
    }
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        kernel: "none".to_owned(),
        engine: "none".to_owned(),
        api: "1.45".to_owned(),
        files,
        packages: BTreeMap::new(),
    };
    Ok(ImageStore::new(store).publish(&built, &manifest)?)
}

/// The smallest kernel that QEMU's `-kernel` loads: a multiboot header with load addresses, then the code.
fn multiboot_kernel(code: &[u8]) -> Result<Vec<u8>> {
    const MAGIC: u32 = 0x1bad_b002;
    // Bit 16: the addresses below hold.
    const FLAGS: u32 = 1 << 16;
    let length = u32::try_from(code.len()).context("a guest of a few bytes")?;
    let end = CODE_ADDRESS + HEADER_BYTES + length;
    let header = [
        MAGIC,
        FLAGS,
        0_u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS),
        CODE_ADDRESS,
        CODE_ADDRESS,
        end,
        end,
        CODE_ADDRESS + HEADER_BYTES,
    ];
    let mut kernel: Vec<u8> = header.iter().flat_map(|field| field.to_le_bytes()).collect();
    kernel.extend_from_slice(code);
    // QEMU reads a fixed length when it looks for the header.
    kernel.resize(kernel.len().max(8192), 0);
    Ok(kernel)
}
