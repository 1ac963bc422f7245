//! What a client of `/events` wants to hear, as dockerd understands it (moby, `daemon/events/filter.go`).

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::Value;

/// Longest query that is read, in bytes: a head's own limit is far above what filters need.
const FILTERS_BYTES_MAX: usize = 32 * 1024;

/// What of an event filters look at.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Event {
    #[serde(rename = "Type")]
    kind: String,
    #[serde(rename = "Action")]
    action: String,
    #[serde(rename = "Actor")]
    actor: Actor,
    #[serde(default)]
    scope: String,
    /// Nanoseconds since the Unix epoch.
    #[serde(rename = "timeNano")]
    pub(super) time_nano: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Actor {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Attributes", default)]
    attributes: Option<BTreeMap<String, String>>,
}

/// A request's query.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Wish {
    /// Nanoseconds since the Unix epoch.
    pub(super) since: Option<i64>,
    /// Nanoseconds since the Unix epoch.
    pub(super) until: Option<i64>,
    filters: BTreeMap<String, BTreeSet<String>>,
}

impl Wish {
    /// Reads `/events?since=...&until=...&filters=...`.
    ///
    /// # Errors
    /// What makes no sense, in words.
    pub(super) fn parse(target: &str) -> Result<Self, String> {
        let mut wish = Self::default();
        let query = target.split_once('?').map_or("", |(_, query)| query);
        for pair in query.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decoded(value);
            match name {
                _ if value.is_empty() => {}
                "since" => wish.since = Some(nanos(&value)?),
                "until" => wish.until = Some(nanos(&value)?),
                "filters" => wish.filters = filters(&value)?,
                _ => {}
            }
        }
        match (wish.since, wish.until) {
            (Some(since), Some(until)) if until < since => Err(format!(
                "`since` time ({}) cannot be after `until` time ({})",
                since / NANOS,
                until / NANOS
            )),
            _ => Ok(wish),
        }
    }

    /// Does it want this event, whenever that was?
    pub(super) fn includes(&self, event: &Event) -> bool {
        const NAMED: [&str; 9] =
            ["daemon", "container", "plugin", "volume", "network", "node", "service", "secret", "config"];
        self.matches_action(&event.action)
            && self.is_exactly("type", &event.kind)
            && self.is_exactly("scope", &event.scope)
            && NAMED.iter().all(|kind| {
                self.begins_like(kind, &event.actor.id) || self.begins_like(kind, event.attribute("name"))
            })
            && self.matches_image(event)
            && self.matches_labels(event)
    }

    fn matches_action(&self, action: &str) -> bool {
        // Actions that carry a command or a result behind a colon.
        let open_ended = ["health_status", "exec_create", "exec_start"];
        match self.filters.get("event") {
            Some(wanted) if open_ended.iter().any(|action| wanted.contains(*action)) => {
                self.begins_like("event", action)
            }
            _ => self.is_exactly("event", action),
        }
    }

    fn matches_image(&self, event: &Event) -> bool {
        let name = event.attribute(if event.kind == "image" { "name" } else { "image" });
        [&*event.actor.id, name, without_tag(&event.actor.id), without_tag(name)]
            .iter()
            .any(|name| self.is_exactly("image", name))
    }

    fn matches_labels(&self, event: &Event) -> bool {
        let Some(labels) = self.filters.get("label") else { return true };
        let attributes = event.actor.attributes.as_ref();
        labels.iter().all(|label| {
            let (name, value) =
                label.split_once('=').map_or((&**label, None), |(name, value)| (name, Some(value)));
            let found = attributes.and_then(|attributes| attributes.get(name));
            found.is_some_and(|found| value.is_none_or(|value| value == found))
        })
    }

    fn is_exactly(&self, filter: &str, value: &str) -> bool {
        self.filters.get(filter).is_none_or(|wanted| wanted.is_empty() || wanted.contains(value))
    }

    fn begins_like(&self, filter: &str, value: &str) -> bool {
        self.is_exactly(filter, value)
            || self
                .filters
                .get(filter)
                .is_some_and(|wanted| wanted.iter().any(|start| value.starts_with(start)))
    }
}

impl Event {
    /// May other containers run than before, or with other addresses?
    pub(super) fn changes_what_runs(&self) -> bool {
        match self.kind.as_str() {
            "container" => matches!(self.action.as_str(), "start" | "die" | "destroy" | "rename"),
            "network" => matches!(self.action.as_str(), "connect" | "disconnect"),
            _ => false,
        }
    }

    fn attribute(&self, name: &str) -> &str {
        self.actor.attributes.as_ref().and_then(|attributes| attributes.get(name)).map_or("", String::as_str)
    }
}

/// `localhost:5000/a:1` is `localhost:5000/a`.
fn without_tag(image: &str) -> &str {
    let name = image.split('@').next().unwrap_or(image);
    match name.rsplit_once(':') {
        Some((before, tag)) if !tag.contains('/') => before,
        _ => name,
    }
}

const NANOS: i64 = 1_000_000_000;

/// `1700000000` or `1700000000.000000001`.
fn nanos(text: &str) -> Result<i64, String> {
    let invalid = || format!("invalid timestamp {text:?}: not a number of seconds since 1970");
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.len() > 9 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(invalid());
    }
    let seconds: i64 = seconds.parse().map_err(|_| invalid())?;
    let fraction: i64 = format!("{fraction:0<9}").parse().map_err(|_| invalid())?;
    seconds.checked_mul(NANOS).and_then(|nanos| nanos.checked_add(fraction)).ok_or_else(invalid)
}

/// `{"type":["container"]}`, or as old clients write it `{"type":{"container":true}}`.
fn filters(text: &str) -> Result<BTreeMap<String, BTreeSet<String>>, String> {
    let invalid = || "invalid filter: not an object of lists".to_owned();
    if text.len() > FILTERS_BYTES_MAX {
        return Err("invalid filter: too long".to_owned());
    }
    let Ok(Value::Object(fields)) = serde_json::from_str(text) else { return Err(invalid()) };
    let values = |value: Value| match value {
        Value::Array(items) => items
            .into_iter()
            .map(|item| item.as_str().map(str::to_owned).ok_or_else(invalid))
            .collect::<Result<BTreeSet<_>, _>>(),
        Value::Object(items) => Ok(items.into_iter().map(|(name, _)| name).collect()),
        _ => Err(invalid()),
    };
    fields.into_iter().map(|(name, value)| Ok((name, values(value)?))).collect()
}

/// `%7B` is `{`, `+` is a blank.
fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let [first, others @ ..] = rest {
        rest = others;
        let hex = |digits: &[u8]| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok();
        match (first, others.first_chunk::<2>().and_then(|digits| hex(digits))) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &others[2..];
            }
            (b'+', _) => bytes.push(b' '),
            (byte, _) => bytes.push(*byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str, action: &str, id: &str, attributes: &str) -> Event {
        let text = format!(
            r#"{{"Type":"{kind}","Action":"{action}","Actor":{{"ID":"{id}","Attributes":{{{attributes}}}}},
                "scope":"local","timeNano":1}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn wish(filters: &str) -> Wish {
        Wish::parse(&format!("/v1.45/events?filters={filters}")).unwrap()
    }

    #[test]
    fn times_are_seconds_with_up_to_nine_decimals() {
        let wish = Wish::parse("/events?since=1700000000.000000001&until=1700000001.5").unwrap();
        assert_eq!(
            (wish.since, wish.until),
            (Some(1_700_000_000_000_000_001), Some(1_700_000_001_500_000_000))
        );
        assert_eq!(Wish::parse("/events?since=&until=").unwrap(), Wish::default());
        for bad in [
            "since=x",
            "since=1.x",
            "until=1.0000000001",
            "since=99999999999999",
            "since=2&until=1",
            "filters=%7B",
            "filters=[]",
        ] {
            assert!(Wish::parse(&format!("/events?{bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn filters_mean_what_they_mean_to_dockerd() {
        let start =
            event("container", "start", "abc123", r#""name":"web","image":"localhost:5000/app:1","a":"b""#);
        let exec = event("container", "exec_start: sh -c true", "abc123", r#""name":"web""#);
        let pull = event("image", "pull", "busybox:latest", r#""name":"busybox""#);
        for (filters, wanted) in [
            (r#"{"type":["container"]}"#, [true, true, false]),
            (r#"{"type":{"image":true}}"#, [false, false, true]),
            (r#"{"event":["start","pull"]}"#, [true, false, true]),
            (r#"{"event":["exec_start"]}"#, [false, true, false]),
            (r#"{"container":["we"]}"#, [true, true, false]),
            (r#"{"container":["abc"]}"#, [true, true, false]),
            (r#"{"container":["bc"]}"#, [false, false, false]),
            (r#"{"image":["localhost:5000/app"]}"#, [true, false, false]),
            (r#"{"image":["busybox"]}"#, [false, false, true]),
            (r#"{"label":["a"]}"#, [true, false, false]),
            (r#"{"label":["a=b"],"type":["container"]}"#, [true, false, false]),
            (r#"{"label":["a=c"]}"#, [false, false, false]),
            (r#"{"scope":["swarm"]}"#, [false, false, false]),
            (r#"{"unknown":["x"]}"#, [true, true, true]),
            ("{}", [true, true, true]),
        ] {
            let wish = wish(filters);
            assert_eq!([&start, &exec, &pull].map(|event| wish.includes(event)), wanted, "{filters}");
        }
    }

    #[test]
    fn a_query_is_decoded() {
        assert_eq!(wish("%7B%22label%22%3A%5B%22a%20b%2Bc+d%22%5D%7D"), wish(r#"{"label":["a b%2Bc d"]}"#));
        assert_eq!(decoded("100%"), "100%");
        assert_eq!(decoded("%zz%4"), "%zz%4");
    }
}
