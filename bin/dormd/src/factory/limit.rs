//! How much of the disk snapshots may take: over it, the oldest are given up. A session without one boots from its disk.

use std::path::PathBuf;

use anyhow::Result;
use dormouse_api::{MemoryForm, SessionId, SnapshotInfo};
use dormouse_client::{Home, UserSettings, size};
use dormouse_snapshot::FREE_BYTES_MIN;
use dormouse_vm::VmRecord;
use jiff::Timestamp;

use super::Factory;
use crate::settings::Settings;

/// The setting that says how much, in bytes.
const LIMIT_KEY: &str = "snapshots.limit";

/// Without it: one part in so many of the file system.
const PART: u64 = 4;

/// A snapshot that somebody sleeps on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) session: SessionId,
    pub(super) store: PathBuf,
    pub(super) made_at: Timestamp,
    pub(super) bytes: u64,
    pub(super) memory: MemoryForm,
}

impl Factory {
    /// Gives up the oldest snapshots while all together take more than they may, or leave less free than the next suspend
    /// needs. Those that were given up are logged, and told to whoever wakes their sessions.
    pub(crate) async fn limit_snapshots(&self) {
        // No VM is made from a snapshot that is on its way out, and none goes from which a VM is being made.
        let _stores = self.stores.write().await;
        let home = self.home.clone();
        match tokio::task::spawn_blocking(move || limit(&home)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = format!("{error:#}"), "snapshots can't be limited"),
            Err(error) => tracing::warn!(%error, "snapshots can't be limited"),
        }
        self.compressing.look_again();
    }
}

fn limit(home: &Home) -> Result<()> {
    let sessions = home.sessions();
    let settings = UserSettings::read(&home.settings()).unwrap_or_default();
    let may = match settings.get(LIMIT_KEY).map(size) {
        Some(Ok(bytes)) => bytes,
        Some(Err(_)) | None => dormouse_vm::size_bytes(&sessions)? / PART,
    };
    let free = dormouse_vm::free_bytes(&sessions)?;
    for Kept { session, store, bytes, .. } in too_many(kept(home)?, may, free) {
        tracing::warn!(%session, bytes, may, free, "the oldest snapshot is given up");
        let reason = format!(
            "it was given up: all snapshots together may take {} MiB, and the disk had {} MiB free",
            may >> 20,
            free >> 20
        );
        dormouse_snapshot::give_up(&store, &reason)?;
    }
    Ok(())
}

/// Snapshots of sessions whose VM is gone.
pub(super) fn kept(home: &Home) -> Result<Vec<Kept>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(home.sessions())? {
        let Ok(settings) = Settings::read(&entry?.path()) else { continue };
        let Some(info) = dormouse_snapshot::info(&settings.storage, None) else { continue };
        let record = VmRecord::read(&home.session_runtime(&settings.id)).ok().flatten();
        let is_gone = record.is_none_or(|record| matches!(record.is_up(), Ok(false)));
        if is_gone {
            let (session, store) = (settings.id, settings.storage);
            let SnapshotInfo { made_at, used_bytes: bytes, memory, .. } = info;
            found.push(Kept { session, store, made_at, bytes, memory });
        }
    }
    Ok(found)
}

/// The oldest that have to go, so that the rest takes what it may and enough is free.
fn too_many(mut kept: Vec<Kept>, may: u64, free: u64) -> Vec<Kept> {
    kept.sort_by_key(|kept| kept.made_at);
    let total: u64 = kept.iter().map(|kept| kept.bytes).sum();
    let too_much = total.saturating_sub(may).max(FREE_BYTES_MIN.saturating_sub(free));
    let mut freed = 0;
    kept.into_iter()
        .take_while(|kept| {
            let is_needed = freed < too_much;
            freed += kept.bytes;
            is_needed
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshots(sizes: &[u64]) -> Vec<Kept> {
        let kept = |(age, bytes): (i64, &u64)| Kept {
            session: SessionId::from_random(age.unsigned_abs()),
            store: PathBuf::from(age.to_string()),
            made_at: Timestamp::from_second(1000 - age).unwrap(),
            bytes: *bytes << 20,
            memory: MemoryForm::Plain,
        };
        (0..).zip(sizes).map(kept).collect()
    }

    fn gone(sizes: &[u64], may: u64, free: u64) -> Vec<String> {
        let gone = too_many(snapshots(sizes), may << 20, free << 20);
        gone.iter().map(|kept| kept.store.display().to_string()).collect()
    }

    #[test]
    fn the_oldest_go_until_the_rest_fits() {
        // From the newest to the oldest.
        let sizes = [300, 300, 300, 300];
        assert!(gone(&sizes, 1200, 10_000).is_empty());
        assert_eq!(gone(&sizes, 1199, 10_000), ["3"]);
        assert_eq!(gone(&sizes, 700, 10_000), ["3", "2"]);
        assert_eq!(gone(&sizes, 0, 10_000), ["3", "2", "1", "0"]);
        assert!(gone(&[], 0, 0).is_empty());
    }

    #[test]
    fn a_disk_that_is_nearly_full_gets_room_for_the_next_suspend() {
        assert_eq!(gone(&[300, 300], 10_000, 0), ["1"]);
        assert!(gone(&[300, 300], 10_000, FREE_BYTES_MIN >> 20).is_empty());
    }
}
