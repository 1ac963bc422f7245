//! What is answered while the VM sleeps.
//!
//! An engine that sleeps can't change, so what it answered last is still the answer. It is asked inside the sleep, after
//! the last recount and before the agent's streams close:
//!
//! ```text
//! Committed ─► capture ─► asleep.json.new ─► the VM is gone, in order ─► seal: asleep.json ─► answered from
//! ```
//!
//! An answer counts only while there is no VM, and only if the latest generation's sleep was sealed: after a crash, or a
//! sleep that went wrong, everything wakes. Asked is a fixed set for each version of the API that clients spoke, and
//! whatever they asked within the last hour. What no engine is needed for is also answered before there ever was one.

mod answers;
mod never;
mod present;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::future::Future;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use dormouse_api::link::EngineFacts;
use dormouse_docker_proxy::{RequestHead, ResponseHead, path_of, tells_paths, version_of};
use jiff::Timestamp;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout, timeout_at};

use self::answers::{Answers, Kept, Question};
use self::present::{containers_with_a_time, take_apart};
use crate::fetch;

/// What is asked for each version of the API: what the docker CLI, compose and IDEs ask of their own accord.
const FIXED: &[(&str, &str)] = &[
    ("GET", "/version"),
    ("GET", "/info"),
    ("GET", "/containers/json"),
    ("GET", "/containers/json?all=1"),
    ("GET", "/images/json"),
    ("GET", "/images/json?all=1"),
    ("GET", "/volumes"),
    ("GET", "/networks"),
];

/// And without a version.
const PINGS: &[(&str, &str)] = &[("HEAD", "/_ping"), ("GET", "/_ping"), ("GET", "/version")];

/// What is asked of a swarm.
const SWARM: &[&str] = &["/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs"];

/// For how long a question is remembered.
const ASKED_WITHIN: Duration = Duration::from_secs(3600);

/// Questions that are remembered, and versions of the API.
const QUESTIONS_MAX: usize = 256;
const VERSIONS_MAX: usize = 4;

/// Longest target that is remembered, in bytes.
const TARGET_BYTES_MAX: usize = 4096;

/// Longest answer that is kept, and all of them together, in bytes.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;
const ANSWERS_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Containers whose times are asked for.
const CONTAINERS_MAX: usize = 256;

/// One answer may take so long, and all of them together: a sleep isn't held up for more.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const CAPTURE_WITHIN: Duration = Duration::from_secs(15);

/// The answers of one session. Clones are the same answers.
#[derive(Debug, Clone)]
pub struct Asleep {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    /// Where the VM's memory is kept.
    store: PathBuf,
    enabled: AtomicBool,
    /// The engine that there would be, if there never was one.
    engine: Option<EngineFacts>,
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    asked: BTreeMap<Question, Instant>,
    /// Versions of the API, and when each was last spoken.
    versions: BTreeMap<String, Instant>,
    /// Captured in a sleep that isn't over.
    captured: Option<Arc<Answers>>,
    /// Of the latest sleep that went in order.
    sealed: Option<Arc<Answers>>,
}

impl Asleep {
    /// Answers that an earlier host left in the session's folder, of a VM whose memory is kept in `store`. What can't be read
    /// is as good as none.
    #[must_use]
    pub fn load(folder: &Path, store: &Path, enabled: bool, engine: Option<EngineFacts>) -> Self {
        let (folder, store, memory) = (folder.to_owned(), store.to_owned(), Mutex::new(Memory::default()));
        let shared = Shared { folder, store, enabled: AtomicBool::new(enabled), engine, memory };
        let mut memory = Memory::default();
        let sealed = read(&shared.sealed_path()).ok().and_then(|bytes| Answers::from_bytes(&bytes));
        if let Some(sealed) = sealed {
            let now = Instant::now();
            let versions = sealed.kept.keys().filter_map(|question| version(&question.target));
            memory.versions = versions.map(|version| (version, now)).collect();
            memory.asked = sealed.kept.keys().map(|question| (question.clone(), now)).collect();
            memory.sealed = Some(Arc::new(sealed));
        }
        Self { shared: Arc::new(Shared { memory: Mutex::new(memory), ..shared }) }
    }

    /// May anything be answered from now on?
    pub(crate) fn enable(&self, may: bool) {
        self.shared.enabled.store(may, Ordering::Relaxed);
    }

    /// The engine that there would be, if there never was one.
    pub(crate) fn engine(&self) -> Option<&EngineFacts> {
        self.shared.engine.as_ref()
    }

    fn is_enabled(&self) -> bool {
        self.shared.enabled.load(Ordering::Relaxed)
    }

    /// May this be answered while the engine sleeps, if its answer was kept?
    pub(crate) fn may_answer(&self, request: &RequestHead) -> bool {
        // HTTP/1.0 knows no chunks.
        self.is_enabled() && request.is_http_1_1 && request.target.len() <= TARGET_BYTES_MAX
    }

    /// Remembers that this was asked, so that it is asked before the next sleep.
    pub(crate) fn asked(&self, request: &RequestHead) {
        if !self.is_enabled() || request.target.len() > TARGET_BYTES_MAX {
            return;
        }
        self.spoken(&request.target);
        let mut memory = self.memory();
        memory.asked.insert(Question::new(&request.method, &request.target), Instant::now());
        if memory.asked.len() > QUESTIONS_MAX {
            forget_oldest(&mut memory.asked);
        }
    }

    /// Remembers in which version of the API this was asked, whatever it was: who runs a container lists it next.
    pub(crate) fn spoken(&self, target: &str) {
        let Some(version) = version(target) else { return };
        let mut memory = self.memory();
        memory.versions.insert(version, Instant::now());
        if memory.versions.len() > VERSIONS_MAX {
            forget_oldest(&mut memory.versions);
        }
    }

    /// What the engine would answer, if it fell asleep in order with this generation.
    pub(crate) fn answer(&self, request: &RequestHead, generation: u64) -> Option<Bytes> {
        if !self.may_answer(request) {
            return None;
        }
        if generation == 0 {
            let engine = self.shared.engine.as_ref()?;
            return never::answer(engine, &request.method, &request.target, Timestamp::now());
        }
        let sealed = self.memory().sealed.clone()?;
        let memory_is_lost = || sealed.need_memory && dormouse_snapshot::is_given_up(&self.shared.store);
        if sealed.generation != generation || memory_is_lost() {
            return None;
        }
        let kept = sealed.kept.get(&Question::new(&request.method, &request.target))?;
        Some(kept.at(&request.method, Timestamp::now()))
    }

    /// Asks the engine what it may be asked while it sleeps. Called inside a sleep: nothing changes any more. Whatever
    /// goes wrong, fewer answers are kept.
    pub(crate) async fn capture<D, F, S>(&self, dial: D, generation: u64)
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<S>>,
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // Of a sleep of this generation that came to nothing.
        self.forget();
        if !self.is_enabled() {
            return;
        }
        let begun = Instant::now();
        let asking = Asking { dial, stream: None, since: BTreeMap::new() };
        let answers = asking.all(self.questions(), generation, begun + CAPTURE_WITHIN).await;
        tracing::debug!(count = answers.kept.len(), took = ?begun.elapsed(), "answers kept for the sleep");
        let answers = Arc::new(answers);
        self.memory().captured = Some(Arc::clone(&answers));
        let path = self.shared.captured_path();
        let written = tokio::task::spawn_blocking(move || fs::write(path, answers.to_bytes()?)).await;
        if !matches!(written, Ok(Ok(()))) {
            tracing::warn!(?written, "answers can't be kept on the disk");
        }
    }

    /// What was captured isn't true any more.
    pub(crate) fn forget(&self) {
        self.memory().captured = None;
    }

    /// This generation is gone, as it should be: what was captured counts from now on, but of containers that ran, unless
    /// the memory that they ran in is kept.
    pub(crate) fn seal(&self, generation: u64, memory_is_kept: bool) {
        let counts = |captured: &Arc<Answers>| {
            captured.generation == generation && (memory_is_kept || !captured.need_memory)
        };
        let mut memory = self.memory();
        let captured = memory.captured.take().filter(counts);
        if let Some(captured) = captured {
            memory.sealed = Some(captured);
            if let Err(error) = fs::rename(self.shared.captured_path(), self.shared.sealed_path()) {
                tracing::warn!(%error, "answers can't be kept on the disk");
            }
        }
    }

    /// The memory that was kept in a sleep is given up: the next VM is booted.
    pub(crate) fn memory_goes(&self) {
        let mut memory = self.memory();
        if memory.sealed.take_if(|sealed| sealed.need_memory).is_some()
            && let Err(error) = fs::remove_file(self.shared.sealed_path())
        {
            tracing::warn!(%error, "answers that don't count any more can't be removed");
        }
    }

    fn questions(&self) -> BTreeSet<Question> {
        let memory = self.memory();
        let mut questions: BTreeSet<_> =
            PINGS.iter().map(|(method, target)| Question::new(method, target)).collect();
        // Before anybody has come, the newest: it is what a client speaks that is no older than the engine.
        let newest = self.shared.engine.iter().map(|engine| format!("/v{}", engine.api));
        let newest: Vec<_> = newest.filter(|_| memory.versions.is_empty()).collect();
        for version in memory.versions.keys().chain(&newest) {
            let fixed = FIXED.iter().map(|(method, path)| Question::new(method, &format!("{version}{path}")));
            questions.extend(fixed);
        }
        let recent = memory.asked.iter().filter(|(_, at)| at.elapsed() < ASKED_WITHIN);
        questions.extend(recent.map(|(question, _)| question.clone()));
        questions
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.shared.memory.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Shared {
    fn sealed_path(&self) -> PathBuf {
        self.folder.join("asleep.json")
    }

    fn captured_path(&self) -> PathBuf {
        self.folder.join("asleep.json.new")
    }
}

fn forget_oldest<T: Clone + Ord>(times: &mut BTreeMap<T, Instant>) {
    if let Some(oldest) = times.iter().min_by_key(|(_, at)| **at).map(|(one, _)| one.clone()) {
        times.remove(&oldest);
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // JSON escapes make texts longer, by a factor that is small for what engines say.
    fs::File::open(path)?.take(4 * ANSWERS_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn version(target: &str) -> Option<String> {
    let version = version_of(target);
    (!version.is_empty() && version.len() < 16).then_some(version)
}

/// Puts one question after the other to the engine, over one connection as long as it lasts.
struct Asking<D, S> {
    dial: D,
    stream: Option<S>,
    /// Since when containers are what they are.
    since: BTreeMap<String, Timestamp>,
}

impl<D, F, S> Asking<D, S>
where
    D: Fn() -> F,
    F: Future<Output = io::Result<S>>,
    S: AsyncRead + AsyncWrite + Unpin,
{
    async fn all(mut self, questions: BTreeSet<Question>, generation: u64, deadline: Instant) -> Answers {
        // Who doesn't say what runs may run something.
        let need_memory = !matches!(timeout_at(deadline, self.runs_nothing()).await, Ok(Ok(true)));
        let mut answers = Answers { generation, need_memory, kept: BTreeMap::new() };
        let mut left = ANSWERS_BYTES_MAX;
        for question in questions {
            match timeout_at(deadline, self.one(&question)).await {
                Ok(Ok(Some((kept, length)))) if length <= left => {
                    left -= length;
                    answers.kept.insert(question, kept);
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::debug!(target = question.target, %error, "no answer to keep");
                    self.stream = None;
                }
                Err(_late) => break,
            }
        }
        answers
    }

    async fn runs_nothing(&mut self) -> io::Result<bool> {
        let (_, body) = self.ask("GET", "/containers/json").await?;
        Ok(body.trim_ascii() == b"[]")
    }

    /// `None`: an answer that can't be kept.
    async fn one(&mut self, question: &Question) -> io::Result<Option<(Kept, usize)>> {
        let (head, mut body) = self.ask(&question.method, &question.target).await?;
        if tells_paths(&question.target)
            && let Some(restored) = dormouse_folders::restore(&body)
        {
            body = restored;
        }
        let (Ok(text), Ok(body)) = (str::from_utf8(&head.bytes), String::from_utf8(body)) else {
            return Ok(None);
        };
        let path = path_of(&question.target);
        // An engine of no swarm says so with 503, and can't join one asleep. What else goes wrong may go right later.
        if head.status >= 500 && !(head.status == 503 && SWARM.contains(&path.as_str())) {
            return Ok(None);
        }
        for id in containers_with_a_time(&path, &body) {
            if !self.since.contains_key(&id)
                && self.since.len() < CONTAINERS_MAX
                && let Some(since) = self.since_of(&id).await?
            {
                self.since.insert(id, since);
            }
        }
        let length = text.len() + body.len();
        let parts = take_apart(&path, &body, &self.since);
        Ok(parts.map(|body| (Kept { head: text.to_owned(), body }, length)))
    }

    /// Since when a container runs, or doesn't.
    async fn since_of(&mut self, id: &str) -> io::Result<Option<Timestamp>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Container {
            state: State,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct State {
            running: bool,
            restarting: bool,
            started_at: Timestamp,
            finished_at: Timestamp,
        }
        let (_, body) = self.ask("GET", &format!("/containers/{id}/json")).await?;
        let Ok(Container { state }) = serde_json::from_slice(&body) else { return Ok(None) };
        let runs = state.running && !state.restarting;
        Ok(Some(if runs { state.started_at } else { state.finished_at }))
    }

    async fn ask(&mut self, method: &str, target: &str) -> io::Result<(ResponseHead, Vec<u8>)> {
        let asking = async {
            let mut stream = match self.stream.take() {
                Some(stream) => stream,
                None => (self.dial)().await?,
            };
            let (head, body) = fetch::ask(&mut stream, method, target, ANSWER_BYTES_MAX).await?;
            if head.keep_alive {
                self.stream = Some(stream);
            }
            Ok((head, body))
        };
        timeout(ANSWER_WITHIN, asking).await?
    }
}

#[cfg(test)]
mod tests;
