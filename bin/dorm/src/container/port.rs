//! Published ports: `[ip:][host[-end]:]container[-end][/proto]`.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

/// Most ports of one range.
const RANGE_MAX: u16 = 10_000;

/// What `-p` and `--expose` come to in the engine's words.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Ports {
    /// `ExposedPorts`.
    pub(crate) exposed: Map<String, Value>,
    /// `PortBindings`.
    pub(crate) bindings: Map<String, Value>,
}

impl Ports {
    /// Adds what one `-p` asks for.
    pub(crate) fn publish(&mut self, text: &str) -> Result<(), String> {
        let wrong = |why: &str| format!("{text:?} publishes no port: {why}");
        let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        if !matches!(protocol, "tcp" | "udp" | "sctp") {
            return Err(wrong("the protocol is tcp, udp or sctp"));
        }
        let (rest, container) =
            rest.rsplit_once(':').map_or(("", rest), |(rest, container)| (rest, container));
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => (address.trim_start_matches('[').trim_end_matches(']'), host),
            None => ("", rest),
        };
        if !address.is_empty() && address.parse::<IpAddr>().is_err() {
            return Err(wrong("its address is none"));
        }
        let container = range(container).map_err(|error| wrong(&error))?;
        let host = if host.is_empty() { None } else { Some(range(host).map_err(|error| wrong(&error))?) };
        let length = container.1 - container.0;
        // One container port can take the first free one of several.
        let several = host.filter(|host| length == 0 && host.1 > host.0);
        if let Some(host) = host
            && several.is_none()
            && host.1 - host.0 != length
        {
            return Err(wrong("its ranges are of different lengths"));
        }
        for offset in 0..=length {
            let name = format!("{}/{protocol}", container.0 + offset);
            let host_port = match (several, host) {
                (Some((first, last)), _) => format!("{first}-{last}"),
                (None, Some((first, _))) => (first + offset).to_string(),
                (None, None) => String::new(),
            };
            self.exposed.insert(name.clone(), json!({}));
            let bindings = self.bindings.entry(name).or_insert_with(|| json!([]));
            if let Some(bindings) = bindings.as_array_mut() {
                bindings.push(json!({ "HostIp": address, "HostPort": host_port }));
            }
        }
        Ok(())
    }

    /// Adds what one `--expose` asks for.
    pub(crate) fn expose(&mut self, text: &str) -> Result<(), String> {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (first, last) = range(ports)?;
        for port in first..=last {
            self.exposed.insert(format!("{port}/{protocol}"), json!({}));
        }
        Ok(())
    }
}

fn range(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} is no port"));
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(text)?, port(text)?),
    };
    if first == 0 && last > 0 || last < first || last - first > RANGE_MAX {
        return Err(format!("{text:?} is no range of ports"));
    }
    Ok((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bindings(text: &str) -> Result<String, String> {
        let mut ports = Ports::default();
        ports.publish(text)?;
        Ok(Value::Object(ports.bindings).to_string())
    }

    #[test]
    fn every_form_is_understood() {
        for (text, wanted) in [
            ("80", r#"{"80/tcp":[{"HostIp":"","HostPort":""}]}"#),
            ("8080:80", r#"{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}"#),
            ("127.0.0.1:8080:80/udp", r#"{"80/udp":[{"HostIp":"127.0.0.1","HostPort":"8080"}]}"#),
            ("127.0.0.1::80", r#"{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":""}]}"#),
            ("[::1]:8080:80", r#"{"80/tcp":[{"HostIp":"::1","HostPort":"8080"}]}"#),
            (
                "8000-8001:80-81",
                r#"{"80/tcp":[{"HostIp":"","HostPort":"8000"}],"81/tcp":[{"HostIp":"","HostPort":"8001"}]}"#,
            ),
            ("8000-8009:80", r#"{"80/tcp":[{"HostIp":"","HostPort":"8000-8009"}]}"#),
        ] {
            assert_eq!(bindings(text).as_deref(), Ok(wanted), "{text}");
        }
    }

    #[test]
    fn what_publishes_nothing_is_refused() {
        for text in ["", "x", "80/icmp", "8000-8001:80-82", "81-80", "70000", "1:2:3", "a:1:2", ":"] {
            assert!(bindings(text).is_err(), "{text}");
        }
    }
}
