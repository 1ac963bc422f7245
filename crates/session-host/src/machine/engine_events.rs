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
    execs: BTreeMap<String, BTreeSet<String>>,
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
        for (container, exec) in execs {
            self.enter(container, exec);
        }
    }

    fn enter(&mut self, container: String, exec: String) {
        if self.execs.len() < CONTAINERS_MAX || self.execs.contains_key(&container) {
            self.execs.entry(container).or_default().insert(exec);
        }
    }

    /// Execs that were found or seen to start, and not seen to end.
    pub(super) fn running_execs(&self) -> u32 {
        u32::try_from(self.execs.values().map(BTreeSet::len).sum::<usize>()).unwrap_or(u32::MAX)
    }

    fn take(&mut self, told: Told) -> Option<EngineEvent> {
        let Told { r#type, action, actor: Actor { id, mut attributes } } = told;
        // `exec_start: sh -c ...`, with a colon and the command.
        let action = action.split(':').next().unwrap_or_default();
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
                    self.enter(id, exec);
                }
                None
            }
            ("container", "exec_die") => {
                if let (Some(execs), Some(exec)) = (self.execs.get_mut(&id), attributes.get("execID")) {
                    execs.remove(exec);
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
    fn a_line_without_an_end_takes_no_more_memory_than_a_line_may() {
        let mut reader = EventReader::default();
        for _ in 0..20 {
            assert!(reader.read(&[b'x'; 100_000]).is_empty());
        }
        assert!(reader.line.len() <= LINE_BYTES_MAX);
    }
}
