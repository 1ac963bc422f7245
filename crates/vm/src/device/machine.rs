//! The machine itself: accelerator, CPU, RAM, and what QEMU may do on the host.

use serde_json::json;

use super::Arguments;
use crate::config::VmConfig;
use crate::probe::{Acceleration, Qemu};

/// Name of the machine type, as it stands in snapshot keys. QEMU resolves it to its newest version, and the key holds
/// the build of QEMU.
pub(crate) const MACHINE: &str = "q35";

/// The CPU as the guest sees it.
pub(crate) const fn cpu_model(acceleration: &Acceleration) -> &'static str {
    match acceleration {
        Acceleration::Kvm => "host",
        // Without `cmpxchg16b`, by which a kernel takes memory from its free lists: a guest died right after one with flags that
        // were another register's value, as QEMU 7.2 emulated it. Where a CPU lacks it, kernels do without.
        // Without `erms` either, which tells that copying byte by byte is fast: emulated, each byte is an instruction.
        Acceleration::Emulation { .. } => "max,cx16=off,erms=off",
    }
}

pub(super) fn add(arguments: &mut Arguments, config: &VmConfig, qemu: &Qemu) {
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot", "-S"] {
        arguments.flag(flag);
    }
    // Not `-nographic`: with it the firmware writes to the serial console, which is the guest's.
    arguments.option("-display", "none");
    arguments.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    let accelerator = match qemu.acceleration {
        Acceleration::Kvm => "kvm",
        // How much translated code is kept, in MiB: a full cache is thrown away whole. A boot translates 200; only what is used
        // takes memory, and the default would be 1 GiB for each VM. See docs/design/003-boot.md.
        Acceleration::Emulation { .. } if qemu.runs_cpus_in_parallel() => "tcg,thread=multi,tb-size=128",
        Acceleration::Emulation { .. } => "tcg,thread=single,tb-size=128",
    };
    arguments.option("-accel", accelerator);
    arguments.option("-cpu", cpu_model(&qemu.acceleration));
    arguments.option("-smp", config.cpus.to_string());
    arguments.option("-m", format!("{}M", config.memory_mib));
    arguments.json(
        "-object",
        &json!({
            "qom-type": "memory-backend-file",
            "id": "ram",
            "size": config.memory_bytes(),
            "mem-path": config.memory_file,
            // A suspend finds the memory in the file, and free pages can be given back.
            "share": true,
            "dump": false,
            "merge": false,
        }),
    );
    // Everything of a q35 that no guest of ours uses is left out: less to boot, less to attack.
    arguments.option(
        "-machine",
        format!("{MACHINE},memory-backend=ram,usb=off,sata=off,smbus=off,vmport=off,i8042=off"),
    );
}
