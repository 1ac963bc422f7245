//! Modules and mounts, from the initramfs to a root in which an engine can live.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use dormouse_agent_proto::BUSY_DIR;
use rustix::mount::{MountFlags, mount, mount_move};

const NO_DATA: Option<&'static CStr> = None;

/// Where the root is mounted before it becomes the root.
const NEW_ROOT: &str = "/root";

/// Loads the modules in this list, one path a line, dependencies first. Loading one twice is no error.
pub(crate) fn load_modules(list: &str) -> Result<()> {
    for path in fs::read_to_string(list).with_context(|| format!("can't read {list}"))?.lines() {
        let file = fs::File::open(path).with_context(|| format!("can't read the module {path}"))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("can't load the module {path}")),
        }
    }
    Ok(())
}

/// The file systems that both stages need: what the kernel tells, and its device nodes.
pub(crate) fn mount_kernel() -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    mount("proc", "/proc", "proc", safe, NO_DATA).context("can't mount /proc")?;
    mount("sysfs", "/sys", "sysfs", safe, NO_DATA).context("can't mount /sys")?;
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, c"mode=0755").context("can't mount /dev")
}

/// Mounts the root image and makes it the root of this process and its children.
pub(crate) fn switch_root() -> Result<()> {
    mount("/dev/vda", NEW_ROOT, "erofs", MountFlags::RDONLY, NO_DATA)
        .context("can't mount the root image")?;
    for kernel in ["/proc", "/sys", "/dev"] {
        mount_move(kernel, format!("{NEW_ROOT}{kernel}")).with_context(|| format!("can't move {kernel}"))?;
    }
    rustix::process::chdir(NEW_ROOT)?;
    mount_move(".", "/").context("can't move the root")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// Everything else that a Linux system has mounted, and what the engine wants set.
pub(crate) fn mount_system() -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    for folder in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        fs::create_dir_all(folder)?;
    }
    mount(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        c"mode=0620,ptmxmode=0666",
    )?;
    mount("tmpfs", "/dev/shm", "tmpfs", safe, c"mode=1777")?;
    mount("mqueue", "/dev/mqueue", "mqueue", safe, NO_DATA)?;
    for (folder, mode) in [("/run", c"mode=0755"), ("/tmp", c"mode=1777"), ("/var/tmp", c"mode=1777")] {
        mount("tmpfs", folder, "tmpfs", safe, mode).with_context(|| format!("can't mount {folder}"))?;
    }
    for folder in ["/root", "/var/log"] {
        mount("tmpfs", folder, "tmpfs", safe, c"mode=0755")
            .with_context(|| format!("can't mount {folder}"))?;
    }
    make_busy_dir()?;
    mount_etc()?;
    mount_cgroups()
}

/// Whoever is in a container that mounts it may leave a mark.
fn make_busy_dir() -> Result<()> {
    fs::create_dir_all(BUSY_DIR)?;
    fs::set_permissions(BUSY_DIR, fs::Permissions::from_mode(0o1777))?;
    Ok(())
}

/// `/etc` is the image's, with a layer in memory above it for what is only known at boot.
fn mount_etc() -> Result<()> {
    for folder in ["/run/etc/upper", "/run/etc/work"] {
        fs::create_dir_all(folder)?;
    }
    let layers = c"lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work";
    mount("overlay", "/etc", "overlay", MountFlags::empty(), layers).context("can't mount /etc")
}

/// One hierarchy, every controller given to the children of the root.
fn mount_cgroups() -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let root = Path::new("/sys/fs/cgroup");
    mount("cgroup2", root, "cgroup2", safe, NO_DATA).context("can't mount the control groups")?;
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    for controller in controllers.split_ascii_whitespace() {
        fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("can't enable the controller {controller}"))?;
    }
    Ok(())
}

/// Kernel settings without which container networks don't work.
pub(crate) fn set_kernel_parameters() -> Result<()> {
    for (name, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        // A port may be published at an address of the host, which the guest hasn't.
        ("net/ipv4/ip_nonlocal_bind", "1"),
        ("net/ipv6/ip_nonlocal_bind", "1"),
        ("net/bridge/bridge-nf-call-iptables", "1"),
        ("net/bridge/bridge-nf-call-ip6tables", "1"),
        ("fs/inotify/max_user_instances", "1024"),
        ("vm/max_map_count", "262144"),
    ] {
        fs::write(Path::new("/proc/sys").join(name), value).with_context(|| format!("can't set {name}"))?;
    }
    Ok(())
}
