//! Ports of the host that clients want published without a number, at one of several, or without an address.
//!
//! What the engine would choose is the VM's: a number may be taken on the host, and of no address it makes all of them. So the
//! host chooses, and what clients read from the engine is where the host listens.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use crate::mounts::{field, is};

/// A port that is to be published at a number of the host's choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnyPort {
    /// Where on the host. `None`: the client doesn't say.
    pub address: Option<IpAddr>,
    /// It has to be one of these. `None`: any will do.
    pub among: Option<RangeInclusive<u16>>,
}

/// Ports that one container can publish: as many as a session can.
const BINDINGS_MAX: usize = 1024;

/// Gives each binding that leaves its number to the engine one of the host's, and each without an address this one.
///
/// # Errors
/// A port that can't be published, in words.
pub(crate) fn settle(
    wish: &mut Value,
    address: Option<IpAddr>,
    mut choose: impl FnMut(AnyPort) -> Option<u16>,
) -> Result<(), String> {
    for config in fields(wish, "HostConfig").filter(|config| has_ports(config)) {
        for bindings in fields(config, "PortBindings") {
            let Value::Object(ports) = bindings else { continue };
            let is_wanted = |list: &Value| list.as_array().is_some_and(|list| !list.is_empty());
            refuse_sctp(ports.iter().filter(|(_, list)| is_wanted(list)).map(|(port, _)| port))?;
            let count: usize = ports.values().filter_map(Value::as_array).map(Vec::len).sum();
            if count > BINDINGS_MAX {
                return Err(format!(
                    "{count} ports are more than the {BINDINGS_MAX} that one container can publish"
                ));
            }
            let lists = ports.values_mut().filter_map(Value::as_array_mut).flatten();
            for binding in lists.filter_map(Value::as_object_mut) {
                fill(binding, address, &mut choose);
            }
        }
    }
    Ok(())
}

/// What the host can't forward would be published in the VM only, where nobody comes.
fn refuse_sctp<'a>(mut ports: impl Iterator<Item = &'a String>) -> Result<(), String> {
    let is_sctp = |port: &str| port.split_once('/').is_some_and(|(_, it)| it.eq_ignore_ascii_case("sctp"));
    match ports.find(|port| is_sctp(port)) {
        Some(port) => Err(format!("{port}: sctp ports can't be published from a VM")),
        None => Ok(()),
    }
}

/// Gives one binding what it lacks.
fn fill(
    binding: &mut Map<String, Value>,
    address: Option<IpAddr>,
    choose: &mut impl FnMut(AnyPort) -> Option<u16>,
) {
    if let Some(address) = address
        && text(binding, "HostIp") == Some("")
    {
        set(binding, "HostIp", &address.to_string());
    }
    if let Some(among) = text(binding, "HostPort").and_then(left_open) {
        let address = text(binding, "HostIp").and_then(|address| address.parse().ok());
        if let Some(port) = choose(AnyPort { address, among }) {
            set(binding, "HostPort", &port.to_string());
        }
    }
}

/// Which numbers does `port` leave to choose from? `None`: it is one, or nothing that can be understood.
fn left_open(port: &str) -> Option<Option<RangeInclusive<u16>>> {
    if matches!(port, "" | "0" | "0-0") {
        return Some(None);
    }
    let (first, last) = port.split_once('-')?;
    let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
    (0 < first && first <= last).then_some(Some(first..=last))
}

/// What a binding says in a field, which is nothing if it is absent or `null`. `None`: no text.
fn text<'a>(binding: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    match field(binding, name) {
        None | Some(Value::Null) => Some(""),
        Some(value) => value.as_str(),
    }
}

fn set(binding: &mut Map<String, Value>, name: &str, value: &str) {
    let name = binding.keys().find(|there| is(there, name)).cloned().unwrap_or_else(|| name.to_owned());
    binding.insert(name, json!(value));
}

/// The image of a wish that wants all ports published which its image names, where that means ports of the host.
pub(crate) fn image_of_all(wish: &Value) -> Option<&str> {
    let wish = wish.as_object()?;
    let config = field(wish, "HostConfig")?;
    let all = field(config.as_object()?, "PublishAllPorts")?.as_bool()?;
    (all && has_ports(config)).then(|| field(wish, "Image")?.as_str()).flatten()
}

/// Is the container to have a network in which ports are published? Without one the engine heeds no binding, or refuses it.
fn has_ports(config: &Value) -> bool {
    let network = config.as_object().and_then(|config| field(config, "NetworkMode")).and_then(Value::as_str);
    let network = network.unwrap_or_default();
    !matches!(network, "host" | "none") && !network.starts_with("container:")
}

/// Gives each port that the image or the client names, and nobody has bound, an address and a number of the host. Was there
/// any?
///
/// # Errors
/// A port that can't be published, in words.
pub(crate) fn settle_all(
    wish: &mut Value,
    exposed: &[String],
    address: Option<IpAddr>,
    mut choose: impl FnMut(AnyPort) -> Option<u16>,
) -> Result<bool, String> {
    let own = wish.as_object().and_then(|wish| field(wish, "ExposedPorts")).and_then(Value::as_object);
    let ports: Vec<String> = own.into_iter().flat_map(Map::keys).chain(exposed).cloned().collect();
    refuse_sctp(ports.iter())?;
    let Some(config) = fields(wish, "HostConfig").find_map(Value::as_object_mut) else { return Ok(false) };
    let name = config.keys().find(|name| is(name, "PortBindings")).cloned();
    let bindings = config.entry(name.unwrap_or_else(|| "PortBindings".to_owned())).or_insert(Value::Null);
    if bindings.is_null() {
        *bindings = json!({});
    }
    let Value::Object(bindings) = bindings else { return Ok(false) };
    let mut changed = false;
    for port in ports {
        let is_bound = bindings.get(&port).and_then(Value::as_array).is_some_and(|list| !list.is_empty());
        if !is_bound && let Some(number) = choose(AnyPort { address, among: None }) {
            let address = address.map(|address| address.to_string()).unwrap_or_default();
            bindings.insert(port, json!([{ "HostIp": address, "HostPort": number.to_string() }]));
            changed = true;
        }
    }
    Ok(changed)
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
            "81/tcp": [{ "HostIp": null, "HostPort": null }], "82/tcp": null, "83/udp": [{ "HostPort": 9 }],
        } } });
        let mut next = 20_000;
        let chosen = settle(&mut wish, None, |_| {
            next += 1;
            Some(next)
        });
        assert_eq!(chosen, Ok(()));
        let expected = json!({ "hostconfig": { "PortBindings": {
            "80/tcp": [{ "HostIp": "", "HostPort": "20001" }, { "HostPort": "8080" }, { "hostport": "20002" }],
            "81/tcp": [{ "HostIp": null, "HostPort": "20003" }], "82/tcp": null, "83/udp": [{ "HostPort": 9 }],
        } } });
        assert_eq!(wish, expected);
    }

    #[test]
    fn bindings_without_an_address_get_the_hosts_and_others_keep_theirs() {
        let mut wish = json!({ "HostConfig": { "PortBindings": {
            "80/tcp": [{ "HostIp": "", "HostPort": "1" }, { "HostPort": "2" }, { "hostip": "", "HostPort": "3" }],
            "81/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "4" }, { "HostIp": "::", "HostPort": "5" }],
        } } });
        settle(&mut wish, Some([127, 0, 0, 9].into()), |_| None).unwrap();
        let here = "127.0.0.9";
        let expected = json!({ "HostConfig": { "PortBindings": {
            "80/tcp": [{ "HostIp": here, "HostPort": "1" }, { "HostIp": here, "HostPort": "2" }, { "hostip": here, "HostPort": "3" }],
            "81/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "4" }, { "HostIp": "::", "HostPort": "5" }],
        } } });
        assert_eq!(wish, expected);
    }

    #[test]
    fn one_number_of_several_is_chosen_by_the_host() {
        let mut wish = json!({ "HostConfig": { "PortBindings": {
            "80/tcp": [{ "HostIp": "10.1.2.3", "HostPort": "8000-8010" }, { "HostPort": "9-9" }],
            "81/tcp": [{ "HostPort": "8010-8000" }, { "HostPort": "0-5" }, { "HostPort": "a-b" }, { "HostPort": "1-70000" }],
        } } });
        let mut asked = Vec::new();
        let settled = settle(&mut wish, Some([127, 0, 0, 1].into()), |port| {
            asked.push((port.address.unwrap().to_string(), port.among.clone().unwrap()));
            port.among.map(|among| *among.end())
        });
        assert_eq!(settled, Ok(()));
        assert_eq!(asked, [("10.1.2.3".to_owned(), 8000..=8010), ("127.0.0.1".to_owned(), 9..=9)]);
        let bindings = &wish["HostConfig"]["PortBindings"];
        assert_eq!(bindings["80/tcp"][0], json!({ "HostIp": "10.1.2.3", "HostPort": "8010" }));
        assert_eq!(bindings["80/tcp"][1], json!({ "HostIp": "127.0.0.1", "HostPort": "9" }));
        for (index, left) in ["8010-8000", "0-5", "a-b", "1-70000"].iter().enumerate() {
            assert_eq!(bindings["81/tcp"][index]["HostPort"], *left, "the engine complains about it");
        }
    }

    #[test]
    fn all_ports_of_an_image_and_of_a_client_are_bound_but_those_that_are() {
        let mut wish = json!({ "Image": "web", "exposedports": { "81/tcp": {}, "82/tcp": {} }, "HostConfig": {
            "PublishAllPorts": true, "portbindings": { "82/tcp": [{ "HostPort": "8082" }], "83/udp": [] },
        } });
        assert_eq!(image_of_all(&wish), Some("web"));
        let exposed = ["80/tcp", "81/tcp", "83/udp"].map(str::to_owned);
        let mut next = 20_000;
        let changed = settle_all(&mut wish, &exposed, Some([127, 0, 0, 1].into()), |_| {
            next += 1;
            Some(next)
        });
        assert_eq!(changed, Ok(true));
        let here = |port: &str| json!([{ "HostIp": "127.0.0.1", "HostPort": port }]);
        let expected = json!({
            "80/tcp": here("20002"), "81/tcp": here("20001"), "82/tcp": [{ "HostPort": "8082" }], "83/udp": here("20003"),
        });
        assert_eq!(wish["HostConfig"]["portbindings"], expected);
        assert!(!settle_all(&mut wish, &exposed, None, |_| Some(1)).unwrap(), "nothing is left to bind");
        let mut bare = json!({ "Image": "web", "HostConfig": { "PublishAllPorts": true } });
        assert!(settle_all(&mut bare, &exposed[..1], None, |_| Some(1)).unwrap());
        assert_eq!(
            bare["HostConfig"]["PortBindings"],
            json!({ "80/tcp": [{ "HostIp": "", "HostPort": "1" }] })
        );
    }

    #[test]
    fn an_sctp_port_is_refused_if_it_is_to_be_published() {
        let wish =
            |bindings: Value| json!({ "HostConfig": { "PortBindings": bindings, "PublishAllPorts": true } });
        for (bindings, refused) in [
            (json!({ "80/tcp": [{ "HostPort": "80" }], "9/sctp": [{ "HostPort": "9" }] }), true),
            (json!({ "9/SCTP": [{}] }), true),
            (json!({ "9/sctp": [], "10/sctp": null, "80": [{ "HostPort": "80" }] }), false),
        ] {
            let settled = settle(&mut wish(bindings.clone()), None, |_| None);
            assert_eq!(settled.is_err(), refused, "{bindings}");
        }
        for network in ["host", "none", "container:web"] {
            let bindings = json!({ "9/sctp": [{}], "80/tcp": [{}] });
            let mut wish = json!({ "HostConfig": { "NetworkMode": network, "PortBindings": bindings } });
            let before = wish.clone();
            settle(&mut wish, None, |_| Some(1)).unwrap();
            assert_eq!(wish, before, "{network}: the engine heeds none of them");
        }
        let exposed = ["9/sctp".to_owned()];
        let refusal = settle_all(&mut wish(json!({})), &exposed, None, |_| Some(1)).unwrap_err();
        assert_eq!(refusal, "9/sctp: sctp ports can't be published from a VM");
    }

    #[test]
    fn no_container_takes_all_numbers_that_there_are() {
        let wish = |count| json!({ "HostConfig": { "PortBindings": { "80/tcp": vec![json!({}); count] } } });
        let mut asked = 0;
        let mut choose = |_| {
            asked += 1;
            Some(1)
        };
        assert_eq!(settle(&mut wish(BINDINGS_MAX), None, &mut choose), Ok(()));
        assert!(settle(&mut wish(BINDINGS_MAX + 1), None, &mut choose).is_err());
        assert_eq!(asked, BINDINGS_MAX);
    }

    #[test]
    fn an_image_is_asked_only_for_a_container_with_ports_of_the_host() {
        let wish = |config: Value| json!({ "Image": "web", "HostConfig": config });
        for (config, is_asked) in [
            (json!({ "PublishAllPorts": true, "NetworkMode": "default" }), true),
            (json!({ "publishallports": true, "NetworkMode": "mine" }), true),
            (json!({ "PublishAllPorts": false }), false),
            (json!({ "PublishAllPorts": "true" }), false),
            (json!({ "PublishAllPorts": true, "NetworkMode": "host" }), false),
            (json!({ "PublishAllPorts": true, "NetworkMode": "none" }), false),
            (json!({ "PublishAllPorts": true, "NetworkMode": "container:web" }), false),
            (json!({}), false),
            (json!(null), false),
        ] {
            assert_eq!(image_of_all(&wish(config.clone())).is_some(), is_asked, "{config}");
        }
    }

    #[test]
    fn nothing_changes_where_nothing_is_to_be_chosen() {
        for body in [
            r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":"80"}]}}}"#,
            r#"{"HostConfig":{"PortBindings":{}}}"#,
            r#"{"HostConfig":null,"PortBindings":{"80/tcp":[{}]}}"#,
            r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":7}]}}}"#,
            "[]",
        ] {
            let mut wish: Value = serde_json::from_str(body).unwrap();
            settle(&mut wish, None, |_| Some(1)).unwrap();
            assert_eq!(wish.to_string(), body);
        }
        let mut wish = json!({ "HostConfig": { "PortBindings": { "80/tcp": [{}] } } });
        let before = wish.clone();
        settle(&mut wish, None, |_| None).unwrap();
        assert_eq!(wish, before, "with no number to give the engine chooses");
    }
}
