//! `dorm network`.

use clap::{Args, Subcommand};
use dormouse_client::Target;
use serde_json::{Map, Value, json};

use crate::container::prune::{PruneOptions, Pruned};
use crate::container::variables::{labels, pairs};
use crate::context::Context;
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::format::listing::{Listing, Row};
use crate::format::units;
use crate::inspect::{Kind, Names};
use crate::output::{print, warn};
use crate::value::filters;

/// `dorm network`.
#[derive(Subcommand)]
pub(crate) enum Network {
    /// Connect a container to a network.
    Connect(Connect),
    /// Make a network.
    Create(Box<Create>),
    /// Disconnect a container from a network.
    Disconnect(Disconnect),
    /// Tell everything of networks.
    Inspect(Names),
    /// List networks.
    #[command(visible_alias = "list")]
    Ls(List),
    /// Remove networks that nobody uses.
    Prune(Prune),
    /// Remove networks.
    #[command(visible_aliases = ["remove", "delete"])]
    Rm(Remove),
}

#[derive(Args)]
pub(crate) struct Connect {
    /// Its name within the network.
    #[arg(long, visible_alias = "network-alias", value_name = "NAME")]
    alias: Vec<String>,
    /// Its IPv4 address.
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<String>,
    /// Its IPv6 address.
    #[arg(long, value_name = "ADDRESS")]
    ip6: Option<String>,
    /// Link it to another container.
    #[arg(long, value_name = "CONTAINER[:ALIAS]")]
    link: Vec<String>,
    /// A link-local address.
    #[arg(long, value_name = "ADDRESS")]
    link_local_ip: Vec<String>,
    /// An option of the driver.
    #[arg(long, value_name = "NAME=VALUE")]
    driver_opt: Vec<String>,
    /// The network.
    network: String,
    /// The container.
    container: String,
}

#[derive(Args)]
pub(crate) struct Disconnect {
    /// Also if it doesn't run.
    #[arg(short, long)]
    force: bool,
    /// The network.
    network: String,
    /// The container.
    container: String,
}

#[derive(Args)]
pub(crate) struct Create {
    /// The driver.
    #[arg(short, long, value_name = "DRIVER", default_value = "bridge")]
    driver: String,
    /// An option of the driver.
    #[arg(short, long, value_name = "NAME=VALUE")]
    opt: Vec<String>,
    /// Label it.
    #[arg(long, value_name = "NAME[=VALUE]")]
    label: Vec<String>,
    /// Its addresses: 10.1.0.0/16.
    #[arg(long, value_name = "SUBNET")]
    subnet: Vec<String>,
    /// Its gateway.
    #[arg(long, value_name = "ADDRESS", requires = "subnet")]
    gateway: Vec<String>,
    /// Addresses that containers get.
    #[arg(long, value_name = "RANGE", requires = "subnet")]
    ip_range: Vec<String>,
    /// Addresses that others have.
    #[arg(long, value_name = "NAME=ADDRESS", requires = "subnet")]
    aux_address: Vec<String>,
    /// No way out.
    #[arg(long)]
    internal: bool,
    /// Containers may connect themselves.
    #[arg(long)]
    attachable: bool,
    /// With IPv6.
    #[arg(long)]
    ipv6: bool,
    /// What gives addresses.
    #[arg(long, value_name = "DRIVER", default_value = "default")]
    ipam_driver: String,
    /// An option of that.
    #[arg(long, value_name = "NAME=VALUE")]
    ipam_opt: Vec<String>,
    /// What to call it.
    name: String,
}

#[derive(Args)]
pub(crate) struct List {
    /// Only those that fit: NAME=VALUE.
    #[arg(short, long, value_name = "FILTER", value_parser = crate::value::filter)]
    filter: Vec<String>,
    /// table, json, or a template.
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Cut nothing off.
    #[arg(long)]
    no_trunc: bool,
    /// Ids only.
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Args)]
pub(crate) struct Prune {
    #[command(flatten)]
    options: PruneOptions,
}

#[derive(Args)]
pub(crate) struct Remove {
    /// Say nothing of those that don't exist.
    #[arg(short, long)]
    force: bool,
    /// Which ones.
    #[arg(required = true, value_name = "NETWORK")]
    names: Vec<String>,
}

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "NETWORK ID"),
    ("Name", "NAME"),
    ("Driver", "DRIVER"),
    ("Scope", "SCOPE"),
    ("IPv6", "IPV6"),
    ("Internal", "INTERNAL"),
    ("Labels", "LABELS"),
    ("CreatedAt", "CREATED AT"),
];

/// Runs one of the commands under `dorm network`.
pub(crate) async fn run(context: &Context, command: Network) -> Done {
    match command {
        Network::Connect(connect) => connect.run(context).await,
        Network::Create(create) => create.run(context).await,
        Network::Disconnect(disconnect) => disconnect.run(context).await,
        Network::Inspect(names) => names.run(context, Kind::Network).await,
        Network::Ls(list) => list.run(context).await,
        Network::Prune(prune) => prune.run(context).await,
        Network::Rm(remove) => remove.run(context).await,
    }
}

impl Connect {
    async fn run(self, context: &Context) -> Done {
        let mut endpoint = json!({
            "Aliases": self.alias,
            "Links": self.link,
            "DriverOpts": pairs(&self.driver_opt),
        });
        if self.ip.is_some() || self.ip6.is_some() || !self.link_local_ip.is_empty() {
            endpoint["IPAMConfig"] = json!({ "IPv4Address": self.ip, "IPv6Address": self.ip6, "LinkLocalIPs": self.link_local_ip });
        }
        let body = json!({ "Container": self.container, "EndpointConfig": endpoint });
        post(context, &self.network, "connect", body).await
    }
}

impl Disconnect {
    async fn run(self, context: &Context) -> Done {
        let body = json!({ "Container": self.container, "Force": self.force });
        post(context, &self.network, "disconnect", body).await
    }
}

async fn post(context: &Context, network: &str, what: &str, body: Value) -> Done {
    let operation = context.operation(format!("dorm network {what} {network}"), false).await?;
    let target = Target::of("networks", network, &format!("/{what}")).text();
    operation.during(async { Ok(operation.engine.post_json::<Value>(&target, body).await?) }).await?;
    Ok(SUCCESS)
}

impl Create {
    async fn run(self, context: &Context) -> Done {
        let mut pools = Vec::new();
        for (index, subnet) in self.subnet.iter().enumerate() {
            let mut pool = json!({ "Subnet": subnet });
            if let Some(gateway) = self.gateway.get(index) {
                pool["Gateway"] = gateway.as_str().into();
            }
            if let Some(range) = self.ip_range.get(index) {
                pool["IPRange"] = range.as_str().into();
            }
            if index == 0 && !self.aux_address.is_empty() {
                pool["AuxiliaryAddresses"] = Value::Object(pairs(&self.aux_address));
            }
            pools.push(pool);
        }
        let body = json!({
            "Name": self.name,
            "Driver": self.driver,
            "Options": pairs(&self.opt),
            "Labels": labels(&[], &self.label).map_err(Failure::new)?,
            "Internal": self.internal,
            "Attachable": self.attachable,
            "EnableIPv6": self.ipv6,
            "IPAM": { "Driver": self.ipam_driver, "Options": pairs(&self.ipam_opt), "Config": pools },
        });
        let operation = context.operation(format!("dorm network create {}", self.name), false).await?;
        let made: Value = operation
            .during(async { Ok(operation.engine.post_json("/networks/create", body).await?) })
            .await?;
        if let Some(warning) = made["Warning"].as_str().filter(|warning| !warning.is_empty()) {
            warn(warning);
        }
        print(made["Id"].as_str().unwrap_or_default())
    }
}

impl List {
    async fn run(self, context: &Context) -> Done {
        let target = Target::new("/networks").maybe("filters", filters(&self.filter)?).text();
        let operation = context.reading().await?;
        let mut networks: Vec<Value> =
            operation.during(async { Ok(operation.engine.get(&target).await?) }).await?;
        networks.sort_by(|one, other| one["Name"].as_str().cmp(&other["Name"].as_str()));
        let mut listing = Listing::new(COLUMNS, &["ID", "Name", "Driver", "Scope"]);
        for network in &networks {
            let text = |key: &str| network[key].as_str().unwrap_or_default();
            let id = text("Id");
            let row = Row::default()
                .with("ID", if self.no_trunc { id } else { units::short_id(id) })
                .with("Name", text("Name"))
                .with("Driver", text("Driver"))
                .with("Scope", text("Scope"))
                .with("IPv6", network["EnableIPv6"].to_string())
                .with("Internal", network["Internal"].to_string())
                .with("CreatedAt", text("Created"))
                .labels(&network["Labels"]);
            listing.push(row);
        }
        listing.print(self.format.as_deref(), self.quiet.then_some("ID"))
    }
}

/// Removes networks that nobody uses.
pub(crate) async fn prune(engine: &dormouse_client::Engine, filter: &[String]) -> Result<Pruned, Failure> {
    let target = Target::new("/networks/prune").maybe("filters", filters(filter)?).text();
    Ok(Pruned::of(&engine.post(&target).await?, "NetworksDeleted", "Deleted Networks:"))
}

impl Prune {
    async fn run(self, context: &Context) -> Done {
        let warning = "This will remove all custom networks not used by at least one container.";
        if !self.options.agreed(warning)? {
            return Ok(SUCCESS);
        }
        let operation = context.operation("dorm network prune", false).await?;
        let pruned = operation.during(prune(&operation.engine, &self.options.filter)).await?;
        for line in pruned.lines {
            print(line)?;
        }
        Ok(SUCCESS)
    }
}

impl Remove {
    async fn run(self, context: &Context) -> Done {
        let operation = context.operation(format!("dorm network rm {}", self.names.join(" ")), false).await?;
        let mut code = SUCCESS;
        for name in &self.names {
            let target = Target::of("networks", name, "").text();
            let removed = operation.during(async {
                match operation.engine.delete::<Option<Map<String, Value>>>(&target).await {
                    Err(error) if self.force && error.is_not_found() => Ok(()),
                    Err(error) if error.is_not_found() => {
                        Err(Kind::Network.unknown(&operation.engine, name, error.into()).await)
                    }
                    removed => Ok(removed.map(|_| ())?),
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
