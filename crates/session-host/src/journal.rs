//! What happened to a session, kept over its hosts: a file of JSON lines with a bound.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;

use serde::{Serialize, de::DeserializeOwned};

/// The latest entries, in memory and in a file. The file may hold up to twice as many before it is written anew.
#[derive(Debug)]
pub(crate) struct Journal<T> {
    path: PathBuf,
    limit: usize,
    entries: VecDeque<T>,
    /// Lines of the file.
    written: usize,
}

impl<T: Serialize + DeserializeOwned> Journal<T> {
    /// Reads what earlier hosts left. Lines that make no sense, such as a last one that was cut short, are dropped.
    pub(crate) fn open(path: PathBuf, limit: usize) -> Self {
        let mut journal = Self { path, limit, entries: VecDeque::new(), written: 0 };
        match File::open(&journal.path) {
            Ok(file) => {
                for line in BufReader::new(file).lines().map_while(Result::ok) {
                    journal.written += 1;
                    if let Ok(entry) = serde_json::from_str(&line) {
                        journal.keep(entry);
                    }
                }
                // A line that was cut short must not swallow the next one.
                journal.rewrite();
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %journal.path.display(), %error, "can't read"),
        }
        journal
    }

    /// The entries, oldest first.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &T> {
        self.entries.iter()
    }

    /// The latest entry.
    pub(crate) fn last(&self) -> Option<&T> {
        self.entries.back()
    }

    /// Adds an entry. Not synced: what must survive a crash of the machine is the lifecycle's state, not this.
    pub(crate) fn push(&mut self, entry: T) {
        let line = serde_json::to_string(&entry);
        self.keep(entry);
        if self.written >= 2 * self.limit {
            self.rewrite();
            return;
        }
        let appended = line.map_err(io::Error::other).and_then(|line| {
            let mut file = File::options().create(true).append(true).open(&self.path)?;
            file.write_all(format!("{line}\n").as_bytes())
        });
        match appended {
            Ok(()) => self.written += 1,
            Err(error) => tracing::warn!(path = %self.path.display(), %error, "can't write"),
        }
    }

    fn keep(&mut self, entry: T) {
        if self.entries.len() == self.limit {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
    }

    fn rewrite(&mut self) {
        let beside = self.path.with_extension("new");
        let written = File::create(&beside).and_then(|file| {
            let mut writer = io::BufWriter::new(file);
            for entry in &self.entries {
                serde_json::to_writer(&mut writer, entry)?;
                writer.write_all(b"\n")?;
            }
            writer.flush()?;
            fs::rename(&beside, &self.path)
        });
        match written {
            Ok(()) => self.written = self.entries.len(),
            Err(error) => tracing::warn!(path = %self.path.display(), %error, "can't write"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(journal: &Journal<u32>) -> Vec<u32> {
        journal.entries().copied().collect()
    }

    #[test]
    fn the_latest_entries_outlive_their_writer_and_the_file_stays_small() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers.jsonl");
        let mut journal = Journal::open(path.clone(), 3);
        for number in 0..100 {
            journal.push(number);
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            assert!(lines <= 6, "{lines} lines");
        }
        assert_eq!(numbers(&Journal::open(path, 3)), [97, 98, 99]);
    }

    #[test]
    fn a_line_that_was_cut_short_costs_itself_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers.jsonl");
        fs::write(&path, "1\n2\n[").unwrap();
        Journal::open(path.clone(), 3).push(3);
        assert_eq!(numbers(&Journal::open(path, 3)), [1, 2, 3]);
    }
}
