//! Ports of the host that clients want published, whatever their numbers.
//!
//! The number that the engine would choose is one of the VM's, and may be taken on the host. So the host chooses it, and
//! the number that clients read from the engine is the one at which the host listens.

use serde_json::{Map, Value, json};

use crate::mounts::is;

/// Gives each binding without a number one of the host's. Was there any?
pub(crate) fn settle(wish: &mut Value, mut choose: impl FnMut() -> Option<u16>) -> bool {
    let mut changed = false;
    for config in fields(wish, "HostConfig") {
        for bindings in fields(config, "PortBindings") {
            let Value::Object(ports) = bindings else { continue };
            let lists = ports.values_mut().filter_map(Value::as_array_mut).flatten();
            for binding in lists.filter_map(Value::as_object_mut) {
                changed |= choose_for(binding, &mut choose);
            }
        }
    }
    changed
}

fn choose_for(binding: &mut Map<String, Value>, choose: &mut impl FnMut() -> Option<u16>) -> bool {
    let number =
        binding.iter().find(|(name, _)| is(name, "HostPort")).map(|(name, number)| (name.clone(), number));
    let is_free = match &number {
        Some((_, number)) => matches!(number.as_str(), Some("" | "0")),
        None => true,
    };
    let name = number.map_or_else(|| "HostPort".to_owned(), |(name, _)| name);
    match is_free.then(choose).flatten() {
        Some(port) => {
            binding.insert(name, json!(port.to_string()));
            true
        }
        None => false,
    }
}

fn fields<'a>(object: &'a mut Value, field: &'static str) -> impl Iterator<Item = &'a mut Value> {
    let fields = object.as_object_mut().into_iter().flatten();
    fields.filter(move |(name, _)| is(name, field)).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bindings_without_a_number_get_one_each_and_others_keep_theirs() {
        let mut wish = json!({ "hostconfig": { "PortBindings": {
            "80/tcp": [{ "HostIp": "", "HostPort": "" }, { "HostPort": "8080" }, { "hostport": "0" }],
            "81/tcp": [{}], "82/tcp": null, "83/udp": [{ "HostPort": "9000-9010" }],
        } } });
        let mut next = 20_000;
        let chosen = settle(&mut wish, || {
            next += 1;
            Some(next)
        });
        assert!(chosen);
        let expected = json!({ "hostconfig": { "PortBindings": {
            "80/tcp": [{ "HostIp": "", "HostPort": "20001" }, { "HostPort": "8080" }, { "hostport": "20002" }],
            "81/tcp": [{ "HostPort": "20003" }], "82/tcp": null, "83/udp": [{ "HostPort": "9000-9010" }],
        } } });
        assert_eq!(wish, expected);
    }

    #[test]
    fn nothing_changes_where_nothing_is_to_be_chosen() {
        for body in [
            r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":"80"}]}}}"#,
            r#"{"HostConfig":{"PortBindings":{}}}"#,
            r#"{"HostConfig":null,"PortBindings":{"80/tcp":[{}]}}"#,
            "[]",
        ] {
            let mut wish: Value = serde_json::from_str(body).unwrap();
            assert!(!settle(&mut wish, || Some(1)), "{body}");
            assert_eq!(wish.to_string(), body);
        }
        let mut wish = json!({ "HostConfig": { "PortBindings": { "80/tcp": [{}] } } });
        assert!(!settle(&mut wish, || None), "with no number to give the engine chooses");
    }
}
