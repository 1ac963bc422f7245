//! Wakes that were set beforehand (`dorm session wake`): deadlines of the wall clock in the sessions' records, so that they
//! outlive the service and the machine's restarts.
//!
//! ```text
//! set ─► due ─► the VM is up ─► the record names the next time, or none
//! ```
//!
//! One that came while there was no service is due at once; of several that were missed one is made up for. A service that
//! dies between the wake and the record wakes once more.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dormouse_api::{ApiError, ErrorCode, Hold, SessionInfo, SessionName, WAKES_MAX, Wake};
use dormouse_client::Endpoint;
use jiff::Timestamp;
use tokio::time::{sleep, timeout};

use super::{Row, Table, internal, unknown};

/// tokio's timers know neither of a changed wall clock nor of the time for which the host slept, so none is longer.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How long a wake may take. A bring-up has a bound of its own, which is told to its user.
const WOKEN_WITHIN: Duration = Duration::from_secs(600);

/// How often a wake is tried, and how long after each other.
const TRIES: u32 = 3;
const TRY_EVERY: Duration = Duration::from_secs(30);

/// A wake whose time has come.
struct Due {
    name: SessionName,
    control: PathBuf,
    at: Timestamp,
}

impl Table {
    /// Sets one more wake. One that is set already isn't set twice.
    pub(crate) fn set_wake(&self, name: &SessionName, wake: Wake) -> Result<SessionInfo, ApiError> {
        wake.check().map_err(|why| ApiError::new(ErrorCode::Invalid, why).hint("`--every 1h`"))?;
        self.change_wakes(name, |wakes| {
            if wakes.contains(&wake) {
                return Ok(());
            }
            if wakes.len() == WAKES_MAX {
                let message = format!("{WAKES_MAX} wakes are set, which is the most");
                return Err(ApiError::new(ErrorCode::Busy, message).hint("`dorm session wake --clear`"));
            }
            wakes.push(wake);
            wakes.sort_by_key(|wake| wake.at);
            Ok(())
        })
    }

    /// Takes all of them back.
    pub(crate) fn clear_wakes(&self, name: &SessionName) -> Result<SessionInfo, ApiError> {
        self.change_wakes(name, |wakes| {
            wakes.clear();
            Ok(())
        })
    }

    fn change_wakes(
        &self,
        name: &SessionName,
        change: impl FnOnce(&mut Vec<Wake>) -> Result<(), ApiError>,
    ) -> Result<SessionInfo, ApiError> {
        let mut rows = self.rows();
        let row = rows.get_mut(name).ok_or_else(|| unknown(name))?;
        let mut settings = row.settings.clone();
        change(&mut settings.wakes)?;
        settings.write(&self.home.session(&settings.id)).map_err(internal)?;
        row.settings = settings;
        self.wakes_changed.notify_one();
        Ok(row.told())
    }

    /// Wakes sessions when it is time. Ends with the service.
    pub(crate) async fn keep_wakes(self: Arc<Self>) {
        loop {
            for due in self.take_due(Timestamp::now()) {
                tokio::spawn(Arc::clone(&self).wake(due));
            }
            let wait = match self.next_wake() {
                Some(next) => Duration::try_from(next.duration_since(Timestamp::now())).unwrap_or_default(),
                None => LOOK_EVERY,
            };
            tokio::select! {
                () = sleep(wait.min(LOOK_EVERY)) => {}
                () = self.wakes_changed.notified() => {}
            }
        }
    }

    /// Those that are due, which are so once only. Their records say so still.
    fn take_due(&self, now: Timestamp) -> Vec<Due> {
        let mut due = Vec::new();
        for (name, row) in self.rows().iter_mut() {
            let wakes = &mut row.settings.wakes;
            let Some(at) = wakes.iter().map(|wake| wake.at).filter(|at| *at <= now).min() else { continue };
            *wakes = wakes.iter().filter_map(|wake| wake.after(now)).collect();
            wakes.sort_by_key(|wake| wake.at);
            let control = row.info.borrow().control_socket.clone();
            due.push(Due { name: name.clone(), control, at });
        }
        due
    }

    fn next_wake(&self) -> Option<Timestamp> {
        self.rows().values().filter_map(|row| row.settings.wakes.first()).map(|wake| wake.at).min()
    }

    async fn wake(self: Arc<Self>, due: Due) {
        let Due { name, control, at } = due;
        let control = Endpoint::new(control);
        let hold = Hold { reason: format!("a wake that was set for {at:.0}") };
        for attempt in 1..=TRIES {
            // Let go at once: the grace period begins, and whatever runs in the VM holds it.
            let failure = match timeout(WOKEN_WITHIN, control.hold(&hold)).await {
                Ok(Ok(_held)) => break,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it took too long".to_owned(),
            };
            tracing::warn!(session = %name, %at, attempt, failure, "a wake that was set failed");
            if attempt < TRIES {
                sleep(TRY_EVERY).await;
            }
        }
        if let Some(Row { settings, .. }) = self.rows().get(&name)
            && let Err(error) = settings.write(&self.home.session(&settings.id))
        {
            tracing::warn!(session = %name, %error, "the next wake can't be noted");
        }
    }
}
