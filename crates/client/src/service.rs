//! Finding `dormd`, and starting it when none listens.

use std::fs::{self, DirBuilder};
use std::io::{self, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use dormouse_api::{
    ChangeSettings, CreateSession, CreateTemplate, SessionInfo, SessionName, TemplateInfo, VerifyAnswer,
    Version, Wake,
};
use http::Method;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::{ClientError, Endpoint, Home, JsonLines};

/// Longest start of the service.
const START_SECONDS_MAX: u64 = 20;

/// The descriptor on which a started service says that it listens.
const READY_FD: i32 = 3;

/// The per-user service, which is known to have listened a moment ago.
#[derive(Debug, Clone)]
pub struct Service {
    endpoint: Endpoint,
}

/// Why no service could be had.
#[derive(Debug, thiserror::Error)]
pub enum ServiceStartError {
    /// The program isn't where it should be.
    #[error("can't run {0:?}: install it beside `dorm`")]
    Program(PathBuf, #[source] io::Error),
    /// The runtime directory can't be made.
    #[error("can't make the folder {0:?}: {1}")]
    Folder(PathBuf, #[source] io::Error),
    /// It ended without listening. Its last words.
    #[error("dormd did not start: {0}")]
    Ended(String),
    /// It neither listens nor ends.
    #[error("dormd did not start within {START_SECONDS_MAX} s: look into {0:?}")]
    Late(PathBuf),
}

/// Where `name` lies: in the folder of the running program.
///
/// # Errors
/// When the running program's own path can't be told.
pub fn program_beside_this_one(name: &str) -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.parent().unwrap_or(Path::new("/")).join(name))
}

impl Service {
    /// Connects to this home's service, and starts one when none listens.
    ///
    /// # Errors
    /// See [`ServiceStartError`].
    pub async fn connect_or_start(home: &Home) -> Result<Self, ServiceStartError> {
        let socket = home.service_socket();
        if UnixStream::connect(&socket).await.is_err() {
            start(home).await?;
        }
        Ok(Self { endpoint: Endpoint::new(socket) })
    }

    /// Who answers.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.endpoint.get("/v1/version").await
    }

    /// Every session of the caller, by name.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn sessions(&self) -> Result<Vec<SessionInfo>, ClientError> {
        self.endpoint.get("/v1/sessions").await
    }

    /// One session, without waking it or making it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn inspect(&self, name: &SessionName) -> Result<SessionInfo, ClientError> {
        self.endpoint.get(&format!("/v1/sessions/{name}")).await
    }

    /// One session; `default` is made on its first use.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn open(&self, name: &SessionName) -> Result<SessionInfo, ClientError> {
        self.endpoint.call(Method::POST, &format!("/v1/sessions/{name}/open"), &()).await
    }

    /// Makes a session that stays.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn create(&self, session: &CreateSession) -> Result<SessionInfo, ClientError> {
        self.endpoint.call(Method::POST, "/v1/sessions", session).await
    }

    /// Makes a session that ends when the returned connection is dropped.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn create_temporary(&self, session: &CreateSession) -> Result<crate::Upgraded, ClientError> {
        self.endpoint.upgrade(Method::POST, "/v1/sessions", session, "dorm-session").await
    }

    /// Terminates a session and removes its storage.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn remove(&self, name: &SessionName) -> Result<(), ClientError> {
        self.endpoint.call(Method::DELETE, &format!("/v1/sessions/{name}"), &()).await
    }

    /// Reads the whole snapshot of a session that sleeps.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn verify(&self, name: &SessionName) -> Result<VerifyAnswer, ClientError> {
        self.endpoint.post(&format!("/v1/sessions/{name}/verify")).await
    }

    /// Changes settings of a session, also while it sleeps.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn change(
        &self,
        name: &SessionName,
        change: &ChangeSettings,
    ) -> Result<SessionInfo, ClientError> {
        self.endpoint.call(Method::POST, &format!("/v1/sessions/{name}/settings"), change).await
    }

    /// Sets one more time at which the session is woken.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn set_wake(&self, name: &SessionName, wake: &Wake) -> Result<SessionInfo, ClientError> {
        self.endpoint.call(Method::POST, &format!("/v1/sessions/{name}/wakes"), wake).await
    }

    /// Takes them all back.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn clear_wakes(&self, name: &SessionName) -> Result<SessionInfo, ClientError> {
        self.endpoint.call(Method::DELETE, &format!("/v1/sessions/{name}/wakes"), &()).await
    }

    /// All templates.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn templates(&self) -> Result<Vec<TemplateInfo>, ClientError> {
        self.endpoint.get("/v1/templates").await
    }

    /// The template for sessions of this size, made if there is none. That takes as long as a boot.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn make_template(&self, template: &CreateTemplate) -> Result<TemplateInfo, ClientError> {
        self.endpoint.call(Method::POST, "/v1/templates", template).await
    }

    /// Removes a template.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn remove_template(&self, name: &str) -> Result<(), ClientError> {
        self.endpoint.call(Method::DELETE, &format!("/v1/templates/{name}"), &()).await
    }

    /// Removes the templates that no new session would be made from, and gives their names.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn prune_templates(&self) -> Result<Vec<String>, ClientError> {
        self.endpoint.call(Method::POST, "/v1/templates/prune", &()).await
    }

    /// A session's changes as they happen, from its host.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn watch(session: &SessionInfo) -> Result<JsonLines, ClientError> {
        Endpoint::new(&session.control_socket).lines("/v1/session/watch").await
    }
}

async fn start(home: &Home) -> Result<(), ServiceStartError> {
    let runtime = home.runtime();
    let folder = |error| ServiceStartError::Folder(runtime.to_owned(), error);
    DirBuilder::new().recursive(true).mode(0o700).create(runtime).map_err(folder)?;
    let log = runtime.join("dormd.log");
    let mut ready = spawn(&log, folder)?;
    let waiting = tokio::task::spawn_blocking(move || {
        let mut word = String::new();
        ready.read_to_string(&mut word).map(|_| word)
    });
    let word = match timeout(Duration::from_secs(START_SECONDS_MAX), waiting).await {
        Ok(Ok(Ok(word))) => word,
        Ok(_) => String::new(),
        Err(_) => return Err(ServiceStartError::Late(log)),
    };
    // Another `dorm` may have started one at the same time: then ours ended, and theirs listens.
    if word.trim() == "ready" || UnixStream::connect(home.service_socket()).await.is_ok() {
        return Ok(());
    }
    let last_words = fs::read_to_string(&log).unwrap_or_default();
    Err(ServiceStartError::Ended(last_words.lines().last().unwrap_or("it left no word").to_owned()))
}

/// Starts the program in a session of its own, and returns the pipe on which it says that it listens.
fn spawn(
    log: &Path,
    folder: impl Fn(io::Error) -> ServiceStartError,
) -> Result<PipeReader, ServiceStartError> {
    let program = program_beside_this_one("dormd")
        .map_err(|error| ServiceStartError::Program("dormd".into(), error))?;
    let (ready, ready_writer) = io::pipe().map_err(&folder)?;
    let output = fs::File::create(log).map_err(&folder)?;
    let mut command = Command::new(&program);
    command
        .arg("--ready-fd")
        .arg(READY_FD.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        .process_group(0);
    let mapping = FdMapping { parent_fd: OwnedFd::from(ready_writer), child_fd: READY_FD };
    command.fd_mappings(vec![mapping]).map_err(|error| folder(io::Error::other(error)))?;
    // Not waited for: it outlives us by design, and init reaps it.
    command.spawn().map_err(|error| ServiceStartError::Program(program, error))?;
    Ok(ready)
}
