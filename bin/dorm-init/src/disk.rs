//! The data disk: made on first use, mended when it wasn't unmounted, grown when the device has grown.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const DEVICE: &str = "/dev/vdb";
/// Where the data disk is mounted.
pub(crate) const MOUNT_POINT: &str = "/var/lib/docker";

/// Where the ext4 superblock lies, and its fields (Linux, Documentation/filesystems/ext4/super.rst).
const SUPERBLOCK: u64 = 1024;
const MAGIC: [u8; 2] = [0x53, 0xef];

/// What is looked at before a disk counts as blank: partition tables, and the superblocks of every file system.
const BLANK_BYTES: usize = 1024 * 1024;

/// A device that is larger than its file system by this much is worth a resize.
const GROWTH_BYTES_MIN: u64 = 128 * 1024 * 1024;

/// How long the kernel may take to see that the disk has grown, and how often it is asked.
const GROWN_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(5);

enum Content {
    Blank,
    Ext4 { bytes: u64, clean: bool },
}

/// Makes the data disk ready, and mounts it.
pub(crate) fn mount_data() -> Result<()> {
    let device = File::open(DEVICE).context("there is no data disk")?;
    let content = look(&device)?;
    drop(device);
    match content {
        Content::Blank => {
            let options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard";
            run(
                Command::new("mkfs.ext4")
                    .args(["-q", "-F", "-m", "0", "-L", "dormouse", "-E", options, DEVICE]),
                0,
            )?;
        }
        // 1: errors were found and mended.
        Content::Ext4 { clean: false, .. } => run(Command::new("e2fsck").args(["-p", DEVICE]), 1)?,
        Content::Ext4 { .. } => {}
    }
    mount(DEVICE, MOUNT_POINT, "ext4", MountFlags::NOATIME, c"discard")
        .context("can't mount the data disk")?;
    if let Content::Ext4 { bytes, .. } = content
        && device_bytes()? >= bytes + GROWTH_BYTES_MIN
    {
        run(Command::new("resize2fs").arg(DEVICE), 0)?;
    }
    Ok(())
}

/// Has the mounted file system fill a disk that has grown to so many bytes.
pub(crate) async fn grow_to(bytes: u64) -> Result<()> {
    let grown = async {
        let mut look = tokio::time::interval(LOOK_EVERY);
        while device_bytes()? < bytes {
            look.tick().await;
        }
        anyhow::Ok(())
    };
    // The host says so when it has told the device; the kernel hears of it by an interrupt.
    tokio::time::timeout(GROWN_WITHIN, grown).await.context("the data disk did not grow")??;
    tokio::task::spawn_blocking(|| run(Command::new("resize2fs").arg(DEVICE), 0)).await?
}

/// Unmounts the data disk. What still uses it loses it: the VM is about to go.
pub(crate) fn unmount_data() {
    rustix::fs::sync();
    if unmount(MOUNT_POINT, UnmountFlags::empty()).is_err() {
        // Its journal was synced, so the next mount finds everything; it is just not marked clean.
        let _ = unmount(MOUNT_POINT, UnmountFlags::DETACH);
    }
}

fn look(device: &File) -> Result<Content> {
    let mut superblock = [0; 1024];
    device.read_exact_at(&mut superblock, SUPERBLOCK).context("the data disk is too small")?;
    if superblock[0x38..0x3a] == MAGIC {
        return Ok(ext4(&superblock));
    }
    let mut start = Vec::new();
    device.take(BLANK_BYTES as u64).read_to_end(&mut start)?;
    if start.iter().any(|byte| *byte != 0) {
        bail!("the data disk holds something that is no ext4 file system; it was left alone");
    }
    Ok(Content::Blank)
}

fn ext4(superblock: &[u8; 1024]) -> Content {
    let word = |at: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|index| superblock[at + index])));
    let blocks = word(0x4) | word(0x150) << 32;
    let block_bytes = 1024_u64.checked_shl(u32::try_from(word(0x18)).unwrap_or(0)).unwrap_or(0);
    // Bit 0: unmounted cleanly. A journal that must be replayed is the mount's own business; bit 1 says errors.
    let state = u16::from_le_bytes([superblock[0x3a], superblock[0x3b]]);
    Content::Ext4 { bytes: blocks.saturating_mul(block_bytes), clean: state & 2 == 0 }
}

fn device_bytes() -> Result<u64> {
    let sectors: u64 = fs::read_to_string("/sys/class/block/vdb/size")?.trim().parse()?;
    Ok(sectors * 512)
}

fn run(command: &mut Command, status_max: i32) -> Result<()> {
    let output = command.output().with_context(|| format!("can't run {command:?}"))?;
    ensure!(
        output.status.code().is_some_and(|status| status <= status_max),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn disk(write: impl FnOnce(&mut File)) -> Result<Content> {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(16 * 1024 * 1024).unwrap();
        write(&mut file);
        look(
            &File::options()
                .read(true)
                .open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)))
                .unwrap(),
        )
    }

    #[test]
    fn a_disk_of_zeros_is_blank_and_one_with_data_is_left_alone() {
        assert!(matches!(disk(|_| {}), Ok(Content::Blank)));
        assert!(disk(|file| file.write_all(b"LUKS").unwrap()).is_err());
        assert!(disk(|file| file.write_all_at(b"x", 700_000).unwrap()).is_err());
    }

    #[test]
    fn the_size_and_state_of_a_file_system_are_read_from_its_superblock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 * 1024 * 1024).unwrap();
        assert!(Command::new("/sbin/mkfs.ext4").arg("-q").arg(file.path()).status().unwrap().success());
        let content = look(&File::open(file.path()).unwrap()).unwrap();
        assert!(matches!(content, Content::Ext4 { bytes: 67_108_864, clean: true }));
    }
}
