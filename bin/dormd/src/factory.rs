//! The VM factory. A request names a session and a generation; everything else was settled when the session was made.

use std::path::PathBuf;

use anyhow::{Context, Result};
use dormouse_api::NetworkKind;
use dormouse_client::Home;
use dormouse_guest_image::ImageStore;
use dormouse_vm::{GuestFiles, KvmPolicy, ProbeOptions, Qemu, Start, VmConfig, spawn};
use tokio::sync::OnceCell;

use crate::settings::Settings;

/// The name of a session's data disk, and of its memory, in its storage.
pub(crate) const DISK: &str = "data.raw";
pub(crate) const MEMORY: &str = "memory";

/// Makes VMs.
#[derive(Debug)]
pub(crate) struct Factory {
    home: Home,
    qemu: OnceCell<Qemu>,
}

impl Factory {
    pub(crate) fn new(home: Home) -> Self {
        Self { home, qemu: OnceCell::new() }
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

    /// Makes one more VM for a session. Its record lies in the session's runtime directory afterwards.
    pub(crate) async fn make(&self, settings: &Settings, generation: u64) -> Result<()> {
        let images = std::env::var_os("DORM_IMAGES").map_or_else(|| self.home.images(), PathBuf::from);
        let image = tokio::task::spawn_blocking(move || ImageStore::new(images).newest()).await??;
        let qemu = self.qemu().await?;
        let config = VmConfig {
            session: settings.id.to_string(),
            generation,
            hostname: "dormouse".to_owned(),
            image: GuestFiles { kernel: image.kernel(), initramfs: image.initramfs(), root: image.root() },
            data_disk: settings.storage.join(DISK),
            memory_file: settings.storage.join(MEMORY),
            memory_mib: settings.memory_mib,
            cpus: settings.cpus,
            network: match settings.network {
                NetworkKind::Passt => dormouse_vm::NetworkKind::Passt,
                NetworkKind::User => dormouse_vm::NetworkKind::UserUnsafe,
                NetworkKind::None => dormouse_vm::NetworkKind::None,
            },
            runtime_dir: self.home.session_runtime(&settings.id),
            start: Start::Cold,
            owner: None,
        };
        let mut spawned = spawn(&config, qemu).await?;
        // Reaped here as its parent; why it ended is for the session's host to tell.
        tokio::spawn(async move {
            let status = spawned.ended().await;
            tracing::info!(generation, ?status, stderr = ?spawned.stderr, "QEMU ended");
        });
        Ok(())
    }
}
