//! Snapshots of sessions that have slept for long are compressed, one at a time, by a thread that yields to all others.
//!
//! Nobody waits for it: whoever has a VM made of such a snapshot calls it off, and what is compressed takes its place only
//! while no VM is being made.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dormouse_api::{IdleTimeout, MemoryForm, SessionId};
use dormouse_client::{Home, UserSettings};
use dormouse_snapshot::{Beside, FREE_BYTES_MIN, Seal};
use jiff::Timestamp;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use super::Factory;
use super::limit::{Kept, kept};

/// The setting that says how long a session has slept by then, in seconds.
const AFTER_KEY: &str = "snapshots.compress-after";

/// Without it: who comes back within the hour finds the snapshot as it was left.
const AFTER_UNLESS_SET: IdleTimeout = IdleTimeout::Seconds(3600);

/// Longest time to the next look: the setting may have been changed.
const LOOK_WITHIN: Duration = Duration::from_secs(600);

/// How much it yields to others, see nice(2).
const NICENESS: i32 = 10;

/// What is being compressed.
#[derive(Debug, Default)]
pub(super) struct Compressing {
    under_way: Mutex<Option<(SessionId, CancellationToken)>>,
    /// Held while there is something to lose.
    turn: tokio::sync::Mutex<()>,
    /// A session fell asleep.
    more: Notify,
}

/// What a look at all snapshots came to.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// This one has been there for long enough.
    Compress(Kept),
    /// The first will have been there for long enough then.
    At(Timestamp),
    /// There is none to wait for.
    Nothing,
}

impl Compressing {
    /// A session's snapshot is needed as it is. Back at once.
    pub(super) fn call_off(&self, session: &SessionId) {
        let under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, called_off)) = under_way.as_ref().filter(|(compressed, _)| compressed == session) {
            called_off.cancel();
        }
    }

    /// There may be more to do.
    pub(super) fn look_again(&self) {
        self.more.notify_one();
    }

    /// Waits for the end of what is under way, which has been called off.
    pub(super) async fn ended(&self) {
        drop(self.turn.lock().await);
    }

    fn set(&self, under_way: Option<(SessionId, CancellationToken)>) {
        *self.under_way.lock().unwrap_or_else(PoisonError::into_inner) = under_way;
    }
}

impl Factory {
    /// Compresses what is old enough, as long as the service is there.
    pub(crate) async fn compress_old_snapshots(&self) {
        // Those that couldn't be: once tried, there is nothing new to try.
        let mut in_vain = BTreeSet::new();
        while !self.closing.is_cancelled() {
            let wait = match self.compress_next(&mut in_vain).await {
                Ok(Next::Compress(_)) => continue,
                Ok(Next::At(due)) => {
                    Duration::try_from(due.duration_since(Timestamp::now())).unwrap_or_default()
                }
                Ok(Next::Nothing) => LOOK_WITHIN,
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "old snapshots can't be looked for");
                    LOOK_WITHIN
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait.min(LOOK_WITHIN)) => {}
                () = self.compressing.more.notified() => {}
                () = self.closing.cancelled() => {}
            }
        }
    }

    async fn compress_next(&self, in_vain: &mut BTreeSet<(SessionId, Timestamp)>) -> Result<Next> {
        let called_off = self.closing.child_token();
        let _turn = self.compressing.turn.lock().await;
        let next = {
            // Whoever has a VM made of it from now on finds it under way.
            let _stores = self.stores.write().await;
            let (home, tried) = (self.home.clone(), in_vain.clone());
            let next = tokio::task::spawn_blocking(move || look(&home, &tried)).await??;
            if let Next::Compress(kept) = &next {
                self.compressing.set(Some((kept.session.clone(), called_off.clone())));
            }
            next
        };
        if let Next::Compress(kept) = &next {
            let compressed = self.compress(kept, &called_off).await;
            self.compressing.set(None);
            match compressed {
                Ok(true) => tracing::info!(session = %kept.session, "a snapshot was compressed"),
                Ok(false) => tracing::info!(session = %kept.session, "a compression was called off"),
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(session = %kept.session, error, "a snapshot can't be compressed");
                    in_vain.insert((kept.session.clone(), kept.made_at));
                }
            }
        }
        Ok(next)
    }

    /// `false`: it was called off.
    async fn compress(&self, kept: &Kept, called_off: &CancellationToken) -> Result<bool> {
        let free = dormouse_vm::free_bytes(&kept.store)?;
        let least = FREE_BYTES_MIN + kept.bytes;
        ensure!(free >= least, "the session's storage has {} MiB free, it needs {}", free >> 20, least >> 20);
        let Some(beside) = compress_beside(kept, called_off.clone()).await? else { return Ok(false) };
        let _stores = self.stores.write().await;
        if called_off.is_cancelled() {
            return Ok(false);
        }
        Ok(tokio::task::spawn_blocking(move || beside.publish()).await??)
    }
}

/// In a thread of its own, as a thread's niceness is for good.
async fn compress_beside(kept: &Kept, called_off: CancellationToken) -> Result<Option<Beside>> {
    let (done, result) = oneshot::channel();
    let store = kept.store.clone();
    std::thread::Builder::new().name("compress".to_owned()).spawn(move || {
        // On Linux the calling thread's alone, see setpriority(2); the disk follows, see ioprio_set(2).
        if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
            tracing::debug!(%error, "can't be nice");
        }
        let compressed = match Seal::read(&store) {
            Ok(Some(seal)) => seal.compress(&store, || !called_off.is_cancelled()),
            Ok(None) => Ok(None),
            Err(unfit) => Err(unfit),
        };
        let _ = done.send(compressed);
    })?;
    Ok(result.await.context("it ended in a panic")??)
}

/// Looks at all snapshots, and removes what a service left that was killed while it compressed one. Only for who knows
/// that no VM is being made.
fn look(home: &Home, in_vain: &BTreeSet<(SessionId, Timestamp)>) -> Result<Next> {
    let settings = UserSettings::read(&home.settings()).unwrap_or_default();
    let after = settings.get(AFTER_KEY).and_then(|text| text.parse().ok()).unwrap_or(AFTER_UNLESS_SET);
    let mut all = kept(home)?;
    for kept in &all {
        if let Ok(Some(seal)) = Seal::read(&kept.store)
            && let Err(error) = dormouse_snapshot::tidy(&kept.store, &seal)
        {
            tracing::warn!(session = %kept.session, %error, "what a compression left can't be removed");
        }
    }
    all.retain(|kept| !in_vain.contains(&(kept.session.clone(), kept.made_at)));
    Ok(next(all, after, Timestamp::now()))
}

/// The oldest that isn't compressed, if it has been there for long enough.
fn next(all: Vec<Kept>, after: IdleTimeout, now: Timestamp) -> Next {
    let IdleTimeout::Seconds(after) = after else { return Next::Nothing };
    let plain = all.into_iter().filter(|kept| kept.memory == MemoryForm::Plain);
    let Some(oldest) = plain.min_by_key(|kept| kept.made_at) else { return Next::Nothing };
    match oldest.made_at.saturating_add(Duration::from_secs(after)) {
        Ok(due) if due <= now => Next::Compress(oldest),
        Ok(due) => Next::At(due),
        Err(_) => Next::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept_for(seconds: i64, memory: MemoryForm) -> Kept {
        Kept {
            session: SessionId::from_random(seconds.unsigned_abs()),
            store: seconds.to_string().into(),
            made_at: at(-seconds),
            bytes: 1,
            memory,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).unwrap()
    }

    #[test]
    fn the_oldest_that_is_plain_is_compressed_once_it_is_old_enough() {
        let all = || {
            vec![
                kept_for(10, MemoryForm::Plain),
                kept_for(30, MemoryForm::Plain),
                kept_for(50, MemoryForm::Compressed),
            ]
        };
        let after = |seconds| next(all(), IdleTimeout::Seconds(seconds), at(0));
        assert_eq!(after(30), Next::Compress(kept_for(30, MemoryForm::Plain)));
        assert_eq!(after(31), Next::At(at(1)));
        assert!(matches!(after(u64::MAX), Next::At(_)));
        assert_eq!(next(all(), IdleTimeout::Never, at(0)), Next::Nothing);
        assert_eq!(
            next(vec![kept_for(50, MemoryForm::Compressed)], IdleTimeout::Seconds(0), at(0)),
            Next::Nothing
        );
    }

    #[test]
    fn only_the_session_that_is_compressed_calls_it_off() {
        let (compressing, token) = (Compressing::default(), CancellationToken::new());
        let [one, other] = [1, 2].map(SessionId::from_random);
        compressing.call_off(&one);
        compressing.set(Some((one.clone(), token.clone())));
        compressing.call_off(&other);
        assert!(!token.is_cancelled());
        compressing.call_off(&one);
        assert!(token.is_cancelled());
    }
}
