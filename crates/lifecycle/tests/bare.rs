//! The core does no I/O, reads no clock and starts no thread, because it can't: it is linked into a program that has none
//! of them, with an allocator and a panic handler of its own. Were the standard library in it, there would be two.

use std::path::Path;
use std::process::Command;

const BARE: &str = r"
#![no_std]
use core::alloc::{GlobalAlloc, Layout};

struct Nothing;

unsafe impl GlobalAlloc for Nothing {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 { core::ptr::null_mut() }
    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static ALLOCATOR: Nothing = Nothing;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! { loop {} }

pub fn step(session: &mut dormouse_lifecycle::Session, actions: &mut dormouse_lifecycle::Actions) {
    let now = dormouse_lifecycle::Timestamp::from_millis(1);
    session.handle(now, dormouse_lifecycle::Event::DeadlineReached, actions);
}
";

/// Compiles for a machine without an operating system's library.
fn compile(arguments: &[&str], folder: &Path) {
    let output = Command::new(Path::new(env!("CARGO")).with_file_name("rustc"))
        .args(["--edition", "2024", "-C", "panic=abort", "-L", "."])
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("rustc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_core_needs_no_operating_system() {
    let folder = tempfile::tempdir().unwrap();
    let core = concat!(env!("CARGO_MANIFEST_DIR"), "/src/lib.rs");
    compile(&["--crate-type", "rlib", "--crate-name", "dormouse_lifecycle", core], folder.path());
    std::fs::write(folder.path().join("bare.rs"), BARE).unwrap();
    compile(
        &[
            "--crate-type",
            "staticlib",
            "--extern",
            "dormouse_lifecycle=libdormouse_lifecycle.rlib",
            "bare.rs",
        ],
        folder.path(),
    );
}
