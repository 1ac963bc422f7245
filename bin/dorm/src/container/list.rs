//! `dorm ps`.

use clap::Args;
use dormouse_client::Target;
use serde_json::Value;

use crate::context::Context;
use crate::error::Done;
use crate::format::listing::{Listing, Row};
use crate::format::units;
use crate::value::filters;

/// Longest command that is shown, in characters.
const COMMAND_WIDTH: usize = 20;
/// Longest name of a mount that is shown.
const MOUNT_WIDTH: usize = 15;

#[derive(Args)]
pub(crate) struct List {
    /// Also those that don't run.
    #[arg(short, long)]
    all: bool,
    /// Only those that fit: NAME=VALUE.
    #[arg(short, long, value_name = "FILTER", value_parser = crate::value::filter)]
    filter: Vec<String>,
    /// table, json, or a template.
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// The last N that were made, running or not.
    #[arg(short = 'n', long, value_name = "N", conflicts_with = "latest")]
    last: Option<u32>,
    /// The last one that was made.
    #[arg(short, long)]
    latest: bool,
    /// Cut nothing off.
    #[arg(long)]
    no_trunc: bool,
    /// Ids only.
    #[arg(short, long)]
    quiet: bool,
    /// Sizes as well.
    #[arg(short, long)]
    size: bool,
}

pub(crate) const COLUMNS: &[(&str, &str)] = &[
    ("ID", "CONTAINER ID"),
    ("Image", "IMAGE"),
    ("Command", "COMMAND"),
    ("RunningFor", "CREATED"),
    ("CreatedAt", "CREATED AT"),
    ("Status", "STATUS"),
    ("State", "STATE"),
    ("Ports", "PORTS"),
    ("Names", "NAMES"),
    ("Size", "SIZE"),
    ("Labels", "LABELS"),
    ("Mounts", "MOUNTS"),
    ("LocalVolumes", "LOCAL VOLUMES"),
    ("Networks", "NETWORKS"),
];

impl List {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let with_size = self.size || self.format.as_deref().is_some_and(|format| format.contains(".Size"));
        let limit = if self.latest { Some(1) } else { self.last };
        let target = Target::new("/containers/json")
            .when("all", self.all)
            .maybe("limit", limit.map(|limit| limit.to_string()))
            .when("size", with_size && !self.quiet)
            .maybe("filters", filters(&self.filter)?)
            .text();
        let operation = context.reading().await?;
        let containers: Vec<Value> =
            operation.during(async { Ok(operation.engine.get(&target).await?) }).await?;
        let mut usual = vec!["ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names"];
        if self.size {
            usual.push("Size");
        }
        let mut listing = Listing::new(COLUMNS, &usual);
        let now = jiff::Timestamp::now().as_second();
        for container in &containers {
            listing.push(row(container, !self.no_trunc, now));
        }
        listing.print(self.format.as_deref(), self.quiet.then_some("ID"))
    }
}

/// A list's row; cut where it would be too wide.
pub(crate) fn row(container: &Value, cut: bool, now: i64) -> Row {
    let text = |key: &str| container[key].as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let id = text("Id");
    let command = if cut { units::ellipsis(&text("Command"), COMMAND_WIDTH) } else { text("Command") };
    let created = container["Created"].as_i64().unwrap_or(0);
    let names: Vec<_> = list(&container["Names"])
        .iter()
        .filter_map(|name| name.as_str()?.strip_prefix('/').map(str::to_owned))
        // The others are links.
        .filter(|name| !cut || !name.contains('/'))
        .collect();
    let mounts = list(&container["Mounts"]);
    let shown: Vec<_> = mounts
        .iter()
        .map(|mount| mount["Name"].as_str().filter(|name| !name.is_empty()).or(mount["Source"].as_str()))
        .map(|name| name.unwrap_or_default())
        .map(|name| if cut { units::ellipsis(name, MOUNT_WIDTH) } else { name.to_owned() })
        .collect();
    let volumes = mounts.iter().filter(|mount| mount["Driver"] == "local").count();
    let networks: Vec<_> = container["NetworkSettings"]["Networks"]
        .as_object()
        .map(|networks| networks.keys().cloned().collect())
        .unwrap_or_default();
    Row::default()
        .with("ID", if cut { units::short_id(&id) } else { &id })
        .with("Image", image(container, cut))
        .with("Command", Value::from(command).to_string())
        .with("CreatedAt", units::go_time(created))
        .with("RunningFor", format!("{} ago", units::duration(now - created)))
        .with("Status", text("Status"))
        .with("State", text("State"))
        .with("Ports", ports(&list(&container["Ports"])))
        .with("Names", names.join(","))
        .with("Size", size(container))
        .with("Mounts", shown.join(","))
        .with("LocalVolumes", volumes.to_string())
        .with("Networks", networks.join(","))
        .labels(&container["Labels"])
}

fn image(container: &Value, cut: bool) -> String {
    let name = container["Image"].as_str().unwrap_or_default();
    let id = container["ImageID"].as_str().unwrap_or_default();
    if name.is_empty() {
        return "<no image>".to_owned();
    }
    if !cut {
        return name.to_owned();
    }
    let short = units::short_id(id);
    if !short.is_empty() && units::short_id(name) == short {
        return short.to_owned();
    }
    // A digest says nothing that a tag beside it doesn't say shorter.
    match name.split_once('@') {
        Some((tagged, _)) if tagged.rsplit('/').next().is_some_and(|last| last.contains(':')) => {
            tagged.to_owned()
        }
        _ => name.to_owned(),
    }
}

fn size(container: &Value) -> String {
    let bytes = |key: &str| container[key].as_f64().unwrap_or(0.0);
    let own = units::size(bytes("SizeRw"));
    if bytes("SizeRootFs") > 0.0 {
        format!("{own} (virtual {})", units::size(bytes("SizeRootFs")))
    } else {
        own
    }
}

/// Ports as docker groups them: ranges of those that are the same on both sides, then the others.
pub(super) fn ports(ports: &[Value]) -> String {
    let mut ports: Vec<(u64, String, u64, String)> = ports
        .iter()
        .map(|port| {
            let text = |key: &str| port[key].as_str().unwrap_or_default().to_owned();
            let number = |key: &str| port[key].as_u64().unwrap_or(0);
            (number("PrivatePort"), text("IP"), number("PublicPort"), text("Type"))
        })
        .collect();
    ports.sort();
    let mut shown = Vec::new();
    let mut mapped = Vec::new();
    let mut groups: Vec<((String, String), u64, u64)> = Vec::new();
    for (private, address, public, protocol) in ports {
        if !address.is_empty() && public != private {
            mapped.push(format!("{address}:{public}->{private}/{protocol}"));
            continue;
        }
        let key = (address, protocol);
        match groups.iter_mut().find(|(known, _, _)| *known == key) {
            None => groups.push((key, private, private)),
            Some((_, _, last)) if private == *last + 1 => *last = private,
            Some(group) => {
                shown.push(grouped(group));
                (group.1, group.2) = (private, private);
            }
        }
    }
    shown.extend(groups.iter().map(grouped));
    shown.extend(mapped);
    shown.join(", ")
}

fn grouped(((address, protocol), first, last): &((String, String), u64, u64)) -> String {
    let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
    if address.is_empty() {
        format!("{range}/{protocol}")
    } else {
        format!("{address}:{range}->{range}/{protocol}")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ports_are_grouped_as_docker_groups_them() {
        let port = |private: u64, address: &str, public: u64| json!({ "PrivatePort": private, "PublicPort": public, "IP": address, "Type": "tcp" });
        let several = [
            port(81, "", 0),
            port(80, "", 0),
            port(90, "0.0.0.0", 9090),
            port(91, "0.0.0.0", 91),
            port(92, "0.0.0.0", 92),
            port(99, "", 0),
        ];
        assert_eq!(ports(&several), "80-81/tcp, 99/tcp, 0.0.0.0:91-92->91-92/tcp, 0.0.0.0:9090->90/tcp");
        assert_eq!(ports(&[]), "");
    }

    #[test]
    fn a_row_is_what_docker_shows() {
        let container = json!({
            "Id": "0123456789abcdef", "Names": ["/one", "/two/alias"], "Image": "sha256:aaaaaaaaaaaabbbb",
            "ImageID": "sha256:aaaaaaaaaaaabbbb", "Command": "sh -c 'exit 7' and much more", "Created": 1_714_560_000,
            "Status": "Up 3 seconds", "State": "running", "Labels": {"a": "1"}, "Ports": [], "Mounts": [],
        });
        let mut listing = Listing::new(COLUMNS, &["ID", "Image", "Command", "RunningFor", "Names"]);
        listing.push(row(&container, true, 1_714_560_180));
        let Ok(text) = listing.text(None, None) else { panic!("a table") };
        let wanted = "0123456789ab   aaaaaaaaaaaa   \"sh -c 'exit 7' and …\"   3 minutes ago   one\n";
        assert_eq!(text.lines().last().map(|line| format!("{line}\n")).as_deref(), Some(wanted));
    }
}
