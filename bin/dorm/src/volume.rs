//! `dorm volume`.

use clap::{Args, Subcommand};
use dormouse_client::{Engine, Target};
use serde_json::{Value, json};

use crate::container::prune::{PruneOptions, Pruned};
use crate::container::variables::{labels, pairs};
use crate::context::Context;
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::format::listing::{Listing, Row};
use crate::inspect::{Kind, Names};
use crate::output::print;
use crate::value::filters;

/// `dorm volume`.
#[derive(Subcommand)]
pub(crate) enum Volume {
    /// Make a volume.
    Create(Create),
    /// Tell everything of volumes.
    Inspect(Names),
    /// List volumes.
    #[command(visible_alias = "list")]
    Ls(List),
    /// Remove volumes that nobody uses.
    Prune(Prune),
    /// Remove volumes.
    #[command(visible_aliases = ["remove", "delete"])]
    Rm(Remove),
}

#[derive(Args)]
pub(crate) struct Create {
    /// The driver.
    #[arg(short, long, value_name = "DRIVER", default_value = "local")]
    driver: String,
    /// An option of the driver.
    #[arg(short, long, value_name = "NAME=VALUE")]
    opt: Vec<String>,
    /// Label it.
    #[arg(long, value_name = "NAME[=VALUE]")]
    label: Vec<String>,
    /// What to call it; the engine finds a name when absent.
    name: Option<String>,
}

#[derive(Args)]
pub(crate) struct List {
    /// Only those that fit: NAME=VALUE.
    #[arg(short, long, value_name = "FILTER", value_parser = crate::value::filter)]
    filter: Vec<String>,
    /// table, json, or a template.
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Names only.
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Args)]
pub(crate) struct Prune {
    /// Also those that have a name.
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    options: PruneOptions,
}

#[derive(Args)]
pub(crate) struct Remove {
    /// Say nothing of those that don't exist.
    #[arg(short, long)]
    force: bool,
    /// Which ones.
    #[arg(required = true, value_name = "VOLUME")]
    names: Vec<String>,
}

pub(crate) const COLUMNS: &[(&str, &str)] = &[
    ("Driver", "DRIVER"),
    ("Name", "VOLUME NAME"),
    ("Scope", "SCOPE"),
    ("Mountpoint", "MOUNTPOINT"),
    ("Labels", "LABELS"),
    ("Links", "LINKS"),
    ("Size", "SIZE"),
    ("Availability", "AVAILABILITY"),
    ("Group", "GROUP"),
    ("Status", "STATUS"),
];

/// Runs one of the commands under `dorm volume`.
pub(crate) async fn run(context: &Context, command: Volume) -> Done {
    match command {
        Volume::Create(create) => create.run(context).await,
        Volume::Inspect(names) => names.run(context, Kind::Volume).await,
        Volume::Ls(list) => list.run(context).await,
        Volume::Prune(prune) => prune.run(context).await,
        Volume::Rm(remove) => remove.run(context).await,
    }
}

impl Create {
    async fn run(self, context: &Context) -> Done {
        let body = json!({
            "Name": self.name.unwrap_or_default(),
            "Driver": self.driver,
            "DriverOpts": pairs(&self.opt),
            "Labels": labels(&[], &self.label).map_err(Failure::new)?,
        });
        let operation = context.operation("dorm volume create", false).await?;
        let made: Value = operation
            .during(async { Ok(operation.engine.post_json("/volumes/create", body).await?) })
            .await?;
        print(made["Name"].as_str().unwrap_or_default())
    }
}

impl List {
    async fn run(self, context: &Context) -> Done {
        let target = Target::new("/volumes").maybe("filters", filters(&self.filter)?).text();
        let operation = context.reading().await?;
        let listed: Value = operation.during(async { Ok(operation.engine.get(&target).await?) }).await?;
        let mut volumes = listed["Volumes"].as_array().cloned().unwrap_or_default();
        volumes.sort_by(|one, other| one["Name"].as_str().cmp(&other["Name"].as_str()));
        let mut listing = Listing::new(COLUMNS, &["Driver", "Name"]);
        for volume in &volumes {
            listing.push(row(volume));
        }
        listing.print(self.format.as_deref(), self.quiet.then_some("Name"))
    }
}

/// A list's row.
pub(crate) fn row(volume: &Value) -> Row {
    let text = |key: &str| volume[key].as_str().unwrap_or_default();
    Row::default()
        .with("Driver", text("Driver"))
        .with("Name", text("Name"))
        .with("Scope", text("Scope"))
        .with("Mountpoint", text("Mountpoint"))
        .with("Links", "N/A")
        .with("Size", "N/A")
        .with("Availability", "N/A")
        .with("Group", "N/A")
        .with("Status", "N/A")
        .labels(&volume["Labels"])
}

/// Removes volumes that nobody uses.
pub(crate) async fn prune(engine: &Engine, all: bool, filter: &[String]) -> Result<Pruned, Failure> {
    let mut filter = filter.to_vec();
    if all {
        filter.push("all=true".to_owned());
    }
    let target = Target::new("/volumes/prune").maybe("filters", filters(&filter)?).text();
    Ok(Pruned::of(&engine.post(&target).await?, "VolumesDeleted", "Deleted Volumes:"))
}

impl Prune {
    async fn run(self, context: &Context) -> Done {
        let warning = if self.all {
            "This will remove all local volumes not used by at least one container."
        } else {
            "This will remove anonymous local volumes not used by at least one container."
        };
        if !self.options.agreed(warning)? {
            return Ok(SUCCESS);
        }
        let operation = context.operation("dorm volume prune", false).await?;
        let pruned = operation.during(prune(&operation.engine, self.all, &self.options.filter)).await?;
        pruned.print()
    }
}

impl Remove {
    async fn run(self, context: &Context) -> Done {
        let operation = context.operation(format!("dorm volume rm {}", self.names.join(" ")), false).await?;
        let mut code = SUCCESS;
        for name in &self.names {
            let target = Target::of("volumes", name, "").when("force", self.force).text();
            let removed = operation.during(async {
                match operation.engine.delete::<Value>(&target).await {
                    Err(error) if error.is_not_found() => {
                        Err(Kind::Volume.unknown(&operation.engine, name, error.into()).await)
                    }
                    removed => Ok(removed.map(drop)?),
                }
            });
            match removed.await {
                Ok(()) => {
                    print(name)?;
                }
                Err(failure) => {
                    failure.report();
                    code = FAILED;
                }
            }
        }
        Ok(code)
    }
}
