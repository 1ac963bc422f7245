//! A guest that shows whether code runs at the processor's speed: the smallest kernel that QEMU loads.
//!
//! It goes where every ordinary kernel goes, paging and 64-bit mode, counts to 100 million there (some 50 ms on a
//! processor, some 150 ms under TCG), and says goodbye through `isa-debug-exit`. A guest that does less proves less: on
//! some paravirtual hosts KVM accepts everything and then carries out one instruction after the other in software, so
//! that a few instructions pass and a kernel's boot takes hours.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;

use rustix::fs::MemfdFlags;

/// The port of `isa-debug-exit`: writing `value` there ends QEMU with status `2 * value + 1`.
pub(super) const EXIT_PORT: u8 = 0xf4;
const EXIT_VALUE: u8 = 0x10;
/// QEMU's exit status when the guest came to its end.
pub(super) const EXIT_STATUS: i32 = 2 * EXIT_VALUE as i32 + 1;

const LOAD_ADDRESS: u32 = 0x0010_0000;
/// The code follows the header; the addresses in it count on that.
const HEADER_BYTES: u32 = 32;

#[rustfmt::skip]
const CODE: &[u8] = &[
    // 32-bit mode. Page tables at 0x200000: zero them, then map the first 2 MiB as one large page.
    0xfc,                                                       // cld
    0xbf, 0x00, 0x00, 0x20, 0x00,                               // mov edi, 0x200000
    0x31, 0xc0,                                                 // xor eax, eax
    0xb9, 0x00, 0x0c, 0x00, 0x00,                               // mov ecx, 3072
    0xf3, 0xab,                                                 // rep stosd
    0xc7, 0x05, 0x00, 0x00, 0x20, 0x00, 0x03, 0x10, 0x20, 0x00, // mov dword [0x200000], 0x201003
    0xc7, 0x05, 0x00, 0x10, 0x20, 0x00, 0x03, 0x20, 0x20, 0x00, // mov dword [0x201000], 0x202003
    0xc7, 0x05, 0x00, 0x20, 0x20, 0x00, 0x83, 0x00, 0x00, 0x00, // mov dword [0x202000], 0x83
    0xb8, 0x00, 0x00, 0x20, 0x00,                               // mov eax, 0x200000
    0x0f, 0x22, 0xd8,                                           // mov cr3, eax
    // PAE, long mode, paging.
    0x0f, 0x20, 0xe0,                                           // mov eax, cr4
    0x83, 0xc8, 0x20,                                           // or eax, 0x20
    0x0f, 0x22, 0xe0,                                           // mov cr4, eax
    0xb9, 0x80, 0x00, 0x00, 0xc0,                               // mov ecx, 0xc0000080 (EFER)
    0x0f, 0x32,                                                 // rdmsr
    0x0d, 0x00, 0x01, 0x00, 0x00,                               // or eax, 0x100
    0x0f, 0x30,                                                 // wrmsr
    0x0f, 0x20, 0xc0,                                           // mov eax, cr0
    0x0d, 0x01, 0x00, 0x00, 0x80,                               // or eax, 0x80000001
    0x0f, 0x22, 0xc0,                                           // mov cr0, eax
    0x0f, 0x01, 0x15, 0xa8, 0x00, 0x10, 0x00,                   // lgdt [0x1000a8]
    0xea, 0x85, 0x00, 0x10, 0x00, 0x08, 0x00,                   // jmp 8:0x100085
    // 64-bit mode, at 0x100085.
    0xb9, 0x00, 0xe1, 0xf5, 0x05,                               // mov ecx, 100000000
    0xff, 0xc9,                                                 // dec ecx
    0x75, 0xfc,                                                 // jnz to the dec
    0xb0, EXIT_VALUE,                                           // mov al, EXIT_VALUE
    0xe6, EXIT_PORT,                                            // out EXIT_PORT, al
    0xf4,                                                       // hlt
    0xeb, 0xfd,                                                 // jmp to the hlt
    0x90, 0x90, 0x90,                                           // up to a multiple of 8
    // The descriptor table, at 0x100098: nothing, and 64-bit code. Then its size and address, at 0x1000a8.
    0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0x9a, 0x20, 0,
    0x0f, 0x00, 0x98, 0x00, 0x10, 0x00,
];

/// A multiboot header with load addresses, and the code.
fn kernel() -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    // Bit 16: the addresses in the header hold.
    const FLAGS: u32 = 1 << 16;
    let end = LOAD_ADDRESS + HEADER_BYTES + CODE.len() as u32;
    let checksum = 0_u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
    let header = [MAGIC, FLAGS, checksum, LOAD_ADDRESS, LOAD_ADDRESS, end, end, LOAD_ADDRESS + HEADER_BYTES];
    let mut kernel: Vec<u8> = header.iter().flat_map(|field| field.to_le_bytes()).collect();
    kernel.extend_from_slice(CODE);
    // QEMU looks for the header in the first 8 KiB, all of which must be there.
    kernel.resize(8192, 0);
    kernel
}

/// The kernel as a file without a name.
pub(super) fn kernel_file() -> io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create("test-guest", MemfdFlags::CLOEXEC)?);
    file.write_all(&kernel())?;
    Ok(file.into())
}
