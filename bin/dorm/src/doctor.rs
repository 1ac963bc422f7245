//! `dorm doctor`: what this machine has, what is missing, and what to do about it.

use std::io::{self, Write};
use std::path::Path;

use clap::Args;
use dormouse_client::{Endpoint, Home, program_beside_this_one};
use dormouse_folders::{GET_VIRTIOFSD, KeeperError, find_virtiofsd, try_virtiofsd};
use dormouse_guest_image::ImageStore;
use dormouse_vm::{Acceleration, KvmPolicy, ProbeOptions, Qemu, free_bytes};
use serde::Serialize;

use crate::arguments::Format;
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::format::units;
use crate::output::print_json;
use crate::terminal::has_colours;

/// Below this much free disk, VMs and images soon find none.
const DISK_SCARCE: u64 = 4 << 30;
/// Below this much nothing can be made.
const DISK_NONE: u64 = 256 << 20;
/// Below this much free memory a VM of the usual size pushes others out.
const MEMORY_SCARCE: u64 = 1 << 30;
/// Below this much none starts.
const MEMORY_NONE: u64 = 256 << 20;

#[derive(Args)]
pub(crate) struct Doctor {
    /// How.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// How it is about one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at. `--format json` is a list of these.
#[derive(Debug, Serialize)]
struct Finding {
    /// What.
    subject: &'static str,
    verdict: Verdict,
    /// How it is, in one line.
    text: String,
    /// What to do about it.
    hint: Option<&'static str>,
}

impl Finding {
    fn ok(subject: &'static str, text: impl Into<String>) -> Self {
        Self { subject, verdict: Verdict::Ok, text: text.into(), hint: None }
    }

    fn warn(subject: &'static str, text: impl Into<String>, hint: &'static str) -> Self {
        Self { subject, verdict: Verdict::Warn, text: text.into(), hint: Some(hint) }
    }

    fn fail(subject: &'static str, text: impl Into<String>, hint: &'static str) -> Self {
        Self { subject, verdict: Verdict::Fail, text: text.into(), hint: Some(hint) }
    }
}

impl Doctor {
    /// Ends with 1 if something is missing without which no VM starts.
    pub(crate) async fn run(self) -> Done {
        let findings = findings().await;
        let failed = findings.iter().any(|finding| finding.verdict == Verdict::Fail);
        match self.format {
            Format::Json => {
                print_json(&findings)?;
            }
            Format::Table => show(&findings)?,
        }
        Ok(if failed { FAILED } else { SUCCESS })
    }
}

fn show(findings: &[Finding]) -> Result<(), Failure> {
    let colours = has_colours(&io::stdout());
    let mut out = io::stdout().lock();
    for Finding { subject, verdict, text, hint } in findings {
        let (word, colour) = match verdict {
            Verdict::Ok => ("ok  ", "\x1b[32m"),
            Verdict::Warn => ("warn", "\x1b[33m"),
            Verdict::Fail => ("fail", "\x1b[31m"),
        };
        if colours {
            writeln!(out, "{colour}{word}\x1b[0m  {subject}: {text}")?;
        } else {
            writeln!(out, "{word}  {subject}: {text}")?;
        }
        if let Some(hint) = hint {
            writeln!(out, "      hint: {hint}")?;
        }
    }
    Ok(())
}

async fn findings() -> Vec<Finding> {
    let home = match Home::from_env() {
        Ok(home) => home,
        Err(error) => {
            return vec![Finding::fail(
                "home",
                error.to_string(),
                "set HOME, or DORM_HOME to a folder of your own",
            )];
        }
    };
    let mut findings = programs();
    findings.extend(virtualization(&home).await);
    findings.push(image(&home));
    findings.push(disk(&home));
    findings.push(memory(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()));
    findings.push(sandbox(
        &std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default(),
    ));
    findings.push(folders().await);
    findings.push(service(&home).await);
    findings
}

fn programs() -> Vec<Finding> {
    let missing: Vec<_> = ["dormd", "dorm-session", "dorm-frames"]
        .into_iter()
        .filter(|name| !program_beside_this_one(name).is_ok_and(|path| path.is_file()))
        .collect();
    if missing.is_empty() {
        return vec![Finding::ok(
            "programs",
            format!("dorm {} and all that belong to it", env!("CARGO_PKG_VERSION")),
        )];
    }
    vec![Finding::fail(
        "programs",
        format!("{} not found beside dorm", missing.join(", ")),
        "install them into dorm's folder",
    )]
}

/// QEMU, what runs the guest's instructions, and the guests' network.
async fn virtualization(home: &Home) -> Vec<Finding> {
    let cache_dir = home.cache().to_owned();
    // Without it nothing is remembered; that is all.
    let _ = std::fs::create_dir_all(&cache_dir);
    let options =
        ProbeOptions { qemu: None, passt: None, frame_filter: None, cache_dir, kvm: KvmPolicy::IfItWorks };
    let qemu = match Qemu::probe(&options).await {
        Ok(qemu) => qemu,
        Err(error) => {
            let hint = "install Debian's qemu-system-x86, 7.2 or newer, or put another one first in the PATH";
            return vec![Finding::fail("qemu", error.to_string(), hint)];
        }
    };
    let (major, minor, micro) = qemu.version;
    let found = format!("{major}.{minor}.{micro} at {}", qemu.program.display());
    let suspend = if qemu.features.ignore_shared {
        Finding::ok("qemu", found)
    } else {
        Finding::warn(
            "qemu",
            format!("{found}, which can't suspend: VMs are shut down instead"),
            "a newer QEMU can",
        )
    };
    let acceleration = match &qemu.acceleration {
        Acceleration::Kvm => Finding::ok(
            "acceleration",
            "KVM: the processor keeps guests apart from this machine, a security boundary",
        ),
        Acceleration::Emulation { why } => Finding::warn(
            "acceleration",
            format!(
                "emulation ({why}), {}: about ten times slower, and no security boundary in QEMU's own words",
                match qemu.runs_cpus_in_parallel() {
                    true => "of several CPUs at once",
                    false => "of one CPU at a time, because this QEMU may corrupt guests with more",
                }
            ),
            "switch on virtualization in the firmware, load the module kvm, and join the group kvm",
        ),
    };
    vec![suspend, acceleration, network(&qemu)]
}

fn network(qemu: &Qemu) -> Finding {
    if std::env::var_os("DORM_NETWORK").is_some_and(|value| value == "none") {
        return Finding::ok("network", "none for guests, as DORM_NETWORK asks");
    }
    match (&qemu.passt, &qemu.frame_filter) {
        (Some(passt), Some(_)) => Finding::ok(
            "network",
            format!(
                "{} with its frames filtered: guests don't reach this machine's loopback",
                passt.display()
            ),
        ),
        (Some(_), None) => Finding::fail(
            "network",
            "dorm-frames is missing, and without it guests get no passt",
            "install it into dorm's folder",
        ),
        (None, _) => Finding::warn(
            "network",
            "QEMU's user network, which is unsafe: guests reach what listens on this machine's loopback",
            "install passt",
        ),
    }
}

/// Opening it verifies it, or finds that it was verified and hasn't changed.
fn image(home: &Home) -> Finding {
    match ImageStore::for_user(home.images()).newest() {
        Ok(image) => {
            let hash = image.hash().as_str();
            Finding::ok("guest image", format!("{} is intact", hash.get(..12).unwrap_or(hash)))
        }
        Err(error) => Finding::fail(
            "guest image",
            error.to_string(),
            "make one with `cargo xtask guest-image`, or name another store in DORM_IMAGES",
        ),
    }
}

fn disk(home: &Home) -> Finding {
    // The nearest folder that is there tells for those that aren't yet.
    let sessions = home.sessions();
    let Some(folder) = sessions.ancestors().find(|folder| folder.exists()) else {
        return Finding::fail(
            "disk",
            format!("{} can't be made", sessions.display()),
            "set DORM_HOME to a folder of your own",
        );
    };
    match free_bytes(folder) {
        Ok(free) => room(
            "disk",
            free,
            DISK_NONE,
            DISK_SCARCE,
            &format!("free in {}", folder.display()),
            "make room: `dorm system prune` removes what no container uses",
        ),
        Err(error) => Finding::fail(
            "disk",
            format!("can't look at {}: {error}", folder.display()),
            "set DORM_HOME to a folder of your own",
        ),
    }
}

fn memory(meminfo: &str) -> Finding {
    let available = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    });
    match available {
        Some(kib) => room(
            "memory",
            kib << 10,
            MEMORY_NONE,
            MEMORY_SCARCE,
            "free",
            "end something, or give sessions less: `dorm session create --memory`",
        ),
        None => Finding::warn("memory", "can't tell how much is free", "mount /proc"),
    }
}

fn room(subject: &'static str, free: u64, none: u64, scarce: u64, what: &str, hint: &'static str) -> Finding {
    #[expect(clippy::cast_precision_loss, reason = "four digits of it are shown")]
    let text = format!("{} {what}", units::binary_size(free as f64));
    if free < none {
        Finding::fail(subject, text, hint)
    } else if free < scarce {
        Finding::warn(subject, text, hint)
    } else {
        Finding::ok(subject, text)
    }
}

/// QEMU's own cage needs the kernel's filters of system calls.
fn sandbox(actions: &str) -> Finding {
    if actions.split_whitespace().any(|action| action == "kill_process") {
        return Finding::ok("sandbox", "the kernel filters QEMU's system calls");
    }
    Finding::warn(
        "sandbox",
        "this kernel can't filter QEMU's system calls",
        "use a kernel with CONFIG_SECCOMP_FILTER",
    )
}

/// What shares folders of this machine, and the namespaces that it is kept in.
async fn folders() -> Finding {
    match find_virtiofsd() {
        Some(program) => shared_by(&program, try_virtiofsd(&program).await),
        None => Finding::warn(
            "folders",
            "virtiofsd not found: containers can have none of this machine's",
            GET_VIRTIOFSD,
        ),
    }
}

fn shared_by(program: &Path, tried: Result<String, KeeperError>) -> Finding {
    match tried {
        Ok(version) => {
            Finding::ok("folders", format!("{version} at {}, in namespaces of your own", program.display()))
        }
        Err(KeeperError::Namespaces(error)) => Finding::warn(
            "folders",
            format!("this machine gives you no namespaces to keep virtiofsd in ({error}): it shares none"),
            "have its administrator allow them: kernel.unprivileged_userns_clone=1, or the AppArmor profile",
        ),
        Err(error) => Finding::warn("folders", format!("{}: {error}", program.display()), GET_VIRTIOFSD),
    }
}

/// It isn't started for this: that it doesn't run is no fault.
async fn service(home: &Home) -> Finding {
    let socket = home.service_socket();
    if !Path::new(&socket).exists() {
        return Finding::ok("service", "doesn't run; the first command starts it");
    }
    match Endpoint::new(&socket).get::<dormouse_api::Version>("/v1/version").await {
        Ok(version) if version.version == env!("CARGO_PKG_VERSION") => {
            Finding::ok("service", format!("dormd {} runs, pid {}", version.version, version.pid))
        }
        Ok(version) => Finding::warn(
            "service",
            format!("dormd {} runs, of another version than dorm", version.version),
            "end it; the next command starts the new one",
        ),
        Err(_) => Finding::ok("service", "doesn't run any more; the next command starts it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scarce_is_a_warning_and_none_is_a_failure() {
        let verdict = |kib: u64| memory(&format!("MemTotal: 9 kB\nMemAvailable:   {kib} kB\n")).verdict;
        assert_eq!(verdict(100 << 10), Verdict::Fail);
        assert_eq!(verdict(512 << 10), Verdict::Warn);
        assert_eq!(verdict(2 << 20), Verdict::Ok);
        assert_eq!(memory("").verdict, Verdict::Warn);
        assert_eq!(sandbox("kill_process kill_thread trap").verdict, Verdict::Ok);
        assert_eq!(sandbox("").verdict, Verdict::Warn);
    }

    #[test]
    fn folders_need_a_virtiofsd_that_runs_and_namespaces_to_keep_it_in() {
        let found = |tried| shared_by(Path::new("/v/virtiofsd"), tried);
        let ready = found(Ok("virtiofsd 1.14.0".to_owned()));
        assert_eq!(ready.verdict, Verdict::Ok);
        assert!(ready.text.starts_with("virtiofsd 1.14.0 at /v/virtiofsd"), "{}", ready.text);
        let refused = || io::Error::from(io::ErrorKind::PermissionDenied);
        let fenced = found(Err(KeeperError::Namespaces(refused())));
        assert_eq!(fenced.verdict, Verdict::Warn);
        assert!(fenced.hint.is_some_and(|hint| hint.contains("administrator")), "{:?}", fenced.hint);
        let broken = found(Err(KeeperError::Virtiofsd(refused())));
        assert_eq!((broken.verdict, broken.hint), (Verdict::Warn, Some(GET_VIRTIOFSD)));
    }

    #[test]
    fn a_finding_is_documented_as_it_is() {
        let finding = Finding::warn("disk", "3 GB are free", "remove what isn't needed");
        let text = serde_json::to_string_pretty(&finding).unwrap();
        assert!(include_str!("../../../docs/OUTPUT.md").contains(&text), "{text}");
    }
}
