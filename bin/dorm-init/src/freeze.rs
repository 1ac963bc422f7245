//! The data disk's file system, frozen for a suspend.
//!
//! ```text
//! thawed ── freeze ──► frozen ── wake, or FROZEN_MAX of guest time ──► thawed
//! ```

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_agent_proto::FROZEN_MAX;
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, ioctl, opcode};

use crate::console;

/// `FIFREEZE` and `FITHAW` of linux/fs.h.
const FREEZE: Opcode = opcode::read_write::<i32>(b'X', 119);
const THAW: Opcode = opcode::read_write::<i32>(b'X', 120);

/// Freezes and thaws one file system.
#[derive(Debug, Clone)]
pub(crate) struct Freezer {
    mount_point: &'static str,
    /// How often it was frozen or thawed: by this a timer knows whether the freeze that it ends is still the present one.
    turns: Arc<AtomicU64>,
}

impl Freezer {
    pub(crate) fn new(mount_point: &'static str) -> Self {
        Self { mount_point, turns: Arc::new(AtomicU64::new(0)) }
    }

    /// Flushes the file system and keeps it from being written to.
    pub(crate) async fn freeze(&self) -> std::io::Result<()> {
        let turn = self.turns.fetch_add(1, Ordering::Relaxed) + 1;
        // Writing everything out takes as long as the disk needs.
        let mount_point = self.mount_point;
        tokio::task::spawn_blocking(move || set(mount_point, Wanted::Frozen)).await??;
        let freezer = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(FROZEN_MAX).await;
            if freezer.turns.load(Ordering::Relaxed) == turn {
                console::say("thawing the disk: the VM was not suspended");
                let _ = freezer.thaw();
            }
        });
        Ok(())
    }

    /// Lets the file system be written to; nothing happens to one that isn't frozen.
    pub(crate) fn thaw(&self) -> std::io::Result<()> {
        self.turns.fetch_add(1, Ordering::Relaxed);
        set(self.mount_point, Wanted::Thawed)
    }
}

#[derive(Debug, Clone, Copy)]
enum Wanted {
    Frozen,
    Thawed,
}

fn set(mount_point: &str, wanted: Wanted) -> std::io::Result<()> {
    let folder = File::open(mount_point)?;
    #[expect(unsafe_code, reason = "no safe call freezes a file system")]
    // SAFETY: both opcodes ignore their argument and touch no memory of ours (linux/fs/ioctl.c).
    let done = unsafe {
        match wanted {
            Wanted::Frozen => ioctl(&folder, IntegerSetter::<FREEZE>::new_usize(0)),
            Wanted::Thawed => ioctl(&folder, IntegerSetter::<THAW>::new_usize(0)),
        }
    };
    match (wanted, done) {
        // It is already as wanted.
        (Wanted::Frozen, Err(Errno::BUSY)) | (Wanted::Thawed, Err(Errno::INVAL)) => Ok(()),
        (_, done) => Ok(done?),
    }
}
