//! What was not as it should be when the VM was woken, told to the client whose request woke it.

use dormouse_api::WARNING_HEADER;
use serde_json::Value;

use crate::mounts::is;

/// Warnings that one answer carries, and how long each may be, in bytes: clients read heads of a bounded size.
const WARNINGS_MAX: usize = 16;
const WARNING_BYTES_MAX: usize = 512;

/// Warnings as values of [`WARNING_HEADER`]. Whoever wrote them may not write other headers.
pub fn header_values(warnings: &[String]) -> impl Iterator<Item = String> {
    warnings.iter().take(WARNINGS_MAX).map(|warning| {
        let printable = warning.chars().map(|letter| match letter {
            ' '..='~' => letter,
            _ => ' ',
        });
        printable.take(WARNING_BYTES_MAX).collect()
    })
}

/// The same as lines of a head.
pub(crate) fn header_lines(warnings: &[String]) -> Vec<u8> {
    header_values(warnings).flat_map(|value| format!("{WARNING_HEADER}: {value}\r\n").into_bytes()).collect()
}

/// The engine's answer to the creation of a container, with these among its `Warnings`, which clients show. `None` if it
/// is no such answer.
pub(crate) fn add_to_created(answer: &[u8], warnings: &[String]) -> Option<Vec<u8>> {
    let mut created: Value = serde_json::from_slice(answer).ok()?;
    let fields = created.as_object_mut()?;
    let name = fields.keys().find(|name| is(name, "Warnings")).cloned();
    let told = fields.entry(name.unwrap_or_else(|| "Warnings".to_owned())).or_insert(Value::Null);
    if told.is_null() {
        *told = Value::Array(Vec::new());
    }
    told.as_array_mut()?.extend(warnings.iter().take(WARNINGS_MAX).cloned().map(Value::String));
    serde_json::to_vec(&created).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_engine_warns_of_stays_and_what_is_no_object_is_left_alone() {
        let warnings = ["a volume is gone".to_owned()];
        for (answer, told) in [
            (r#"{"Id":"c1","Warnings":[]}"#, Some(r#"{"Id":"c1","Warnings":["a volume is gone"]}"#)),
            (r#"{"Id":"c1","Warnings":null}"#, Some(r#"{"Id":"c1","Warnings":["a volume is gone"]}"#)),
            (r#"{"warnings":["low"]}"#, Some(r#"{"warnings":["low","a volume is gone"]}"#)),
            (r#"{"Id":"c1"}"#, Some(r#"{"Id":"c1","Warnings":["a volume is gone"]}"#)),
            (r#"{"Warnings":"none"}"#, None),
            ("[]", None),
            ("created", None),
        ] {
            let found = add_to_created(answer.as_bytes(), &warnings);
            assert_eq!(found.as_deref(), told.map(str::as_bytes), "{answer}");
        }
    }
}
