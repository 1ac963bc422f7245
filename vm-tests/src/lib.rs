//! Real VMs for tests. See TESTING.md.
//!
//! Whatever a test makes goes away with its [`Home`]: folders by their drop, VMs because each is killed by pid.

pub mod client;
pub mod database;
pub mod desk;
pub mod fake;
pub mod fault;
pub mod polling;
pub mod raw;
pub mod registry;
pub mod remote;
pub mod root_process;
pub mod stage;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_agent_proto::Nonce;
use dormouse_guest_image::ImageStore;
use dormouse_mux::{Agent, Limits, Mux};
use dormouse_vm::{
    GuestFiles, KvmPolicy, NetworkKind, ProbeOptions, Qemu, Spawned, Start, Vm, VmConfig, VmEvents,
    create_data_disk, spawn,
};
use tokio::time::Instant;

/// Longest boot under emulation on a machine that does other things too.
pub const BOOT_WITHIN: Duration = Duration::from_secs(240);

/// Says what was measured. Bounds in tests are for hangs; `scripts/test-long` collects these lines from a quiet machine.
pub fn figure(name: &str, value: Duration) {
    println!("figure: {name} = {} ms", value.as_millis());
}

/// The store of guest images that tests boot: `DORM_IMAGES`, else `build/images` of this project.
#[must_use]
pub fn images() -> PathBuf {
    std::env::var_os("DORM_IMAGES").map_or_else(|| project().join("build/images"), PathBuf::from)
}

/// The folder of templates that tests share: `DORM_TEMPLATES`, else `build/templates` of this project.
#[must_use]
pub fn templates() -> PathBuf {
    std::env::var_os("DORM_TEMPLATES").map_or_else(|| project().join("build/templates"), PathBuf::from)
}

/// The project's top folder.
#[must_use]
pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Folders for one VM.
#[derive(Debug)]
pub struct Home {
    folder: tempfile::TempDir,
    /// What is behind the network cards of VMs that are booted from now on.
    pub network: NetworkKind,
    /// How long their guests stand being without a host.
    pub lonely_after: Option<Duration>,
}

/// A VM whose guest answers.
#[derive(Debug)]
pub struct Machine {
    /// The VM.
    pub vm: Vm,
    /// What happens to it.
    pub events: VmEvents,
    /// `dorm-init` in it.
    pub agent: Agent,
    /// Its console.
    pub console: dormouse_vm::Console,
    spawned: Spawned,
}

impl Home {
    /// Empty folders, and a data disk of 4 GiB.
    ///
    /// # Errors
    /// When they can't be made.
    pub fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dorm").tempdir()?;
        create_data_disk(&folder.path().join("data.raw"), 4 << 30)?;
        Ok(Self { folder, network: NetworkKind::None, lonely_after: None })
    }

    /// Makes the data disk larger; no VM may be up.
    ///
    /// # Errors
    /// When it can't be.
    pub fn grow_disk(&self, bytes: u64) -> Result<()> {
        Ok(dormouse_vm::grow_data_disk(&self.folder.path().join("data.raw"), bytes)?)
    }

    /// Boots a VM of this generation, and waits for its agent.
    ///
    /// # Errors
    /// Whatever stands in the way, with the console's last lines.
    pub async fn boot(&self, generation: u64) -> Result<Machine> {
        let image = ImageStore::new(images()).newest()?;
        let cache_dir = self.folder.path().join("cache");
        std::fs::create_dir_all(&cache_dir)?;
        let options = ProbeOptions {
            qemu: None,
            passt: None,
            frame_filter: Some(stage::program("dorm-frames")),
            cache_dir,
            kvm: KvmPolicy::Never,
        };
        let qemu = Qemu::probe(&options).await?;
        let config = VmConfig {
            session: "test".to_owned(),
            generation,
            hostname: "test".to_owned(),
            image: GuestFiles {
                kernel: image.kernel(),
                initramfs: image.initramfs(),
                root: image.root(),
                hash: image.hash().as_str().to_owned(),
            },
            data_disk: self.folder.path().join("data.raw"),
            memory_file: self.folder.path().join("memory"),
            memory_mib: 1024,
            cpus: 1,
            network: self.network,
            runtime_dir: self.folder.path().to_owned(),
            start: Start::Cold,
            owner: None,
            niceness: 0,
            lonely_after: self.lonely_after,
        };
        let spawned = spawn(&config, &qemu).await?;
        let connected = Vm::connect(spawned.record.clone(), self.folder.path()).await?;
        let (vm, events) = connected.context("the VM ended at once")?;
        let console = vm.console().await?;
        vm.cont().await?;
        match greet(&vm).await {
            Ok(agent) => Ok(Machine { vm, events, agent, console, spawned }),
            Err(error) => {
                vm.kill();
                Err(error.context(console.last_lines(30).join("\n")))
            }
        }
    }
}

/// Connects to the agent of a VM, which may still be booting.
///
/// # Errors
/// When it doesn't answer.
pub async fn greet(vm: &Vm) -> Result<Agent> {
    let mut port = vm.agent().await?;
    let nonce = Nonce(u128::from(std::process::id()));
    dormouse_mux::connect(&mut port, nonce, Instant::now() + BOOT_WITHIN).await?;
    let mux = Mux::client(port, Limits::AGENT);
    let agent = Agent::new(mux.clone(), mux);
    agent.hello("hello").await?;
    Ok(agent)
}

impl Machine {
    /// Kills the VM and waits until nothing is left of it.
    ///
    /// # Errors
    /// When it can't be waited for.
    pub async fn end(mut self) -> Result<()> {
        self.vm.kill();
        self.spawned.ended().await?;
        self.vm.remove().await;
        Ok(())
    }

    /// Waits until QEMU is gone by itself.
    ///
    /// # Errors
    /// When it can't be waited for.
    pub async fn gone(mut self) -> Result<dormouse_vm::VmExit> {
        let exit = loop {
            if let dormouse_vm::VmEvent::Exited(exit) = self.events.next().await {
                break exit;
            }
        };
        self.spawned.ended().await?;
        self.vm.remove().await;
        Ok(exit)
    }
}

/// A file system of this size for a test that is in a mount namespace of its own ([`in_mount_namespace`]).
///
/// # Errors
/// When it can't be mounted.
pub fn file_system(size: &str) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let mut mount = std::process::Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(folder.path());
    anyhow::ensure!(mount.status()?.success(), "can't mount a file system");
    Ok(folder)
}

/// Asks as HTTP/1.0 does, and closes the sending side: the answer still has to come. What listens may have to wake a VM.
///
/// # Errors
/// When nobody listens, or nothing comes.
pub fn fetch(address: &str) -> Result<String> {
    use std::io::Write as _;
    let mut stream =
        std::net::TcpStream::connect(address).with_context(|| format!("nobody listens at {address}"))?;
    stream.set_read_timeout(Some(stage::STATE_WITHIN))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(std::io::read_to_string(stream)?)
}

/// Runs the named test of this program once more, in a mount namespace of its own, and tells whether this was outside of
/// it. As a user without root, one becomes root of a user namespace.
///
/// # Errors
/// When the test fails there.
pub fn in_mount_namespace(test: &str) -> Result<bool> {
    in_namespace(test, &["--mount"])
}

/// [`in_mount_namespace`], with a network of its own as well, in which there is nothing but a loopback that is down.
///
/// # Errors
/// When the test fails there.
pub fn in_network_namespace(test: &str) -> Result<bool> {
    in_namespace(test, &["--mount", "--net"])
}

fn in_namespace(test: &str, kinds: &[&str]) -> Result<bool> {
    const INSIDE: &str = "DORM_TEST_NAMESPACE";
    if std::env::var_os(INSIDE).is_some() {
        return Ok(false);
    }
    let mut unshare = std::process::Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.arg("--map-root-user");
    }
    let status = unshare
        .args(kinds)
        .arg(std::env::current_exe()?)
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .context("can't run unshare")?;
    anyhow::ensure!(status.success(), "{test} fails in its namespace");
    Ok(true)
}
