//! `dorm stats`.

use std::io::{self, IsTerminal, Write};

use clap::Args;
use dormouse_client::{Engine, Target};
use futures_util::future::join_all;
use serde_json::Value;

use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::format::listing::{Listing, Row};
use crate::format::units;
use crate::operation::Operation;

#[derive(Args)]
pub(crate) struct Stats {
    /// Which ones; all that run when none is named.
    #[arg(value_name = "CONTAINER")]
    containers: Vec<String>,
    /// Also those that don't run.
    #[arg(short, long)]
    all: bool,
    /// table, json, or a template.
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Once, instead of again and again.
    #[arg(long)]
    no_stream: bool,
    /// Cut nothing off.
    #[arg(long)]
    no_trunc: bool,
}

const COLUMNS: &[(&str, &str)] = &[
    ("Container", "CONTAINER"),
    ("ID", "CONTAINER ID"),
    ("Name", "NAME"),
    ("CPUPerc", "CPU %"),
    ("MemUsage", "MEM USAGE / LIMIT"),
    ("MemPerc", "MEM %"),
    ("NetIO", "NET I/O"),
    ("BlockIO", "BLOCK I/O"),
    ("PIDs", "PIDS"),
];

impl Stats {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let operation = context.operation("dorm stats", false).await?;
        operation.during(self.in_engine(&operation)).await
    }

    async fn in_engine(&self, operation: &Operation) -> Done {
        loop {
            let text = self.round(&operation.engine).await?.text(self.format.as_deref(), None)?;
            let mut out = io::stdout().lock();
            if !self.no_stream && out.is_terminal() {
                // To the upper left corner, and nothing below.
                write!(out, "\x1b[H\x1b[J")?;
            }
            out.write_all(text.as_bytes())?;
            out.flush()?;
            if self.no_stream {
                return Ok(SUCCESS);
            }
        }
    }

    /// One look at each. The engine takes a second for it: it measures twice.
    async fn round(&self, engine: &Engine) -> Result<Listing, Failure> {
        let names = if self.containers.is_empty() {
            let target = Target::new("/containers/json").when("all", self.all).text();
            let running: Vec<Value> = engine.get(&target).await?;
            running.iter().filter_map(|container| container["Id"].as_str().map(str::to_owned)).collect()
        } else {
            self.containers.clone()
        };
        let looks = names.iter().map(|name| async move {
            let target = Target::of("containers", name, "/stats").with("stream", "0").text();
            (name, engine.get::<Value>(&target).await)
        });
        let usual = ["ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs"];
        let mut listing = Listing::new(COLUMNS, &usual);
        for (name, seen) in join_all(looks).await {
            match seen {
                Ok(stats) => listing.push(row(name, &stats, !self.no_trunc)),
                // One that has just gone is missed by nobody, unless it was named.
                Err(error) if error.is_not_found() && self.containers.is_empty() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(listing)
    }
}

fn row(name: &str, stats: &Value, cut: bool) -> Row {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let text = |key: &str| stats[key].as_str().unwrap_or_default();
    let (memory, limit) = (&stats["memory_stats"], number(&stats["memory_stats"]["limit"]));
    // The page cache that can go at any time is not counted.
    let used = (number(&memory["usage"]) - number(&memory["stats"]["inactive_file"])).max(0.0);
    let memory_share = if limit > 0.0 { used / limit * 100.0 } else { 0.0 };
    let networks = stats["networks"].as_object().cloned().unwrap_or_default();
    let network = |key: &str| networks.values().map(|network| number(&network[key])).sum::<f64>();
    let blocks = stats["blkio_stats"]["io_service_bytes_recursive"].as_array().cloned().unwrap_or_default();
    let block = |what: &str| {
        let of_kind = blocks
            .iter()
            .filter(|entry| entry["op"].as_str().is_some_and(|op| op.eq_ignore_ascii_case(what)));
        of_kind.map(|entry| number(&entry["value"])).sum::<f64>()
    };
    let id = text("id");
    Row::default()
        .with("Container", name)
        .with("ID", if cut { units::short_id(id) } else { id })
        .with("Name", text("name").trim_start_matches('/'))
        .with("CPUPerc", format!("{:.2}%", cpu_share(stats)))
        .with("MemUsage", format!("{} / {}", units::binary_size(used), units::binary_size(limit)))
        .with("MemPerc", format!("{memory_share:.2}%"))
        .with("NetIO", format!("{} / {}", units::size(network("rx_bytes")), units::size(network("tx_bytes"))))
        .with("BlockIO", format!("{} / {}", units::size(block("read")), units::size(block("write"))))
        .with("PIDs", stats["pids_stats"]["current"].as_u64().unwrap_or(0).to_string())
}

/// Of one processor, between the two looks.
fn cpu_share(stats: &Value) -> f64 {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let (now, before) = (&stats["cpu_stats"], &stats["precpu_stats"]);
    let used = number(&now["cpu_usage"]["total_usage"]) - number(&before["cpu_usage"]["total_usage"]);
    let all = number(&now["system_cpu_usage"]) - number(&before["system_cpu_usage"]);
    let processors = now["online_cpus"].as_f64().unwrap_or(1.0);
    if used > 0.0 && all > 0.0 { used / all * processors * 100.0 } else { 0.0 }
}
