//! What a container publishes, as its engine tells it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// What is spoken on a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

/// A door on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Door {
    pub(crate) protocol: Protocol,
    pub(crate) address: SocketAddr,
}

/// As Go's errors have it, which Docker's users know: `tcp4 127.0.0.1:80`.
impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match (self.protocol, self.address.is_ipv4()) {
            (Protocol::Tcp, true) => "tcp4",
            (Protocol::Tcp, false) => "tcp6",
            (Protocol::Udp, true) => "udp4",
            (Protocol::Udp, false) => "udp6",
        };
        write!(f, "{protocol} {}", self.address)
    }
}

/// Who is behind a door.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Behind {
    /// The container's id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// The engine starts it again when the VM is booted again.
    pub(crate) restarts: bool,
    /// Where it listens, as seen in the guest. `None` before it runs.
    pub(crate) target: Option<SocketAddr>,
}

/// A container as `GET /containers/ID/json` tells it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Container {
    pub(crate) id: String,
    name: String,
    state: State,
    host_config: HostConfig,
    network_settings: NetworkSettings,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    running: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HostConfig {
    #[serde(default)]
    port_bindings: Option<Bindings>,
    #[serde(default)]
    restart_policy: Option<RestartPolicy>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RestartPolicy {
    #[serde(default)]
    name: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NetworkSettings {
    #[serde(default)]
    ports: Option<Bindings>,
    #[serde(default)]
    networks: Option<BTreeMap<String, Network>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Network {
    #[serde(rename = "IPAddress", default)]
    address: String,
    #[serde(rename = "Gateway", default)]
    gateway: String,
}

/// By the container's port, such as `80/tcp`.
type Bindings = BTreeMap<String, Option<Vec<Binding>>>;

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Binding {
    #[serde(default)]
    host_ip: String,
    #[serde(default)]
    host_port: String,
}

impl Container {
    /// Reads the engine's answer.
    pub(crate) fn parse(body: &[u8]) -> serde_json::Result<Self> {
        let mut container: Self = serde_json::from_slice(body)?;
        if let Some(name) = container.name.strip_prefix('/') {
            container.name = name.to_owned();
        }
        Ok(container)
    }

    /// The doors that this container wants, and what is behind each. One that doesn't run yet has those only whose
    /// numbers were given. A binding without an address gets `default`.
    pub(crate) fn doors(&self, default: IpAddr) -> BTreeMap<Door, Behind> {
        let wanted = if self.state.running { self.actual(default) } else { self.given(default) };
        wanted.into_iter().map(|(door, port)| (door, self.behind(port))).collect()
    }

    fn behind(&self, port: u16) -> Behind {
        let policy = self.host_config.restart_policy.as_ref();
        Behind {
            id: self.id.clone(),
            name: self.name.clone(),
            restarts: policy
                .is_some_and(|policy| matches!(policy.name.as_str(), "always" | "unless-stopped")),
            target: self
                .address()
                .filter(|_| self.state.running)
                .map(|address| SocketAddr::new(address, port)),
        }
    }

    /// Where the guest reaches it: best in a network in which the guest is, as the gateway.
    fn address(&self) -> Option<IpAddr> {
        let networks = || self.network_settings.networks.iter().flatten().map(|(_, network)| network);
        let with_gateway = networks().filter(|network| !network.gateway.is_empty());
        with_gateway.chain(networks()).find_map(|network| network.address.parse().ok())
    }

    /// From the wish alone: numbers that were given.
    fn given(&self, default: IpAddr) -> Vec<(Door, u16)> {
        let mut doors = Vec::new();
        for (protocol, inside, binding) in each(self.host_config.port_bindings.as_ref()) {
            let Ok(port @ 1..) = binding.host_port.parse() else { continue };
            if let Some(address) = binding.address(default) {
                doors.push((Door { protocol, address: SocketAddr::new(address, port) }, inside));
            }
        }
        doors
    }

    /// From what the engine did: each number that it has bound in the guest, at the address that was wished for.
    fn actual(&self, default: IpAddr) -> Vec<(Door, u16)> {
        let wishes: Vec<_> = each(self.host_config.port_bindings.as_ref()).collect();
        let mut doors = Vec::new();
        for (protocol, inside, bound) in each(self.network_settings.ports.as_ref()) {
            let Ok(port @ 1..) = bound.host_port.parse() else { continue };
            let wish = wishes.iter().find(|(wished, wished_inside, wish)| {
                (*wished, *wished_inside) == (protocol, inside) && wish.covers(bound, port)
            });
            let address = match wish {
                Some((.., wish)) => wish.address(default),
                // Nobody named an address: `--publish-all`.
                None => Some(default),
            };
            if let Some(address) = address {
                doors.push((Door { protocol, address: SocketAddr::new(address, port) }, inside));
            }
        }
        doors
    }
}

impl Binding {
    /// The address on the host.
    fn address(&self, default: IpAddr) -> Option<IpAddr> {
        if self.host_ip.is_empty() { Some(default) } else { self.host_ip.parse().ok() }
    }

    /// Can `bound`, with this number, have come from this wish?
    fn covers(&self, bound: &Self, port: u16) -> bool {
        let same_address = self.host_ip == bound.host_ip
            || self.host_ip.is_empty() && matches!(bound.host_ip.as_str(), "" | "0.0.0.0" | "::");
        let (first, last) = self.host_port.split_once('-').unwrap_or((&self.host_port, &self.host_port));
        let in_range = match (first.parse::<u16>(), last.parse::<u16>()) {
            (Ok(0), Ok(0)) => true,
            (Ok(first), Ok(last)) => (first..=last).contains(&port),
            _ => self.host_port.is_empty(),
        };
        same_address && in_range
    }
}

/// Bindings one by one, with the protocol and the container's port. Others than TCP's and UDP's aren't forwarded.
fn each(bindings: Option<&Bindings>) -> impl Iterator<Item = (Protocol, u16, &Binding)> {
    bindings.into_iter().flatten().flat_map(|(inside, bindings)| {
        let (port, protocol) = inside.split_once('/').unwrap_or((inside, "tcp"));
        let protocol = match protocol {
            "tcp" => Some(Protocol::Tcp),
            "udp" => Some(Protocol::Udp),
            _ => None,
        };
        let inside = protocol.zip(port.parse().ok());
        let bindings = bindings.iter().flatten();
        bindings.filter_map(move |binding| inside.map(|(protocol, port)| (protocol, port, binding)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn container(running: bool, wished: &str, bound: &str) -> Container {
        let text = format!(
            r#"{{"Id":"c1","Name":"/web","State":{{"Running":{running}}},
            "HostConfig":{{"PortBindings":{wished},"RestartPolicy":{{"Name":"always"}}}},
            "NetworkSettings":{{"Ports":{bound},"Networks":{{"none":{{"IPAddress":""}},"one":{{"IPAddress":"172.18.0.2"}}}}}}}}"#
        );
        Container::parse(text.as_bytes()).unwrap()
    }

    fn doors(container: &Container) -> Vec<String> {
        let doors = container.doors(LOCAL);
        doors.iter().map(|(door, behind)| format!("{door} > {}", behind.target.unwrap())).collect()
    }

    #[test]
    fn a_running_container_has_the_doors_that_its_engine_bound_where_they_were_wished() {
        let both = |ip4: &str, ip6: &str, port: u16| {
            format!(r#"{{"HostIp":"{ip4}","HostPort":"{port}"}},{{"HostIp":"{ip6}","HostPort":"{port}"}}"#)
        };
        for (wished, bound, expected) in [
            // Nowhere in particular: the default address, and no more.
            (
                r#"[{"HostIp":"","HostPort":"8080"}]"#,
                both("0.0.0.0", "::", 8080),
                &["tcp4 127.0.0.1:8080"][..],
            ),
            (r#"[{"HostPort":"0"}]"#, both("0.0.0.0", "::", 20_001), &["tcp4 127.0.0.1:20001"]),
            (
                r#"[{"HostIp":"","HostPort":"8000-8010"}]"#,
                both("0.0.0.0", "::", 8003),
                &["tcp4 127.0.0.1:8003"],
            ),
            // Everywhere, because somebody said so.
            (
                r#"[{"HostIp":"0.0.0.0","HostPort":"8080"},{"HostIp":"::","HostPort":"8080"}]"#,
                both("0.0.0.0", "::", 8080),
                &["tcp4 0.0.0.0:8080", "tcp6 [::]:8080"],
            ),
            (
                r#"[{"HostIp":"10.1.2.3","HostPort":"80"}]"#,
                r#"{"HostIp":"10.1.2.3","HostPort":"80"}"#.into(),
                &["tcp4 10.1.2.3:80"],
            ),
            // `--publish-all`.
            ("[]", both("0.0.0.0", "::", 32_768), &["tcp4 127.0.0.1:32768"]),
        ] {
            let container =
                container(true, &format!(r#"{{"80/tcp":{wished}}}"#), &format!(r#"{{"80/tcp":[{bound}]}}"#));
            let expected: Vec<_> = expected.iter().map(|door| format!("{door} > 172.18.0.2:80")).collect();
            assert_eq!(doors(&container), expected, "{wished}");
        }
    }

    #[test]
    fn a_container_is_reached_in_a_network_that_has_a_gateway_if_it_is_in_one() {
        let ports = r#"{"80/tcp":[{"HostPort":"8080"}]}"#;
        for (networks, expected) in [
            (
                r#"{"a":{"IPAddress":"10.0.0.2","Gateway":""},"b":{"IPAddress":"172.18.0.2","Gateway":"172.18.0.1"}}"#,
                "172.18.0.2:80",
            ),
            (r#"{"a":{"IPAddress":"10.0.0.2"},"b":{"IPAddress":"","Gateway":"172.18.0.1"}}"#, "10.0.0.2:80"),
            (
                r#"{"a":{"IPAddress":"172.17.0.2","Gateway":"172.17.0.1"},"b":{"IPAddress":"172.18.0.2","Gateway":"172.18.0.1"}}"#,
                "172.17.0.2:80",
            ),
        ] {
            let text = format!(
                r#"{{"Id":"c1","Name":"/web","State":{{"Running":true}},"HostConfig":{{"PortBindings":{ports}}},
                "NetworkSettings":{{"Ports":{ports},"Networks":{networks}}}}}"#
            );
            let container = Container::parse(text.as_bytes()).unwrap();
            let targets: Vec<_> = container
                .doors(LOCAL)
                .into_values()
                .map(|behind| behind.target.unwrap().to_string())
                .collect();
            assert_eq!(targets, [expected], "{networks}");
        }
    }

    #[test]
    fn each_binding_of_one_port_is_told_from_the_others() {
        let wished = r#"{"53/udp":[{"HostIp":"","HostPort":"53"},{"HostIp":"0.0.0.0","HostPort":"54"}],"53/tcp":null}"#;
        let bound = r#"{"53/udp":[{"HostIp":"0.0.0.0","HostPort":"53"},{"HostIp":"0.0.0.0","HostPort":"54"}],"53/tcp":null}"#;
        let doors = doors(&container(true, wished, bound));
        assert_eq!(doors, ["udp4 0.0.0.0:54 > 172.18.0.2:53", "udp4 127.0.0.1:53 > 172.18.0.2:53"]);
    }

    #[test]
    fn before_its_start_only_numbers_that_were_given_are_known() {
        let wished = r#"{"80/tcp":[{"HostPort":"8080"},{"HostPort":""},{"HostPort":"9000-9010"},{"HostPort":"0"}],
            "9/sctp":[{"HostPort":"9"}]}"#;
        let doors = container(false, wished, "{}").doors(LOCAL);
        let (door, behind) = doors.first_key_value().unwrap();
        assert_eq!((doors.len(), door.to_string().as_str()), (1, "tcp4 127.0.0.1:8080"));
        assert_eq!((behind.name.as_str(), behind.restarts, behind.target), ("web", true, None));
    }
}
