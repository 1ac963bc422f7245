//! `docker.sock`: the relay's engine is the session's.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dormouse_agent_proto::{BUSY_DIR, Target};
use dormouse_api::link::HostSettings;
use dormouse_api::{Phase, SessionInfo, SessionState};
use dormouse_docker_proxy::{
    Answer, AnyPort, Bind, Class, Engine, Given, Mount, Refusal, RequestHead, path_of, started_by,
};
use dormouse_lifecycle::{HoldKind, Policy};
use dormouse_mux::Stream;
use serde::de::IgnoredAny;
use tokio::time::timeout;

use crate::asleep::Asleep;
use crate::events::Events;
use crate::fetch;
use crate::folders::{Folders, Using};
use crate::hooks::Verdict;
use crate::lease::Refused;
use crate::owner::{Claimant, HeldLease, Owner};
use crate::ports::{Ports, Starting};

/// Longest answer of the engine that is read here, in bytes.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Longest name of an image that the engine is asked about, in bytes: a registry's, 255, a digest's.
const IMAGE_NAME_MAX: usize = 1024;

/// A sleep that takes longer is no longer waited for by who only looks.
const SLEPT_WITHIN: Duration = Duration::from_secs(30);

/// How long the engine may take to say which ports an image names.
const EXPOSED_WITHIN: Duration = Duration::from_secs(10);

/// What clients see of a session beside its engine. Clones are the same.
#[derive(Debug, Clone)]
pub struct Face {
    /// What is answered while the VM sleeps.
    pub asleep: Asleep,
    /// What has happened in the engine.
    pub events: Events,
    /// The doors to containers.
    pub ports: Ports,
    /// What containers have of the host's.
    pub folders: Folders,
}

impl Face {
    /// What the last host left.
    #[must_use]
    pub fn load(session_dir: &Path, settings: &HostSettings, doors: Vec<OwnedFd>) -> Self {
        // Sessions differ in their ids; numbers for their ports are to differ as well.
        let seed = settings.id.as_str().bytes().fold(u64::from(settings.owner), |seed, byte| {
            seed.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        Self {
            asleep: Asleep::load(
                session_dir,
                &settings.storage,
                settings.asleep_answers,
                settings.engine.clone(),
            ),
            events: Events::load(session_dir),
            ports: Ports::load(session_dir, seed, settings.publish_address, doors),
            folders: Folders::load(session_dir, settings),
        }
    }
}

/// The session's engine as one client sees it.
#[derive(Debug, Clone)]
pub(crate) struct SessionEngine {
    pub(crate) owner: Owner,
    pub(crate) face: Face,
    /// Who the client is, in words.
    pub(crate) client: Arc<str>,
    /// May its requests start a VM? A hook's may not.
    pub(crate) policy: Policy,
}

/// A lease for one request.
#[derive(Debug)]
pub(crate) struct RequestLease {
    lease: HeldLease,
    owner: Owner,
    claimant: Claimant,
    /// As what it holds, if its client moves.
    kind: HoldKind,
    folders: Folders,
    _starting: Option<Starting>,
    _using: Option<Using>,
}

impl Engine for SessionEngine {
    type Lease = RequestLease;

    async fn answer(&self, request: &RequestHead, class: Class) -> Result<Option<Answer>, Refusal> {
        if class == Class::Reads {
            self.face.asleep.asked(request);
            // What a sleep waits for can't wait for the sleep; nor what would wake the VM from it.
            if self.policy == Policy::Acquire && self.face.asleep.may_answer(request) {
                self.sleep_is_over().await;
            }
        }
        let watched = self.owner.info();
        let (state, phase, generation) = {
            let info = watched.borrow();
            (info.state, info.vm.phase, info.vm.generation)
        };
        if state != SessionState::Running {
            return Ok(None);
        }
        match (class, phase) {
            (Class::Events, _) if request.is_http_1_1 => {
                self.face.events.answer(&request.target, self.face.asleep.engine(), watched)
            }
            (Class::Reads, Phase::Absent) => {
                Ok(self.face.asleep.answer(request, generation).map(Answer::Whole))
            }
            _ => Ok(None),
        }
    }

    async fn lease(&self, request: &RequestHead, class: Class) -> Result<RequestLease, Refusal> {
        let kind = match class {
            Class::Events => HoldKind::Events,
            // Else whoever polls would wake the VM each time that it has fallen asleep.
            Class::Reads if self.face.asleep.may_answer(request) => HoldKind::Read,
            _ => HoldKind::Request,
        };
        self.face.asleep.spoken(&request.target);
        let path = request.target.split('?').next().unwrap_or_default();
        let claimant = Claimant {
            kind,
            policy: self.policy,
            owner: self.client.to_string(),
            reason: format!("{} {path}", request.method),
        };
        let lease = self.owner.lease(claimant.clone()).await.map_err(|refused| told(&refused))?;
        let (mut starting, mut using) = (None, None);
        if let Some(container) = started_by(&request.target) {
            if class == Class::Starts {
                let prepared = self.prepare(&lease, &container).await;
                if prepared.is_err() {
                    discard(&lease, &container).await;
                }
                (starting, using) = prepared?;
            } else if path_of(&request.target).ends_with("/archive") {
                // To copy from or to a container that doesn't run, its engine mounts what it has.
                using = self.face.folders.start(&lease, &container).await?;
            }
        }
        let (owner, folders) = (self.owner.clone(), self.face.folders.clone());
        Ok(RequestLease { lease, owner, claimant, kind, folders, _starting: starting, _using: using })
    }

    fn publish_address(&self) -> Option<IpAddr> {
        Some(self.face.ports.address()).filter(IpAddr::is_ipv4)
    }

    fn free_port(&self, wanted: AnyPort) -> Option<u16> {
        self.face.ports.free(wanted)
    }

    async fn started(&self) {
        let claimant = Claimant {
            kind: HoldKind::Request,
            policy: Policy::ExistingOnly,
            owner: self.client.to_string(),
            reason: "what was started is published".to_owned(),
        };
        // A VM that is gone has started nothing.
        if let Ok(lease) = self.owner.lease(claimant).await {
            let dial = || async { lease.dial(Target::Engine).await.map_err(io::Error::other) };
            self.face.ports.compare(dial).await;
        }
    }

    fn mount(&self, bind: Bind<'_>) -> Mount {
        let there = of_the_vm(bind.source, &self.owner.info().borrow().docker_socket);
        there.unwrap_or_else(|| self.face.folders.mount(bind))
    }

    fn take_back(&self, numbers: &[u16]) {
        self.face.ports.take_back(numbers);
    }

    async fn created(&self, container: &str, given: Vec<Given>, numbers: Vec<u16>) {
        self.face.folders.created(container, &given);
        self.face.ports.created(container, numbers);
    }

    fn restore(&self, answer: &[u8]) -> Option<Vec<u8>> {
        dormouse_folders::restore(answer)
    }
}

impl SessionEngine {
    /// Waits while the engine is asked whether the VM may sleep, and while it is put to sleep. Whoever only looks is answered
    /// from what is kept then: a lease would put the sleep off, or end it.
    async fn sleep_is_over(&self) {
        let is_over = |info: &SessionInfo| match info.vm.phase {
            Phase::Counting | Phase::Committed | Phase::Stopping => info.state != SessionState::Running,
            Phase::Absent | Phase::Starting | Phase::Running | Phase::Dozing => true,
        };
        let mut info = self.owner.info();
        let _late = timeout(SLEPT_WITHIN, info.wait_for(is_over)).await;
    }

    /// Hooks may forbid the start of a container; what a hook itself starts isn't asked about.
    async fn ask_hooks(&self, lease: &HeldLease, container: &str) -> Result<(), Refusal> {
        if self.policy == Policy::ExistingOnly {
            return Ok(());
        }
        match self.owner.may_start(lease.generation(), container.to_owned()).await {
            Verdict::Fine => Ok(()),
            Verdict::Veto(words) => {
                Err(Refusal { status: 403, message: format!("a hook refused it: {words}") })
            }
        }
    }

    /// The host's side of a container, before the engine is asked to start it.
    async fn prepare(
        &self,
        lease: &HeldLease,
        container: &str,
    ) -> Result<(Option<Starting>, Option<Using>), Refusal> {
        self.ask_hooks(lease, container).await?;
        let starting = match lease.dial(Target::Engine).await {
            Ok(mut engine) => self.face.ports.start(&mut engine, container).await?,
            // There may be room when the request itself is passed on, and its container would start with its ports unbound.
            Err(error) if error.is_busy() => {
                return Err(Refusal { status: 503, message: error.to_string() });
            }
            // The request itself meets the same error, and tells it.
            Err(_) => None,
        };
        Ok((starting, self.face.folders.start(lease, container).await?))
    }
}

/// As Docker's clients are told: they show a message and nothing else. Whatever the reason, it isn't their request: 409 is a
/// name that is taken to them.
fn told(refused: &Refused) -> Refusal {
    let error = refused.to_api();
    let hint = error.hint.map(|hint| format!("; {hint}")).unwrap_or_default();
    Refusal { status: 503, message: error.message + &hint }
}

/// Removes a container whose start was refused here, if it was to be removed in the end: an engine does so when a start
/// fails, and clients wait for it.
async fn discard(lease: &HeldLease, container: &str) {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Container {
        id: String,
        state: State,
        host_config: HostConfig,
    }
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct State {
        running: bool,
    }
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct HostConfig {
        auto_remove: bool,
    }
    let discarding = async {
        let dial = || async { lease.dial(Target::Engine).await.map_err(io::Error::other) };
        let target = format!("/containers/{container}/json");
        let (_, body) = fetch::ask(&mut dial().await?, "GET", &target, ANSWER_BYTES_MAX).await?;
        let Container { id, state, host_config } = serde_json::from_slice(&body)?;
        if host_config.auto_remove && !state.running {
            let target = format!("/containers/{id}?v=1");
            fetch::ask(&mut dial().await?, "DELETE", &target, ANSWER_BYTES_MAX).await?;
        }
        io::Result::Ok(())
    };
    if let Err(error) = discarding.await {
        tracing::warn!(container, %error, "a container that was not started can't be removed");
    }
}

/// The ports that an image names. `None`: it isn't there, or the engine doesn't say.
async fn exposed_ports(lease: &HeldLease, image: &str) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Image {
        config: Config,
    }
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Config {
        #[serde(default)]
        exposed_ports: Option<BTreeMap<String, IgnoredAny>>,
    }
    let is_name = image.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/:@".contains(&byte));
    if !is_name || image.len() > IMAGE_NAME_MAX {
        return None;
    }
    let mut engine = lease.dial(Target::Engine).await.ok()?;
    let (_, body) =
        fetch::ask(&mut engine, "GET", &format!("/images/{image}/json"), ANSWER_BYTES_MAX).await.ok()?;
    let image: Image = serde_json::from_slice(&body).ok()?;
    Some(image.config.exposed_ports.unwrap_or_default().into_keys().collect())
}

/// What becomes of a bind mount of the engine's own socket, which is in the VM as well, and so is the folder for marks.
/// `None`: it is another path.
fn of_the_vm(source: &str, docker_socket: &Path) -> Option<Mount> {
    // Components, so that neither `//` nor `/./` makes another path.
    let source: PathBuf = Path::new(source).components().collect();
    let of_the_vm = ["/var/run/docker.sock", "/run/docker.sock", BUSY_DIR];
    if of_the_vm.iter().any(|there| source == Path::new(there)) {
        Some(Mount::AsIs)
    } else if source == docker_socket {
        Some(Mount::From("/var/run/docker.sock".to_owned()))
    } else {
        None
    }
}

impl dormouse_docker_proxy::Lease for RequestLease {
    type Stream = Stream;

    async fn dial(&self) -> io::Result<Stream> {
        self.lease.dial(Target::Engine).await.map_err(|error| match error.is_busy() {
            true => io::Error::new(io::ErrorKind::ResourceBusy, error),
            false => io::Error::other(error),
        })
    }

    async fn exposed_ports(&self, image: &str) -> Vec<String> {
        let asking = exposed_ports(&self.lease, image);
        timeout(EXPOSED_WITHIN, asking).await.map_or_else(|_late| Vec::new(), Option::unwrap_or_default)
    }

    async fn given_to(&self, container: &str) -> Result<Vec<Given>, Refusal> {
        self.folders.given_to(&self.lease, container).await
    }

    fn warnings(&self) -> &[String] {
        self.lease.warnings()
    }

    fn ended(&self) -> impl Future<Output = String> + Send + 'static {
        self.lease.ended()
    }

    async fn weaken(self) -> Option<Self> {
        self.held_as(HoldKind::Events).await
    }

    async fn strengthen(self) -> Option<Self> {
        let kind = self.kind;
        self.held_as(kind).await
    }
}

impl RequestLease {
    /// The same request's lease, of another kind. `None`: its VM grants none any more.
    async fn held_as(self, kind: HoldKind) -> Option<Self> {
        let claimant = Claimant { kind, policy: Policy::ExistingOnly, ..self.claimant };
        // The other one goes only now, so that this one is of the same VM.
        let lease = self.owner.lease(claimant.clone()).await.ok()?;
        let is_same = lease.generation() == self.lease.generation();
        is_same.then_some(Self { lease, claimant, ..self })
    }
}

#[cfg(test)]
mod tests {
    use dormouse_lifecycle::{Cause, Refusal as No, Reopen, Termination, TerminationReason};

    use super::*;

    #[test]
    fn a_session_that_cannot_serve_now_is_no_conflict_to_docker() {
        let reason = "no space left".into();
        let (details, reopen) = ("by request".into(), Reopen::OnStart);
        let over = Termination { reason: TerminationReason::Shutdown, cause: Cause::Asked, details, reopen };
        for (no, words) in [
            (No::IoPaused { reason }, "no space left; make room"),
            (No::Terminated(over), "by request; `dorm session start`"),
            (No::HostLeaving, "going down"),
        ] {
            let told = told(&Refused(no));
            assert!(told.status == 503 && told.message.contains(words), "{told:?}");
        }
    }

    #[test]
    fn of_all_paths_only_the_engines_socket_and_the_folder_for_marks_are_in_the_vm() {
        let ours = Path::new("/run/user/1000/dormouse/ab12/docker.sock");
        for (source, is_there) in [
            ("/var/run/docker.sock", Some(Mount::AsIs)),
            ("/run//docker.sock", Some(Mount::AsIs)),
            ("/run/dormouse/busy", Some(Mount::AsIs)),
            (
                "/run/user/1000/dormouse/ab12/docker.sock",
                Some(Mount::From("/var/run/docker.sock".to_owned())),
            ),
            ("/run/user/1000/dormouse/cd34/docker.sock", None),
            ("/var/run", None),
            ("/var/run/../run/docker.sock", None),
            ("/", None),
            ("/etc/passwd", None),
        ] {
            assert_eq!(of_the_vm(source, ours), is_there, "{source}");
        }
    }
}
