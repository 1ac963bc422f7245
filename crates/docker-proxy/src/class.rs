//! What an endpoint means for a VM's sleep: one line per class of endpoints, and nowhere else.

use crate::target::Target;

/// What a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The engine, or the answer that it gave before it fell asleep: a read of what can't change while it sleeps.
    Reads,
    /// The engine; the VM stays up until the answer is complete.
    Holds,
    /// As `Holds`; its body may name paths and ports of the host, and is looked at before anything is woken.
    Creates,
    /// As `Holds`; whoever serves the session prepares for it, and hears of the answer before the client does.
    Starts,
    /// The engine; the connection becomes a byte stream, and the VM stays up until both sides have ended it.
    Hijacks,
    /// The engine; an answer that was silent for [`crate::QUIET_AFTER`] is only being watched, and then keeps nothing
    /// awake: what is still to come is a running container's, which holds by itself.
    Follows,
    /// The engine to begin with; the answer then never ends by itself, and keeps nothing awake.
    Weak,
    /// The engine's events, which are told by who subscribed to them once for all clients.
    Events,
}

/// A query parameter that a line wants to be true, or not to be false.
#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    True(&'static str),
    NotFalse(&'static str),
}

use Class::{Creates, Events, Follows, Hijacks, Holds, Reads, Starts, Weak};
use When::{Always, NotFalse, True};

/// Method, path after the version, query, class. `*` is one segment, `**` one or more (names of images have slashes,
/// and so have those that a container has for another).
/// The first line that fits counts; what none fits is unknown here, goes to the engine untouched, and holds.
///
/// Of the long polls: `wait` holds, because `docker run --rm` hangs on it while the engine still cleans up; `logs`
/// follows; `attach` and `exec` are somebody at work, and hold; `stats` and `events` are looked at by programs that
/// never stop.
const TABLE: &[(&str, &str, When, Class)] = &[
    // The engine itself.
    ("GET", "/_ping", Always, Reads),
    ("HEAD", "/_ping", Always, Reads),
    ("GET", "/version", Always, Reads),
    ("GET", "/info", Always, Reads),
    ("GET", "/system/df", Always, Reads),
    ("GET", "/events", Always, Events),
    ("POST", "/auth", Always, Holds),
    ("POST", "/session", Always, Hijacks),
    ("POST", "/grpc", Always, Hijacks),
    ("POST", "/build", Always, Holds),
    ("POST", "/build/*", Always, Holds),
    ("POST", "/commit", Always, Holds),
    // Containers. What only a running one answers isn't kept: it holds by itself.
    ("GET", "/containers/json", Always, Reads),
    ("GET", "/containers/*/json", Always, Reads),
    ("GET", "/containers/*/changes", Always, Reads),
    ("GET", "/containers/*/top", Always, Holds),
    ("GET", "/containers/*/export", Always, Holds),
    ("GET", "/containers/*/logs", True("follow"), Follows),
    ("GET", "/containers/*/logs", Always, Holds),
    ("GET", "/containers/*/stats", NotFalse("stream"), Weak),
    ("GET", "/containers/*/stats", Always, Holds),
    ("GET", "/containers/*/attach/ws", Always, Hijacks),
    ("POST", "/containers/**/attach", Always, Hijacks),
    ("POST", "/containers/*/wait", Always, Holds),
    ("POST", "/containers/create", Always, Creates),
    ("POST", "/containers/**/start", Always, Starts),
    ("POST", "/containers/**/restart", Always, Starts),
    ("POST", "/containers/prune", Always, Holds),
    ("POST", "/containers/*/*", Always, Holds),
    ("DELETE", "/containers/*", Always, Holds),
    ("HEAD", "/containers/*/archive", Always, Holds),
    ("GET", "/containers/*/archive", Always, Holds),
    ("PUT", "/containers/*/archive", Always, Holds),
    ("GET", "/exec/*/json", Always, Holds),
    ("POST", "/exec/*/start", Always, Hijacks),
    ("POST", "/exec/*/resize", Always, Holds),
    // Images.
    ("GET", "/images/json", Always, Reads),
    ("GET", "/images/search", Always, Holds),
    ("GET", "/images/get", Always, Holds),
    ("GET", "/images/**/json", Always, Reads),
    ("GET", "/images/**/history", Always, Reads),
    ("GET", "/images/**/get", Always, Holds),
    ("POST", "/images/**", Always, Holds),
    ("DELETE", "/images/**", Always, Holds),
    ("GET", "/distribution/**/json", Always, Holds),
    // Volumes and networks.
    ("GET", "/volumes", Always, Reads),
    ("GET", "/volumes/*", Always, Reads),
    ("POST", "/volumes/create", Always, Creates),
    ("POST", "/volumes/prune", Always, Holds),
    ("PUT", "/volumes/*", Always, Holds),
    ("DELETE", "/volumes/*", Always, Holds),
    ("GET", "/networks", Always, Reads),
    ("GET", "/networks/*", Always, Reads),
    ("POST", "/networks/**", Always, Holds),
    ("DELETE", "/networks/*", Always, Holds),
    // Plugins and swarm: an engine of one machine is asked whether it has any, and says no.
    ("GET", "/plugins", Always, Reads),
    ("GET", "/swarm", Always, Reads),
    ("GET", "/nodes", Always, Reads),
    ("GET", "/services", Always, Reads),
    ("GET", "/services/*/logs", True("follow"), Follows),
    ("GET", "/tasks", Always, Reads),
    ("GET", "/tasks/*/logs", True("follow"), Follows),
    ("GET", "/secrets", Always, Reads),
    ("GET", "/configs", Always, Reads),
];

impl Class {
    /// The class of a request; the strictest if its target can't be understood.
    #[must_use]
    pub fn of(method: &str, target: &str) -> Self {
        let Some(target) = Target::parse(target) else { return Creates };
        let (_, path) = target.version_and_path();
        let listed = TABLE
            .iter()
            .find(|(verb, pattern, when, _)| *verb == method && fits(pattern, path) && when.holds(&target));
        listed.map_or(Holds, |(.., class)| *class)
    }
}

impl When {
    fn holds(self, target: &Target<'_>) -> bool {
        match self {
            Always => true,
            True(name) => is_true(target, name).unwrap_or(false),
            NotFalse(name) => is_true(target, name).unwrap_or(true),
        }
    }
}

/// A query parameter as dockerd reads one: everything that isn't a word for no is a yes. `None`: it isn't there.
fn is_true(target: &Target<'_>, name: &str) -> Option<bool> {
    let value = target.parameter(name)?;
    Some(!matches!(value.to_ascii_lowercase().trim(), "" | "0" | "no" | "false" | "none"))
}

/// The container that a request is about, as the client names it: the one that a request of the class
/// [`Class::Starts`] starts. `None` also for a name that no container can have.
#[must_use]
pub fn started_by(target: &str) -> Option<String> {
    let path = path_of(target);
    let (name, _) = path.strip_prefix("/containers/")?.rsplit_once('/')?;
    is_container_name(name).then(|| name.to_owned())
}

/// Can a container be named so? Those that a container has for another have slashes.
pub(crate) fn is_container_name(name: &str) -> bool {
    let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-/".contains(&byte));
    is_name && !name.is_empty()
}

/// May the answer name paths of the host: what containers and volumes are made of?
#[must_use]
pub fn tells_paths(target: &str) -> bool {
    let path = path_of(target);
    ["/containers/json", "/containers/*/json", "/volumes", "/volumes/*"]
        .iter()
        .any(|pattern| fits(pattern, &path))
}

/// `/v1.45` of `/v1.45/info`; empty if there is none.
#[must_use]
pub fn version_of(target: &str) -> String {
    Target::parse(target).map_or_else(String::new, |target| target.version_and_path().0.to_owned())
}

/// `/info` of `/v1.45/info?x=y`, as the engine understands it; empty if that can't be told.
#[must_use]
pub fn path_of(target: &str) -> String {
    Target::parse(target).map_or_else(String::new, |target| target.version_and_path().1.to_owned())
}

fn fits(pattern: &str, path: &str) -> bool {
    if let Some((before, after)) = pattern.split_once("**") {
        let name = path.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
        return name.is_some_and(|name| !name.is_empty());
    }
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
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn classes_are_told_with_and_without_a_version() {
        for (method, target, class) in [
            ("GET", "/events?since=1", Events),
            ("GET", "/v1.45/events", Events),
            ("POST", "/v1.45/exec/abc/start", Hijacks),
            ("POST", "/containers/a/attach?stream=1", Hijacks),
            ("GET", "/containers/a/attach", Holds),
            ("POST", "/containers//attach", Holds),
            ("POST", "/containers/a/b/attach", Hijacks),
            ("POST", "/containers/create/", Holds),
            ("POST", "/containers/%63reate%", Creates),
            ("POST", "/grpc", Hijacks),
            ("GET", "/v1.45/containers/json", Reads),
            ("HEAD", "/_ping", Reads),
            ("GET", "/volumes", Reads),
            ("POST", "/v1.45/containers/create?name=x", Creates),
            ("POST", "/v1.45/containers/x/start", Starts),
            ("GET", "/", Holds),
            ("GET", "/v1.45/", Holds),
            ("PATCH", "/containers/json", Holds),
            ("GET", "/something/new", Holds),
        ] {
            assert_eq!(Class::of(method, target), class, "{method} {target}");
        }
    }

    #[test]
    fn names_of_images_may_have_slashes() {
        for (target, class) in [
            ("/v1.45/images/busybox/json", Reads),
            ("/images/localhost:5000/a/b:1/json", Reads),
            ("/images/json", Reads),
            ("/images/a/b/history", Reads),
            ("/images/a/b/get", Holds),
            ("/images/search", Holds),
        ] {
            assert_eq!(Class::of("GET", target), class, "{target}");
        }
        assert_eq!(Class::of("POST", "/images/a/b/push"), Holds);
    }

    #[test]
    fn each_long_poll_is_decided() {
        for (method, target, class) in [
            ("POST", "/containers/a/wait?condition=removed", Holds),
            ("POST", "/containers/a/attach?logs=1", Hijacks),
            ("GET", "/containers/a/attach/ws?stream=1", Hijacks),
            ("POST", "/v1.45/session", Hijacks),
            ("GET", "/containers/a/logs?stdout=1&follow=1", Follows),
            ("GET", "/containers/a/logs?follow=true&stdout=1", Follows),
            ("GET", "/containers/a/logs?follow=0&stdout=1", Holds),
            ("GET", "/containers/a/logs?stdout=1&follow=", Holds),
            ("GET", "/containers/a/logs?stdout=1", Holds),
            ("GET", "/containers/a/stats?%73tream=+No", Holds),
            ("GET", "/containers/a/stats", Weak),
            ("GET", "/containers/a/stats?stream=1", Weak),
            ("GET", "/containers/a/stats?stream=false&one-shot=1", Holds),
            ("GET", "/events", Events),
        ] {
            assert_eq!(Class::of(method, target), class, "{method} {target}");
        }
    }

    /// Other spellings of a path that Go makes the same of, in front of a router or by its redirect.
    fn spelling(path: &'static str) -> impl Strategy<Value = String> {
        let escaped = proptest::collection::vec(any::<bool>(), path.len());
        let slash = prop_oneof![
            4 => Just("/"), 1 => Just("//"), 1 => Just("/./"), 1 => Just("/x/../"), 1 => Just("/%2e/"), 1 => Just("%2f"),
        ];
        let slashes = proptest::collection::vec(slash, path.split('/').count() - 1);
        let front = prop_oneof![Just(""), Just("http://docker"), Just("HTTPS://a:1@b"), Just("x+y:///a/..")];
        let query = prop_oneof![Just(""), Just("?"), Just("?name=/x?y#z")];
        (escaped, slashes, front, query).prop_map(move |(escaped, slashes, front, query)| {
            let mut spelled = String::new();
            let mut slashes = slashes.into_iter();
            for (letter, is_escaped) in path.chars().zip(escaped) {
                match letter {
                    // A target begins with one.
                    '/' if spelled.is_empty() => {
                        spelled += slashes
                            .next()
                            .map_or("/", |slash| slash.strip_prefix("%2f").map_or(slash, |_| "/"))
                    }
                    '/' => spelled += slashes.next().unwrap_or("/"),
                    letter if is_escaped => spelled += &format!("%{:02x}", u32::from(letter)),
                    letter => spelled.push(letter),
                }
            }
            format!("{front}{spelled}{query}")
        })
    }

    proptest! {
        #[test]
        fn no_spelling_of_a_path_is_taken_for_another(
            creates in prop_oneof![
                spelling("/containers/create"), spelling("/v1.45/containers/create"), spelling("/v1/volumes/create"),
            ],
            starts in prop_oneof![spelling("/containers/web/start"), spelling("/v1.45/containers/web/restart")],
            tells in prop_oneof![spelling("/containers/json"), spelling("/v1.45/volumes")],
        ) {
            prop_assert_eq!(Class::of("POST", &creates), Creates, "{}", creates);
            prop_assert_eq!(Class::of("POST", &starts), Starts, "{}", starts);
            prop_assert_eq!(started_by(&starts), Some("web".to_owned()), "{}", starts);
            prop_assert!(tells_paths(&tells) && Class::of("GET", &tells) == Reads, "{}", tells);
        }

        #[test]
        fn no_target_makes_the_classing_panic(target in "[/%.a-z0-9:?*]{0,40}|\\PC*") {
            let _ = (Class::of("POST", &target), started_by(&target), version_of(&target), path_of(&target));
        }
    }

    #[test]
    fn who_is_started_is_known() {
        for (target, name) in [
            ("/v1.45/containers/web/start?detachKeys=x", Some("web")),
            ("/containers/ab12/restart", Some("ab12")),
            ("/containers/web/db/start", Some("web/db")),
            ("//containers/./%77eb/%73tart", Some("web")),
            ("/containers/a%20b/start", None),
            ("/containers/a%0d%0ab/start", None),
            ("/images/x/tag", None),
        ] {
            assert_eq!(started_by(target).as_deref(), name, "{target}");
        }
    }

    #[test]
    fn answers_that_tell_of_paths_are_known() {
        for target in
            ["/v1.45/containers/json?all=1", "/containers/web/json", "/v1.45/volumes", "/volumes/data"]
        {
            assert!(tells_paths(target), "{target}");
        }
        for target in ["/images/json", "/containers/web/logs", "/v1.45/containers/create", "/info"] {
            assert!(!tells_paths(target), "{target}");
        }
    }

    #[test]
    fn a_version_is_told_from_a_name_that_begins_like_one() {
        assert_eq!(version_of("/v1.45/info?x=/v2/"), "/v1.45");
        assert_eq!(version_of("/info"), "");
        assert_eq!(version_of("/volumes/v1"), "");
        assert_eq!(version_of("/v/info"), "");
    }
}
