//! Texts about the present in the engine's answers, and how they read at another time.
//!
//! They are few: how long a container is up or gone (`Status` in lists), and the engine's clock (`SystemTime`).
//! Everything else in the answers of a sleeping engine stays as it is.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A piece of an answer's body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Part {
    /// As the engine said it.
    Text(String),
    /// A container's status, without its quotes, and since when it is so.
    Status { text: String, since: Timestamp },
    /// The engine's clock, without its quotes.
    Clock,
}

impl Part {
    /// How it reads at this time.
    pub(super) fn at(&self, now: Timestamp) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Status { text, since } => status_at(text, *since, now),
            Self::Clock => now.to_string(),
        }
    }
}

/// A status as the engine words it (moby, `container.State.String`), as it would word it at `now`.
fn status_at(status: &str, since: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(since).as_secs().max(0).cast_unsigned();
    let lasted = in_words(seconds);
    if let Some(rest) = status.strip_prefix("Up ") {
        // `Up 3 hours`, `Up 3 hours (Paused)`, `Up 3 hours (healthy)`.
        return match rest.split_once(" (") {
            Some((_, note)) => format!("Up {lasted} ({note}"),
            None => format!("Up {lasted}"),
        };
    }
    // `Exited (0) 3 hours ago`, `Restarting (1) 3 seconds ago`.
    match status.split_once(") ") {
        Some((what, rest)) if rest.ends_with(" ago") => format!("{what}) {lasted} ago"),
        _ => status.to_owned(),
    }
}

/// A length of time as Docker says it (go-units, `HumanDuration`).
fn in_words(seconds: u64) -> String {
    let minutes = seconds / 60;
    let hours = (seconds + 30 * 60) / 3600;
    let whole_hours = seconds / 3600;
    match (seconds, minutes, hours) {
        (0, ..) => "Less than a second".to_owned(),
        (1, ..) => "1 second".to_owned(),
        (2..60, ..) => format!("{seconds} seconds"),
        (_, 1, _) => "About a minute".to_owned(),
        (_, 2..60, _) => format!("{minutes} minutes"),
        (_, _, 1) => "About an hour".to_owned(),
        (_, _, 2..48) => format!("{hours} hours"),
        (_, _, 48..336) => format!("{} days", hours / 24),
        (_, _, 336..1440) => format!("{} weeks", hours / 24 / 7),
        (_, _, 1440..17520) => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", whole_hours / 24 / 365),
    }
}

/// A container in a list, with the texts where they stand in it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed<'a> {
    id: String,
    #[serde(borrow)]
    status: &'a RawValue,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Usage<'a> {
    #[serde(borrow)]
    containers: Vec<Listed<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Info<'a> {
    #[serde(borrow)]
    system_time: &'a RawValue,
}

/// The containers in an answer whose status says how long it is so.
pub(super) fn containers_with_a_time(path: &str, body: &str) -> Vec<String> {
    let timed = listed(path, body).into_iter().filter(|one| tells_a_time(one.status.get()));
    timed.map(|one| one.id).collect()
}

fn tells_a_time(status: &str) -> bool {
    status.starts_with("\"Up ") || status.ends_with(" ago\"")
}

fn listed<'a>(path: &str, body: &'a str) -> Vec<Listed<'a>> {
    let listed = match path {
        "/containers/json" => serde_json::from_str(body),
        "/system/df" => serde_json::from_str::<Usage<'a>>(body).map(|usage| usage.containers),
        _ => return Vec::new(),
    };
    listed.unwrap_or_default()
}

/// Takes an answer's body apart. `None`: it tells of a container since when nobody knows.
pub(super) fn take_apart(path: &str, body: &str, since: &BTreeMap<String, Timestamp>) -> Option<Vec<Part>> {
    let mut texts = Vec::new();
    for one in listed(path, body) {
        if tells_a_time(one.status.get()) {
            let text = serde_json::from_str(one.status.get()).ok()?;
            texts.push((one.status.get(), Part::Status { text, since: *since.get(&one.id)? }));
        }
    }
    if path == "/info"
        && let Ok(info) = serde_json::from_str::<Info<'_>>(body)
    {
        texts.push((info.system_time.get(), Part::Clock));
    }
    let (mut parts, mut at) = (Vec::new(), 0);
    for (text, part) in texts {
        // Where it stands: it was borrowed from the body, quotes included.
        let begin = text.as_ptr() as usize - body.as_ptr() as usize + 1;
        let end = begin + text.len() - 2;
        parts.push(Part::Text(body[at..begin].to_owned()));
        parts.push(part);
        at = end;
    }
    parts.push(Part::Text(body[at..].to_owned()));
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    #[test]
    fn a_status_reads_as_the_engine_would_word_it_at_that_time() {
        const DAY: i64 = 24 * 3600;
        for (seconds, words) in [
            (0, "Less than a second"),
            (1, "1 second"),
            (2, "2 seconds"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (119, "About a minute"),
            (120, "2 minutes"),
            (59 * 60 + 59, "59 minutes"),
            (3600, "About an hour"),
            (3600 + 1799, "About an hour"),
            (3600 + 1800, "2 hours"),
            (47 * 3600 + 1799, "47 hours"),
            (47 * 3600 + 1800, "2 days"),
            (14 * DAY - 1801, "13 days"),
            (14 * DAY - 1800, "2 weeks"),
            (14 * DAY, "2 weeks"),
            (60 * DAY - 1801, "8 weeks"),
            (60 * DAY - 1800, "2 months"),
            (60 * DAY, "2 months"),
            (365 * DAY, "12 months"),
            (729 * DAY, "24 months"),
            (730 * DAY - 1801, "24 months"),
            // The one place where the engine doesn't round up.
            (730 * DAY - 1800, "1 years"),
            (730 * DAY, "2 years"),
            (1095 * DAY - 1, "2 years"),
            (1095 * DAY, "3 years"),
        ] {
            for (before, after) in [
                ("Up 3 minutes", format!("Up {words}")),
                ("Up About an hour (Paused)", format!("Up {words} (Paused)")),
                ("Up 2 seconds (health: starting)", format!("Up {words} (health: starting)")),
                ("Exited (137) 2 hours ago", format!("Exited (137) {words} ago")),
                ("Restarting (1) Less than a second ago", format!("Restarting (1) {words} ago")),
            ] {
                assert_eq!(status_at(before, at(0), at(seconds)), after);
            }
        }
        for steady in ["Created", "Dead", "Removal In Progress", ""] {
            assert_eq!(status_at(steady, at(0), at(9)), steady);
        }
    }

    #[test]
    fn only_the_texts_about_now_change_and_everything_else_stays_to_the_byte() {
        let body = "[{\"Id\":\"a\",\"Status\":\"Up 3 minutes\" , \"X\":\"Up 3 minutes\"},\n\
                    {\"Status\":\"Created\",\"Id\":\"b\"},{\"Id\":\"c\",\"Status\":\"Exited (0) 2 hours ago\"}]\n";
        assert_eq!(containers_with_a_time("/containers/json", body), ["a", "c"]);
        let since = BTreeMap::from([("a".to_owned(), at(0)), ("c".to_owned(), at(-3600))]);
        let parts = take_apart("/containers/json", body, &since).unwrap();
        let replayed: String = parts.iter().map(|part| part.at(at(3600))).collect();
        let expected = body.replace("\"Status\":\"Up 3 minutes\"", "\"Status\":\"Up About an hour\"");
        assert_eq!(replayed, expected);
        let usage = format!("{{\"LayersSize\":1,\"Containers\":{}}}", body.trim());
        let parts = take_apart("/system/df", &usage, &since).unwrap();
        let replayed: String = parts.iter().map(|part| part.at(at(180))).collect();
        assert_eq!(replayed, usage.replace("2 hours ago", "About an hour ago"));
        let info = r#"{"ID":"x","SystemTime":"2026-01-01T00:00:00.5Z","NFd":23}"#;
        let parts = take_apart("/info", info, &since).unwrap();
        let replayed: String = parts.iter().map(|part| part.at(at(0))).collect();
        assert_eq!(replayed, r#"{"ID":"x","SystemTime":"2023-11-14T22:13:20Z","NFd":23}"#);
    }

    #[test]
    fn a_container_since_when_nobody_knows_makes_the_answer_unfit() {
        let body = r#"[{"Id":"a","Status":"Up 3 minutes"}]"#;
        assert_eq!(take_apart("/containers/json", body, &BTreeMap::new()), None);
    }

    #[test]
    fn what_is_not_a_list_stays_whole() {
        for (path, body) in [("/containers/json", "{\"message\":\"no\"}"), ("/_ping", "OK"), ("/info", "{}")]
        {
            let parts = take_apart(path, body, &BTreeMap::new()).unwrap();
            assert_eq!(parts, [Part::Text(body.to_owned())]);
        }
    }
}
