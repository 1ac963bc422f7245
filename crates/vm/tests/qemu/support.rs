//! VMs for tests: real QEMU, emulated, with a guest of a few bytes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dormouse_vm::{
    GuestFiles, KvmPolicy, NetworkKind, Owner, ProbeOptions, Qemu, RunState, Spawned, Start, Vm, VmConfig,
    VmEvent, VmEvents, VmRecord, create_data_disk, spawn,
};

/// Nothing that a test waits for takes longer, unless something is wrong: also on a machine with ten times as much to do
/// as it can.
pub(crate) const SOON: Duration = Duration::from_secs(120);

/// A session's directory, and every QEMU that was started in it: they are killed when the test is over.
pub(crate) struct Bench {
    directory: tempfile::TempDir,
    pub(crate) qemu: Qemu,
}

impl Bench {
    pub(crate) async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = ProbeOptions {
            qemu: None,
            passt: None,
            frame_filter: Some(env!("CARGO_BIN_EXE_dorm-frames").into()),
            cache_dir: directory.path().join("cache"),
            kvm: KvmPolicy::Never,
        };
        let qemu = Qemu::probe(&options).await.unwrap();
        Self { directory, qemu }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// A VM whose guest is this machine code, entered in 32-bit protected mode.
    pub(crate) fn config(&self, code: &[u8]) -> VmConfig {
        std::fs::write(self.path("kernel"), multiboot_kernel(code)).unwrap();
        std::fs::write(self.path("initramfs"), b"none").unwrap();
        std::fs::write(self.path("root"), vec![0; 1 << 20]).unwrap();
        if !self.path("data").exists() {
            create_data_disk(&self.path("data"), 1 << 30).unwrap();
        }
        VmConfig {
            session: "test1".to_owned(),
            generation: 1,
            hostname: "test".to_owned(),
            image: GuestFiles {
                hash: String::new(),
                kernel: self.path("kernel"),
                initramfs: self.path("initramfs"),
                root: self.path("root"),
            },
            data_disk: self.path("data"),
            memory_file: self.path("memory"),
            memory_mib: 64,
            cpus: 1,
            network: NetworkKind::None,
            runtime_dir: self.runtime_dir(),
            start: Start::Cold,
            owner: None,
            niceness: 0,
            lonely_after: None,
        }
    }

    /// Lets another user's QEMU in.
    pub(crate) fn give_to(&self, owner: Owner) {
        use std::os::unix::fs::{PermissionsExt as _, chown};
        std::fs::set_permissions(self.directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["kernel", "initramfs", "root", "data"] {
            chown(self.path(name), Some(owner.uid), Some(owner.gid)).unwrap();
        }
    }

    pub(crate) async fn spawn(&self, config: &VmConfig) -> Spawned {
        within(spawn(config, &self.qemu)).await.unwrap()
    }

    pub(crate) async fn connect(&self, spawned: &Spawned) -> (Vm, VmEvents) {
        let connected = within(Vm::connect(spawned.record.clone(), &self.runtime_dir())).await.unwrap();
        connected.expect("the VM is there")
    }

    /// Made, connected to, not running yet.
    pub(crate) async fn vm(&self, code: &[u8]) -> (Spawned, Vm, VmEvents) {
        let spawned = self.spawn(&self.config(code)).await;
        let (vm, events) = self.connect(&spawned).await;
        assert_eq!(vm.found(), RunState::Prelaunch);
        (spawned, vm, events)
    }

    /// What lies in the runtime directory.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.runtime_dir()) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // A test that failed leaves its VM: known by the directory that only this test has.
        let ours = self.directory.path().to_string_lossy().into_owned();
        for pid in processes_with(&ours) {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Processes whose command line holds this text.
pub(crate) fn processes_with(text: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let Some(pid) = entry.unwrap().file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(command_line) = std::fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        if String::from_utf8_lossy(&command_line).contains(text) {
            found.push(pid);
        }
    }
    found
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("it takes too long")
}

/// The next event for which `wanted` has an answer.
pub(crate) async fn event<T>(events: &mut VmEvents, wanted: impl Fn(&VmEvent) -> Option<T>) -> T {
    let search = async {
        loop {
            let event = events.next().await;
            if let Some(found) = wanted(&event) {
                return found;
            }
            assert!(!matches!(event, VmEvent::Exited(_)), "{event:?}");
        }
    };
    within(search).await
}

pub(crate) async fn exit(events: &mut VmEvents) -> dormouse_vm::VmExit {
    event(events, |event| if let VmEvent::Exited(exit) = event { Some(exit.clone()) } else { None }).await
}

pub(crate) fn record(directory: &Path) -> Option<VmRecord> {
    VmRecord::read(directory).unwrap()
}

/// Where the code is loaded.
pub(crate) const CODE_ADDRESS: u32 = 0x0010_0000;
const HEADER_BYTES: u32 = 32;

/// The smallest kernel that QEMU's `-kernel` loads: a multiboot header with load addresses, then the code.
pub(crate) fn multiboot_kernel(code: &[u8]) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    // Bit 16: the addresses below hold.
    const FLAGS: u32 = 1 << 16;
    let end = CODE_ADDRESS + HEADER_BYTES + u32::try_from(code.len()).unwrap();
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
    kernel
}

/// Guests, in machine code.
pub(crate) mod guest {
    /// hlt; jmp to it. Interrupts are off, so it sleeps for ever.
    pub(crate) const IDLE: &[u8] = &[0xf4, 0xeb, 0xfd];

    /// Loads an empty interrupt table and traps: a triple fault.
    pub(crate) const TRIPLE_FAULT: &[u8] = &[
        0x6a, 0x00, 0x6a, 0x00, // push 0; push 0
        0x0f, 0x01, 0x1c, 0x24, // lidt [esp]
        0xcc, // int3
    ];

    /// Powers off by ACPI: the firmware has put q35's PM1a_CNT at port 0x604.
    pub(crate) const POWER_OFF: &[u8] = &[
        0x66, 0xb8, 0x00, 0x20, // mov ax, 0x2000 (SLP_EN, S5)
        0x66, 0xba, 0x04, 0x06, // mov dx, 0x604
        0x66, 0xef, // out dx, ax
        0xf4, 0xeb, 0xfd, // hlt; jmp to it
    ];

    /// Writes `dorm\n` to the serial port for ever, as fast as that takes it.
    pub(crate) const CHATTER: &[u8] = &[
        0xbe, 0x40, 0x00, 0x10, 0x00, // mov esi, text (0x100000 + 32 + 32)
        0x66, 0xba, 0xfd, 0x03, // wait: mov dx, 0x3fd
        0xec, // in al, dx
        0xa8, 0x20, // test al, 0x20
        0x74, 0xf7, // jz wait
        0xac, // lodsb
        0x84, 0xc0, // test al, al
        0x74, 0xed, // jz start
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0xeb, 0xeb, // jmp wait
        0x90, 0x90, 0x90, 0x90, 0x90, 0x90, // up to 32
        b'd', b'o', b'r', b'm', b'\n', 0,
    ];

    /// Counts up at address 0x300000 for ever.
    pub(crate) const COUNTER: &[u8] = &[
        0xff, 0x05, 0x00, 0x00, 0x30, 0x00, // inc dword [0x300000]
        0xeb, 0xf8, // jmp to it
    ];
}
