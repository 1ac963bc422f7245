//! What a QEMU can do, by its own word.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use command_fds::CommandFdExt as _;
use command_fds::FdMapping;
use dormouse_qmp::{Client, QomListTypes, QueryMigrateCapabilities, QueryQmpSchema, Quit, VersionTriple};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::ProbeError;
use crate::stderr::StderrTail;

/// How long QEMU may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Where QEMU finds its monitor's socket.
const MONITOR_FD: i32 = 10;

/// The types of devices and objects that device list v1 is made of.
const NEEDED: [&str; 10] = [
    "virtio-blk-pci",
    "virtio-net-pci",
    "virtio-serial-pci",
    "virtserialport",
    "virtio-rng-pci",
    "virtio-balloon-pci",
    "pvpanic-pci",
    "pcie-root-port",
    "isa-serial",
    "memory-backend-file",
];

/// What a QEMU can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Those devices of the list that it lacks.
    lacking: Vec<String>,
    /// The state of a VM can be saved without its memory, which is in a file.
    pub ignore_shared: bool,
    /// It can be told to plug virtiofs devices.
    pub virtiofs: bool,
}

impl Features {
    /// Is everything there that no VM can do without?
    pub(super) fn require(&self, program: &Path) -> Result<(), ProbeError> {
        let missing = NEEDED.into_iter().find(|name| self.lacking.iter().any(|lacking| lacking == name));
        match missing {
            Some(feature) => Err(ProbeError::Lacks { program: program.to_owned(), feature }),
            None => Ok(()),
        }
    }
}

pub(super) async fn ask(program: &Path) -> Result<(dormouse_qmp::Version, Features), ProbeError> {
    let broken = |reason: String| ProbeError::Broken { program: program.to_owned(), reason };
    let (ours, theirs) = UnixStream::pair().map_err(|error| broken(error.to_string()))?;
    let mut command = Command::new(program);
    command
        .args(["-machine", "none", "-nodefaults", "-no-user-config", "-nographic", "-S", "-mon"])
        .args(["chardev=monitor,mode=control", "-chardev"])
        .arg(format!("socket,id=monitor,fd={MONITOR_FD}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
        .fd_mappings(vec![FdMapping { parent_fd: OwnedFd::from(theirs), child_fd: MONITOR_FD }])
        .map_err(|error| broken(error.to_string()))?;
    let mut child = command.spawn().map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ProbeError::Missing(program.display().to_string()),
        _ => ProbeError::Io { path: program.to_owned(), source },
    })?;
    drop(command);
    let (stderr, drained) = StderrTail::of(&mut child);
    let asked = async {
        ours.set_nonblocking(true).map_err(|error| error.to_string())?;
        let stream = tokio::net::UnixStream::from_std(ours).map_err(|error| error.to_string())?;
        let (client, _events) =
            Client::over(stream, ANSWER_WITHIN).await.map_err(|error| error.to_string())?;
        let version = client.greeting().version.clone();
        let features = if is_too_old(version.qemu) {
            Features::default()
        } else {
            questions(&client).await.map_err(|error| error.to_string())?
        };
        // It is killed on drop if it doesn't leave.
        let _ = client.execute(Quit {}, ANSWER_WITHIN).await;
        Ok((version, features))
    };
    match asked.await {
        Ok(answers) => Ok(answers),
        Err(reason) => {
            let _ = child.kill().await;
            let _ = drained.await;
            let words = stderr.text();
            Err(broken(if words.is_empty() { reason } else { words }))
        }
    }
}

fn is_too_old(version: VersionTriple) -> bool {
    (version.major, version.minor) < super::QEMU_MIN
}

async fn questions(client: &Client) -> Result<Features, dormouse_qmp::ExecuteError> {
    let types: BTreeSet<String> =
        client.execute(QomListTypes {}, ANSWER_WITHIN).await?.into_iter().map(|listed| listed.name).collect();
    let commands = client.execute(QueryQmpSchema {}, ANSWER_WITHIN).await?;
    let capabilities = client.execute(QueryMigrateCapabilities {}, ANSWER_WITHIN).await?;
    let has_command =
        |name: &str| commands.iter().any(|entity| entity.name == name && entity.meta_type == "command");
    Ok(Features {
        lacking: NEEDED.into_iter().filter(|name| !types.contains(*name)).map(str::to_owned).collect(),
        ignore_shared: has_command("migrate-incoming")
            && capabilities.iter().any(|known| known.capability == "x-ignore-shared"),
        virtiofs: types.contains("vhost-user-fs-pci"),
    })
}
