//! `dorm session create`.

use std::io::Read;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use dormouse_api::{
    CreateSession, IdleAction, IdleTimeout, ImageChoice, Registries, RunningContainers, SessionInfo,
    SessionName, check_insecure, check_mirror,
};
use dormouse_client::{UserSettings, first_line};
use tokio::io::{AsyncReadExt, BufReader};
use tokio::signal::unix::{SignalKind, signal};

use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::output::print;
use crate::session::settings::{OnCrash, OnOff};
use crate::value::size;

#[derive(Args)]
pub(crate) struct Create {
    /// What to call it.
    name: SessionName,
    /// Where its disk lives.
    #[arg(long, value_name = "PATH")]
    storage: Option<PathBuf>,
    /// The storage must be there already.
    #[arg(long, requires = "storage")]
    no_create: bool,
    /// Its disk goes with the VM, which therefore never sleeps.
    #[arg(long, conflicts_with = "storage")]
    ephemeral: bool,
    /// Print the name and stay: the session ends with this command, or with its standard input.
    #[arg(long, conflicts_with = "storage")]
    temporary: bool,
    /// Virtual CPUs.
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// RAM, e.g. 2G.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Size of the disk, e.g. 64G; it takes only what is used.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    storage_size: Option<u64>,
    /// Seconds from the last use to the sleep, or "never".
    #[arg(long, value_name = "SECONDS")]
    idle_timeout: Option<IdleTimeout>,
    /// Seconds that the VM then dozes, in memory and back at once, before it is put to sleep; 0: not at all.
    #[arg(long, value_name = "SECONDS")]
    doze: Option<u64>,
    /// What follows a crash of the VM.
    #[arg(long, value_enum)]
    crash: Option<OnCrash>,
    /// How the VM is put to sleep then; suspended where that works when absent.
    #[arg(long, value_enum)]
    idle_action: Option<Action>,
    /// Whether running containers keep the VM awake, or are suspended with it while they are quiet.
    #[arg(long, value_enum, default_value = "hold")]
    running: Running,
    /// Which guest image it boots.
    #[arg(long, value_enum, default_value = "newest")]
    image: Image,
    /// Longest start of a VM, in seconds.
    #[arg(long, value_name = "SECONDS")]
    boot_timeout: Option<u64>,
    /// Whether reads of its engine are answered while its VM sleeps, without waking it.
    #[arg(long, value_enum)]
    asleep_answers: Option<OnOff>,
    /// Where ports are published that name no address; 127.0.0.1 when absent.
    #[arg(long, value_name = "IP")]
    publish_address: Option<IpAddr>,
    /// A registry that its engine asks before Docker Hub, by its URL. May be repeated.
    #[arg(long = "registry-mirror", value_name = "URL", value_parser = mirror)]
    registry_mirrors: Vec<String>,
    /// A registry that its engine speaks to without TLS, e.g. registry.lan:5000. May be repeated.
    #[arg(long = "insecure-registry", value_name = "HOST", value_parser = insecure)]
    insecure_registries: Vec<String>,
    /// A file or folder with certificates of authorities that its engine trusts beside the host's. May be repeated.
    #[arg(long = "registry-authority", value_name = "PATH")]
    registry_authorities: Vec<PathBuf>,
}

fn mirror(text: &str) -> Result<String, String> {
    check_mirror(text).map(|()| text.to_owned())
}

fn insecure(text: &str) -> Result<String, String> {
    check_insecure(text).map(|()| text.to_owned())
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    /// Shut it down.
    Stop,
    /// Keep its memory.
    Suspend,
}

#[derive(Clone, Copy, ValueEnum)]
enum Image {
    /// At each boot the newest.
    Newest,
    /// Always the one that it was first booted from.
    Pinned,
}

#[derive(Clone, Copy, ValueEnum)]
enum Running {
    /// They keep it awake.
    Hold,
    /// They are suspended with it.
    Suspend,
}

/// What is named on the line, else what is set.
fn or<T>(named: Vec<T>, set: Vec<T>) -> Vec<T> {
    if named.is_empty() { set } else { named }
}

impl Create {
    /// What is asked for: the options, else the settings, else the defaults.
    fn wish(self, settings: &UserSettings) -> CreateSession {
        let mut wish = CreateSession::named(self.name);
        settings.apply(&mut wish);
        CreateSession {
            storage: self.storage,
            no_create: self.no_create,
            ephemeral: self.ephemeral,
            temporary: self.temporary,
            cpus: self.cpus.or(wish.cpus),
            memory_mib: self.memory.map(|bytes| bytes >> 20).or(wish.memory_mib),
            storage_bytes: self.storage_size.or(wish.storage_bytes),
            idle_timeout: self.idle_timeout.unwrap_or(wish.idle_timeout),
            doze_seconds: self.doze.unwrap_or(wish.doze_seconds),
            crash: self.crash.map_or(wish.crash, Into::into),
            idle_action: self.idle_action.map_or(wish.idle_action, |action| match action {
                Action::Stop => IdleAction::Stop,
                Action::Suspend => IdleAction::Suspend,
            }),
            running: match self.running {
                Running::Hold => RunningContainers::Hold,
                Running::Suspend => RunningContainers::Suspend,
            },
            image: match self.image {
                Image::Newest => ImageChoice::Newest,
                Image::Pinned => ImageChoice::Pinned,
            },
            boot_timeout_seconds: self.boot_timeout.or(wish.boot_timeout_seconds),
            asleep_answers: self.asleep_answers.map(bool::from).or(wish.asleep_answers),
            publish_address: self.publish_address.or(wish.publish_address),
            registries: Registries {
                mirrors: or(self.registry_mirrors, wish.registries.mirrors),
                insecure: or(self.insecure_registries, wish.registries.insecure),
                authorities: or(self.registry_authorities, wish.registries.authorities),
            },
            name: wish.name,
        }
    }

    pub(crate) async fn run(mut self, context: &Context) -> Done {
        if let Some(storage) = &mut self.storage {
            *storage = std::path::absolute(&*storage)?;
        }
        for path in &mut self.registry_authorities {
            *path = std::path::absolute(&*path)?;
            std::fs::metadata(&*path)
                .map_err(|error| Failure::new(format!("can't read {}: {error}", path.display())))?;
        }
        let wish = self.wish(&crate::settings::read()?);
        let service = context.service().await?;
        if !wish.temporary {
            return print(service.create(&wish).await?.name.as_str());
        }
        let mut life = BufReader::new(service.create_temporary(&wish).await?);
        let info: SessionInfo = first_line(&mut life).await?;
        print(info.name.as_str())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut byte = [0];
        tokio::select! {
            _ = life.read(&mut byte) => Err(Failure::new("the service is gone, and the session with it")),
            _ = input_ends() => Ok(SUCCESS),
            _ = terminate.recv() => Ok(SUCCESS),
            interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| SUCCESS).map_err(Failure::from),
        }
    }
}

/// Waits until nobody writes to our standard input any more.
async fn input_ends() {
    let (ended, end) = tokio::sync::oneshot::channel();
    // A thread of its own: a read can't be taken back, and the process must be able to end without it.
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(1..) = std::io::stdin().read(&mut buffer) {}
        let _ = ended.send(());
    });
    let _ = end.await;
}
