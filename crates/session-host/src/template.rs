//! Making a template: a VM that was made for nobody is booted, warmed, and put to sleep.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dormouse_agent_proto::{ProcessFrame, RunProcess};
use dormouse_mux::read_process_frame;
use dormouse_snapshot::{MEMORY, Origin};
use dormouse_vm::{RecordError, Vm, VmRecord};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::machine::{Guest, Purpose, Up, authorities, engine_answer, save};

/// Longest boot of a template's VM. Nobody waits for it.
const BOOT_WITHIN: Duration = Duration::from_secs(300);

/// What the engine is asked before the VM is frozen: what clients ask first is then in memory.
const WARM: [&str; 6] =
    ["/_ping", "/version", "/info", "/containers/json?all=1", "/images/json", "/networks"];

/// What a guest gives up before it is frozen: what it has read and not mapped, so that no clone and no snapshot of one
/// carries it. It tells of free pages in blocks of 128 KiB for that, where Linux begins at 2 MiB: what it frees is scattered.
const GIVE_UP: &str = "sync; echo 5 > /sys/module/page_reporting/parameters/page_reporting_order; \
    echo 3 > /proc/sys/vm/drop_caches";

/// While it works that costs too much (docs/design/001-asleep-on-disk.md). 9 is Linux's own choice on this machine.
const WORK_ON: &str = "echo 9 > /sys/module/page_reporting/parameters/page_reporting_order";

/// A memory file that didn't shrink for so long shrinks no more: the guest tells of what it freed two seconds later
/// (Linux, mm/page_reporting.c), and again while there is more.
const SETTLED_AFTER: Duration = Duration::from_secs(15);

/// Longest wait for that. What is left by then stays.
const SETTLED_WITHIN: Duration = Duration::from_secs(90);

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Why no template was made.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The VM's record can't be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// There is no VM.
    #[error("there is no VM to make a template of")]
    NoVm,
    /// QEMU can't be reached.
    #[error("can't reach QEMU: {0}")]
    Io(#[from] std::io::Error),
    /// The guest didn't come up.
    #[error("the guest did not come up: {0}")]
    Guest(String),
    /// It couldn't be saved and sealed.
    #[error("the template was not saved: {0}")]
    Save(String),
}

/// Makes the VM whose record lies in `runtime_dir` into a sealed store. The VM is gone afterwards if that succeeded.
///
/// # Errors
/// See [`TemplateError`].
pub async fn make_template(store: &Path, runtime_dir: &Path) -> Result<(), TemplateError> {
    let record = VmRecord::read(runtime_dir)?.ok_or(TemplateError::NoVm)?;
    let (vm, _events) = Vm::connect(record, runtime_dir).await?.ok_or(TemplateError::NoVm)?;
    // Drained for as long as the VM runs: a guest whose console nobody reads waits for a reader.
    let console = vm.console().await?;
    let vm = Arc::new(vm);
    vm.cont().await.map_err(|error| TemplateError::Guest(error.to_string()))?;
    let deadline = Instant::now() + BOOT_WITHIN;
    let come_up = async {
        let guest = Guest::greet(&vm, deadline, None).await?;
        guest
            .until_ready(
                deadline,
                |step| tracing::info!(step, "template"),
                |words| tracing::warn!(words, "template"),
            )
            .await?;
        for path in WARM {
            engine_answer(&guest.agent, path).await?;
        }
        let introduced = authorities::introduce(&guest.agent, &[], None).await?;
        give_up(&guest, &store.join(MEMORY)).await?;
        Ok((guest, introduced.told))
    };
    let (guest, told) = come_up.await.map_err(|reason: String| {
        TemplateError::Guest(format!("{reason}\n{}", console.last_lines(20).join("\n")))
    })?;
    let up = Up { vm, guest, purpose: watch::channel(Purpose::Suspend).0 };
    let seal = save(&up, store, Origin::Template, told)
        .await
        .map_err(|error| TemplateError::Save(error.to_string()))?;
    up.vm.discard().await;
    // So that it outlives a restart of the host.
    let store = store.to_owned();
    let summed = tokio::task::spawn_blocking(move || seal.make_sum(&store)).await;
    summed
        .map_err(|error| TemplateError::Save(error.to_string()))?
        .map_err(|error| TemplateError::Save(error.to_string()))
}

/// Has the guest give up what it can do without, and waits until that is out of its memory file.
async fn give_up(guest: &Guest, memory: &Path) -> Result<(), String> {
    shell(guest, GIVE_UP).await?;
    settle(memory).await?;
    shell(guest, WORK_ON).await
}

async fn shell(guest: &Guest, command: &str) -> Result<(), String> {
    let argv = ["sh", "-c", command].map(str::to_owned).to_vec();
    let process = RunProcess { argv, ..RunProcess::default() };
    let mut process = guest.agent.run(process).await.map_err(|error| error.to_string())?;
    let mut buffer = Vec::new();
    loop {
        match read_process_frame(&mut process.stream, &mut buffer).await.map_err(|error| error.to_string())? {
            Some(ProcessFrame::Exit(0)) => return Ok(()),
            Some(ProcessFrame::Exit(status)) => {
                return Err(format!("its caches: the guest's shell ended with {status}"));
            }
            Some(_) => {}
            None => return Err("its caches: the guest hung up".to_owned()),
        }
    }
}

async fn settle(memory: &Path) -> Result<(), String> {
    let mut least = allocated(memory)?;
    let (begun, mut since) = (Instant::now(), Instant::now());
    while since.elapsed() < SETTLED_AFTER && begun.elapsed() < SETTLED_WITHIN {
        tokio::time::sleep(LOOK_EVERY).await;
        let bytes = allocated(memory)?;
        if bytes < least {
            (least, since) = (bytes, Instant::now());
        }
    }
    tracing::info!(mib = least >> 20, "a template's memory");
    Ok(())
}

fn allocated(memory: &Path) -> Result<u64, String> {
    dormouse_vm::allocated_bytes(memory).map_err(|error| format!("can't look at its memory: {error}"))
}
