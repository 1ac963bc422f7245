//! The usual VM, to compare with: Debian 13 with systemd and its `docker.io` package, booted from its own kernel for the same
//! answer, with as much RAM and as many vCPUs.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::http::request;
use super::ours::{inherit, uncached};
use super::{ANSWER_WITHIN, Measured};
use crate::debian::SUITE;
use crate::shell::run;

/// What it is made of. socat joins the engine's socket to a serial port: no network is needed to reach it.
const PACKAGES: &str = "systemd-sysv,udev,docker.io,iptables,socat,linux-image-cloud-amd64,initramfs-tools";

/// Size of its disk.
const DISK: &str = "4G";

/// The engine on the serial port, up as soon as the engine is.
const UNIT: &str = "[Unit]\nDescription=The engine on a serial port\nAfter=docker.service\nRequires=docker.service\n\
    [Service]\nExecStart=/usr/bin/socat /dev/virtio-ports/docker UNIX-CONNECT:/run/docker.sock\nRestart=always\n\
    [Install]\nWantedBy=multi-user.target\n";

pub(super) struct Usual {
    folder: PathBuf,
}

impl Usual {
    /// Builds it unless that was done before. Needs root: Debian's packages are installed as usual, with their scripts.
    pub(super) fn prepare(folder: &Path) -> Result<Self> {
        let usual = Self { folder: folder.to_owned() };
        if usual.disk().exists() {
            return Ok(usual);
        }
        fs::create_dir_all(folder)?;
        let root = folder.join("root");
        let _ = fs::remove_dir_all(&root);
        eprintln!("building the usual VM");
        run(Command::new("mmdebstrap")
            .args(["--quiet", "--mode=root", "--variant=minbase", "--format=directory", "--components=main"])
            .arg(format!("--include={PACKAGES}"))
            .arg(SUITE)
            .arg(&root))?;
        let units = root.join("etc/systemd/system");
        fs::write(units.join("serial-engine.service"), UNIT)?;
        let wanted = units.join("multi-user.target.wants");
        fs::create_dir_all(&wanted)?;
        std::os::unix::fs::symlink("../serial-engine.service", wanted.join("serial-engine.service"))?;
        fs::write(root.join("etc/fstab"), "/dev/vda / ext4 defaults 0 1\n")?;
        fs::write(root.join("etc/hostname"), "usual\n")?;
        for entry in fs::read_dir(root.join("boot"))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            for (prefix, target) in [("vmlinuz-", "kernel"), ("initrd.img-", "initrd")] {
                if name.starts_with(prefix) {
                    fs::copy(&path, folder.join(target))?;
                }
            }
        }
        let fresh = folder.join("disk.new");
        let _ = fs::remove_file(&fresh);
        run(Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&root).arg(&fresh).arg(DISK))?;
        fs::remove_dir_all(&root)?;
        fs::rename(fresh, usual.disk())?;
        // Its first boot makes what later ones find: keys, the engine's folders. It is cut off, as by a power cut.
        usual.wake(Path::new("qemu-system-x86_64"), 0)?;
        Ok(usual)
    }

    fn disk(&self) -> PathBuf {
        self.folder.join("disk.raw")
    }

    /// From the start of QEMU to the answer. Its VM is killed then, and its disk is as before.
    pub(super) fn wake(&self, qemu: &Path, round: u32) -> Result<Measured> {
        let place = tempfile::tempdir()?;
        let socket = place.path().join("docker.sock");
        // It listens before QEMU is there: nobody has to look whether QEMU does yet.
        let listener = UnixListener::bind(&socket)?;
        inherit(&listener)?;
        let cpus = std::thread::available_parallelism()?.get().min(4).to_string();
        // What later boots write is dropped, so that each finds the same.
        let snapshot = if round == 0 { "off" } else { "on" };
        let begun = Instant::now();
        let (kernel, initrd) = (self.folder.join("kernel"), self.folder.join("initrd"));
        let vm = Vm(Command::new(qemu)
            .args(["-accel", "tcg,thread=multi,tb-size=64", "-cpu", "max", "-m", "1024", "-smp", &cpus])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35"])
            .args(["-kernel", path(&kernel)?, "-initrd", path(&initrd)?])
            .args(["-append", "root=/dev/vda rw console=ttyS0 quiet mitigations=off no_timer_check"])
            .arg("-drive")
            .arg(format!("if=none,id=d,file={},format=raw,snapshot={snapshot}", path(&self.disk())?))
            .args(["-device", "virtio-blk-pci,drive=d", "-device", "virtio-rng-pci"])
            .arg("-chardev")
            .arg(format!("socket,id=c,fd={},server=on,wait=off", listener.as_raw_fd()))
            .args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=c,name=docker"])
            .arg("-serial")
            .arg(format!("file:{}", path(&self.folder.join("console.log"))?))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(self.folder.join("qemu.log"))?)
            .spawn()
            .context("can't run QEMU")?);
        drop(listener);
        let mut stream = UnixStream::connect(&socket).context("QEMU ended at once")?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        // It waits in the socket until the guest opens the port.
        stream.write_all(request("GET", &uncached(), "").as_bytes())?;
        let mut head = [0; 12];
        stream.read_exact(&mut head).with_context(|| vm.last_words(&self.folder))?;
        let total = begun.elapsed();
        ensure!(head.ends_with(b" 200"), "the usual VM answered {:?}", String::from_utf8_lossy(&head));
        Ok(Measured { total, phases: vec![("boot of kernel, systemd and docker".to_owned(), total)] })
    }
}

fn path(path: &Path) -> Result<&str> {
    let text = path.to_str().context("the path isn't UTF-8")?;
    ensure!(!text.contains(','), "QEMU takes no comma in {text}");
    Ok(text)
}

/// A QEMU that ends with this.
struct Vm(Child);

impl Vm {
    fn last_words(&self, folder: &Path) -> String {
        let console = fs::read_to_string(folder.join("console.log")).unwrap_or_default();
        let lines: Vec<_> = console.lines().rev().take(10).collect();
        format!("the usual VM (pid {}) gave no answer: {}", self.0.id(), lines.join(" | "))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
