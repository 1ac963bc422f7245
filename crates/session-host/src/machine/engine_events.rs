//! The engine's stream of events, as far as hooks are told of it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::owner::EngineEvent;

/// A line that is longer is dropped: a container's labels can be long, but not so long.
const LINE_BYTES_MAX: usize = 1024 * 1024;

/// Containers whose running execs are known; of more, they aren't.
const CONTAINERS_MAX: usize = 4096;

/// Reads the bytes of an HTTP/1.0 answer with one JSON object per line.
#[derive(Debug, Default)]
pub(super) struct EventReader {
    line: Vec<u8>,
    /// The running execs of each container.
    execs: BTreeMap<String, BTreeSet<Exec>>,
    /// The health check of each container that was asked about, if it has one. Its runs are execs that keep nothing awake.
    checks: BTreeMap<String, Option<String>>,
}

/// A process started by `exec`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Exec {
    id: String,
    /// Program and arguments in one line; not known of one that began before the stream.
    command: Option<String>,
}

/// A program and its arguments in one line, to be compared with another: without the blanks at its ends, of which the engine
/// makes some itself.
pub(super) fn command_line(words: &str) -> String {
    words.trim().to_owned()
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Told {
    r#type: String,
    action: String,
    actor: Actor,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Actor {
    #[serde(rename = "ID")]
    id: String,
    #[serde(default)]
    attributes: BTreeMap<String, String>,
}

impl EventReader {
    /// What is subscribed to, as a query has it: `{"type":["container","image"]}`.
    pub(super) const FILTERS: &str = "%7B%22type%22%3A%5B%22container%22%2C%22image%22%5D%7D";

    /// Takes the stream's next bytes. What isn't an event, such as the answer's head, is passed over.
    pub(super) fn read(&mut self, bytes: &[u8]) -> Vec<EngineEvent> {
        let mut events = Vec::new();
        for byte in bytes {
            match byte {
                b'\n' => {
                    if let Ok(told) = serde_json::from_slice(&self.line) {
                        events.extend(self.take(told));
                    }
                    self.line.clear();
                }
                _ if self.line.len() < LINE_BYTES_MAX => self.line.push(*byte),
                _ => {}
            }
        }
        events
    }

    /// Takes execs that began before the stream did, by their containers.
    pub(super) fn found(&mut self, execs: Vec<(String, String)>) {
        for (container, id) in execs {
            let is_known = |execs: &BTreeSet<Exec>| execs.iter().any(|exec| exec.id == id);
            if !self.execs.get(&container).is_some_and(is_known) {
                self.enter(container, Exec { id, command: None });
            }
        }
    }

    /// Takes in which execs run at all: of one that couldn't be started no end is told.
    pub(super) fn looked(&mut self, execs: Vec<(String, String)>) {
        for (container, known) in &mut self.execs {
            known.retain(|exec| execs.iter().any(|(within, id)| within == container && *id == exec.id));
        }
        self.found(execs);
    }

    fn enter(&mut self, container: String, exec: Exec) {
        if self.execs.len() < CONTAINERS_MAX || self.execs.contains_key(&container) {
            let execs = self.execs.entry(container).or_default();
            // It may have been found before its start was told.
            execs.retain(|known| known.id != exec.id);
            execs.insert(exec);
        }
    }

    /// Containers with running execs whose health checks aren't known. Until they are, their runs hold as any exec does.
    pub(super) fn unasked(&self) -> Vec<String> {
        let running =
            self.execs.iter().filter(|(_, execs)| !execs.is_empty()).map(|(container, _)| container);
        running.filter(|container| !self.checks.contains_key(*container)).cloned().collect()
    }

    /// Takes in a container's health check, in one line. It never changes.
    pub(super) fn learn(&mut self, container: String, check: Option<String>) {
        if self.checks.len() >= CONTAINERS_MAX {
            self.checks.retain(|container, _| self.execs.contains_key(container));
        }
        self.checks.insert(container, check);
    }

    /// Execs that were found or seen to start, and not seen to end, but for health checks.
    pub(super) fn running_execs(&self) -> u32 {
        let is_check = |container: &String, exec: &Exec| {
            let check = self.checks.get(container).and_then(Option::as_ref);
            check.is_some() && check == exec.command.as_ref()
        };
        let count = self
            .execs
            .iter()
            .map(|(container, execs)| execs.iter().filter(|exec| !is_check(container, exec)).count());
        u32::try_from(count.sum::<usize>()).unwrap_or(u32::MAX)
    }

    fn take(&mut self, told: Told) -> Option<EngineEvent> {
        let Told { r#type, action, actor: Actor { id, mut attributes } } = told;
        // `exec_start: sh -c ...`, with a colon and the command.
        let (action, command) = action.split_once(':').unwrap_or((&action, ""));
        match (r#type.as_str(), action) {
            ("container", "start") => {
                Some(EngineEvent::Started { id, name: attributes.remove("name").unwrap_or_default() })
            }
            ("container", "die") => {
                self.execs.remove(&id);
                Some(EngineEvent::Died { id })
            }
            ("container", "exec_start") => {
                if let Some(exec) = attributes.remove("execID") {
                    self.enter(id, Exec { id: exec, command: Some(command_line(command)) });
                }
                None
            }
            ("container", "exec_die") => {
                if let (Some(execs), Some(exec)) = (self.execs.get_mut(&id), attributes.get("execID")) {
                    execs.retain(|running| running.id != *exec);
                }
                None
            }
            ("image", "pull" | "import" | "load" | "tag") => {
                Some(EngineEvent::ImageCreated { image: attributes.remove("name").unwrap_or(id) })
            }
            ("image", "delete") => Some(EngineEvent::ImageDeleted { image: id }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(kind: &str, action: &str, id: &str, attributes: &str) -> String {
        format!(
            r#"{{"Type":"{kind}","Action":"{action}","Actor":{{"ID":"{id}","Attributes":{{{attributes}}}}},"time":1}}"#
        ) + "\n"
    }

    #[test]
    fn events_are_read_wherever_the_stream_is_cut() {
        let text = "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n".to_owned()
            + &line("container", "start", "c1", r#""name":"one""#)
            + "no json\n"
            + &line("container", "die", "c1", "")
            + &line("image", "pull", "busybox:latest", r#""name":"busybox""#)
            + &line("image", "delete", "sha256:1", "");
        let expected = [
            EngineEvent::Started { id: "c1".to_owned(), name: "one".to_owned() },
            EngineEvent::Died { id: "c1".to_owned() },
            EngineEvent::ImageCreated { image: "busybox".to_owned() },
            EngineEvent::ImageDeleted { image: "sha256:1".to_owned() },
        ];
        for size in [1, 7, 64, text.len()] {
            let mut reader = EventReader::default();
            let events: Vec<_> = text.as_bytes().chunks(size).flat_map(|bytes| reader.read(bytes)).collect();
            assert_eq!(events, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn an_exec_runs_until_it_or_its_container_dies() {
        let mut reader = EventReader::default();
        let mut count = |action: &str, exec: &str| {
            reader.read(line("container", action, "c1", &format!(r#""execID":"{exec}""#)).as_bytes());
            reader.running_execs()
        };
        assert_eq!(count("exec_start: sh -c true", "a"), 1);
        assert_eq!(count("exec_start: sleep 9", "b"), 2);
        assert_eq!(count("exec_die", "a"), 1);
        assert_eq!(count("exec_die", "unknown"), 1);
        assert_eq!(count("die", ""), 0);
        let [one, two] = ["a", "b"].map(|exec| ("c2".to_owned(), exec.to_owned()));
        reader.found(vec![one.clone(), two, one]);
        assert_eq!(reader.running_execs(), 2);
        reader.read(line("container", "exec_die", "c2", r#""execID":"b""#).as_bytes());
        assert_eq!(reader.running_execs(), 1);
    }

    #[test]
    fn an_exec_that_was_told_to_start_and_does_not_run_is_none() {
        let mut reader = EventReader::default();
        for exec in ["a", "b"] {
            let attributes = format!(r#""execID":"{exec}""#);
            reader.read(line("container", "exec_start: nosuch", "c1", &attributes).as_bytes());
        }
        let [runs, late] = ["b", "c"].map(|exec| ("c1".to_owned(), exec.to_owned()));
        reader.looked(vec![runs, late]);
        assert_eq!(reader.running_execs(), 2, "what runs is left, and what was not told of yet comes in");
        reader.read(line("container", "exec_start: sleep 9", "c1", r#""execID":"c""#).as_bytes());
        assert_eq!(reader.running_execs(), 2, "and is the same when it is told of");
        reader.looked(Vec::new());
        assert_eq!(reader.running_execs(), 0);
    }

    #[test]
    fn a_health_check_is_no_exec_that_holds() {
        let mut reader = EventReader::default();
        let mut start = |command: &str, exec: &str| {
            let action = format!("exec_start: {command}");
            reader.read(line("container", &action, "c1", &format!(r#""execID":"{exec}""#)).as_bytes());
            for container in reader.unasked() {
                reader.learn(container, Some("/bin/sh -c exit 0".to_owned()));
            }
            reader.running_execs()
        };
        assert_eq!(start("/bin/sh -c exit 0", "a"), 0);
        assert_eq!(start("/bin/sh -c exit 1", "b"), 1);
        assert_eq!(start("/bin/sh -c exit 0 ", "c"), 1);
        // One that began before is told without its command, and was told apart by whoever asked.
        reader.found(vec![("c1".to_owned(), "a".to_owned()), ("c1".to_owned(), "d".to_owned())]);
        assert_eq!(reader.running_execs(), 2);
    }

    #[test]
    fn a_line_without_an_end_takes_no_more_memory_than_a_line_may() {
        let mut reader = EventReader::default();
        for _ in 0..20 {
            assert!(reader.read(&[b'x'; 100_000]).is_empty());
        }
        assert!(reader.line.len() <= LINE_BYTES_MAX);
    }
}
