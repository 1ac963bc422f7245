//! What an endpoint means for a VM's sleep: one line per class of endpoints.

/// What a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The engine; the VM stays up until the answer is complete.
    Holds,
    /// The engine; the connection becomes a byte stream, and the VM stays up until both sides have ended it.
    Hijacks,
    /// The engine to begin with; the open stream then keeps nothing awake.
    Weak,
}

/// Method, path after the version (`*` is one segment), class. The first that fits counts; what isn't listed holds.
const TABLE: &[(&str, &str, Class)] = &[
    ("GET", "/events", Class::Weak),
    ("POST", "/exec/*/start", Class::Hijacks),
    ("POST", "/containers/*/attach", Class::Hijacks),
    ("GET", "/containers/*/attach/ws", Class::Hijacks),
    ("POST", "/session", Class::Hijacks),
    ("POST", "/grpc", Class::Hijacks),
];

impl Class {
    /// The class of a request.
    #[must_use]
    pub fn of(method: &str, target: &str) -> Self {
        let path = without_version(target.split('?').next().unwrap_or(target));
        let listed = TABLE.iter().find(|(verb, pattern, _)| *verb == method && fits(pattern, path));
        listed.map_or(Self::Holds, |(_, _, class)| *class)
    }
}

/// `/v1.45/info` is `/info`.
fn without_version(path: &str) -> &str {
    let Some(rest) = path.strip_prefix("/v") else { return path };
    let Some(end) = rest.find('/') else { return path };
    let is_version =
        !rest[..end].is_empty() && rest[..end].bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if is_version { &rest[end..] } else { path }
}

fn fits(pattern: &str, path: &str) -> bool {
    let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return true,
            (Some("*"), Some(segment)) if !segment.is_empty() => {}
            (Some(wanted), Some(given)) if wanted == given => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_told_with_and_without_a_version() {
        for (method, target, class) in [
            ("GET", "/events?since=1", Class::Weak),
            ("GET", "/v1.45/events", Class::Weak),
            ("POST", "/v1.45/exec/abc/start", Class::Hijacks),
            ("POST", "/containers/a/attach?stream=1", Class::Hijacks),
            ("GET", "/containers/a/attach", Class::Holds),
            ("POST", "/containers//attach", Class::Holds),
            ("POST", "/grpc", Class::Hijacks),
            ("GET", "/v1.45/containers/json", Class::Holds),
            ("GET", "/volumes", Class::Holds),
            ("GET", "/", Class::Holds),
        ] {
            assert_eq!(Class::of(method, target), class, "{method} {target}");
        }
    }
}
