//! How images are called: `[registry/]path[:tag][@digest]`.

/// The registry of names that have none.
pub(crate) const HUB: &str = "docker.io";

/// A name, and its tag or digest.
pub(crate) fn split(reference: &str) -> (&str, Option<&str>) {
    if let Some((name, digest)) = reference.split_once('@') {
        return (tag_of(name).map_or(name, |(name, _)| name), Some(digest));
    }
    match tag_of(reference) {
        Some((name, tag)) => (name, Some(tag)),
        None => (reference, None),
    }
}

/// A colon after the last slash; one before it belongs to a port.
fn tag_of(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'))
}

/// With the tag `latest` if it has none.
pub(crate) fn tagged(reference: &str) -> String {
    match split(reference) {
        (_, Some(_)) => reference.to_owned(),
        (name, None) => format!("{name}:latest"),
    }
}

/// The registry that has it.
pub(crate) fn registry(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => first,
        _ => HUB,
    }
}

/// With its registry, its path and its tag.
pub(crate) fn canonical(reference: &str) -> String {
    let tagged = tagged(reference);
    if registry(&tagged) != HUB || tagged.starts_with("docker.io/") {
        return tagged;
    }
    let library = if split(&tagged).0.contains('/') { "" } else { "library/" };
    format!("{HUB}/{library}{tagged}")
}

/// Can it be one? The engine knows better; this catches what can't even be asked for.
pub(crate) fn check(reference: &str) -> Result<(), String> {
    let (name, _) = split(reference);
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-/:".contains(&byte);
    if name.is_empty() || !name.bytes().all(fine) || name.starts_with(['-', '/']) {
        return Err(format!("{reference:?} is no image's name: invalid reference format"));
    }
    let path = name.strip_prefix(registry(name)).unwrap_or(name);
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(format!("{reference:?} is no image's name: it must be lower case"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        assert_eq!(split("busybox"), ("busybox", None));
        assert_eq!(split("busybox:1"), ("busybox", Some("1")));
        assert_eq!(split("localhost:5000/a/b"), ("localhost:5000/a/b", None));
        assert_eq!(split("localhost:5000/a:2"), ("localhost:5000/a", Some("2")));
        assert_eq!(split("a:1@sha256:ff"), ("a", Some("sha256:ff")));
        assert_eq!(canonical("busybox"), "docker.io/library/busybox:latest");
        assert_eq!(canonical("me/x:1"), "docker.io/me/x:1");
        assert_eq!(canonical("localhost:5000/x"), "localhost:5000/x:latest");
        assert_eq!(registry("quay.io/x"), "quay.io");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in ["", "-x", "A", "a b", "/x", "x$"] {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert!(check("Registry.example/x:TAG").is_ok());
    }
}
