//! The kernel, and what can be told from ELF headers.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Offsets in a bzImage's setup header (Linux, Documentation/arch/x86/boot.rst).
const SETUP_SECTORS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Unpacks the ELF file inside a bzImage.
pub(super) fn unpack(image: &Path, vmlinux: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("can't read the kernel {}", image.display()))?;
    let payload = payload(&bytes)?;
    let program = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0xfd, b'7', b'z', ..] => "xz",
        [0x1f, 0x8b, ..] => "gzip",
        _ => bail!("the kernel is packed in a way that isn't known here"),
    };
    let mut unpacker = Command::new(program)
        .args(["-d", "-c", "-q"])
        .stdin(Stdio::piped())
        .stdout(File::create(vmlinux)?)
        .spawn()
        .with_context(|| format!("can't run {program}"))?;
    unpacker.stdin.take().context("the unpacker has no stdin")?.write_all(payload)?;
    let status = unpacker.wait()?;
    ensure!(status.success(), "{program} ended with {status}");
    ensure!(fs::read(vmlinux)?.starts_with(b"\x7fELF"), "what was unpacked is no ELF file");
    Ok(())
}

fn payload(image: &[u8]) -> Result<&[u8]> {
    let word =
        |at: usize| image.get(at..)?.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes) as usize);
    ensure!(image.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS"), "this is no bzImage");
    let sectors = usize::from(image[SETUP_SECTORS]);
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET).context("the header is cut off")?;
    let length = word(PAYLOAD_LENGTH).context("the header is cut off")?;
    // The last four bytes are the unpacked size, which is the boot loader's business.
    let end =
        start.checked_add(length).and_then(|end| end.checked_sub(4)).context("the header makes no sense")?;
    image.get(start..end).context("the payload is cut off")
}

/// Fails if the ELF file wants an interpreter, and so isn't static.
pub(super) fn ensure_static(program: &[u8]) -> Result<()> {
    const PT_INTERP: u32 = 3;
    ensure!(program.starts_with(b"\x7fELF\x02\x01"), "this is no 64-bit ELF file");
    let half = |at: usize| {
        program.get(at..)?.first_chunk::<2>().map(|bytes| usize::from(u16::from_le_bytes(*bytes)))
    };
    let table =
        program.get(0x20..).and_then(|rest| rest.first_chunk::<8>()).map(|bytes| u64::from_le_bytes(*bytes));
    let (table, size, count) =
        (table.context("cut off")?, half(0x36).context("cut off")?, half(0x38).context("cut off")?);
    for index in 0..count {
        let at = usize::try_from(table)? + index * size;
        let kind = program.get(at..).and_then(|rest| rest.first_chunk::<4>()).context("cut off")?;
        ensure!(u32::from_le_bytes(*kind) != PT_INTERP, "the program isn't static");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_an_interpreter_is_not_static() {
        let this_test = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(ensure_static(&this_test).is_err());
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(payload(&[]).is_err());
        assert!(payload(&[0; 4096]).is_err());
        let mut cut = vec![0; 1024];
        cut[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        cut[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(payload(&cut).is_err());
    }
}
