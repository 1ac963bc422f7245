//! The table of sessions.

mod wakes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use dormouse_api::{
    ApiError, ChangeSettings, CreateSession, CreateTemplate, ErrorCode, IdleInfo, NetworkInfo, NetworkKind,
    Phase, SessionId, SessionInfo, SessionName, SessionState, StorageInfo, TemplateInfo, VerifyAnswer,
    VmInfo,
};
use dormouse_client::{Endpoint, Home, UserSettings};
use dormouse_snapshot::Template;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::factory::{Factory, Shape, api_error};
use crate::host::{Keeper, Order, Orders};
use crate::settings::{HostTraits, Settings};
use crate::{leftovers, storage};

/// How long a session may take to end.
const TERMINATED_WITHIN: Duration = Duration::from_secs(150);

/// How long a host may take to take over a setting.
const CHANGED_WITHIN: Duration = Duration::from_secs(10);

/// How long the hooks may take to say whether a session may be: theirs, and the start of its host.
const CREATED_WITHIN: Duration = Duration::from_secs(20);

/// How long it may take until all sessions listen; a host that hangs may keep one of them from it.
const LISTENING_WITHIN: Duration = Duration::from_secs(10);

/// How long every session together may take when the service goes down.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(65);

/// All sessions of one home.
#[derive(Debug)]
pub(crate) struct Table {
    home: Home,
    factory: Arc<Factory>,
    rows: Mutex<BTreeMap<SessionName, Row>>,
    /// A wake was set, or taken back.
    wakes_changed: Notify,
}

#[derive(Debug)]
struct Row {
    settings: Settings,
    info: watch::Receiver<SessionInfo>,
    orders: mpsc::Sender<Order>,
    keeper: JoinHandle<()>,
    /// Turns true when somebody listens on the session's sockets.
    listening: watch::Receiver<bool>,
    /// Absent for an ephemeral session, and when somebody else has the store: then its VM will not start.
    _store: Option<storage::Lock>,
}

impl Row {
    /// What its host last told, and what the service alone knows.
    fn told(&self) -> SessionInfo {
        SessionInfo { wakes: self.settings.wakes.clone(), ..self.info.borrow().clone() }
    }
}

fn internal(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Internal, error)
}

fn unknown(name: &SessionName) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no session named {name:?}", name = name.as_str()))
        .hint("`dorm session ls` lists those there are")
}

impl Table {
    /// The sessions that are there. A record that can't be read is left alone, and logged. What a service that was killed
    /// left half-made or half-removed goes.
    pub(crate) fn load(home: Home) -> io::Result<Self> {
        let mut folders = DirBuilder::new();
        folders.recursive(true).mode(0o700);
        folders.create(home.sessions())?;
        let factory = Arc::new(Factory::new(home.clone()));
        let sweeper = Arc::clone(&factory);
        tokio::spawn(async move {
            sweeper.sweep().await;
            sweeper.compress_old_snapshots().await;
        });
        let table = Self { home, factory, rows: Mutex::new(BTreeMap::new()), wakes_changed: Notify::new() };
        for entry in fs::read_dir(table.home.sessions())? {
            let folder = entry?.path();
            if leftovers::finish(&folder)? {
                continue;
            }
            match Settings::read(&folder) {
                Ok(settings) => {
                    let store = match settings.ephemeral {
                        true => None,
                        false => storage::lock(&settings.storage)
                            .inspect_err(|error| tracing::error!(%error, "a store can't be locked"))
                            .ok(),
                    };
                    table.insert(settings, store)?;
                }
                Err(error) => {
                    tracing::error!(folder = %folder.display(), %error, "a session's record can't be read")
                }
            }
        }
        Ok(table)
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<SessionName, Row>> {
        self.rows.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Ends what nobody has a use for: temporary sessions, whose creators' connections ended with the last service, and
    /// VMs of sessions that are gone.
    pub(crate) async fn end_leftovers(&self) {
        let temporary: Vec<SessionName> = self
            .rows()
            .values()
            .filter(|row| row.settings.temporary)
            .map(|row| row.settings.name.clone())
            .collect();
        for name in temporary {
            if let Err(error) = self.remove(&name, Order::CreatorGone).await {
                tracing::warn!(session = %name, %error, "a temporary session could not be removed");
            }
        }
        let known: BTreeSet<_> = self.rows().values().map(|row| row.settings.id.clone()).collect();
        if let Err(error) = leftovers::end_vms(self.home.runtime(), |id| known.contains(id)).await {
            tracing::warn!(%error, "can't look for what the last service left");
        }
    }

    fn insert(&self, settings: Settings, store: Option<storage::Lock>) -> io::Result<()> {
        let runtime = self.home.session_runtime(&settings.id);
        DirBuilder::new().recursive(true).mode(0o700).create(&runtime)?;
        let (sender, info) = watch::channel(known(&settings, &self.home.session(&settings.id), &runtime));
        let (orders, inbox) = Orders::new();
        let (listens, listening) = watch::channel(false);
        let keeper = Keeper {
            settings: settings.clone(),
            home: self.home.clone(),
            factory: Arc::clone(&self.factory),
            info: sender,
            orders: inbox,
            listens,
        };
        let keeper = tokio::spawn(keeper.run());
        let row = Row { settings, info, orders, keeper, listening, _store: store };
        self.rows().insert(row.settings.name.clone(), row);
        Ok(())
    }

    /// Waits until somebody listens on the sockets of the sessions that are there, or of just this one, so that whoever is
    /// told of one can connect.
    pub(crate) async fn listening(&self, only: Option<&SessionName>) {
        let is_meant = |row: &Row| only.is_none_or(|name| row.settings.name == *name);
        let sessions: Vec<_> =
            self.rows().values().filter(|row| is_meant(row)).map(|row| row.listening.clone()).collect();
        let all = async {
            for mut session in sessions {
                // One that can't be served has been logged, and keeps nobody from the others.
                let _ = session.wait_for(|listening| *listening).await;
            }
        };
        if timeout(LISTENING_WITHIN, all).await.is_err() {
            tracing::warn!("not every session listens yet");
        }
    }

    /// Every session, by name.
    pub(crate) fn all(&self) -> Vec<SessionInfo> {
        self.rows().values().map(Row::told).collect()
    }

    /// One session.
    pub(crate) fn get(&self, name: &SessionName) -> Result<SessionInfo, ApiError> {
        self.rows().get(name).map(Row::told).ok_or_else(|| unknown(name))
    }

    /// One session, with what it wakes from as that is now.
    pub(crate) fn inspect(&self, name: &SessionName) -> Result<SessionInfo, ApiError> {
        let (mut info, settings) = {
            let rows = self.rows();
            let row = rows.get(name).ok_or_else(|| unknown(name))?;
            (row.told(), row.settings.clone())
        };
        info.snapshot = match info.vm.phase {
            Phase::Absent => self.factory.snapshot_info(&settings),
            Phase::Starting
            | Phase::Running
            | Phase::Counting
            | Phase::Dozing
            | Phase::Committed
            | Phase::Stopping => None,
        };
        Ok(info)
    }

    /// Reads a session's whole snapshot, and compares it with what was put to sleep.
    pub(crate) async fn verify(&self, name: &SessionName) -> Result<VerifyAnswer, ApiError> {
        let store = {
            let rows = self.rows();
            let row = rows.get(name).ok_or_else(|| unknown(name))?;
            match row.info.borrow().vm.phase {
                Phase::Absent => row.settings.storage.clone(),
                Phase::Starting
                | Phase::Running
                | Phase::Counting
                | Phase::Dozing
                | Phase::Committed
                | Phase::Stopping => {
                    return Ok(VerifyAnswer::NoSnapshot);
                }
            }
        };
        tokio::task::spawn_blocking(move || dormouse_snapshot::verify(&store)).await.map_err(internal)
    }

    /// One session; the default one is made on its first use.
    pub(crate) async fn open(&self, name: &SessionName) -> Result<SessionInfo, ApiError> {
        match self.get(name) {
            Err(_) if name.is_default() => match self.create(&self.unasked(name)).await {
                // Somebody else made it at the same time.
                Err(error) if error.code == ErrorCode::Exists => self.get(name),
                created => created,
            },
            found => found,
        }
    }

    /// A session that nobody described: the user's settings, else the defaults.
    fn unasked(&self, name: &SessionName) -> CreateSession {
        let mut wish = CreateSession::named(name.clone());
        match UserSettings::read(&self.home.settings()) {
            Ok(settings) => settings.apply(&mut wish),
            Err(error) => tracing::warn!(%error, "the settings can't be read: the defaults are used"),
        }
        wish
    }

    /// Makes a session: everything that its VMs will be made of is settled here.
    pub(crate) async fn create(&self, wish: &CreateSession) -> Result<SessionInfo, ApiError> {
        let taken = || {
            ApiError::new(
                ErrorCode::Exists,
                format!("there is already a session named {:?}", wish.name.as_str()),
            )
        };
        if self.rows().contains_key(&wish.name) {
            return Err(taken());
        }
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).map_err(internal)?;
        let id = SessionId::from_random(u64::from_ne_bytes(random));
        let folder = self.home.session(&id);
        let path = match &wish.storage {
            Some(path) => storage::check(path, wish.no_create)?,
            None if wish.no_create => {
                return Err(ApiError::new(ErrorCode::Storage, "--no-create needs a store that is there")
                    .hint("name it with --storage"));
            }
            None => folder.clone(),
        };
        if wish.ephemeral && wish.storage.is_some() {
            let message = "an ephemeral session keeps its data in memory and has no use for storage";
            return Err(
                ApiError::new(ErrorCode::Invalid, message).hint("leave --storage or --ephemeral away")
            );
        }
        let used_by = |row: &Row| row.settings.storage == path;
        if let Some(other) = self.rows().values().find(|row| used_by(row)) {
            let message = format!(
                "the store {} is used by the session {:?}",
                path.display(),
                other.settings.name.as_str()
            );
            return Err(ApiError::new(ErrorCode::Storage, message).hint("a store has one session at a time"));
        }
        let settings = Settings::settle(wish, id, path, self.host_traits().await?)?;
        let found = storage::is_store(&settings.storage);
        let half = leftovers::half_made(&folder);
        let store = build(&settings, &folder, &half).inspect_err(|_| {
            let _ = fs::remove_dir_all(&half);
        })?;
        if self.rows().contains_key(&wish.name) {
            self.take_back(&settings, found);
            return Err(taken());
        }
        self.insert(settings, store).map_err(internal)?;
        self.listening(Some(&wish.name)).await;
        let info = self.get(&wish.name)?;
        if let Err(refusal) = self.ask_hooks(&info).await {
            // It never was, so nobody is told of its end.
            let settings = self.let_go(&wish.name).await?;
            self.take_back(&settings, found);
            return Err(refusal);
        }
        Ok(info)
    }

    /// Changes settings of a session that lives: written down first, then told to its host.
    pub(crate) async fn change(
        &self,
        name: &SessionName,
        change: ChangeSettings,
    ) -> Result<SessionInfo, ApiError> {
        let (orders, mut info, wanted) = {
            let mut rows = self.rows();
            let row = rows.get_mut(name).ok_or_else(|| unknown(name))?;
            let mut settings = row.settings.clone();
            settings.change(&change);
            settings.write(&self.home.session(&settings.id)).map_err(internal)?;
            row.settings = settings;
            let Settings { idle_timeout, doze_seconds, crash, .. } = &row.settings;
            (row.orders.clone(), row.info.clone(), (*idle_timeout, *doze_seconds, *crash))
        };
        let gone = |_| ApiError::new(ErrorCode::NotFound, "the session is being removed");
        orders.send(Order::Change(change)).await.map_err(gone)?;
        let told = |info: &SessionInfo| (info.idle.timeout_seconds, info.idle.doze_seconds, info.crash);
        let changed = info.wait_for(|info| told(info) == wanted);
        match timeout(CHANGED_WITHIN, changed).await {
            Ok(Ok(info)) => Ok(info.clone()),
            Ok(Err(_)) | Err(_) => Err(ApiError::new(
                ErrorCode::Busy,
                "the setting is written down, but the session's host did not say that it took it over",
            )),
        }
    }

    /// Asks the hooks whether the session may be. Only the machine's can be there already, and without them there is
    /// nothing to ask.
    async fn ask_hooks(&self, info: &SessionInfo) -> Result<(), ApiError> {
        if !fs::read_dir(self.home.machine_hooks()).is_ok_and(|mut hooks| hooks.next().is_some()) {
            return Ok(());
        }
        let control = Endpoint::new(&info.control_socket);
        let asked = control.post::<SessionInfo>("/v1/session/created");
        match timeout(CREATED_WITHIN, asked).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.into_api()),
            Err(_) => Err(ApiError::new(ErrorCode::Busy, "the hooks did not say in time whether it may be")),
        }
    }

    async fn host_traits(&self) -> Result<HostTraits, ApiError> {
        let words = |error: anyhow::Error| internal(format!("{error:#}"));
        let qemu = self.factory.qemu().await.map_err(words)?;
        let network = self.factory.network().await.map_err(words)?;
        Ok(HostTraits::of_this_host(qemu, network))
    }

    /// All templates.
    pub(crate) async fn templates(&self) -> Result<Vec<TemplateInfo>, ApiError> {
        let templates = self.factory.templates();
        let found = tokio::task::spawn_blocking(move || templates.all()).await.map_err(internal)?;
        Ok(found.map_err(|error| api_error(&error))?.iter().map(template_info).collect())
    }

    /// The template for sessions of this shape, made if there is none.
    pub(crate) async fn make_template(&self, wish: &CreateTemplate) -> Result<TemplateInfo, ApiError> {
        let shape = Shape::asked_for(wish, self.host_traits().await?)?;
        let made = self.factory.template(shape).await;
        made.map(|template| template_info(&template)).map_err(|error| internal(format!("{error:#}")))
    }

    /// Removes the templates that are of no use any more, and gives their names.
    pub(crate) async fn prune_templates(&self) -> Result<Vec<String>, ApiError> {
        self.factory.prune_templates().await.map_err(|error| internal(format!("{error:#}")))
    }

    /// Removes one template.
    pub(crate) fn remove_template(&self, name: &str) -> Result<(), ApiError> {
        self.factory.templates().remove(name).map_err(|error| api_error(&error))
    }

    /// Ends a session by this order and removes all that it has.
    pub(crate) async fn remove(&self, name: &SessionName, end: Order) -> Result<(), ApiError> {
        let (orders, mut info) = {
            let rows = self.rows();
            let row = rows.get(name).ok_or_else(|| unknown(name))?;
            (row.orders.clone(), row.info.clone())
        };
        // Hooks are told of the end of what they were told of.
        let is_told = self.home.session(&self.id_of(name)?).join("facts.jsonl").exists();
        // One look at it only: a second one beside it would wait for a writer that waits for the first.
        let ended =
            |info: &SessionInfo| info.state == SessionState::Terminated && info.vm.phase == Phase::Absent;
        let is_over = ended(&info.borrow());
        if is_told && !is_over {
            let _ = orders.send(end).await;
            if timeout(TERMINATED_WITHIN, info.wait_for(ended)).await.is_err() {
                return Err(
                    ApiError::new(ErrorCode::Busy, "the session did not end in time").hint("try again")
                );
            }
        }
        let settings = self.let_go(name).await?;
        self.discard(&settings);
        Ok(())
    }

    fn id_of(&self, name: &SessionName) -> Result<SessionId, ApiError> {
        self.rows().get(name).map(|row| row.settings.id.clone()).ok_or_else(|| unknown(name))
    }

    /// Lets the session's host go.
    async fn let_go(&self, name: &SessionName) -> Result<Settings, ApiError> {
        let Some(row) = self.rows().remove(name) else { return Err(unknown(name)) };
        let _ = row.orders.send(Order::Shutdown).await;
        let _ = timeout(TERMINATED_WITHIN, row.keeper).await;
        Ok(row.settings)
    }

    /// Removes all that a session has.
    fn discard(&self, settings: &Settings) {
        self.clear(settings, leftovers::remove);
    }

    /// Removes what was made for a session that is not to be after all: not the store that it `found`.
    fn take_back(&self, settings: &Settings, found: bool) {
        self.clear(settings, if found { leftovers::take_back } else { leftovers::remove });
    }

    fn clear(&self, settings: &Settings, remove: impl FnOnce(&Path) -> io::Result<()>) {
        if let Err(error) = remove(&self.home.session(&settings.id)) {
            tracing::warn!(session = %settings.name, %error, "a session could not be removed whole");
        }
        let _ = fs::remove_dir_all(self.home.session_runtime(&settings.id));
    }

    /// Puts every VM to sleep.
    pub(crate) async fn shut_down(&self) {
        let rows = std::mem::take(&mut *self.rows());
        for row in rows.values() {
            let _ = row.orders.send(Order::Shutdown).await;
        }
        let ended = async {
            self.factory.close().await;
            for (_, row) in rows {
                let _ = row.keeper.await;
            }
        };
        if timeout(SHUTDOWN_WITHIN, ended).await.is_err() {
            tracing::warn!("not every session went to sleep in time");
        }
    }
}

/// Makes the folder and the store of a session: beside the folder's place, in `half`, so that a service that is killed
/// leaves no half of a session.
fn build(settings: &Settings, folder: &Path, half: &Path) -> Result<Option<storage::Lock>, ApiError> {
    DirBuilder::new().recursive(true).mode(0o700).create(half).map_err(internal)?;
    let mut store = None;
    if !settings.ephemeral {
        let place = if settings.storage == folder { half } else { &settings.storage };
        storage::make(place, settings.storage_bytes)?;
        store = Some(storage::lock(place)?);
    }
    settings.write(half).map_err(internal)?;
    fs::rename(half, folder).map_err(internal)?;
    Ok(store)
}

fn template_info(template: &Template) -> TemplateInfo {
    let seal = template.seal();
    TemplateInfo {
        name: template.name(),
        cpus: seal.key.cpus,
        memory_mib: seal.key.memory_mib,
        network: match seal.key.network {
            dormouse_vm::NetworkKind::Passt => NetworkKind::Passt,
            dormouse_vm::NetworkKind::UserUnsafe => NetworkKind::User,
            dormouse_vm::NetworkKind::None => NetworkKind::None,
        },
        guest_image: seal.key.guest_image.clone(),
        made_at: seal.sealed_at,
        used_bytes: template.allocated_bytes(),
    }
}

/// What the last host left, or what can be told of a session that never had one.
fn known(settings: &Settings, folder: &Path, runtime: &Path) -> SessionInfo {
    let fresh = fresh(settings, runtime);
    match crate::settings::read_json::<SessionInfo>(&folder.join("info.json")) {
        // Its sockets are where this service listens, which needn't be where the last one did, and its settings may have been
        // changed while it had no host.
        Ok(left) => {
            let SessionInfo { docker_socket, control_socket, idle, crash, .. } = fresh;
            SessionInfo { docker_socket, control_socket, idle, crash, ..left }
        }
        Err(_) => fresh,
    }
}

/// A session that never had a host.
fn fresh(settings: &Settings, runtime: &Path) -> SessionInfo {
    SessionInfo {
        name: settings.name.clone(),
        id: settings.id.clone(),
        owner: settings.owner,
        state: SessionState::Running,
        incarnation: 1,
        vm: VmInfo {
            phase: Phase::Absent,
            generation: 0,
            boot: None,
            how: None,
            start_count: 0,
            boots: 0,
            since: jiff::Timestamp::now(),
            deadline: None,
            step: None,
            acceleration: None,
            cpus: settings.cpus,
            memory_mib: settings.memory_mib,
        },
        holds: Vec::new(),
        crash: settings.crash,
        idle: IdleInfo {
            timeout_seconds: settings.idle_timeout,
            doze_seconds: settings.doze_seconds,
            action: settings.idle_action,
            running: settings.running,
        },
        network: NetworkInfo {
            kind: settings.network,
            host_loopback: settings.network == NetworkKind::User,
            publish_address: settings.publish_address,
            registries: settings.registries.clone(),
        },
        storage: StorageInfo {
            path: settings.storage.clone(),
            size_bytes: settings.storage_bytes,
            used_bytes: 0,
        },
        snapshot: None,
        wakes: settings.wakes.clone(),
        termination: None,
        docker_socket: runtime.join("docker.sock"),
        control_socket: runtime.join("control.sock"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sessions_sockets_are_where_this_service_listens_whatever_the_last_host_left() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path();
        let mut settings = crate::settings::tests::of(folder);
        let mut left = fresh(&settings, Path::new("/run/then"));
        left.vm.start_count = 7;
        crate::settings::write_json(&folder.join("info.json"), &left).unwrap();
        settings.doze_seconds += 1;
        let known = known(&settings, folder, Path::new("/run/now"));
        assert_eq!(known.docker_socket, Path::new("/run/now/docker.sock"));
        assert_eq!(known.control_socket, Path::new("/run/now/control.sock"));
        assert_eq!((known.vm.start_count, known.idle.doze_seconds), (7, settings.doze_seconds));
    }
}
