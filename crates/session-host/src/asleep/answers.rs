//! The engine's answers, kept: as they came, but for what tells of the present.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::present::Part;

/// Marks an answer that was given while the engine slept.
const MARK: &str = "Dormouse-Answered: asleep\r\n";

/// What was asked: the method, and the target with its version and query.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Question {
    pub(super) method: String,
    pub(super) target: String,
}

impl Question {
    pub(super) fn new(method: &str, target: &str) -> Self {
        Self { method: method.to_owned(), target: target.to_owned() }
    }
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// The head, its empty line included.
    pub(super) head: String,
    /// The body, without its coding.
    pub(super) body: Vec<Part>,
}

impl Kept {
    /// The response at this time. The framing is of the kind that the engine chose.
    pub(super) fn at(&self, method: &str, now: Timestamp) -> Bytes {
        let body: String = self.body.iter().map(|part| part.at(now)).collect();
        let (mut response, mut chunked) = (String::new(), false);
        for line in self.head.split_inclusive("\r\n") {
            let name = line.split(':').next().unwrap_or_default();
            if line == "\r\n" {
                response += MARK;
                response += line;
            } else if name.eq_ignore_ascii_case("date") {
                response += &now.strftime("Date: %a, %d %b %Y %H:%M:%S GMT\r\n").to_string();
            } else if name.eq_ignore_ascii_case("content-length") && method != "HEAD" {
                response += &format!("Content-Length: {}\r\n", body.len());
            } else {
                chunked |= name.eq_ignore_ascii_case("transfer-encoding");
                response += line;
            }
        }
        match (method, chunked) {
            ("HEAD", _) => {}
            (_, false) => response += &body,
            (_, true) if body.is_empty() => response += "0\r\n\r\n",
            (_, true) => response += &format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()),
        }
        response.into()
    }
}

/// All answers of one sleep.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Answers {
    /// The VM that gave them and then fell asleep.
    pub(super) generation: u64,
    /// Containers ran, and do so again only if the VM's memory comes back.
    pub(super) need_memory: bool,
    pub(super) kept: BTreeMap<Question, Kept>,
}

/// Version of the file's format.
const FORMAT: u32 = 2;

/// How answers lie on the disk.
#[derive(Debug, Serialize, Deserialize)]
struct File {
    format: u32,
    generation: u64,
    need_memory: bool,
    answers: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    question: Question,
    answer: Kept,
}

impl Answers {
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let entry = |(question, answer): (&Question, &Kept)| Entry {
            question: question.clone(),
            answer: answer.clone(),
        };
        let answers = self.kept.iter().map(entry).collect();
        let Self { generation, need_memory, .. } = *self;
        serde_json::to_vec(&File { format: FORMAT, generation, need_memory, answers })
    }

    /// `None`: a format that isn't known here, or no answers at all.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let file: File = serde_json::from_slice(bytes).ok()?;
        let kept = file.answers.into_iter().map(|entry| (entry.question, entry.answer)).collect();
        let File { format, generation, need_memory, .. } = file;
        (format == FORMAT).then_some(Self { generation, need_memory, kept })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<Part> {
        vec![Part::Text(text.to_owned())]
    }

    #[test]
    fn an_answer_is_framed_as_the_engine_framed_it() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let date = "Date: Tue, 14 Nov 2023 22:13:20 GMT\r\n";
        let kept = |head: &str, body: &str| Kept { head: head.to_owned(), body: text(body) };
        let length = kept(
            "HTTP/1.1 200 OK\r\nApi-Version: 1.45\r\nDate: Mon, 1 Jan 2001 00:00:00 GMT\r\nContent-Length: 9\r\n\r\n",
            "hi",
        );
        assert_eq!(
            length.at("GET", now),
            format!("HTTP/1.1 200 OK\r\nApi-Version: 1.45\r\n{date}Content-Length: 2\r\n{MARK}\r\nhi")
        );
        assert_eq!(
            length.at("HEAD", now),
            format!("HTTP/1.1 200 OK\r\nApi-Version: 1.45\r\n{date}Content-Length: 9\r\n{MARK}\r\n")
        );
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let marked = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{MARK}\r\n");
        assert_eq!(
            kept(head, "0123456789ab").at("GET", now),
            format!("{marked}c\r\n0123456789ab\r\n0\r\n\r\n")
        );
        assert_eq!(kept(head, "").at("GET", now), format!("{marked}0\r\n\r\n"));
    }

    #[test]
    fn answers_come_back_from_the_disk_as_they_were() {
        let mut answers = Answers { generation: 7, need_memory: true, kept: BTreeMap::new() };
        let since = Timestamp::from_second(5).unwrap();
        let mut body = text("[\"");
        body.push(Part::Status { text: "Up".to_owned(), since });
        body.push(Part::Clock);
        answers.kept.insert(Question::new("GET", "/v1.45/info"), Kept { head: "h".to_owned(), body });
        assert_eq!(Answers::from_bytes(&answers.to_bytes().unwrap()), Some(answers));
        assert_eq!(Answers::from_bytes(b"{}"), None);
        assert_eq!(Answers::from_bytes(br#"{"format":2,"generation":1,"answers":[]}"#), None);
    }
}
