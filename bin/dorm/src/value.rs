//! Values of options, read as docker reads them.

use std::collections::BTreeMap;

pub(crate) use dormouse_client::size;

use serde_json::{Value, json};

use crate::error::Failure;

/// A size, or -1.
pub(crate) fn signed_size(text: &str) -> Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    i64::try_from(size(text)?).map_err(|_| format!("{text:?} is too large"))
}

/// A number of processors, in billionths of one: `1.5`.
pub(crate) fn cpus(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no number of processors: try 1.5");
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if whole.len() + fraction.len() == 0
        || fraction.len() > 9
        || !fraction.bytes().all(|byte| byte.is_ascii_digit())
    {
        return Err(wrong());
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| wrong())? };
    let fraction: u64 = format!("{fraction:0<9}").parse().map_err(|_| wrong())?;
    whole.checked_mul(1_000_000_000).and_then(|whole| whole.checked_add(fraction)).ok_or_else(wrong)
}

/// A time as Go has it, in nanoseconds: `1m30s`, `500ms`, `0`.
pub(crate) fn go_duration(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is no duration: try 30s or 1m30s");
    if text == "0" {
        return Ok(0);
    }
    let (mut rest, mut total) = (text, 0.0);
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').ok_or_else(wrong)?;
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let end = rest.find(|letter: char| letter.is_ascii_digit() || letter == '.').unwrap_or(rest.len());
        total += number
            * match &rest[..end] {
                "ns" => 1.0,
                "us" | "µs" => 1e3,
                "ms" => 1e6,
                "s" => 1e9,
                "m" => 60e9,
                "h" => 3600e9,
                _ => return Err(wrong()),
            };
        rest = &rest[end..];
    }
    if text.is_empty() || total > 9e18 {
        return Err(wrong());
    }
    #[expect(clippy::cast_possible_truncation, reason = "it is in range")]
    Ok(total.round() as i64)
}

/// A restart policy: its name, and the most tries.
pub(crate) fn restart(text: &str) -> Result<(String, u64), String> {
    let wrong = || format!("{text:?} is no restart policy: no, on-failure[:N], always, unless-stopped are");
    match text.split_once(':') {
        Some(("on-failure", tries)) => Ok(("on-failure".to_owned(), tries.parse().map_err(|_| wrong())?)),
        None if matches!(text, "no" | "on-failure" | "always" | "unless-stopped") => Ok((text.to_owned(), 0)),
        _ => Err(wrong()),
    }
}

/// A limit of a resource: `nofile=1024[:2048]`.
pub(crate) fn ulimit(text: &str) -> Result<Value, String> {
    let wrong = || format!("{text:?} is no limit: try nofile=1024:2048");
    let (name, values) = text.split_once('=').ok_or_else(wrong)?;
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let value = |text: &str| text.parse::<i64>().ok().filter(|value| *value >= -1).ok_or_else(wrong);
    let (soft, hard) = (value(soft)?, value(hard)?);
    if name.is_empty() || hard != -1 && (soft > hard || soft == -1) {
        return Err(wrong());
    }
    Ok(json!({ "Name": name, "Soft": soft, "Hard": hard }))
}

/// A moment as the engine takes it, in seconds since 1970: a number, a date, or so long ago (`10m`).
pub(crate) fn moment(text: &str) -> Result<String, String> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return Ok(text.to_owned());
    }
    if let Ok(ago) = go_duration(text) {
        let then = jiff::Timestamp::now() - jiff::SignedDuration::from_nanos(ago);
        return Ok(seconds_of(then));
    }
    if let Ok(then) = text.parse::<jiff::Timestamp>() {
        return Ok(seconds_of(then));
    }
    let local = text.parse::<jiff::civil::DateTime>().map_err(|_| {
        format!(
            "{text:?} is no time: try 2024-05-01T12:00:00Z, seconds since 1970, or 10m for ten minutes ago"
        )
    })?;
    let then = local.to_zoned(jiff::tz::TimeZone::system()).map_err(|error| error.to_string())?;
    Ok(seconds_of(then.timestamp()))
}

fn seconds_of(then: jiff::Timestamp) -> String {
    format!("{}.{:09}", then.as_second(), then.subsec_nanosecond())
}

/// A filter, which is `NAME=VALUE`.
pub(crate) fn filter(text: &str) -> Result<String, String> {
    if text.contains('=') {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} is no filter: try NAME=VALUE"))
    }
}

/// `NAME=VALUE` filters as the engine takes them: `{"name":{"value":true}}`; `None` if there are none.
pub(crate) fn filters(texts: &[String]) -> Result<Option<String>, Failure> {
    let mut filters: BTreeMap<&str, BTreeMap<&str, bool>> = BTreeMap::new();
    for text in texts {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| Failure::new(format!("{text:?} is no filter")).hint("a filter is NAME=VALUE"))?;
        filters.entry(name.trim()).or_default().insert(value.trim(), true);
    }
    if filters.is_empty() {
        return Ok(None);
    }
    serde_json::to_string(&filters).map(Some).map_err(Failure::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_values_are_read_as_docker_reads_them() {
        assert_eq!(cpus("1.5"), Ok(1_500_000_000));
        assert_eq!(cpus(".25"), Ok(250_000_000));
        assert_eq!(go_duration("1m30s"), Ok(90_000_000_000));
        assert_eq!(go_duration("500ms"), Ok(500_000_000));
        assert_eq!(restart("on-failure:3"), Ok(("on-failure".to_owned(), 3)));
        assert_eq!(ulimit("nofile=1:2"), Ok(json!({ "Name": "nofile", "Soft": 1, "Hard": 2 })));
        assert_eq!(signed_size("-1"), Ok(-1));
        let text = filters(&["status=running".into(), "label=a=b".into(), "status=paused".into()]).unwrap();
        assert_eq!(
            text.as_deref(),
            Some(r#"{"label":{"a=b":true},"status":{"paused":true,"running":true}}"#)
        );
        for bad in ["", ".", "x", "-1", "1.0000000001", "1e3"] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
        for bad in ["", "5", "s", "1x", "1.2.3s", "-1s"] {
            assert!(go_duration(bad).is_err(), "{bad}");
        }
        for bad in ["never", "always:1", "on-failure:x", ""] {
            assert!(restart(bad).is_err(), "{bad}");
        }
        for bad in ["nofile", "nofile=2:1", "=1", "nofile=x", "nofile=-2"] {
            assert!(ulimit(bad).is_err(), "{bad}");
        }
        assert!(filters(&["running".into()]).is_err());
        assert_eq!(moment("1714560000"), Ok("1714560000".to_owned()));
        assert_eq!(moment("2024-05-01T12:00:00.5+02:00"), Ok("1714557600.500000000".to_owned()));
        assert!(moment("10m").is_ok() && moment("2024-05-01T12:00").is_ok());
        assert!(moment("").is_err() && moment("yesterday").is_err());
    }
}
