//! What the monitor knows, and what keys do. Pure: it is tested without a terminal.

use dormouse_api::{HoldKind, Phase, SessionInfo, SessionName, SessionState};
use jiff::Timestamp;
use ratatui::crossterm::event::KeyCode;

/// Hours of which wakes are shown.
pub(super) const HOURS: usize = 24;

/// What is known of one session at a moment.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) info: SessionInfo,
    /// What its VM has of the host's memory, in MiB.
    pub(super) memory_mib: Option<u64>,
    /// CPUs that it takes, as a share of one.
    pub(super) cpu: Option<f64>,
    /// Where its containers' ports are listened on.
    pub(super) ports: Vec<String>,
    /// Starts of its VM, by the hour, the latest hour last.
    pub(super) wakes: [u64; HOURS],
}

impl Seen {
    /// What its VM is doing.
    pub(super) fn phase(&self) -> &'static str {
        match self.info.state {
            SessionState::Running => crate::session::phase(&self.info),
            SessionState::Terminating => "terminating",
            SessionState::Terminated => "terminated",
        }
    }

    /// Why it is awake, or since when it isn't, in a few words.
    pub(super) fn why(&self, now: Timestamp) -> String {
        let ago = |then: Timestamp| lasting(now.as_second() - then.as_second());
        let vm = &self.info.vm;
        if self.info.state == SessionState::Terminated {
            return self
                .info
                .termination
                .as_ref()
                .map_or_else(String::new, |end| format!("since {}", ago(end.at)));
        }
        match vm.phase {
            Phase::Absent if vm.start_count == 0 => "never started".to_owned(),
            Phase::Absent => format!("since {}", ago(vm.since)),
            Phase::Starting => vm.step.clone().unwrap_or_else(|| "QEMU".to_owned()),
            Phase::Running | Phase::Counting | Phase::Dozing | Phase::Committed | Phase::Stopping => {
                let mut strong = self.info.holds.iter().filter(|hold| !hold.weak);
                match (strong.next(), strong.count(), vm.deadline) {
                    (Some(hold), 0, _) => hold.reason.clone(),
                    (Some(hold), more, _) => format!("{}, and {more} more", hold.reason),
                    (None, _, Some(deadline)) => {
                        format!("sleeps in {}", lasting((deadline.as_second() - now.as_second()).max(0)))
                    }
                    (None, ..) => "nothing".to_owned(),
                }
            }
        }
    }

    /// What its VM has given back of its memory, in MiB.
    pub(super) fn given_back_mib(&self) -> Option<u64> {
        Some(self.info.vm.memory_mib.saturating_sub(self.memory_mib?))
    }

    fn is_pinned(&self) -> bool {
        self.info.holds.iter().any(|hold| hold.kind == HoldKind::Pin)
    }
}

/// A length of time in its largest unit.
fn lasting(seconds: i64) -> String {
    match seconds {
        ..60 => format!("{} s", seconds.max(0)),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

/// What a key asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Order {
    Sleep(SessionName),
    Wake(SessionName),
    Pin(SessionName),
    Unpin(SessionName),
    Terminate(SessionName),
    Quit,
}

/// All that is on the screen.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) seen: Vec<Seen>,
    /// When that was.
    pub(super) at: Timestamp,
    /// The session that keys are about.
    selected: Option<SessionName>,
    /// Whose end has to be confirmed.
    pub(super) ending: Option<SessionName>,
    /// What came of the last order.
    pub(super) told: String,
}

impl State {
    /// What was seen now.
    pub(super) fn look(&mut self, seen: Vec<Seen>) {
        self.look_at(seen, Timestamp::now());
    }

    pub(super) fn look_at(&mut self, seen: Vec<Seen>, at: Timestamp) {
        // One that is gone leaves its place to the one that stands there now.
        let place = self.selected();
        (self.seen, self.at) = (seen, at);
        let known = |name: &SessionName| self.seen.iter().any(|seen| seen.info.name == *name);
        if !self.selected.as_ref().is_some_and(known) {
            self.select(place);
        }
        if !self.ending.as_ref().is_some_and(|name| self.seen.iter().any(|seen| seen.info.name == *name)) {
            self.ending = None;
        }
    }

    /// What came of an order.
    pub(super) fn told(&mut self, words: String) {
        self.told = words;
    }

    /// The place of the session that keys are about.
    pub(super) fn selected(&self) -> usize {
        let name = self.selected.as_ref();
        name.and_then(|name| self.seen.iter().position(|seen| seen.info.name == *name)).unwrap_or(0)
    }

    fn select(&mut self, place: usize) {
        let last = self.seen.len().saturating_sub(1);
        self.selected = self.seen.get(place.min(last)).map(|seen| seen.info.name.clone());
    }

    /// A key was typed.
    pub(super) fn key(&mut self, key: KeyCode) -> Option<Order> {
        if let Some(name) = self.ending.take() {
            return (key == KeyCode::Char('y')).then_some(Order::Terminate(name));
        }
        let place = self.selected();
        match key {
            KeyCode::Char('q') | KeyCode::Esc => return Some(Order::Quit),
            KeyCode::Up | KeyCode::Char('k') => self.select(place.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(place + 1),
            KeyCode::Home => self.select(0),
            KeyCode::End => self.select(usize::MAX),
            _ => {}
        }
        let seen = self.seen.get(place)?;
        let name = seen.info.name.clone();
        match key {
            KeyCode::Char('s') => Some(Order::Sleep(name)),
            KeyCode::Char('w') => Some(Order::Wake(name)),
            KeyCode::Char('p') if seen.is_pinned() => Some(Order::Unpin(name)),
            KeyCode::Char('p') => Some(Order::Pin(name)),
            KeyCode::Char('t') => {
                self.ending = Some(name);
                None
            }
            _ => None,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    pub(in super::super) const AT: &str = "2026-01-01T12:00:00Z";

    /// A session as it is seen; `holds` by kind and reason.
    pub(in super::super) fn seen(name: &str, phase: &str, holds: &[(&str, &str)]) -> Seen {
        let holds: Vec<Value> = holds
            .iter()
            .map(|(kind, reason)| {
                json!({ "kind": kind, "owner": "me", "reason": reason, "since": AT, "weak": *kind == "connection" })
            })
            .collect();
        let vm = json!({
            "phase": phase, "generation": 3, "boot": null, "how": null, "start_count": 3, "boots": 1,
            "since": "2026-01-01T11:00:00Z", "deadline": "2026-01-01T12:00:25Z", "step": "engine",
            "acceleration": null, "cpus": 1, "memory_mib": 1024,
        });
        let info = json!({
            "name": name, "id": "00000000000000aa", "owner": 0, "state": "running", "incarnation": 1, "vm": vm,
            "holds": holds, "idle": { "timeout_seconds": 30, "action": "suspend" },
            "network": { "kind": "none", "host_loopback": false },
            "storage": { "path": "/s", "size_bytes": 0, "used_bytes": 0 }, "termination": null,
            "docker_socket": "/d", "control_socket": "/c",
        });
        let info = serde_json::from_value(info).expect("a session");
        Seen { info, memory_mib: None, cpu: None, ports: Vec::new(), wakes: [0; HOURS] }
    }

    fn now() -> Timestamp {
        AT.parse().unwrap()
    }

    fn state(names: &[&str]) -> State {
        let mut state = State::default();
        state.look_at(names.iter().map(|name| seen(name, "running", &[])).collect(), now());
        state
    }

    #[test]
    fn why_a_session_is_awake_is_told_in_a_few_words() {
        let why = |phase, holds: &[_]| seen("a", phase, holds).why(now());
        assert_eq!(why("absent", &[]), "since 1 h");
        assert_eq!(why("starting", &[]), "engine");
        assert_eq!(why("running", &[("connection", "GET /events")]), "sleeps in 25 s");
        assert_eq!(why("running", &[("pin", "backup")]), "backup");
        assert_eq!(why("running", &[("pin", "backup"), ("exec", "sh")]), "backup, and 1 more");
        let mut busy = seen("a", "running", &[]);
        assert_eq!(busy.given_back_mib(), None);
        busy.memory_mib = Some(300);
        assert_eq!(busy.given_back_mib(), Some(724));
    }

    #[test]
    fn keys_are_about_the_session_that_is_selected_also_when_others_come_and_go() {
        let mut state = state(&["a", "b", "c"]);
        let name = |name: &str| name.parse::<SessionName>().unwrap();
        assert_eq!(state.key(KeyCode::Char('s')), Some(Order::Sleep(name("a"))));
        assert_eq!(state.key(KeyCode::Down), None);
        assert_eq!(state.key(KeyCode::Char('w')), Some(Order::Wake(name("b"))));
        state.look_at(["0", "a", "b"].map(|name| seen(name, "running", &[])).into(), now());
        assert_eq!(state.selected(), 2);
        state.look_at(["0", "a", "z"].map(|name| seen(name, "running", &[("pin", "")])).into(), now());
        assert_eq!(state.key(KeyCode::Char('p')), Some(Order::Unpin(name("z"))));
        state.key(KeyCode::Down);
        assert_eq!(state.selected(), 2);
        state.look_at(Vec::new(), now());
        assert_eq!(state.key(KeyCode::Char('s')), None);
        assert_eq!(state.key(KeyCode::Char('q')), Some(Order::Quit));
    }

    #[test]
    fn an_end_is_confirmed_and_any_other_key_is_a_no() {
        let mut state = state(&["a"]);
        assert_eq!(state.key(KeyCode::Char('t')), None);
        assert!(state.ending.is_some());
        assert_eq!(state.key(KeyCode::Char('q')), None);
        assert!(state.ending.is_none());
        state.key(KeyCode::Char('t'));
        assert_eq!(state.key(KeyCode::Char('y')), Some(Order::Terminate("a".parse().unwrap())));
        state.key(KeyCode::Char('t'));
        state.look_at(Vec::new(), now());
        assert_eq!(state.key(KeyCode::Char('y')), None);
    }
}
