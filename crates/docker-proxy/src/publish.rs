//! Ports of the host that clients want published, whatever their numbers, or without an address.
//!
//! What the engine would choose is the VM's: a number may be taken on the host, and of no address it makes all of them. So the
//! host chooses, and what clients read from the engine is where the host listens.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use crate::mounts::is;

/// Gives each binding without a number one of the host's, and each without an address this one. Was there any?
pub(crate) fn settle(
    wish: &mut Value,
    address: Option<IpAddr>,
    mut choose: impl FnMut() -> Option<u16>,
) -> bool {
    let mut changed = false;
    for config in fields(wish, "HostConfig") {
        for bindings in fields(config, "PortBindings") {
            let Value::Object(ports) = bindings else { continue };
            let lists = ports.values_mut().filter_map(Value::as_array_mut).flatten();
            for binding in lists.filter_map(Value::as_object_mut) {
                changed |= fill(binding, "HostPort", &["", "0"], || choose().map(|port| port.to_string()));
                changed |= fill(binding, "HostIp", &[""], || address.map(|address| address.to_string()));
            }
        }
    }
    changed
}

/// Has a field of a binding chosen that is absent, or says one of these.
fn fill(
    binding: &mut Map<String, Value>,
    field: &'static str,
    free: &[&str],
    choose: impl FnOnce() -> Option<String>,
) -> bool {
    let present = binding.iter().find(|(name, _)| is(name, field));
    if present.is_some_and(|(_, value)| value.as_str().is_none_or(|value| !free.contains(&value))) {
        return false;
    }
    let name = present.map_or_else(|| field.to_owned(), |(name, _)| name.clone());
    let Some(chosen) = choose() else { return false };
    binding.insert(name, json!(chosen));
    true
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
        let chosen = settle(&mut wish, None, || {
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
    fn bindings_without_an_address_get_the_hosts_and_others_keep_theirs() {
        let mut wish = json!({ "HostConfig": { "PortBindings": {
            "80/tcp": [{ "HostIp": "", "HostPort": "1" }, { "HostPort": "2" }, { "hostip": "", "HostPort": "3" }],
            "81/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "4" }, { "HostIp": "::", "HostPort": "5" }],
        } } });
        assert!(settle(&mut wish, Some([127, 0, 0, 9].into()), || None));
        let here = "127.0.0.9";
        let expected = json!({ "HostConfig": { "PortBindings": {
            "80/tcp": [{ "HostIp": here, "HostPort": "1" }, { "HostIp": here, "HostPort": "2" }, { "hostip": here, "HostPort": "3" }],
            "81/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "4" }, { "HostIp": "::", "HostPort": "5" }],
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
            assert!(!settle(&mut wish, None, || Some(1)), "{body}");
            assert_eq!(wish.to_string(), body);
        }
        let mut wish = json!({ "HostConfig": { "PortBindings": { "80/tcp": [{}] } } });
        assert!(!settle(&mut wish, None, || None), "with no number to give the engine chooses");
    }
}
