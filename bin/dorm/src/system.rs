//! `dorm system`: the engine as a whole.

use std::io::{self, Write};

use clap::{Args, Subcommand};
use dormouse_client::{Call, Target};
use http::Method;
use serde_json::Value;

use crate::container::prune::{self, PruneOptions};
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::format::listing::{Listing, Row};
use crate::format::template::Template;
use crate::format::units;
use crate::operation::Operation;
use crate::output::print;
use crate::session::Session;
use crate::usage::Usage;
use crate::value::{filters, moment};

/// `dorm system`.
#[derive(Subcommand)]
pub(crate) enum System {
    /// Join standard input and output with the session's Docker socket.
    DialStdio,
    /// Tell what takes how much of the session's disk.
    Df(Df),
    /// Tell what happens in the engine.
    Events(Events),
    /// Tell everything of the engine.
    Info(Info),
    /// Remove what nobody uses.
    Prune(Prune),
    /// The same as `dorm session`.
    #[command(subcommand)]
    Session(Session),
}

#[derive(Args)]
pub(crate) struct Df {
    /// table, json, or a template.
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Only what all sessions take on the host. Wakes nothing.
    #[arg(long, conflicts_with = "verbose")]
    host: bool,
    /// Each image, container and volume by itself.
    #[arg(short, long)]
    verbose: bool,
}

#[derive(Args)]
pub(crate) struct Events {
    /// Only those that fit: NAME=VALUE.
    #[arg(short, long, value_name = "FILTER", value_parser = crate::value::filter)]
    filter: Vec<String>,
    /// json, or a template.
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// From this time on.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Up to this time.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
}

#[derive(Args)]
pub(crate) struct Info {
    /// json, or a template.
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
}

#[derive(Args)]
pub(crate) struct Prune {
    /// All images that no container uses.
    #[arg(short, long)]
    all: bool,
    /// Anonymous volumes as well.
    #[arg(long)]
    volumes: bool,
    #[command(flatten)]
    options: PruneOptions,
}

/// Runs one of the commands under `dorm system`.
pub(crate) async fn run(context: &Context, command: System) -> Done {
    match command {
        System::DialStdio => crate::clients::dial_stdio(context).await,
        System::Df(df) => df.run(context).await,
        System::Events(events) => events.run(context).await,
        System::Info(info) => info.run(context).await,
        System::Prune(prune) => prune.run(context).await,
        System::Session(session) => crate::session::run(context, session).await,
    }
}

impl Df {
    async fn run(self, context: &Context) -> Done {
        if self.host {
            return crate::room::of_host(context).await?.print(self.format.as_deref(), None);
        }
        let operation = context.operation("dorm system df", false).await?;
        let used: Value = operation.during(async { Ok(operation.engine.get("/system/df").await?) }).await?;
        if self.verbose {
            let now = jiff::Timestamp::now().as_second();
            return Usage::of(&used, now).print(self.format.as_deref());
        }
        let columns = &[
            ("Type", "TYPE"),
            ("TotalCount", "TOTAL"),
            ("Active", "ACTIVE"),
            ("Size", "SIZE"),
            ("Reclaimable", "RECLAIMABLE"),
        ];
        let mut listing = Listing::new(columns, &["Type", "TotalCount", "Active", "Size", "Reclaimable"]);
        for part in parts(&used) {
            let share = if part.size > 0.0 { part.free / part.size * 100.0 } else { 0.0 };
            let free = units::size_in_four_digits(part.free);
            let row = Row::default()
                .with("Type", part.kind)
                .with("TotalCount", part.total.to_string())
                .with("Active", part.active.to_string())
                .with("Size", units::size_in_four_digits(part.size))
                .with(
                    "Reclaimable",
                    if part.size > 0.0 && part.kind != "Build Cache" {
                        format!("{free} ({:.0}%)", share.trunc())
                    } else {
                        free
                    },
                );
            listing.push(row);
        }
        listing.print(self.format.as_deref(), None)?;
        // Scripts that name a format want docker's rows, and no others.
        if self.format.is_none() {
            print("")?;
            crate::room::of_host(context).await?.print(None, None)?;
        }
        Ok(SUCCESS)
    }
}

/// What takes room.
struct Part {
    kind: &'static str,
    total: usize,
    active: usize,
    size: f64,
    free: f64,
}

fn parts(used: &Value) -> Vec<Part> {
    let list = |key: &str| used[key].as_array().cloned().unwrap_or_default();
    let number = |value: &Value| value.as_f64().filter(|number| *number > 0.0).unwrap_or(0.0);
    let sum = |items: &[&Value], key: &str| items.iter().map(|item| number(&item[key])).sum::<f64>();
    let images = list("Images");
    let (used_images, _): (Vec<_>, Vec<_>) =
        images.iter().partition(|image| image["Containers"].as_i64().unwrap_or(0) > 0);
    let in_use: f64 =
        used_images.iter().map(|image| number(&image["Size"]) - number(&image["SharedSize"])).sum();
    let layers = number(&used["LayersSize"]);
    let containers = list("Containers");
    let (running, stopped): (Vec<_>, Vec<_>) = containers.iter().partition(|container| {
        matches!(container["State"].as_str(), Some("running" | "paused" | "restarting"))
    });
    let volumes = list("Volumes");
    let (linked, unlinked): (Vec<_>, Vec<_>) =
        volumes.iter().partition(|volume| volume["UsageData"]["RefCount"].as_i64().unwrap_or(0) > 0);
    let volume_sizes =
        |volumes: &[&Value]| volumes.iter().map(|volume| number(&volume["UsageData"]["Size"])).sum::<f64>();
    let cache = list("BuildCache");
    let (cache_used, cache_free): (Vec<_>, Vec<_>) =
        cache.iter().partition(|entry| entry["InUse"].as_bool() == Some(true));
    vec![
        Part {
            kind: "Images",
            total: images.len(),
            active: used_images.len(),
            size: layers,
            free: (layers - in_use).max(0.0),
        },
        Part {
            kind: "Containers",
            total: containers.len(),
            active: running.len(),
            size: sum(&containers.iter().collect::<Vec<_>>(), "SizeRw"),
            free: sum(&stopped, "SizeRw"),
        },
        Part {
            kind: "Local Volumes",
            total: volumes.len(),
            active: linked.len(),
            size: volume_sizes(&volumes.iter().collect::<Vec<_>>()),
            free: volume_sizes(&unlinked),
        },
        Part {
            kind: "Build Cache",
            total: cache.len(),
            active: cache_used.len(),
            size: sum(&cache.iter().collect::<Vec<_>>(), "Size"),
            free: sum(&cache_free, "Size"),
        },
    ]
}

impl Events {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let template = match self.format.as_deref() {
            None | Some("json") => None,
            Some(text) => Some(Template::new(text).map_err(Failure::new)?),
        };
        let moments = [&self.since, &self.until].map(|time| time.as_deref().map(moment).transpose());
        let [since, until] = moments.map(|time| time.map_err(Failure::new));
        let target = Target::new("/events")
            .maybe("since", since?)
            .maybe("until", until?)
            .maybe("filters", filters(&self.filter)?)
            .text();
        let operation = context.reading().await?;
        operation.during(self.follow(&operation, &target, template.as_ref())).await
    }

    async fn follow(&self, operation: &Operation, target: &str, template: Option<&Template>) -> Done {
        let reply = operation.engine.send(Call::new(Method::GET, target)).await?;
        let mut lines = reply.lines();
        loop {
            let next = lines.next::<Value>().await;
            let Some(event) =
                next.map_err(|error| Failure::Lost(format!("the events broke off: {error}")))?
            else {
                return Ok(SUCCESS);
            };
            match (template, self.format.is_some()) {
                (Some(template), _) => print(template.apply(&event).map_err(Failure::new)?)?,
                (None, true) => print(event.to_string())?,
                (None, false) => print(in_words(&event))?,
            };
        }
    }
}

/// An event in docker's one line.
fn in_words(event: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let nanos = event["timeNano"].as_i64().unwrap_or(0);
    let time = jiff::Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or_default();
    let time = time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%dT%H:%M:%S.%9f%:z").to_string();
    let time = time.strip_suffix("+00:00").map_or(time.clone(), |utc| format!("{utc}Z"));
    let mut attributes: Vec<_> = event["Actor"]["Attributes"]
        .as_object()
        .map(|attributes| attributes.iter().map(|(key, value)| format!("{key}={}", text(value))).collect())
        .unwrap_or_default();
    attributes.sort();
    let mut line =
        format!("{time} {} {} {}", text(&event["Type"]), text(&event["Action"]), text(&event["Actor"]["ID"]));
    if !attributes.is_empty() {
        line.push_str(&format!(" ({})", attributes.join(", ")));
    }
    line
}

impl Info {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let operation = context.reading().await?;
        let info: Value = operation.during(async { Ok(operation.engine.get("/info").await?) }).await?;
        match self.format.as_deref() {
            Some("json") => print(info.to_string()),
            Some(text) => {
                print(Template::new(text).and_then(|template| template.apply(&info)).map_err(Failure::new)?)
            }
            None => {
                let session = context.open(&context.pick(None)).await?;
                let mut out = io::stdout().lock();
                writeln!(out, "Session: {}", session.name)?;
                writeln!(out, " VM: {} (start {})", crate::session::phase(&session), session.vm.start_count)?;
                writeln!(out, " Docker Socket: {}", session.docker_socket.display())?;
                out.write_all(engine_in_words(&info).as_bytes())?;
                Ok(SUCCESS)
            }
        }
    }
}

fn engine_in_words(info: &Value) -> String {
    let shown = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut text = String::from("Engine:\n");
    for (key, title) in [
        ("Containers", "Containers"),
        ("ContainersRunning", " Running"),
        ("ContainersPaused", " Paused"),
        ("ContainersStopped", " Stopped"),
        ("Images", "Images"),
        ("ServerVersion", "Server Version"),
        ("Driver", "Storage Driver"),
        ("LoggingDriver", "Logging Driver"),
        ("CgroupDriver", "Cgroup Driver"),
        ("CgroupVersion", "Cgroup Version"),
        ("DefaultRuntime", "Default Runtime"),
        ("KernelVersion", "Kernel Version"),
        ("OperatingSystem", "Operating System"),
        ("OSType", "OSType"),
        ("Architecture", "Architecture"),
        ("NCPU", "CPUs"),
    ] {
        text.push_str(&format!(" {title}: {}\n", shown(&info[key])));
    }
    let memory = units::binary_size(info["MemTotal"].as_f64().unwrap_or(0.0));
    text.push_str(&format!(" Total Memory: {memory}\n"));
    for (key, title) in [
        ("Name", "Name"),
        ("ID", "ID"),
        ("DockerRootDir", "Docker Root Dir"),
        ("LiveRestoreEnabled", "Live Restore Enabled"),
    ] {
        text.push_str(&format!(" {title}: {}\n", shown(&info[key])));
    }
    text
}

impl Prune {
    async fn run(self, context: &Context) -> Done {
        let mut what = String::from(
            "This will remove:\n  - all stopped containers\n  - all networks not used by at least one container\n",
        );
        if self.volumes {
            what.push_str("  - all anonymous volumes not used by at least one container\n");
        }
        what.push_str(if self.all {
            "  - all images without at least one container associated to them\n"
        } else {
            "  - all dangling images\n"
        });
        what.push_str("  - unused build cache\n");
        if !self.options.agreed(&what)? {
            return Ok(SUCCESS);
        }
        let operation = context.operation("dorm system prune", false).await?;
        let pruned = operation
            .during(async {
                let engine = &operation.engine;
                let mut pruned = prune::containers(engine, &self.options.filter).await?;
                pruned.and(crate::network::prune(engine, &self.options.filter).await?);
                if self.volumes {
                    pruned.and(crate::volume::prune(engine, false, &self.options.filter).await?);
                }
                pruned.and(crate::image::prune_images(engine, self.all, &self.options.filter).await?);
                let target = Target::new("/build/prune").when("all", self.all).text();
                let cache: Value = engine.post(&target).await?;
                pruned.and(prune::Pruned::of(&cache, "CachesDeleted", "Deleted build cache objects:"));
                Ok(pruned)
            })
            .await?;
        pruned.print()
    }
}
