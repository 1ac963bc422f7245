//! Sizes and times in docker's words.

/// `About a minute`, `3 days`: as docker says how long something took.
pub(crate) fn duration(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match seconds {
        ..1 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        2..60 => format!("{seconds} seconds"),
        _ if minutes == 1 => "About a minute".to_owned(),
        _ if minutes < 60 => format!("{minutes} minutes"),
        _ if hours == 1 => "About an hour".to_owned(),
        _ if hours < 48 => format!("{hours} hours"),
        _ if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        _ if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        _ if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", seconds / 3600 / 24 / 365),
    }
}

/// `1.23MB`: decimal units, three digits.
pub(crate) fn size(bytes: f64) -> String {
    scaled(bytes, 1000.0, 3, &["B", "kB", "MB", "GB", "TB", "PB", "EB"])
}

/// `1.234MB`: decimal units, four digits.
pub(crate) fn size_in_four_digits(bytes: f64) -> String {
    scaled(bytes, 1000.0, 4, &["B", "kB", "MB", "GB", "TB", "PB", "EB"])
}

/// `1.5GiB`: binary units, four digits.
pub(crate) fn binary_size(bytes: f64) -> String {
    scaled(bytes, 1024.0, 4, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

fn scaled(mut number: f64, base: f64, digits: usize, units: &[&str]) -> String {
    // The sum of nothing is -0.0.
    number += 0.0;
    let mut index = 0;
    while number >= base && index + 1 < units.len() {
        number /= base;
        index += 1;
    }
    format!("{}{}", significant(number, digits), units[index])
}

/// C's `%.*g` for numbers from 0 to 1024.
fn significant(number: f64, digits: usize) -> String {
    let magnitude = [1000.0, 100.0, 10.0].iter().position(|limit| number >= *limit);
    let before_point = magnitude.map_or(1, |index| 4 - index);
    let text = format!("{number:.*}", digits.saturating_sub(before_point));
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Seconds since 1970 as Go prints a time: `2024-05-01 12:00:00 +0000 UTC`.
pub(crate) fn go_time(seconds: i64) -> String {
    let Ok(time) = jiff::Timestamp::from_second(seconds) else { return String::new() };
    let time = time.to_zoned(jiff::tz::TimeZone::system());
    time.strftime("%Y-%m-%d %H:%M:%S %z %Z").to_string()
}

/// The first twelve digits of an id, without what names its hash.
pub(crate) fn short_id(id: &str) -> &str {
    let id = id.split_once(':').map_or(id, |(_, digits)| digits);
    id.get(..12).unwrap_or(id)
}

/// At most `width` characters, the last an ellipsis if something is cut off.
pub(crate) fn ellipsis(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_said_as_docker_says_them() {
        for (seconds, text) in [
            (-5, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (3599, "59 minutes"),
            (3600, "About an hour"),
            (5399, "About an hour"),
            (7200, "2 hours"),
            (86400 * 2, "2 days"),
            (86400 * 14, "2 weeks"),
            (86400 * 60, "2 months"),
            (86400 * 365 * 2, "2 years"),
        ] {
            assert_eq!(duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn sizes_have_as_many_digits_as_docker_gives_them() {
        for (bytes, text) in [
            (0.0, "0B"),
            (999.0, "999B"),
            (1000.0, "1kB"),
            (1234.0, "1.23kB"),
            (1_460_000.0, "1.46MB"),
            (123_456_789.0, "123MB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(size_in_four_digits(1_234_567.0), "1.235MB");
        assert_eq!(size_in_four_digits([].iter().sum()), "0B");
        assert_eq!(binary_size(1024.0 * 1536.0), "1.5MiB");
        assert_eq!(binary_size(1_073_741_824.0), "1GiB");
    }

    #[test]
    fn ids_and_texts_are_cut() {
        assert_eq!(short_id("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short_id("abc"), "abc");
        assert_eq!(ellipsis("abcdef", 6), "abcdef");
        assert_eq!(ellipsis("abcdefg", 6), "abcde…");
    }
}
