//! What must not be the same in two guests that come from one template: random numbers, machine id, host name.

use std::fs::{self, File};
use std::io::Write;

use anyhow::{Context, Result};
use dormouse_agent_proto::Identity;
use rustix::ioctl::{NoArg, Opcode, ioctl, opcode};

/// `RNDRESEEDCRNG` of linux/random.h.
const RESEED: Opcode = opcode::none(b'R', 0x07);

/// Makes this guest a different one from the guest that it was copied from.
pub(crate) fn become_another(identity: &Identity) -> Result<()> {
    reseed(&identity.seed).context("can't renew the random numbers")?;
    set_machine_id(&identity.machine_id)?;
    set_hostname(&identity.hostname)
}

/// What is written is mixed into the pool; from it the generator takes a new key at once, also for programs that draw
/// their numbers without a system call.
fn reseed(seed: &[u8]) -> Result<()> {
    let mut random = File::options().write(true).open("/dev/urandom")?;
    random.write_all(seed)?;
    #[expect(unsafe_code, reason = "no safe call reseeds the kernel's generator")]
    // SAFETY: the opcode takes no argument and touches no memory of ours (random(4)).
    unsafe {
        ioctl(&random, NoArg::<RESEED>::new())?;
    }
    Ok(())
}

/// Writes machine-id(5).
pub(crate) fn set_machine_id(bytes: &[u8; 16]) -> Result<()> {
    let id: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write("/etc/machine-id", id + "\n").context("can't write the machine id")
}

/// Sets the host name, for programs and for files.
pub(crate) fn set_hostname(hostname: &str) -> Result<()> {
    rustix::system::sethostname(hostname.as_bytes()).context("can't set the host name")?;
    fs::write("/etc/hostname", format!("{hostname}\n"))?;
    fs::write("/etc/hosts", format!("127.0.0.1 localhost {hostname}\n::1 localhost {hostname}\n"))?;
    Ok(())
}
