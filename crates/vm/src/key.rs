//! What a template or snapshot fits.

use serde::{Deserialize, Serialize};

use crate::config::{NetworkKind, VmConfig};
use crate::device::{DEVICE_LIST_VERSION, MACHINE, cpu_model};
use crate::probe::Qemu;

/// Everything that must be the same for a device state and a memory file to be brought to life again. A snapshot with
/// another key is void, and the session boots cold from the same disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotKey {
    /// Hash of the guest image.
    pub guest_image: String,
    /// Build of QEMU, see [`Qemu::build`].
    pub qemu_build: String,
    /// Machine type.
    pub machine: String,
    /// `kvm` or `emulation`.
    pub acceleration: String,
    /// The CPU as the guest sees it; with KVM also which CPU the host has.
    pub cpu: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Number of the device list.
    pub device_list: u32,
    /// What is behind the network card: the guest's addresses depend on it.
    pub network: NetworkKind,
}

/// Why a snapshot doesn't fit: what differs, what it has, what is needed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it was made with {what} {has}, now it is {needs}")]
pub struct KeyMismatch {
    /// Which part of the key.
    pub what: &'static str,
    /// As it is in the snapshot.
    pub has: String,
    /// As it would have to be.
    pub needs: String,
}

impl SnapshotKey {
    /// The key of the VM that `config` makes.
    #[must_use]
    pub fn of(config: &VmConfig, qemu: &Qemu) -> Self {
        Self::made_of(&config.image.hash, config.memory_mib, config.cpus, config.network, qemu)
    }

    /// The key of a VM of this image and size.
    #[must_use]
    pub fn made_of(image: &str, memory_mib: u64, cpus: u32, network: NetworkKind, qemu: &Qemu) -> Self {
        let model = cpu_model(&qemu.acceleration);
        let cpu =
            if qemu.acceleration.is_kvm() { format!("{model}: {}", host_cpu()) } else { model.to_owned() };
        Self {
            guest_image: image.to_owned(),
            qemu_build: qemu.build.clone(),
            machine: MACHINE.to_owned(),
            acceleration: qemu.acceleration.name().to_owned(),
            cpu,
            memory_mib,
            cpus,
            device_list: DEVICE_LIST_VERSION,
            network,
        }
    }

    /// Its parts: what each is in words, and its value.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, String); 9] {
        [
            ("guest image", self.guest_image.clone()),
            ("QEMU build", self.qemu_build.clone()),
            ("machine", self.machine.clone()),
            ("acceleration", self.acceleration.clone()),
            ("CPU", self.cpu.clone()),
            ("memory (MiB)", self.memory_mib.to_string()),
            ("number of CPUs", self.cpus.to_string()),
            ("device list", self.device_list.to_string()),
            ("network", format!("{:?}", self.network)),
        ]
    }

    /// Does a snapshot with this key fit a VM that needs `needed`?
    ///
    /// # Errors
    /// The first difference, in words.
    pub fn fits(&self, needed: &Self) -> Result<(), KeyMismatch> {
        for ((what, has), (_, needs)) in self.parts().into_iter().zip(needed.parts()) {
            if has != needs {
                return Err(KeyMismatch { what, has, needs });
            }
        }
        Ok(())
    }

    /// A name for what has this key: a hash of it, in hex.
    #[must_use]
    pub fn digest(&self) -> String {
        use sha2::Digest as _;
        let text = serde_json::to_vec(self).expect("strings and numbers always serialise");
        sha2::Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Which CPU the host has: its model and what it can do.
fn host_cpu() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field =
        |name: &str| cpuinfo.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    format!("{} {} {}", field("model name"), field("microcode"), field("flags"))
}
