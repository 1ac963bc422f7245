//! The VM factory. A request names a session and a generation; everything else was settled when the session was made,
//! and what a VM is made from the session's store tells.
//!
//! ```text
//! ephemeral ──► from the kernel up, in memory
//! sealed store ─── fits ──► woken from its snapshot, which is decompressed before if need be
//!    │ doesn't fit: void
//!    ▼
//! blank disk, a template fits ──► copied from the template, then woken
//!    │ else
//!    ▼
//! from the kernel up
//! ```

mod compress;
mod engine;
mod limit;
mod template;
mod volatile;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use dormouse_api::link::EngineFacts;
use dormouse_api::{NetworkKind, SnapshotInfo};
use dormouse_client::Home;
use dormouse_guest_image::{GuestImage, ImageStore};
use dormouse_snapshot::{DISK, FREE_BYTES_MIN, MEMORY, Progress, Seal, TemplateError, TemplateStore};
use dormouse_vm::{GuestFiles, KvmPolicy, ProbeOptions, Qemu, SnapshotKey, Start, VmConfig, spawn};
use tokio::sync::{Mutex, OnceCell, RwLock};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::compress::Compressing;
pub(crate) use self::engine::forget as forget_engine;
pub(crate) use self::template::{Shape, api_error};
use self::volatile::Volatile;
use crate::settings::Settings;

/// The environment variable that names another folder of templates than the cache's.
const TEMPLATES_VARIABLE: &str = "DORM_TEMPLATES";

/// How often something is told of that takes long.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Makes VMs.
#[derive(Debug)]
pub(crate) struct Factory {
    home: Home,
    qemu: OnceCell<Qemu>,
    /// One template is made at a time.
    making_template: Mutex<()>,
    /// Cancelled when the service goes down.
    closing: CancellationToken,
    /// Held for writing by who removes or replaces snapshots of sessions that sleep, for reading by who makes VMs of them.
    stores: RwLock<()>,
    /// What is being compressed.
    compressing: Compressing,
}

impl Factory {
    pub(crate) fn new(home: Home) -> Self {
        Self {
            home,
            qemu: OnceCell::new(),
            making_template: Mutex::new(()),
            closing: CancellationToken::new(),
            stores: RwLock::new(()),
            compressing: Compressing::default(),
        }
    }

    /// The QEMU of this machine, probed on first use.
    pub(crate) async fn qemu(&self) -> Result<&Qemu> {
        let probe = async || {
            let cache_dir = self.home.cache().to_owned();
            std::fs::create_dir_all(&cache_dir)
                .with_context(|| format!("can't make {}", cache_dir.display()))?;
            let options = ProbeOptions {
                qemu: None,
                passt: None,
                frame_filter: None,
                cache_dir,
                kvm: KvmPolicy::IfItWorks,
            };
            let qemu = Qemu::probe(&options).await?;
            tracing::info!(version = ?qemu.version, acceleration = qemu.acceleration.name(), "QEMU probed");
            Ok(qemu)
        };
        self.qemu.get_or_try_init(probe).await
    }

    /// The best network that guests can have here; `DORM_NETWORK=none` gives them none.
    pub(crate) async fn network(&self) -> Result<NetworkKind> {
        if std::env::var_os("DORM_NETWORK").is_some_and(|value| value == "none") {
            return Ok(NetworkKind::None);
        }
        Ok(if self.qemu().await?.passt.is_some() { NetworkKind::Passt } else { NetworkKind::User })
    }

    /// The engine of the image that new VMs boot.
    pub(crate) fn engine(&self) -> Option<EngineFacts> {
        let manifest = self.images().newest_manifest().ok()?;
        // The package's revision is not part of what the engine calls itself.
        let version = manifest.engine.rsplit_once('-').map_or(&*manifest.engine, |(version, _)| version);
        Some(EngineFacts { version: version.to_owned(), api: manifest.api, kernel: manifest.kernel })
    }

    fn images(&self) -> ImageStore {
        ImageStore::for_user(self.home.images())
    }

    /// The templates of this home.
    pub(crate) fn templates(&self) -> TemplateStore {
        let named = std::env::var_os(TEMPLATES_VARIABLE).filter(|value| !value.is_empty());
        TemplateStore::new(named.map_or_else(|| self.home.cache().join("templates"), PathBuf::from))
    }

    /// What is told of a session's snapshot. Nothing is probed or made for it.
    pub(crate) fn snapshot_info(&self, settings: &Settings) -> Option<SnapshotInfo> {
        let sealed = Seal::read(&settings.storage).ok().flatten();
        let needed = self.qemu.get().zip(sealed).map(|(qemu, seal)| {
            let network = network(settings.network);
            // It is woken with the image that it was made with.
            let image = &seal.key.guest_image;
            SnapshotKey::made_of(image, settings.memory_mib, settings.cpus, network, qemu)
        });
        dormouse_snapshot::info(&settings.storage, needed.as_ref())
    }

    /// Makes one more VM for a session. Its record lies in the session's runtime directory afterwards. Answered with what
    /// was tried in vain before, in words. What takes long is told of now and then.
    pub(crate) async fn make(
        &self,
        settings: &Settings,
        generation: u64,
        tell: impl Fn(String),
    ) -> Result<Vec<String>> {
        let progress = Arc::new(Progress::default());
        let qemu = self.qemu().await?;
        let plan = Plan {
            settings: settings.clone(),
            generation,
            runtime_dir: self.home.session_runtime(&settings.id),
            images: self.images(),
            templates: self.templates(),
            qemu: qemu.clone(),
            notes: Vec::new(),
            progress: Arc::clone(&progress),
        };
        self.compressing.call_off(&settings.id);
        // Until there is a VM that can be seen.
        let _stores = self.stores.read().await;
        // Kept until QEMU has opened what is in it.
        let volatile = settings.ephemeral.then(|| Volatile::new(settings, generation)).transpose()?;
        let mut carried_out = tokio::task::spawn_blocking(move || plan.carry_out());
        let (mut config, notes) = loop {
            match timeout(TELL_EVERY, &mut carried_out).await {
                Ok(done) => break done??,
                Err(_) => tell(progress.words().unwrap_or_else(|| "looking at what is stored".to_owned())),
            }
        };
        if let Some(volatile) = &volatile {
            volatile.put_into(&mut config);
        }
        let mut spawned = spawn(&config, qemu).await?;
        // Reaped here as its parent; why it ended is for the session's host to tell.
        tokio::spawn(async move {
            let status = spawned.ended().await;
            tracing::info!(generation, ?status, stderr = spawned.stderr.text(), "QEMU ended");
        });
        Ok(notes)
    }
}

/// How a VM is made: from the best that there is.
struct Plan {
    settings: Settings,
    generation: u64,
    runtime_dir: PathBuf,
    images: ImageStore,
    templates: TemplateStore,
    qemu: Qemu,
    /// What was tried in vain.
    notes: Vec<String>,
    /// How far it has come.
    progress: Arc<Progress>,
}

impl Plan {
    /// Prepares the store, and says what to make of it. Blocks.
    fn carry_out(mut self) -> Result<(VmConfig, Vec<String>)> {
        if self.settings.ephemeral {
            // It has no store, so there is nothing to wake and nowhere to copy to.
            return Ok((self.config(&self.images.newest()?), self.notes));
        }
        let config = match self.snapshot()? {
            Some(config) => config,
            None => {
                let image = engine::image_for(&self.settings.storage, self.settings.image, &self.images)?;
                let hash = image.hash().as_str();
                engine::take_over(&self.settings.storage, &image.manifest().engine, hash)?;
                let cold = self.config(&image);
                let copied = self.template(&cold);
                if copied { VmConfig { start: Start::Incoming, ..cold } } else { cold }
            }
        };
        Ok((config, self.notes))
    }

    /// A VM that is woken from the session's snapshot, with the image that it was made with.
    fn snapshot(&mut self) -> Result<Option<VmConfig>> {
        let store = &self.settings.storage;
        let seal = match Seal::read(store) {
            Ok(None) => {
                self.notes.extend(
                    dormouse_snapshot::given_up(store).map(|why| format!("the snapshot is gone: {why}")),
                );
                return Ok(None);
            }
            Ok(Some(seal)) => Ok(seal),
            Err(unfit) => Err(anyhow::Error::from(unfit)),
        };
        let woken = seal.and_then(|mut seal| {
            let hash = seal.key.guest_image.parse().map_err(|()| anyhow!("it names no guest image"))?;
            let config = VmConfig { start: Start::Incoming, ..self.config(&self.images.open(&hash)?) };
            seal.check(store, &SnapshotKey::of(&config, &self.qemu))?;
            seal.decompress(store, &self.progress)?;
            Ok(config)
        });
        match woken {
            Ok(config) => Ok(Some(config)),
            Err(reason) => {
                self.notes.push(format!("the snapshot can't be used: {reason:#}"));
                dormouse_snapshot::discard(store).context("can't remove a snapshot that is void")?;
                Ok(None)
            }
        }
    }

    /// Copies the template into the store of a session whose disk was never used, if there is one that fits.
    fn template(&mut self, cold: &VmConfig) -> bool {
        let blank = dormouse_vm::allocated_bytes(&cold.data_disk).is_ok_and(|bytes| bytes == 0);
        if !blank {
            return false;
        }
        let copied = self.templates.find(&SnapshotKey::of(cold, &self.qemu)).and_then(|template| {
            let Some(template) = template else { return Ok(false) };
            // A file system isn't made smaller.
            if template.disk_bytes()? > self.settings.storage_bytes {
                return Ok(false);
            }
            check_space(&self.settings.storage, template.allocated_bytes())?;
            template.copy_to(&self.settings.storage, &self.progress).map(|_| true)
        });
        copied.unwrap_or_else(|error| {
            self.notes.push(format!("the template can't be used: {error}"));
            false
        })
    }

    fn config(&self, image: &GuestImage) -> VmConfig {
        VmConfig {
            session: self.settings.id.to_string(),
            generation: self.generation,
            hostname: self.settings.hostname(),
            image: files(image),
            data_disk: self.settings.storage.join(DISK),
            memory_file: self.settings.storage.join(MEMORY),
            memory_mib: self.settings.memory_mib,
            cpus: self.settings.cpus,
            network: network(self.settings.network),
            runtime_dir: self.runtime_dir.clone(),
            start: Start::Cold,
            owner: None,
            niceness: 0,
            lonely_after: None,
        }
    }
}

/// A copy of so many bytes must leave enough free.
fn check_space(store: &Path, bytes: u64) -> Result<(), TemplateError> {
    let free = dormouse_vm::free_bytes(store)
        .map_err(|source| TemplateError::Io { what: "look at free space", source })?;
    let least = bytes + FREE_BYTES_MIN;
    if free < least { Err(TemplateError::NoSpace { free, least }) } else { Ok(()) }
}

fn files(image: &GuestImage) -> GuestFiles {
    GuestFiles {
        kernel: image.kernel(),
        initramfs: image.initramfs(),
        root: image.root(),
        hash: image.hash().as_str().to_owned(),
    }
}

const fn network(kind: NetworkKind) -> dormouse_vm::NetworkKind {
    match kind {
        NetworkKind::Passt => dormouse_vm::NetworkKind::Passt,
        NetworkKind::User => dormouse_vm::NetworkKind::UserUnsafe,
        NetworkKind::None => dormouse_vm::NetworkKind::None,
    }
}

#[cfg(test)]
mod tests;
