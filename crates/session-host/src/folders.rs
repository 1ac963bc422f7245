//! Folders of the host in containers.
//!
//! ```text
//! POST /containers/create ─► may it be shared? ─► named as in the guest ─► created: written down who was given what
//! POST .../start ─► plugged, if it isn't ─► each folder shared ─► passed on to the engine ─► it runs ─┐
//! the engine says that something started or died ───────────────────────────────────────────────────┴─► what no
//!     container needs is taken back, the last with its device: a VM that has one can't be suspended
//! ```
//!
//! While a folder is shared the VM is held. docs/design/002-folders.md says why so.

mod device;
mod given;
mod guest;
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use dormouse_agent_proto::Target;
use dormouse_api::link::HostSettings;
use dormouse_docker_proxy::{Bind, By, Mount, Refusal};
use dormouse_folders::{Access, GUEST_ROOT, Missing, Policy, Share, rules};
use dormouse_lifecycle::{HoldKind, Policy as LeasePolicy};
use dormouse_mux::Agent;
use dormouse_vm::Vm;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use self::device::Device;
use self::given::{Gift, Given};
use crate::fetch;
use crate::owner::{Claimant, HeldLease, Message, Owner};

/// Longest answer of the engine that is read here, in bytes.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How long one comparison may take.
const COMPARED_WITHIN: Duration = Duration::from_secs(60);

/// From an engine that lists to a VM that may be held: what runs in it is counted meanwhile.
const UP_WITHIN: Duration = Duration::from_secs(60);
const LEASE_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// How soon a hold that could not be had is asked for again.
const HOLD_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The folders of one session. Clones are the same folders.
#[derive(Debug, Clone)]
pub struct Folders {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    places: Places,
    given: Given,
    owner: watch::Sender<Option<Owner>>,
    vm: Mutex<Option<Arc<Vm>>>,
    /// Containers that are being started, and by how many requests.
    starting: Mutex<BTreeMap<String, u32>>,
    /// One plugs, shares and takes back at a time.
    device: tokio::sync::Mutex<Device>,
    /// A start is over, however it ended.
    start_over: Notify,
}

/// Where things lie that decide what may be shared.
#[derive(Debug)]
struct Places {
    rules: PathBuf,
    home: Option<PathBuf>,
    own: Vec<PathBuf>,
    sessions: PathBuf,
}

/// A container that is being started, or looked into: until this is dropped its folders stay, whatever the engine lists.
#[derive(Debug)]
pub(crate) struct Using {
    folders: Folders,
    id: String,
}

impl Drop for Using {
    fn drop(&mut self) {
        let mut starting = self.folders.starting();
        if let Some(count) = starting.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                starting.remove(&self.id);
            }
        }
        drop(starting);
        self.folders.shared.start_over.notify_one();
    }
}

impl Places {
    /// What may be shared now.
    fn policy(&self) -> Policy {
        let allowed = match std::fs::read_to_string(&self.rules) {
            Ok(text) => rules(&text, self.home.as_deref()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.home.iter().cloned().chain([std::env::temp_dir()]).collect()
            }
            // Nobody knows what they forbid.
            Err(error) => {
                tracing::error!(path = %self.rules.display(), %error, "the rules for folders can't be read");
                Vec::new()
            }
        };
        let hidden: Vec<_> = self.own.iter().cloned().chain(self.stores()).collect();
        Policy::new(&allowed, &hidden)
    }

    /// Where sessions keep their disks that were put elsewhere.
    fn stores(&self) -> Vec<PathBuf> {
        #[derive(Deserialize)]
        struct Session {
            storage: PathBuf,
        }
        let sessions = std::fs::read_dir(&self.sessions).into_iter().flatten().flatten();
        let read = sessions.filter_map(|session| std::fs::read(session.path().join("session.json")).ok());
        read.filter_map(|bytes| Some(serde_json::from_slice::<Session>(&bytes).ok()?.storage)).collect()
    }
}

impl Folders {
    /// The folders of the session whose own folder this is.
    #[must_use]
    pub fn load(session_dir: &Path, settings: &HostSettings) -> Self {
        let places = Places {
            rules: settings.folder_rules.clone(),
            home: std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute()),
            own: settings.own_folders.iter().cloned().chain([settings.storage.clone()]).collect(),
            sessions: session_dir.parent().unwrap_or(session_dir).to_owned(),
        };
        let shared = Shared {
            places,
            given: Given::load(session_dir),
            owner: watch::channel(None).0,
            vm: Mutex::new(None),
            starting: Mutex::default(),
            device: tokio::sync::Mutex::default(),
            start_over: Notify::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Who gives leases.
    pub(crate) fn set_owner(&self, owner: Owner) {
        self.shared.owner.send_replace(Some(owner));
    }

    /// The VM that is up.
    pub(crate) fn set_vm(&self, vm: Arc<Vm>) {
        *self.shared.vm.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(vm);
    }

    fn vm(&self) -> Option<Arc<Vm>> {
        self.shared.vm.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn starting(&self) -> MutexGuard<'_, BTreeMap<String, u32>> {
        self.shared.starting.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What becomes of a bind mount.
    pub(crate) fn mount(&self, bind: Bind<'_>) -> Mount {
        let make = match bind.by {
            By::Volume => Missing::Make,
            By::Mount { make: true } => Missing::Make,
            By::Mount { make: false } => Missing::Refuse,
            By::Driver => {
                return Mount::Refused(format!(
                    "{}: a volume's driver would mount a folder of the VM; name the folder in `--volume`",
                    bind.source
                ));
            }
        };
        let access = if bind.read_only { Access::Read } else { Access::Write };
        match self.shared.places.policy().find(Path::new(bind.source), make) {
            Ok(path) => match (Share { path, access }).in_guest().into_os_string().into_string() {
                Ok(path) if !path.contains(':') => Mount::From(path),
                _ => Mount::Refused(format!("{}: a path with a colon can't be mounted", bind.source)),
            },
            Err(refused) => Mount::Refused(in_words(bind.source, &refused)),
        }
    }

    /// Writes down what a container was given.
    pub(crate) fn created(&self, container: &str, given: &[dormouse_docker_proxy::Given]) {
        // The engine's own socket is no folder. What this has of several containers may be the same.
        let gifts: BTreeSet<_> = given.iter().filter_map(Gift::named).collect();
        if !gifts.is_empty() {
            self.shared.given.give(container, gifts.into_iter().collect());
        }
    }

    /// What a container was given, by any name of it.
    ///
    /// # Errors
    /// Docker's own, if the engine can't be asked which container that is.
    pub(crate) async fn given_to(
        &self,
        lease: &HeldLease,
        container: &str,
    ) -> Result<Vec<dormouse_docker_proxy::Given>, Refusal> {
        if self.shared.given.is_empty() {
            return Ok(Vec::new());
        }
        let id = id_of(lease, container).await?;
        let gifts = id.map(|id| self.shared.given.of(&id)).unwrap_or_default();
        Ok(gifts.iter().filter_map(Gift::in_guest).collect())
    }

    /// Shares what a container was given, before it is started or looked into.
    ///
    /// # Errors
    /// Docker's own, if one of its folders can't be had.
    pub(crate) async fn start(&self, lease: &HeldLease, container: &str) -> Result<Option<Using>, Refusal> {
        if self.shared.given.is_empty() {
            return Ok(None);
        }
        let Some(id) = id_of(lease, container).await? else { return Ok(None) };
        let gifts = self.shared.given.of(&id);
        if gifts.is_empty() {
            return Ok(None);
        }
        let using = self.using(id);
        self.share(&lease.agent, &gifts).await.map_err(|why| Refusal {
            status: 500,
            message: format!("error while mounting folders of the host: {why}"),
        })?;
        Ok(Some(using))
    }

    fn using(&self, id: String) -> Using {
        *self.starting().entry(id.clone()).or_default() += 1;
        Using { folders: self.clone(), id }
    }

    /// Shares these, as far as they may be shared now.
    async fn share(&self, agent: &Agent, gifts: &[Gift]) -> Result<(), String> {
        let policy = self.shared.places.policy();
        for gift in gifts {
            let path = &gift.share.path;
            let found = policy.find(path, gift.missing());
            if found.map_err(|refused| in_words(&path.to_string_lossy(), &refused))? != *path {
                return Err(format!("{} is another folder now than it was", path.display()));
            }
        }
        let vm = self.vm().ok_or("there is no VM")?;
        let mut device = self.shared.device.lock().await;
        device.belong_to(&vm, agent, self).await?;
        device.plug(&vm, agent, self).await?;
        for gift in gifts {
            device.share(&gift.share).await?;
        }
        Ok(())
    }

    /// Keeps what is shared what the containers of a VM need, until it is aborted.
    pub(crate) async fn follow(self, agent: Agent, mut changes: watch::Receiver<u64>) {
        self.begin(&agent).await;
        loop {
            changes.mark_unchanged();
            let is_held = self.compare(&agent).await;
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = self.shared.start_over.notified() => {}
                () = sleep(HOLD_AGAIN_AFTER), if !is_held => {}
            }
        }
    }

    /// Makes what is shared what the engine's containers need. `false`: the VM should be held and isn't.
    async fn compare(&self, agent: &Agent) -> bool {
        if self.shared.given.is_empty() && !self.shared.device.lock().await.is_plugged() {
            return true;
        }
        let comparing = async {
            let running = ids(|| dial(agent), "/containers/json").await.map_err(|error| error.to_string())?;
            let needed: BTreeSet<String> =
                running.into_iter().chain(self.starting().keys().cloned()).collect();
            let gifts: Vec<_> = needed.iter().flat_map(|id| self.shared.given.of(id)).collect();
            self.settle(agent, &gifts).await
        };
        match timeout(COMPARED_WITHIN, comparing).await {
            Ok(Ok(is_held)) => return is_held,
            Ok(Err(error)) => tracing::warn!(error, "shared folders are not what containers need"),
            Err(_late) => tracing::warn!("it takes too long to compare shared folders with containers"),
        }
        true
    }

    async fn settle(&self, agent: &Agent, gifts: &[Gift]) -> Result<bool, String> {
        let vm = self.vm().ok_or("there is no VM")?;
        let mut device = self.shared.device.lock().await;
        device.belong_to(&vm, agent, self).await?;
        // What began to start meanwhile waits for this lock, and shares what it needs itself.
        let starting: Vec<_> = self.starting().keys().cloned().collect();
        let starting = starting.iter().flat_map(|id| self.shared.given.of(id));
        let wanted: BTreeSet<_> = gifts.iter().cloned().chain(starting).map(|gift| gift.share).collect();
        if wanted.is_empty() {
            device.unplug(&vm, agent).await?;
            return Ok(true);
        }
        device.keep_only(&wanted).await?;
        if device.shares().next().is_none() {
            return Ok(true);
        }
        if !device.is_held() {
            let paths: Vec<_> = device.shares().map(|share| share.path.display().to_string()).collect();
            let reason =
                format!("{} shared; a VM with a folder of the host can't be suspended", paths.join(", "));
            device.hold(self.lease(&reason).await);
        }
        Ok(device.is_held())
    }

    /// The VM is about to be suspended.
    ///
    /// # Errors
    /// In words, if it can't be.
    pub(crate) async fn leave(&self, agent: &Agent) -> Result<(), String> {
        let Some(vm) = self.vm() else { return Ok(()) };
        let mut device = self.shared.device.lock().await;
        device.belong_to(&vm, agent, self).await?;
        if device.is_broken() {
            return Err("a device for folders is left in it".to_owned());
        }
        if let Some(share) = device.shares().next() {
            return Err(format!("{} is shared with a container that runs", share.path.display()));
        }
        device
            .unplug(&vm, agent)
            .await
            .map_err(|why| format!("folders of the host can't be taken back: {why}"))
    }

    /// A VM has come up: containers that are no more are forgotten, and those are started that the engine tried to start by
    /// itself when their folders weren't there yet.
    async fn begin(&self, agent: &Agent) {
        let known = self.shared.given.ids();
        if known.is_empty() {
            return;
        }
        let Ok(all) = ids(|| dial(agent), "/containers/json?all=1").await else { return };
        let all: BTreeSet<_> = all.into_iter().collect();
        self.shared.given.forget(&known.difference(&all).cloned().collect());
        for id in known.intersection(&all) {
            if !failed_to_restart(agent, id).await {
                continue;
            }
            let Some(lease) = self.first_lease().await else { return };
            if let Err(why) = self.start_again(&lease, id).await {
                self.note(lease.generation(), format!("the container {id} was not started again: {why}"));
            }
        }
    }

    /// Holds a VM that has just come up, which nobody may have been told of yet.
    async fn first_lease(&self) -> Option<HeldLease> {
        let deadline = Instant::now() + UP_WITHIN;
        while Instant::now() < deadline {
            let lease = self.lease("a container that restarts by itself waits for folders").await;
            if lease.is_some() {
                return lease;
            }
            sleep(LEASE_AGAIN_AFTER).await;
        }
        None
    }

    async fn start_again(&self, lease: &HeldLease, id: &str) -> Result<(), String> {
        let using = self.start(lease, id).await.map_err(|refusal| refusal.message)?;
        let mut engine = lease.dial(Target::Engine).await.map_err(|error| error.to_string())?;
        let target = format!("/containers/{id}/start");
        let (head, body) = fetch::ask(&mut engine, "POST", &target, ANSWER_BYTES_MAX)
            .await
            .map_err(|error| error.to_string())?;
        drop(using);
        match head.status {
            204 | 304 => Ok(()),
            _ => Err(String::from_utf8_lossy(&body).into_owned()),
        }
    }

    /// Nobody serves this port's device any more.
    async fn lost(&self, generation: u64, port: usize, why: String) {
        let mut device = self.shared.device.lock().await;
        if !device.is_lost(generation, port) {
            return;
        }
        // If it went with its VM, there is none to be told.
        let Some(lease) = self.lease("folders of the host are gone").await else { return };
        if lease.generation() == generation {
            let what = "folders of the host are gone from containers that run, until these are started again";
            self.note(generation, format!("{what}: {why}"));
        }
    }

    fn note(&self, generation: u64, what: String) {
        if let Some(owner) = &*self.shared.owner.borrow() {
            let generation = dormouse_lifecycle::Generation(generation);
            owner.inbox.send(Message::Note { generation, what });
        }
    }

    /// Holds the VM that is up, if one is.
    async fn lease(&self, reason: &str) -> Option<HeldLease> {
        let owner = self.shared.owner.borrow().clone()?;
        let claimant = Claimant {
            kind: HoldKind::Container,
            policy: LeasePolicy::ExistingOnly,
            owner: "folders of the host".to_owned(),
            reason: reason.to_owned(),
        };
        owner.lease(claimant).await.ok()
    }
}

fn in_words(source: &str, refused: &dormouse_folders::Refused) -> String {
    match refused {
        // Docker's words, which have the path.
        dormouse_folders::Refused::Missing(_) => refused.to_string(),
        _ => format!("{source}: {refused}"),
    }
}

async fn dial(agent: &Agent) -> io::Result<dormouse_mux::Stream> {
    agent.dial(Target::Engine).await.map_err(io::Error::other)
}

/// The id of the container that has this name. What isn't there is the engine's to say.
///
/// # Errors
/// The engine can't be asked now, but may be there for the request itself.
async fn id_of(lease: &HeldLease, container: &str) -> Result<Option<String>, Refusal> {
    match lease.dial(Target::Engine).await {
        Ok(mut engine) => Ok(id_in(&mut engine, container).await),
        // There may be room when the request itself is passed on, and its container would lack its folders.
        Err(error) if error.is_busy() => Err(Refusal { status: 503, message: error.to_string() }),
        // The request itself meets the same error, and tells it.
        Err(_) => Ok(None),
    }
}

async fn id_in(engine: &mut (impl AsyncRead + AsyncWrite + Unpin), container: &str) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Container {
        id: String,
    }
    let target = format!("/containers/{container}/json");
    let (_, body) = fetch::ask(engine, "GET", &target, ANSWER_BYTES_MAX).await.ok()?;
    Some(serde_json::from_slice::<Container>(&body).ok()?.id)
}

/// The ids of the containers in this list.
async fn ids<D, F, S>(dial: D, target: &str) -> io::Result<Vec<String>>
where
    D: Fn() -> F,
    F: Future<Output = io::Result<S>>,
    S: AsyncRead + AsyncWrite + Unpin,
{
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Listed {
        id: String,
    }
    let mut engine = dial().await?;
    let (_, body) = fetch::ask(&mut engine, "GET", target, ANSWER_BYTES_MAX).await?;
    let listed: Vec<Listed> = serde_json::from_slice(&body)?;
    Ok(listed.into_iter().map(|one| one.id).collect())
}

/// Did the engine try to start this container by itself, and find its folders missing?
async fn failed_to_restart(agent: &Agent, id: &str) -> bool {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Container {
        state: State,
        host_config: HostConfig,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct State {
        running: bool,
        error: String,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct HostConfig {
        restart_policy: RestartPolicy,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct RestartPolicy {
        name: String,
    }
    let asking = async {
        let mut engine = dial(agent).await?;
        let target = format!("/containers/{id}/json");
        let (_, body) = fetch::ask(&mut engine, "GET", &target, ANSWER_BYTES_MAX).await?;
        let Container { state, host_config } = serde_json::from_slice(&body)?;
        let restarts =
            matches!(host_config.restart_policy.name.as_str(), "always" | "unless-stopped" | "on-failure");
        Ok::<_, io::Error>(restarts && !state.running && state.error.contains(GUEST_ROOT))
    };
    asking.await.unwrap_or_default()
}

#[cfg(test)]
mod tests;
