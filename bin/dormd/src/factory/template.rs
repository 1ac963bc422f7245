//! Making templates: one at a time, in the background, by a process of its own that talks to the guest.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dormouse_api::{CreateTemplate, ErrorCode};
use dormouse_client::program_beside_this_one;
use dormouse_snapshot::{DISK, MEMORY, Template, TemplateError};
use dormouse_vm::{
    Adoption, Monitor, SnapshotKey, Start, VmConfig, VmRecord, adopt, create_data_disk, spawn,
};
use tokio::process::Command;
use tokio::time::timeout;

use super::{Factory, files, network};
use crate::settings::{HostTraits, STORAGE_BYTES, Settings};

/// How much a template's VM yields to whatever else runs, see nice(2): nobody waits for it.
const NICENESS: i32 = 10;

/// Longest making of a template.
const MADE_WITHIN: Duration = Duration::from_secs(10 * 60);

/// The folder of the sockets of a template's VM, beside those of the sessions.
const RUNTIME: &str = "template";

/// What VMs a template is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    cpus: u32,
    memory_mib: u64,
    network: dormouse_vm::NetworkKind,
}

impl Shape {
    pub(crate) fn of(settings: &Settings) -> Self {
        Self { cpus: settings.cpus, memory_mib: settings.memory_mib, network: network(settings.network) }
    }

    /// The shape of a session that is made with these options and no others.
    pub(crate) fn asked_for(wish: &CreateTemplate, host: HostTraits) -> Result<Self, dormouse_api::ApiError> {
        let session = dormouse_api::CreateSession {
            cpus: wish.cpus,
            memory_mib: wish.memory_mib,
            ..dormouse_api::CreateSession::named(dormouse_api::SessionName::default())
        };
        let id = dormouse_api::SessionId::from_random(0);
        Settings::settle(&session, id, std::path::PathBuf::new(), host).map(|settings| Self::of(&settings))
    }
}

impl Factory {
    /// Makes the template for a session's VMs, unless there is one or one is being made. Nobody waits for it.
    pub(crate) fn template_in_background(self: &std::sync::Arc<Self>, shape: Shape) {
        let factory = std::sync::Arc::clone(self);
        tokio::spawn(async move {
            if factory.making_template.try_lock().is_err() {
                return;
            }
            match factory.template(shape).await {
                Ok(template) => tracing::info!(name = template.name(), "there is a template"),
                Err(error) => tracing::warn!(error = format!("{error:#}"), "no template was made"),
            }
        });
    }

    /// The template for VMs of this shape, made if there is none.
    pub(crate) async fn template(&self, shape: Shape) -> Result<Template> {
        let _turn = self.making_template.lock().await;
        let (qemu, images, templates) = (self.qemu().await?, self.images(), self.templates());
        let image = tokio::task::spawn_blocking(move || images.newest()).await??;
        let unfinished = templates.begin()?;
        let runtime_dir = self.home.runtime().join(RUNTIME);
        let config = VmConfig {
            session: RUNTIME.to_owned(),
            generation: 1,
            hostname: "dormouse".to_owned(),
            image: files(&image),
            data_disk: unfinished.path().join(DISK),
            memory_file: unfinished.path().join(MEMORY),
            memory_mib: shape.memory_mib,
            cpus: shape.cpus,
            network: shape.network,
            runtime_dir: runtime_dir.clone(),
            start: Start::Cold,
            owner: None,
            niceness: NICENESS,
            lonely_after: None,
        };
        match templates.find(&SnapshotKey::of(&config, qemu)) {
            Ok(Some(template)) => return Ok(template),
            Ok(None) | Err(TemplateError::Unfit(_)) => {}
            Err(error) => return Err(error.into()),
        }
        create_data_disk(&config.data_disk, STORAGE_BYTES).context("can't make the template's disk")?;
        reap(&runtime_dir).await;
        let mut spawned = spawn(&config, qemu).await?;
        let made = tokio::select! {
            made = make(unfinished.path(), &runtime_dir) => made,
            () = self.closing.cancelled() => Err(anyhow::anyhow!("the service is going down")),
        };
        // Gone already if all went well.
        reap(&runtime_dir).await;
        spawned.ended().await.context("QEMU can't be waited for")?;
        let _ = std::fs::remove_dir_all(&runtime_dir);
        made?;
        Ok(tokio::task::spawn_blocking(move || templates.publish(unfinished)).await??)
    }

    /// Makes no more templates and compresses nothing more; what is under way is given up.
    pub(crate) async fn close(&self) {
        self.closing.cancel();
        self.compressing.ended().await;
        drop(self.making_template.lock().await);
    }

    /// Removes what a service left that was killed while it made a template.
    pub(crate) async fn sweep(&self) {
        // Not while this service makes one already.
        let _turn = self.making_template.lock().await;
        let runtime_dir = self.home.runtime().join(RUNTIME);
        reap(&runtime_dir).await;
        let _ = std::fs::remove_dir_all(&runtime_dir);
        // A folder that was named is others' as well, who may be making one.
        if std::env::var_os(super::TEMPLATES_VARIABLE).is_none() {
            self.templates().sweep();
        }
    }

    /// Removes the templates that no new session would be made from: those of earlier guest images and QEMUs. Gives
    /// their names.
    pub(crate) async fn prune_templates(&self) -> Result<Vec<String>> {
        let (build, images, templates) = (self.qemu().await?.build.clone(), self.images(), self.templates());
        tokio::task::spawn_blocking(move || {
            let newest = images.newest()?;
            let mut removed = Vec::new();
            for template in templates.all()? {
                let (key, name) = (&template.seal().key, template.name());
                if key.qemu_build != build || key.guest_image != newest.hash().as_str() {
                    drop(template);
                    templates.remove(&name)?;
                    removed.push(name);
                }
            }
            Ok(removed)
        })
        .await?
    }
}

/// Has a process of its own bring the guest up and freeze it: what guests say isn't parsed here.
async fn make(store: &Path, runtime_dir: &Path) -> Result<()> {
    let mut command = Command::new(program_beside_this_one("dorm-session")?);
    command.arg("make-template").arg("--store").arg(store).arg("--runtime-dir").arg(runtime_dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let ended = timeout(MADE_WITHIN, command.output()).await.context("it took too long")??;
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.success(), "the template's maker ended with {}: {}", ended.status, said.trim());
    Ok(())
}

/// Ends the VM of a template, if there is one.
async fn reap(runtime_dir: &Path) {
    let record = match VmRecord::read(runtime_dir) {
        Ok(Some(record)) => record,
        Ok(None) => return,
        Err(error) => {
            tracing::warn!(%error, "a template's VM can't be looked for");
            let _ = dormouse_vm::discard_record(runtime_dir);
            return;
        }
    };
    if let Ok(Adoption::Adopted(vm)) = adopt(&record, runtime_dir, Monitor::Service).await {
        vm.process.kill();
        vm.process.ended().await;
        record.remove(runtime_dir);
    }
}

/// What went wrong, for the API.
pub(crate) fn api_error(error: &TemplateError) -> dormouse_api::ApiError {
    let code = match error {
        TemplateError::Missing(_) => ErrorCode::NotFound,
        TemplateError::InUse(_) => ErrorCode::Busy,
        TemplateError::Io { .. }
        | TemplateError::Seal(_)
        | TemplateError::Unfit(_)
        | TemplateError::NoSpace { .. } => ErrorCode::Storage,
    };
    dormouse_api::ApiError::new(code, error)
}
