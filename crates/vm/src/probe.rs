//! What this host has: which QEMU, what it can do, and which acceleration really works.
//!
//! Nothing is concluded from a version or from the presence of a file: QEMU is asked over QMP, and `/dev/kvm` must
//! run a guest. The answers are remembered in the cache directory until QEMU, the kernel or the boot changes.

mod acceleration;
mod cache;
mod features;
mod test_guest;

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use acceleration::{Acceleration, KVM_PROBE_WITHIN};
pub use features::Features;

/// The oldest QEMU that is tried: 7.2 brought `-netdev stream`, which passt needs.
pub const QEMU_MIN: (u32, u32) = (7, 2);

/// The oldest QEMU that is let emulate several CPUs at once. In those before it, code that one CPU changes while another
/// translates it goes on being run as it was (fixed by "accel/tcg: Always lock pages before translation"), and a Linux
/// that patches itself or compiles BPF can meet that. Kernels that lost their memory were seen with several CPUs only.
const PARALLEL_EMULATION_MIN: (u32, u32) = (8, 1);

/// Where to look and what to leave alone.
#[derive(Debug, Clone)]
pub struct ProbeOptions {
    /// This QEMU instead of the `qemu-system-x86_64` in the `PATH`.
    pub qemu: Option<PathBuf>,
    /// This passt instead of the one in the `PATH`.
    pub passt: Option<PathBuf>,
    /// This `dorm-frames` instead of the one beside the running program.
    pub frame_filter: Option<PathBuf>,
    /// Where answers are remembered; may be deleted at any time.
    pub cache_dir: PathBuf,
    /// Whether KVM may be used.
    pub kvm: KvmPolicy,
}

/// Whether KVM may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmPolicy {
    /// If a test guest runs on it.
    IfItWorks,
    /// Never.
    Never,
}

/// A QEMU that was asked what it can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// Upstream version: major, minor, micro.
    pub version: (u32, u32, u32),
    /// What the distributor calls it; may be empty.
    pub package: String,
    /// Hash of the program's bytes. Snapshots and templates die with it.
    pub build: String,
    /// What it can do.
    pub features: Features,
    /// What runs the guest's instructions.
    pub acceleration: Acceleration,
    /// passt, where there is one.
    pub passt: Option<PathBuf>,
    /// `dorm-frames`, without which no guest is given passt: see [`crate::frames`].
    pub frame_filter: Option<PathBuf>,
}

/// Why no VM can run on this host.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no QEMU.
    #[error("QEMU not found ({0}): install qemu-system-x86")]
    Missing(String),
    /// The QEMU there is won't do.
    #[error("QEMU {}.{}.{} is too old: {}.{} is needed", .0.0, .0.1, .0.2, QEMU_MIN.0, QEMU_MIN.1)]
    TooOld((u32, u32, u32)),
    /// The QEMU there is was built without something.
    #[error("QEMU at {program} lacks {feature}")]
    Lacks {
        /// The program.
        program: PathBuf,
        /// What is missing.
        feature: &'static str,
    },
    /// QEMU doesn't even start.
    #[error("QEMU at {program} does not work: {reason}")]
    Broken {
        /// The program.
        program: PathBuf,
        /// What it said.
        reason: String,
    },
    /// The program can't be read, or the probe can't be carried out.
    #[error("cannot probe {path}")]
    Io {
        /// What was being looked at.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Qemu {
    /// Do a guest's CPUs run at the same time? One after the other more of them would only cost.
    #[must_use]
    pub fn runs_cpus_in_parallel(&self) -> bool {
        self.acceleration.is_kvm() || (self.version.0, self.version.1) >= PARALLEL_EMULATION_MIN
    }

    /// Looks at this host's QEMU. Takes some 10 ms when the answer is remembered, up to 5 s when not.
    ///
    /// # Errors
    /// See [`ProbeError`].
    pub async fn probe(options: &ProbeOptions) -> Result<Self, ProbeError> {
        let program = match &options.qemu {
            Some(program) => program.clone(),
            None => in_path("qemu-system-x86_64")
                .ok_or_else(|| ProbeError::Missing("no qemu-system-x86_64 in PATH".to_owned()))?,
        };
        let key = cache::Key::of(&program).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ProbeError::Missing(program.display().to_string()),
            _ => ProbeError::Io { path: program.clone(), source },
        })?;
        let mut remembered = cache::read(&options.cache_dir, &key).unwrap_or_default();
        let before = remembered.clone();
        let basics = match remembered.basics.clone() {
            Some(basics) => basics,
            None => remembered.basics.insert(Basics::ask(&program).await?).clone(),
        };
        if (basics.version.0, basics.version.1) < QEMU_MIN {
            return Err(ProbeError::TooOld(basics.version));
        }
        basics.features.require(&program)?;
        let acceleration = match options.kvm {
            KvmPolicy::Never => Acceleration::Emulation { why: "KVM is switched off".to_owned() },
            KvmPolicy::IfItWorks => match acceleration::obstacle() {
                Some(why) => Acceleration::Emulation { why },
                None => match remembered.acceleration.clone() {
                    Some(known) => known,
                    None => remembered.acceleration.insert(acceleration::test_kvm(&program).await).clone(),
                },
            },
        };
        if remembered != before {
            cache::write(&options.cache_dir, &key, &remembered);
        }
        let passt = options.passt.clone().or_else(|| in_path("passt"));
        let frame_filter = options.frame_filter.clone().or_else(|| beside_us("dorm-frames"));
        let Basics { version, package, build, features } = basics;
        Ok(Self { program, version, package, build, features, acceleration, passt, frame_filter })
    }
}

/// What a QEMU is, apart from the host it runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Basics {
    version: (u32, u32, u32),
    package: String,
    build: String,
    features: Features,
}

impl Basics {
    async fn ask(program: &Path) -> Result<Self, ProbeError> {
        let (version, features) = features::ask(program).await?;
        let path = program.to_owned();
        let build = tokio::task::spawn_blocking(move || hash(&path))
            .await
            .map_err(io::Error::other)
            .and_then(|hash| hash)
            .map_err(|source| ProbeError::Io { path: program.to_owned(), source })?;
        let triple = version.qemu;
        Ok(Self {
            version: (triple.major, triple.minor, triple.micro),
            package: version.package,
            build,
            features,
        })
    }
}

fn hash(path: &Path) -> io::Result<String> {
    use sha2::Digest as _;
    let mut hash = sha2::Sha256::new();
    io::copy(&mut std::fs::File::open(path)?, &mut HashWriter(&mut hash))?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

struct HashWriter<'a>(&'a mut sha2::Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        sha2::Digest::update(self.0, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An executable file of this name in the `PATH`.
fn in_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|directory| directory.join(name))
        .find(|path| std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.mode() & 0o111 != 0))
}

/// A program of ours, which is installed beside the one that runs.
fn beside_us(name: &str) -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.with_file_name(name);
    path.is_file().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_qemu_that_can_emulates_cpus_at_once() {
        let qemu = |version, acceleration| Qemu {
            program: PathBuf::new(),
            version,
            package: String::new(),
            build: String::new(),
            features: Features::default(),
            acceleration,
            passt: None,
            frame_filter: None,
        };
        let emulation = || Acceleration::Emulation { why: String::new() };
        assert!(!qemu((7, 2, 22), emulation()).runs_cpus_in_parallel());
        assert!(!qemu((8, 0, 5), emulation()).runs_cpus_in_parallel());
        assert!(qemu((8, 1, 0), emulation()).runs_cpus_in_parallel());
        assert!(qemu((10, 0, 0), emulation()).runs_cpus_in_parallel());
        assert!(qemu((7, 2, 22), Acceleration::Kvm).runs_cpus_in_parallel());
    }
}
