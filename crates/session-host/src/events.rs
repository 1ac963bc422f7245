//! The engine's events: heard once for the session, told to any number of clients, over any number of sleeps.
//!
//! ```text
//! engine ── one subscription per VM, `since` the last event heard ──► ring ──► each client of /events
//! ```
//!
//! A client's stream is open as long as the client wants, and keeps nothing awake. dockerd keeps 256 events for who
//! comes late; where it, or the ring here, had forgotten some, the stream says so with an event of the type `daemon` and
//! the action `events-lost`.

mod filter;

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use dormouse_api::link::EngineFacts;
use dormouse_api::{Phase, SessionInfo, SessionState};
use dormouse_docker_proxy::{Answer, BodyScanner, Refusal};
use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use self::filter::{Event, Wish};
use crate::fetch;
use crate::known::{head_lines, speaks};

/// Events that are kept for clients that come late or read slowly.
const EVENTS_MAX: usize = 10_000;

/// And how much memory they may take, in bytes.
const EVENTS_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Events that are left to the next host: as many as dockerd keeps.
const LEFT_MAX: usize = 256;

/// A longer event is dropped. Labels can be long.
const LINE_BYTES_MAX: usize = 1024 * 1024;

/// Events that wait between the ring and one client.
const QUEUE: usize = 64;

/// A subscription that says nothing for so long has told what its engine still knew.
const CAUGHT_UP_AFTER: Duration = Duration::from_millis(50);

/// A client that comes before that waits so long at most.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(2);

/// What happened by a client's `until` has been heard so long after it.
const HEARD_WITHIN: Duration = Duration::from_millis(300);

/// The events of one session. Clones are the same events.
#[derive(Debug, Clone)]
pub struct Events {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    ring: Mutex<Ring>,
    /// How many events there were.
    end: watch::Sender<u64>,
    /// How many of them may have changed which containers run.
    changes: watch::Sender<u64>,
    /// The generation whose subscription has caught up.
    caught_up: watch::Sender<Option<u64>>,
}

#[derive(Debug, Default)]
struct Ring {
    entries: VecDeque<Arc<Entry>>,
    bytes: usize,
    /// Number of the first entry.
    first: u64,
}

#[derive(Debug)]
struct Entry {
    event: Event,
    line: Bytes,
}

impl Entry {
    fn parse(line: &[u8]) -> Option<Self> {
        let event = serde_json::from_slice(line).ok()?;
        let mut line = line.trim_ascii().to_vec();
        line.push(b'\n');
        Some(Self { event, line: line.into() })
    }

    /// Says that events are missing.
    fn lost(why: &str) -> Option<Self> {
        let now = Timestamp::now();
        let text = serde_json::json!({
            "Type": "daemon", "Action": "events-lost",
            "Actor": { "ID": "dormouse", "Attributes": { "name": "dormouse", "reason": why } },
            "scope": "local", "time": now.as_second(), "timeNano": i64::try_from(now.as_nanosecond()).ok()?,
        });
        Self::parse(text.to_string().as_bytes())
    }
}

impl Ring {
    fn end(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    fn push(&mut self, entry: Entry) {
        self.bytes += entry.line.len();
        self.entries.push_back(Arc::new(entry));
        while self.entries.len() > EVENTS_MAX || self.bytes > EVENTS_BYTES_MAX {
            if let Some(oldest) = self.entries.pop_front() {
                self.bytes -= oldest.line.len();
                self.first += 1;
            }
        }
    }

    /// Is it in the ring? Those that the engine repeats are among the latest.
    fn knows(&self, entry: &Entry) -> bool {
        let time = entry.event.time_nano;
        self.entries
            .iter()
            .rev()
            .take_while(|known| known.event.time_nano >= time)
            .any(|known| known.line == entry.line)
    }
}

impl Events {
    /// No events, or those that an earlier host left in the session's folder.
    #[must_use]
    pub fn load(folder: &Path) -> Self {
        let path = folder.join("events.jsonl");
        let mut ring = Ring::default();
        let left = fs::metadata(&path).is_ok_and(|file| file.len() <= (LEFT_MAX * LINE_BYTES_MAX) as u64);
        let text = if left { fs::read(&path).unwrap_or_default() } else { Vec::new() };
        text.split(|byte| *byte == b'\n').filter_map(Entry::parse).for_each(|entry| ring.push(entry));
        let (end, changes) = (watch::channel(ring.end()).0, watch::channel(0).0);
        let caught_up = watch::channel(None).0;
        Self { shared: Arc::new(Shared { path, ring: Mutex::new(ring), end, changes, caught_up }) }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.shared.ring.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Changes whenever other containers run, or the same ones elsewhere.
    pub(crate) fn container_changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// Leaves the latest events to the next host. What can't be written is only missing there.
    pub(crate) fn leave(&self) {
        let lines: Vec<Bytes> = {
            let ring = self.ring();
            let skipped = ring.entries.len().saturating_sub(LEFT_MAX);
            ring.entries.iter().skip(skipped).map(|entry| entry.line.clone()).collect()
        };
        let beside = self.shared.path.with_extension("jsonl.new");
        let written =
            fs::write(&beside, lines.concat()).and_then(|()| fs::rename(&beside, &self.shared.path));
        if let Err(error) = written {
            tracing::warn!(%error, "events can't be kept on the disk");
        }
    }

    /// Hears an engine's events until its stream ends.
    ///
    /// # Errors
    /// When the stream breaks, or isn't one of events.
    pub(crate) async fn hear<S>(&self, mut engine: S, generation: u64, is_same_boot: bool) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let last = self.ring().entries.back().cloned();
        let since = last.as_ref().map_or(1, |last| last.event.time_nano);
        let (seconds, nanos) = (since / 1_000_000_000, since % 1_000_000_000);
        let request = format!("GET /events?since={seconds}.{nanos:09} HTTP/1.1\r\nHost: docker\r\n\r\n");
        engine.write_all(request.as_bytes()).await?;
        let mut bytes = BytesMut::new();
        let head = fetch::head(&mut engine, "GET", &mut bytes).await?;
        if head.status != 200 {
            return Err(io::Error::other("the engine tells no events"));
        }
        let mut body = BodyScanner::new(head.framing);
        // An engine that goes on repeats the last event that was heard, unless it has forgotten it.
        let mut expected = last.filter(|_| is_same_boot);
        let (mut line, mut caught_up) = (BytesMut::new(), false);
        loop {
            let used = body.advance(&bytes, |part| line.extend_from_slice(part)).map_err(io::Error::other)?;
            let _ = bytes.split_to(used);
            while let Some(end) = line.iter().position(|byte| *byte == b'\n') {
                self.take(&line.split_to(end + 1), &mut expected);
            }
            if line.len() > LINE_BYTES_MAX {
                return Err(io::Error::other("an event is too long"));
            }
            if body.is_done() {
                return Ok(());
            }
            let reading = engine.read_buf(&mut bytes);
            let count = if caught_up {
                reading.await?
            } else {
                match timeout(CAUGHT_UP_AFTER, reading).await {
                    Ok(count) => count?,
                    Err(_silent) => {
                        caught_up = true;
                        self.shared.caught_up.send_replace(Some(generation));
                        continue;
                    }
                }
            };
            if count == 0 {
                return Ok(());
            }
        }
    }

    fn take(&self, line: &[u8], expected: &mut Option<Arc<Entry>>) {
        let Some(entry) = Entry::parse(line) else { return };
        let mut ring = self.ring();
        if let Some(expected) = expected.take()
            && expected.line != entry.line
        {
            tracing::warn!("the engine has forgotten events that were not heard");
            if let Some(lost) = Entry::lost("the engine had forgotten events before they were heard") {
                ring.push(lost);
            }
        }
        if !ring.knows(&entry) {
            if entry.event.changes_what_runs() {
                self.shared.changes.send_modify(|count| *count += 1);
            }
            ring.push(entry);
        }
        self.shared.end.send_replace(ring.end());
    }

    /// The answer to a client's `GET /events`, with what is known of the engine. `None`: it is for the engine to refuse.
    pub(crate) fn answer(
        &self,
        target: &str,
        engine: Option<&EngineFacts>,
        info: watch::Receiver<SessionInfo>,
    ) -> Result<Option<Answer>, Refusal> {
        if engine.is_some_and(|engine| !speaks(engine, target)) {
            return Ok(None);
        }
        let wish = Wish::parse(target).map_err(|message| Refusal { status: 400, message })?;
        let date = Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT");
        let who = engine.map(head_lines).unwrap_or_default();
        let head = format!(
            "HTTP/1.1 200 OK\r\n{who}Content-Type: application/json\r\nDate: {date}\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        let (sender, chunks) = mpsc::channel(QUEUE);
        let events = self.clone();
        // Where it begins is settled now: what happens after this is in the answer.
        let cursor = match (wish.since, wish.until) {
            (None, None) => self.ring().end(),
            _ => 0,
        };
        tokio::spawn(async move {
            tokio::select! {
                () = events.tell(&wish, cursor, &sender, info.clone()) => {}
                () = sender.closed() => {}
                () = ended(info) => {}
            }
        });
        Ok(Some(Answer::Stream(head.into(), chunks)))
    }

    async fn tell(
        &self,
        wish: &Wish,
        mut cursor: u64,
        sender: &mpsc::Sender<Bytes>,
        info: watch::Receiver<SessionInfo>,
    ) {
        if wish.since.is_some() || wish.until.is_some() {
            self.caught_up(&info).await;
            cursor = self.ring().first;
        }
        let mut end = self.shared.end.subscribe();
        let mut last_look = false;
        loop {
            let (lost, entries) = self.after(cursor);
            if lost > 0
                && let Some(entry) = Entry::lost("events came faster than they were read")
                && wish.includes(&entry.event)
                && sender.send(entry.line).await.is_err()
            {
                return;
            }
            cursor += lost + entries.len() as u64;
            for entry in &entries {
                let time = entry.event.time_nano;
                let is_in_time = wish.since.is_none_or(|since| time >= since)
                    && wish.until.is_none_or(|until| time <= until);
                if is_in_time && wish.includes(&entry.event) && sender.send(entry.line.clone()).await.is_err()
                {
                    return;
                }
            }
            if !entries.is_empty() {
                continue;
            }
            if last_look {
                return;
            }
            tokio::select! {
                _ = end.wait_for(|end| *end > cursor) => {}
                () = over(wish.until, &info) => last_look = true,
            }
        }
    }

    /// Some entries from this number on, and how many before them are gone already.
    fn after(&self, cursor: u64) -> (u64, Vec<Arc<Entry>>) {
        let ring = self.ring();
        let lost = ring.first.saturating_sub(cursor);
        let skipped = usize::try_from(cursor.saturating_sub(ring.first)).unwrap_or(usize::MAX);
        (lost, ring.entries.iter().skip(skipped).take(QUEUE).cloned().collect())
    }

    /// Waits until what a VM that is up has still to tell is here.
    async fn caught_up(&self, info: &watch::Receiver<SessionInfo>) {
        let (phase, generation) = {
            let info = info.borrow();
            (info.vm.phase, info.vm.generation)
        };
        if matches!(phase, Phase::Running | Phase::Counting) {
            let mut caught_up = self.shared.caught_up.subscribe();
            let _ = timeout(CAUGHT_UP_WITHIN, caught_up.wait_for(|up| *up == Some(generation))).await;
        }
    }
}

/// Waits for the end of what a client wants to hear; for ever if it set none.
async fn over(until: Option<i64>, info: &watch::Receiver<SessionInfo>) {
    let Some(until) = until else { return std::future::pending().await };
    let left = i128::from(until) - Timestamp::now().as_nanosecond();
    sleep(Duration::from_nanos(u64::try_from(left.max(0)).unwrap_or(u64::MAX))).await;
    let phase = info.borrow().vm.phase;
    if phase != Phase::Absent {
        sleep(HEARD_WITHIN).await;
    }
}

/// Waits until the session is over.
async fn ended(mut info: watch::Receiver<SessionInfo>) {
    let _ = info.wait_for(|info| info.state != SessionState::Running).await;
}

#[cfg(test)]
mod tests;
