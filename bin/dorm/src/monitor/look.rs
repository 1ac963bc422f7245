//! Where the monitor gets what it shows: the service's table, and what lies in the sessions' folders. A session's host is
//! never asked, because asking would start it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Instant;

use dormouse_api::link::DOORS_FILE;
use dormouse_api::{HistoryEntry, Phase, SessionId, SessionInfo};
use dormouse_client::{Home, Service};
use dormouse_vm::VmRecord;
use jiff::Timestamp;
use serde_json::Value;

use super::state::{HOURS, Seen};
use crate::error::Failure;

/// Of a history this much is read, from its end.
const HISTORY_BYTES_MAX: u64 = 256 * 1024;
/// Of a list of ports this much is read.
const DOORS_BYTES_MAX: u64 = 256 * 1024;
/// Of `/proc`: USER_HZ, on every architecture that Dormouse runs on.
const TICKS_PER_SECOND: f64 = 100.0;
/// Ports that are told of one session.
const DOORS_MAX: usize = 32;

/// Looks again and again; what a CPU did is told from two looks.
pub(super) struct Looker {
    home: Home,
    service: Service,
    /// Ticks of each VM's process at the last look.
    before: HashMap<(SessionId, u64), (u64, Instant)>,
}

impl Looker {
    pub(super) fn new(home: Home, service: Service) -> Self {
        Self { home, service, before: HashMap::new() }
    }

    /// All sessions as they are now.
    pub(super) async fn look(&mut self) -> Result<Vec<Seen>, Failure> {
        let sessions = self.service.sessions().await?;
        let before = std::mem::take(&mut self.before);
        Ok(sessions.into_iter().map(|info| self.one(info, &before)).collect())
    }

    fn one(&mut self, info: SessionInfo, before: &HashMap<(SessionId, u64), (u64, Instant)>) -> Seen {
        let folder = self.home.session(&info.id);
        let (mut memory_mib, mut cpu) = (None, None);
        if info.vm.phase != Phase::Absent
            && let Ok(Some(record)) = VmRecord::read(&self.home.session_runtime(&info.id))
            && let Some(process) = &record.process
        {
            let place = Path::new("/proc").join(process.pid.to_string());
            let read = |file: &str| fs::read_to_string(place.join(file)).unwrap_or_default();
            memory_mib = resident_mib(&read("status"));
            if let Some(ticks) = ticks(&read("stat")) {
                let (key, now) = ((info.id.clone(), record.generation), Instant::now());
                cpu = before
                    .get(&key)
                    .map(|(then, at)| share(ticks - then.min(&ticks), (now - *at).as_secs_f64()));
                self.before.insert(key, (ticks, now));
            }
        }
        let ports = doors(&read_end(&folder.join(DOORS_FILE), DOORS_BYTES_MAX));
        let history = read_end(&folder.join("history.jsonl"), HISTORY_BYTES_MAX);
        let wakes = wakes(&history, Timestamp::now());
        Seen { info, memory_mib, cpu, ports, wakes }
    }
}

/// The end of a file, or nothing.
fn read_end(path: &Path, most: u64) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
        file.take(most).read_to_end(&mut bytes)
    });
    read.map(|_| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// What a process has in memory, of `/proc/PID/status`.
fn resident_mib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// What a process and its threads had of the CPUs so far, of `/proc/PID/stat`: fields 14 and 15 (proc(5)). The second field
/// is the program's name, which may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11).map(str::parse::<u64>);
    Some(fields.next()?.ok()? + fields.next()?.ok()?)
}

#[expect(clippy::cast_precision_loss, reason = "it is shown in percent")]
fn share(ticks: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { ticks as f64 / TICKS_PER_SECOND / seconds } else { 0.0 }
}

/// Where ports are listened on, as their session's host wrote it down.
fn doors(text: &str) -> Vec<String> {
    let file: Value = serde_json::from_str(text).unwrap_or_default();
    let doors = file["doors"].as_array().into_iter().flatten();
    doors.filter_map(|door| Some(door[0]["address"].as_str()?.to_owned())).take(DOORS_MAX).collect()
}

/// Starts by the hour, the latest hour last.
fn wakes(history: &str, now: Timestamp) -> [u64; HOURS] {
    let mut hours = [0; HOURS];
    for entry in history.lines().filter_map(|line| serde_json::from_str::<HistoryEntry>(line).ok()) {
        let ago = usize::try_from((now.as_second() - entry.at.as_second()) / 3600);
        if entry.what == "start"
            && let Ok(ago) = ago
            && ago < HOURS
        {
            hours[HOURS - 1 - ago] += 1;
        }
    }
    hours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processs_memory_and_ticks_are_read_whatever_it_is_called() {
        assert_eq!(resident_mib("Name:\tq\nVmRSS:\t  307200 kB\nThreads:\t1\n"), Some(300));
        assert_eq!(resident_mib(""), None);
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 1";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("7"), None);
    }

    #[test]
    fn starts_are_counted_by_the_hour_and_broken_lines_are_none() {
        let now: Timestamp = "2026-01-02T12:30:00Z".parse().unwrap();
        let line = |at: &str, what: &str| {
            format!(
                r#"{{"at":"{at}","what":"{what}","generation":1,"how":"resume","duration_ms":1,"reason":""}}"#
            )
        };
        let history = [
            "ut off".to_owned(),
            line("2026-01-02T12:00:00Z", "start"),
            line("2026-01-02T11:45:00Z", "start"),
            line("2026-01-02T11:45:00Z", "sleep"),
            line("2026-01-02T11:15:00Z", "start"),
            line("2026-01-01T01:00:00Z", "start"),
            line("2026-01-03T01:00:00Z", "start"),
        ];
        let hours = wakes(&history.join("\n"), now);
        assert_eq!((hours[HOURS - 1], hours[HOURS - 2], hours.iter().sum::<u64>()), (2, 1, 3));
    }

    #[test]
    fn ports_are_read_as_the_host_left_them() {
        let text = r#"{"format":1,"doors":[[{"protocol":"Tcp","address":"127.0.0.1:8080"},{}]]}"#;
        assert_eq!(doors(text), ["127.0.0.1:8080"]);
        assert!(doors("").is_empty() && doors("{}").is_empty());
        assert_eq!(read_end(Path::new("/nonexistent"), 9), "");
    }
}
