//! Making a template: a VM that was made for nobody is booted, warmed, and put to sleep.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dormouse_snapshot::Origin;
use dormouse_vm::{RecordError, Vm, VmRecord};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::machine::{Guest, Purpose, Up, engine_answer, save};

/// Longest boot of a template's VM. Nobody waits for it.
const BOOT_WITHIN: Duration = Duration::from_secs(300);

/// What the engine is asked before the VM is frozen: what clients ask first is then in memory.
const WARM: [&str; 6] =
    ["/_ping", "/version", "/info", "/containers/json?all=1", "/images/json", "/networks"];

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
        Ok(guest)
    };
    let guest = come_up.await.map_err(|reason: String| {
        TemplateError::Guest(format!("{reason}\n{}", console.last_lines(20).join("\n")))
    })?;
    let up = Up { vm, guest, purpose: watch::channel(Purpose::Suspend).0 };
    save(&up, store, Origin::Template).await.map_err(|error| TemplateError::Save(error.to_string()))?;
    up.vm.discard().await;
    Ok(())
}
