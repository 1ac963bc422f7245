//! A session's record: everything that was settled when it was created.
//!
//! The VM factory makes VMs from this and nothing else, so it is copied whole at creation: a default that changes later
//! changes no session that exists.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use dormouse_api::link::{EngineFacts, HostSettings};
use dormouse_api::{
    ApiError, ChangeSettings, CrashPolicy, CreateSession, ErrorCode, IdleAction, IdleTimeout, ImageChoice,
    NetworkKind, Registries, RunningContainers, SessionId, SessionName, Wake, this_host_only,
};
use dormouse_client::Home;
use dormouse_vm::{CPUS_MAX, MEMORY_MIB_MIN, Qemu};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Version of the record's format.
const FORMAT: u32 = 1;
/// Name of the record in a session's folder.
const FILE_NAME: &str = "session.json";
/// No record is longer, in bytes.
const RECORD_BYTES_MAX: u64 = 1024 * 1024;
/// Size of a data disk when none is asked for: 64 GiB, sparse.
pub(crate) const STORAGE_BYTES: u64 = 64 << 30;
/// The smallest data disk that the guest can format and an engine can live on.
const STORAGE_BYTES_MIN: u64 = 256 << 20;
/// The largest ext4 with 4 KiB blocks.
const STORAGE_BYTES_MAX: u64 = 16 << 40;
/// Longest bring-up when nothing is asked for.
const BOOT_TIMEOUT_SECONDS: u64 = 240;
/// Longest bring-up that may be asked for: a day.
const BOOT_TIMEOUT_SECONDS_MAX: u64 = 24 * 60 * 60;
/// Most virtual CPUs that a session gets unasked.
const CPUS_UNASKED_MAX: u32 = 4;
/// Bounds of a quarter of the host's RAM, in MiB.
const MEMORY_MIB_UNASKED: (u64, u64) = (1024, 8 * 1024);

/// Everything that was settled when a session was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    format: u32,
    /// What sockets and folders call it.
    pub(crate) id: SessionId,
    /// What the user calls it.
    pub(crate) name: SessionName,
    /// The owner's uid.
    pub(crate) owner: u32,
    /// Where its disk lives; canonical.
    pub(crate) storage: PathBuf,
    /// Virtual CPUs.
    pub(crate) cpus: u32,
    /// RAM in MiB.
    pub(crate) memory_mib: u64,
    /// Size of the data disk in bytes.
    pub(crate) storage_bytes: u64,
    /// The way out.
    pub(crate) network: NetworkKind,
    /// The disk lives in memory and goes with the VM.
    pub(crate) ephemeral: bool,
    /// Ends when the creating connection closes.
    pub(crate) temporary: bool,
    /// The grace period.
    pub(crate) idle_timeout: IdleTimeout,
    /// How long the VM dozes after it, in seconds; 0: not at all.
    #[serde(default)]
    pub(crate) doze_seconds: u64,
    /// How the VM is put to sleep after it.
    #[serde(default)]
    pub(crate) idle_action: IdleAction,
    /// What follows a crash.
    #[serde(default)]
    pub(crate) crash: CrashPolicy,
    /// Whether running containers keep the VM awake.
    #[serde(default)]
    pub(crate) running: RunningContainers,
    /// Which guest image it boots.
    #[serde(default)]
    pub(crate) image: ImageChoice,
    /// Longest bring-up, in seconds.
    pub(crate) boot_timeout_seconds: u64,
    /// May reads be answered without waking the VM?
    #[serde(default = "yes")]
    pub(crate) asleep_answers: bool,
    /// Registries that its engine treats in a way of their own.
    #[serde(default)]
    pub(crate) registries: Registries,
    /// Where ports are published whose clients name no address.
    #[serde(default = "this_host_only")]
    pub(crate) publish_address: IpAddr,
    /// When it is woken though nobody asks for it, soonest first.
    #[serde(default)]
    pub(crate) wakes: Vec<Wake>,
}

/// Of records that say nothing about it.
fn yes() -> bool {
    true
}

/// The same. dockerd's default is every address; a user's containers are nobody else's business unless the user says so.
/// What this host can do, as far as defaults depend on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostTraits {
    /// Processors that a VM can use at once.
    pub(crate) cpus: u32,
    /// RAM in MiB.
    pub(crate) memory_mib: u64,
    /// No hardware virtualization.
    pub(crate) emulation: bool,
    /// The best network that guests can have here.
    pub(crate) network: NetworkKind,
}

impl HostTraits {
    /// Looks at this host's processors and memory, and at what its QEMU makes of them.
    #[must_use]
    pub(crate) fn of_this_host(qemu: &Qemu, network: NetworkKind) -> Self {
        let info = rustix::system::sysinfo();
        let emulation = !qemu.acceleration.is_kvm();
        let cpus = match qemu.runs_cpus_in_parallel() {
            true => std::thread::available_parallelism().map_or(1, usize::from),
            false => 1,
        };
        Self {
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_mib: info.totalram.saturating_mul(u64::from(info.mem_unit)) >> 20,
            emulation,
            network,
        }
    }
}

impl Settings {
    /// What `wish` comes to on this host. The storage is still to be made.
    ///
    /// # Errors
    /// [`ErrorCode::Invalid`] for a value that no VM can have.
    pub(crate) fn settle(
        wish: &CreateSession,
        id: SessionId,
        storage: PathBuf,
        host: HostTraits,
    ) -> Result<Self, ApiError> {
        let (least, most) = MEMORY_MIB_UNASKED;
        let memory_unasked = if host.emulation { least } else { (host.memory_mib / 4).clamp(least, most) };
        let settings = Self {
            format: FORMAT,
            id,
            name: wish.name.clone(),
            owner: rustix::process::geteuid().as_raw(),
            storage,
            cpus: wish.cpus.unwrap_or(host.cpus.clamp(1, CPUS_UNASKED_MAX)),
            memory_mib: wish.memory_mib.unwrap_or(memory_unasked),
            storage_bytes: wish.storage_bytes.unwrap_or(STORAGE_BYTES),
            network: host.network,
            ephemeral: wish.ephemeral,
            temporary: wish.temporary,
            idle_timeout: wish.idle_timeout,
            doze_seconds: wish.doze_seconds,
            idle_action: wish.idle_action,
            crash: wish.crash,
            running: wish.running,
            image: wish.image,
            boot_timeout_seconds: wish.boot_timeout_seconds.unwrap_or(BOOT_TIMEOUT_SECONDS),
            asleep_answers: wish.asleep_answers.unwrap_or(true),
            registries: wish.registries.clone(),
            publish_address: wish.publish_address.unwrap_or_else(this_host_only),
            wakes: Vec::new(),
        };
        settings.check(host)?;
        Ok(settings)
    }

    fn check(&self, host: HostTraits) -> Result<(), ApiError> {
        let invalid =
            |message: String, hint: String| Err(ApiError::new(ErrorCode::Invalid, message).hint(hint));
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return invalid(
                format!("{} CPUs can't be given to a VM", self.cpus),
                format!("1 to {CPUS_MAX} can"),
            );
        }
        if self.memory_mib < MEMORY_MIB_MIN || self.memory_mib > host.memory_mib {
            return invalid(
                format!("{} MiB of memory can't be given to a VM", self.memory_mib),
                format!("{MEMORY_MIB_MIN} to {} MiB can on this host", host.memory_mib),
            );
        }
        if !(STORAGE_BYTES_MIN..=STORAGE_BYTES_MAX).contains(&self.storage_bytes) {
            return invalid(
                format!("a disk of {} bytes can't be made", self.storage_bytes),
                format!("{STORAGE_BYTES_MIN} to {STORAGE_BYTES_MAX} bytes can"),
            );
        }
        if !(1..=BOOT_TIMEOUT_SECONDS_MAX).contains(&self.boot_timeout_seconds) {
            return invalid(
                format!("a boot timeout of {} s makes no sense", self.boot_timeout_seconds),
                format!("give 1 to {BOOT_TIMEOUT_SECONDS_MAX} s"),
            );
        }
        self.registries.check().or_else(|why| {
            let hint = "`--registry-mirror http://HOST:PORT`, `--insecure-registry HOST:PORT`, \
                        `--registry-authority /PATH`";
            invalid(why, hint.to_owned())
        })
    }

    /// The guest's host name: the session's name, as far as host names may have its characters (RFC 1123).
    #[must_use]
    pub(crate) fn hostname(&self) -> String {
        let letters = self.name.as_str().bytes().map(|byte| match byte {
            byte if byte.is_ascii_alphanumeric() => char::from(byte.to_ascii_lowercase()),
            _ => '-',
        });
        let label: String = letters.take(63).collect();
        // A session's name begins with a letter or digit, so something is left.
        label.trim_end_matches('-').to_owned()
    }

    /// What the session's host is told of them.
    #[must_use]
    pub(crate) fn for_host(&self, home: &Home, engine: Option<EngineFacts>) -> HostSettings {
        HostSettings {
            id: self.id.clone(),
            name: self.name.clone(),
            owner: self.owner,
            storage: self.storage.clone(),
            ephemeral: self.ephemeral,
            temporary: self.temporary,
            idle_timeout: self.idle_timeout,
            doze_seconds: self.doze_seconds,
            idle_action: self.idle_action,
            running: self.running,
            hostname: self.hostname(),
            machine_hooks: home.machine_hooks(),
            folder_rules: home.folder_rules(),
            own_folders: home.own_folders(),
            crash: self.crash,
            boot_timeout_seconds: self.boot_timeout_seconds,
            asleep_answers: self.asleep_answers,
            registries: self.registries.clone(),
            publish_address: self.publish_address,
            engine,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            storage_bytes: self.storage_bytes,
            network: self.network,
        }
    }

    /// Takes over what may be changed while a session lives.
    pub(crate) fn change(&mut self, change: &ChangeSettings) {
        let ChangeSettings { idle_timeout, doze_seconds, crash, asleep_answers } = change;
        if let Some(timeout) = idle_timeout {
            self.idle_timeout = *timeout;
        }
        if let Some(seconds) = doze_seconds {
            self.doze_seconds = *seconds;
        }
        if let Some(crash) = crash {
            self.crash = *crash;
        }
        if let Some(answers) = asleep_answers {
            self.asleep_answers = *answers;
        }
    }

    /// Reads the record in a session's folder.
    ///
    /// # Errors
    /// When it can't be read, makes no sense, or another version of Dormouse wrote it.
    pub(crate) fn read(folder: &Path) -> io::Result<Self> {
        let settings: Self = read_json(&folder.join(FILE_NAME))?;
        if settings.format != FORMAT {
            let message = format!("it has format {}, this version reads {FORMAT}", settings.format);
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(settings)
    }

    /// Writes the record into a session's folder, in one step as seen by readers, and durably.
    ///
    /// # Errors
    /// When that fails.
    pub(crate) fn write(&self, folder: &Path) -> io::Result<()> {
        write_json(&folder.join(FILE_NAME), self)
    }
}

/// Reads a JSON file of bounded length.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let mut bytes = Vec::new();
    File::open(path)?.take(RECORD_BYTES_MAX).read_to_end(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(io::Error::from)
}

/// Writes a JSON file beside its place, syncs it, and renames it.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let beside = path.with_extension("json.new");
    let mut options = File::options();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const HOST: HostTraits =
        HostTraits { cpus: 16, memory_mib: 24 * 1024, emulation: false, network: NetworkKind::Passt };

    /// Of a session that has its storage there.
    pub(crate) fn of(storage: &Path) -> Settings {
        let wish = CreateSession::named("work".parse().unwrap());
        Settings::settle(&wish, SessionId::from_random(1), storage.into(), HOST).unwrap()
    }

    fn settle(change: impl FnOnce(&mut CreateSession), host: HostTraits) -> Result<Settings, ApiError> {
        let mut wish = CreateSession::named("work".parse().unwrap());
        change(&mut wish);
        Settings::settle(&wish, SessionId::from_random(1), "/x".into(), host)
    }

    #[test]
    fn what_is_not_asked_for_follows_the_host_within_bounds() {
        let settings = settle(|_| {}, HOST).unwrap();
        assert_eq!((settings.cpus, settings.memory_mib), (4, 6 * 1024));
        assert_eq!(settings.storage_bytes, 64 << 30);
        assert_eq!(settings.idle_timeout, IdleTimeout::Seconds(30));
        assert_eq!(settings.boot_timeout_seconds, 240);
        let large = HostTraits { memory_mib: 1 << 20, cpus: 2, ..HOST };
        let settings = settle(|_| {}, large).unwrap();
        assert_eq!((settings.cpus, settings.memory_mib), (2, 8 * 1024));
        assert_eq!(settle(|_| {}, HostTraits { emulation: true, ..HOST }).unwrap().memory_mib, 1024);
    }

    #[test]
    fn values_that_no_vm_can_have_are_refused_with_a_hint() {
        let refused = |change: fn(&mut CreateSession)| {
            let error = settle(change, HOST).unwrap_err();
            assert_eq!(error.code, ErrorCode::Invalid);
            assert!(error.hint.is_some());
        };
        refused(|wish| wish.cpus = Some(0));
        refused(|wish| wish.cpus = Some(CPUS_MAX + 1));
        refused(|wish| wish.memory_mib = Some(1));
        refused(|wish| wish.memory_mib = Some(1 << 30));
        refused(|wish| wish.storage_bytes = Some(0));
        refused(|wish| wish.storage_bytes = Some(u64::MAX));
        refused(|wish| wish.boot_timeout_seconds = Some(0));
        refused(|wish| wish.registries.mirrors = vec!["mirror.example.org".to_owned()]);
        refused(|wish| wish.registries.insecure = vec!["http://registry.lan".to_owned()]);
        refused(|wish| wish.registries.authorities = vec!["company.pem".into()]);
    }

    #[test]
    fn a_host_name_has_only_what_host_names_may_have() {
        for (name, hostname) in [("default", "default"), ("My_Work.2", "my-work-2"), ("a_", "a")] {
            let settings = settle(|wish| wish.name = name.parse().unwrap(), HOST).unwrap();
            assert_eq!(settings.hostname(), hostname);
        }
        let long = settle(|wish| wish.name = "a".repeat(200).parse().unwrap(), HOST).unwrap();
        assert_eq!(long.hostname().len(), 63);
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_another_format_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settle(
            |wish| {
                wish.idle_timeout = IdleTimeout::Never;
                wish.registries.mirrors = vec!["http://192.0.2.7:5000".to_owned()];
                wish.publish_address = Some(std::net::Ipv4Addr::UNSPECIFIED.into());
            },
            HOST,
        )
        .unwrap();
        settings.wakes.push(Wake { at: jiff::Timestamp::now(), every_seconds: Some(60) });
        settings.write(folder.path()).unwrap();
        assert_eq!(Settings::read(folder.path()).unwrap(), settings);
        settings.format = 9;
        settings.write(folder.path()).unwrap();
        assert!(Settings::read(folder.path()).unwrap_err().to_string().contains("format 9"));
    }
}
