//! What a request's target means to the engine: dockerd's path is what Go's `net/url` decodes, and its router serves a path
//! only in its shortest form. Here every spelling of a path is that path, so that none is taken for something harmless.

/// Path and query of a request's target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target<'a> {
    /// Decoded, and in its shortest form; the version of the API is in front, if there is one.
    pub(crate) path: String,
    /// As sent.
    pub(crate) query: &'a str,
}

impl<'a> Target<'a> {
    /// `None`: an engine would refuse it, or read something of its own into it.
    pub(crate) fn parse(target: &'a str) -> Option<Self> {
        let (before, query) = target.split_once('?').unwrap_or((target, ""));
        let path = if before.starts_with('/') || before == "*" { before } else { behind_authority(before)? };
        let path = decoded(path)?;
        Some(Self { path: shortest(&String::from_utf8_lossy(&path)), query })
    }

    /// The version in front of the path, such as `/v1.45`, and the path behind it.
    pub(crate) fn version_and_path(&self) -> (&str, &str) {
        self.path.split_at(self.version_end().unwrap_or(0))
    }

    fn version_end(&self) -> Option<usize> {
        let (number, _) = self.path.strip_prefix("/v")?.split_once('/')?;
        let is_version =
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        is_version.then_some("/v".len() + number.len())
    }

    /// What the query says of `name` first.
    pub(crate) fn parameter(&self, name: &str) -> Option<String> {
        self.query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (in_query(key)? == name).then(|| in_query(value))?
        })
    }
}

/// `/info` of `http://docker/info`.
fn behind_authority(target: &str) -> Option<&str> {
    let (scheme, rest) = target.split_once("://")?;
    let is_scheme = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    is_scheme.then(|| rest.find('/').map_or("", |path| &rest[path..]))
}

/// `%2f` is `/`. `None`: an escape that is none.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    loop {
        let (byte, behind) = match rest {
            [] => return Some(bytes),
            [b'%', high, low, behind @ ..] => (hex(*high)? << 4 | hex(*low)?, behind),
            [b'%', ..] => return None,
            [byte, behind @ ..] => (*byte, behind),
        };
        bytes.push(byte);
        rest = behind;
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// As forms write names and values.
fn in_query(text: &str) -> Option<String> {
    Some(String::from_utf8_lossy(&decoded(&text.replace('+', " "))?).into_owned())
}

/// Without empty segments, `.` and `..`; a slash at the end stays.
fn shortest(path: &str) -> String {
    let mut segments = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            segment => segments.push(segment),
        }
    }
    let end = if path.ends_with('/') && !segments.is_empty() { "/" } else { "" };
    format!("/{}{end}", segments.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_path_is_that_path() {
        for (target, path) in [
            ("/info", "/info"),
            ("/v1.45/info?a=/b", "/v1.45/info"),
            ("http://docker/info", "/info"),
            ("http://docker", "/"),
            ("http:///info", "/info"),
            ("http://docker?x=/info", "/"),
            ("//info", "/info"),
            ("/a/./b/../%69nfo", "/a/info"),
            ("/../../info", "/info"),
            ("/a%2F%2e%2E%2finfo", "/info"),
            ("/a/", "/a/"),
            ("/a/.", "/a"),
            ("/%2569nfo", "/%69nfo"),
            ("/info#x", "/info#x"),
            ("/info+x", "/info+x"),
            ("*", "/*"),
        ] {
            assert_eq!(Target::parse(target).map(|target| target.path).as_deref(), Some(path), "{target}");
        }
    }

    #[test]
    fn what_an_engine_might_read_in_another_way_is_not_understood() {
        for target in [
            "info",
            "http:/info",
            "http:info",
            "://d/info",
            "1x://d/info",
            "/%",
            "/%4",
            "/%zz",
            "/%+1",
            "docker:80",
        ] {
            assert_eq!(Target::parse(target), None, "{target}");
        }
    }

    #[test]
    fn parameters_are_decoded_and_the_first_of_a_name_counts() {
        let target = Target::parse("/x?%zz=1&a=%31+2&b&a=3&%63=").unwrap();
        let found = ["a", "b", "c", "d"].map(|name| target.parameter(name));
        assert_eq!(found, [Some("1 2".to_owned()), Some(String::new()), Some(String::new()), None]);
    }
}
