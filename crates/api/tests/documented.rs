//! docs/OUTPUT.md has each field of what `--format json` prints, and no other.

use dormouse_api::{HistoryEntry, SessionEvent, SessionInfo, TemplateInfo, Version, Why};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

const DOCUMENT: &str = include_str!("../../../docs/OUTPUT.md");

/// The value under a heading.
fn documented(heading: &str) -> Value {
    let section = DOCUMENT.split(&format!("\n### {heading}\n")).nth(1).expect("a heading");
    let text = section.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a value");
    serde_json::from_str(text).expect("JSON")
}

/// A field that the type doesn't have isn't written again, and one that isn't documented is written beside.
fn is_whole<T: DeserializeOwned + Serialize>(document: &Value) {
    let read: T = serde_json::from_value(document.clone()).expect("the type's own shape");
    assert_eq!(serde_json::to_value(read).expect("JSON"), *document);
}

#[test]
fn each_field_of_our_own_output_is_documented_as_it_is() {
    is_whole::<SessionInfo>(&documented("session"));
    is_whole::<HistoryEntry>(&documented("history"));
    is_whole::<SessionEvent>(&documented("event"));
    is_whole::<Why>(&documented("why"));
    is_whole::<TemplateInfo>(&documented("template"));
    is_whole::<Version>(&documented("version")["service"]);
}

#[test]
fn every_word_that_can_stand_somewhere_is_documented() {
    let session = documented("session");
    let words = |field: &[&str]| {
        // A word that isn't one is refused with a list of those that are.
        let mut wrong = session.clone();
        let place = field.iter().fold(&mut wrong, |value, name| match name.parse::<usize>() {
            Ok(index) => &mut value[index],
            Err(_) => &mut value[*name],
        });
        *place = "no such word".into();
        let refusal = serde_json::from_value::<SessionInfo>(wrong).expect_err("no such word").to_string();
        refusal.split('`').skip(1).step_by(2).map(str::to_owned).skip(1).collect::<Vec<_>>()
    };
    for field in [&["state"][..], &["vm", "phase"], &["vm", "how"], &["holds", "0", "kind"]] {
        let words = words(field);
        assert!(words.len() >= 3, "{field:?}: {words:?}");
        for word in words {
            assert!(DOCUMENT.contains(&format!("`{word}`")), "{field:?}: {word}");
        }
    }
}
