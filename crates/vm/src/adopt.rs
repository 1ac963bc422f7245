//! Finding a VM that another process made: a new `dormd` or session host adopts what answers with the right id, and
//! reaps the rest.

use std::io;
use std::path::Path;
use std::time::Duration;

use dormouse_qmp::{Client, Events, QueryName, QueryStatus, QueryUuid, RunState};

use crate::process::{Process, ProcessIdentity};
use crate::record::VmRecord;

/// How long QEMU may take to answer who it is.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How long a killed QEMU may take to go.
const KILL_WITHIN: Duration = Duration::from_secs(5);

/// Which of QEMU's two monitors to talk to. Each serves one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// The session host's.
    Host,
    /// `dormd`'s.
    Service,
}

/// What became of the VM of a record.
#[derive(Debug)]
pub enum Adoption {
    /// It lives, and said who it is.
    Adopted(Box<Adopted>),
    /// It is gone, by now: a QEMU that didn't answer was killed. Its sockets and its record are removed.
    Gone,
}

/// A VM that was found alive.
#[derive(Debug)]
pub struct Adopted {
    /// QEMU.
    pub process: Process,
    /// Its monitor.
    pub client: Client,
    /// What happens from now on.
    pub events: Events,
    /// In which state it was found. One in `prelaunch` or `inmigrate` never ran under us: its maker died on the way.
    pub state: RunState,
}

/// Adopts the VM of `record`, or makes sure that it is gone.
///
/// # Errors
/// When the host refuses to tell about its processes.
pub async fn adopt(record: &VmRecord, runtime_dir: &Path, monitor: Monitor) -> io::Result<Adoption> {
    let identity = match record.process {
        Some(identity) => Some(identity),
        None => find_by_uuid(&record.uuid)?,
    };
    let Some(process) = identity.map(Process::open).transpose()?.flatten() else {
        record.remove(runtime_dir);
        return Ok(Adoption::Gone);
    };
    match introduce(record, monitor).await {
        Ok((client, events, state)) => {
            Ok(Adoption::Adopted(Box::new(Adopted { process, client, events, state })))
        }
        Err(reason) => {
            tracing::warn!(
                session = record.session,
                generation = record.generation,
                pid = process.identity().pid,
                reason,
                "QEMU can't be adopted, killed"
            );
            reap(record, runtime_dir, &process).await;
            Ok(Adoption::Gone)
        }
    }
}

/// Kills the QEMU of `record` and removes what it leaves.
pub(crate) async fn reap(record: &VmRecord, runtime_dir: &Path, process: &Process) {
    process.kill();
    if tokio::time::timeout(KILL_WITHIN, process.ended()).await.is_err() {
        tracing::error!(pid = process.identity().pid, "QEMU does not die of SIGKILL");
    }
    record.remove(runtime_dir);
}

/// Is it the VM that the record tells of?
async fn introduce(record: &VmRecord, monitor: Monitor) -> Result<(Client, Events, RunState), String> {
    let socket = match monitor {
        Monitor::Host => &record.sockets.host_monitor,
        Monitor::Service => &record.sockets.service_monitor,
    };
    let (client, events) = Client::connect(socket, ANSWER_WITHIN).await.map_err(|error| error.to_string())?;
    let asked = async {
        let uuid = client.execute(QueryUuid {}, ANSWER_WITHIN).await?.uuid;
        let name = client.execute(QueryName {}, ANSWER_WITHIN).await?.name;
        let state = client.execute(QueryStatus {}, ANSWER_WITHIN).await?.status;
        Ok::<_, dormouse_qmp::ExecuteError>((uuid, name, state))
    };
    let (uuid, name, state) = asked.await.map_err(|error| error.to_string())?;
    if uuid != record.uuid || name.as_deref() != Some(&record.name) {
        return Err(format!("it calls itself {name:?}, {uuid}"));
    }
    Ok((client, events, state))
}

/// The process that was started with `-uuid UUID`: for a record whose writer was killed between starting QEMU and
/// writing down its pid.
pub(crate) fn find_by_uuid(uuid: &str) -> io::Result<Option<ProcessIdentity>> {
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Processes come and go, and those of others can't be read.
        let Ok(command_line) = std::fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let arguments: Vec<&[u8]> = command_line.split(|&byte| byte == 0).collect();
        if arguments.windows(2).any(|pair| pair == [b"-uuid", uuid.as_bytes()]) {
            return Ok(ProcessIdentity::of(pid).ok());
        }
    }
    Ok(None)
}
