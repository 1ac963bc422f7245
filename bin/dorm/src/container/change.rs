//! `dorm rename`, `commit` and `update`.

use clap::Args;
use dormouse_client::Target;
use serde_json::{Map, Value, json};

use super::unknown;
use crate::context::Context;
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::output::{print, warn};
use crate::value::{cpus, restart, signed_size, size};

#[derive(Args)]
pub(crate) struct Rename {
    /// Which one.
    container: String,
    /// Its new name.
    name: String,
}

#[derive(Args)]
pub(crate) struct Commit {
    /// Which one.
    container: String,
    /// What to call the image.
    image: Option<String>,
    /// Who made it.
    #[arg(short, long, value_name = "NAME")]
    author: Option<String>,
    /// A line of a Dockerfile to apply.
    #[arg(short, long, value_name = "LINE")]
    change: Vec<String>,
    /// What for.
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// Halt the container meanwhile.
    #[arg(short, long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", hide_default_value = true, action = clap::ArgAction::Set)]
    pause: bool,
}

#[derive(Args)]
pub(crate) struct Update {
    /// Its part of the VM's memory.
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Memory that it gets back first.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory_reservation: Option<u64>,
    /// Memory and swap; -1 is no limit.
    #[arg(long, value_name = "SIZE", value_parser = signed_size, allow_hyphen_values = true)]
    memory_swap: Option<i64>,
    /// Its part of the VM's processors.
    #[arg(long, value_name = "N", value_parser = cpus)]
    cpus: Option<u64>,
    /// Its weight among containers that want processors.
    #[arg(short, long, value_name = "N")]
    cpu_shares: Option<u64>,
    /// Run on these processors.
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Most processes; -1 is no limit.
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// When to restart it.
    #[arg(long, value_name = "POLICY", value_parser = restart)]
    restart: Option<(String, u64)>,
    /// Which ones.
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

impl Rename {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let operation = context.operation(format!("dorm rename {}", self.container), false).await?;
        let target = Target::of("containers", &self.container, "/rename").with("name", self.name.as_str());
        operation
            .during(async {
                match operation.engine.post::<Value>(&target.text()).await {
                    Ok(_) => Ok(SUCCESS),
                    Err(error) if error.is_not_found() => {
                        Err(unknown(&operation.engine, &self.container, error.into()).await)
                    }
                    Err(error) => Err(error.into()),
                }
            })
            .await
    }
}

impl Commit {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let operation = context.operation(format!("dorm commit {}", self.container), false).await?;
        let (repository, tag) = match &self.image {
            Some(image) => {
                let (repository, tag) = crate::image::reference::split(image);
                (Some(repository), tag)
            }
            None => (None, None),
        };
        let mut target = Target::new("/commit")
            .with("container", self.container.as_str())
            .maybe("repo", repository)
            .maybe("tag", tag)
            .maybe("author", self.author.as_deref())
            .maybe("comment", self.message.as_deref())
            .with("pause", if self.pause { "1" } else { "0" });
        for change in &self.change {
            target = target.with("changes", change.as_str());
        }
        let made: Value = operation
            .during(async { Ok(operation.engine.post_json(&target.text(), json!({})).await?) })
            .await?;
        print(made["Id"].as_str().unwrap_or_default())
    }
}

impl Update {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let mut body = Map::new();
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                body.insert(key.to_owned(), value);
            }
        };
        set("Memory", self.memory.map(Value::from));
        set("MemoryReservation", self.memory_reservation.map(Value::from));
        set("MemorySwap", self.memory_swap.map(Value::from));
        set("NanoCpus", self.cpus.map(Value::from));
        set("CpuShares", self.cpu_shares.map(Value::from));
        set("CpusetCpus", self.cpuset_cpus.as_deref().map(Value::from));
        set("PidsLimit", self.pids_limit.map(Value::from));
        set(
            "RestartPolicy",
            self.restart
                .as_ref()
                .map(|(policy, retries)| json!({ "Name": policy, "MaximumRetryCount": retries })),
        );
        if body.is_empty() {
            return Err(
                Failure::new("nothing was to be changed").hint("`dorm update --help` lists what can be")
            );
        }
        let operation =
            context.operation(format!("dorm update {}", self.containers.join(" ")), false).await?;
        let mut code = SUCCESS;
        for name in &self.containers {
            let target = Target::of("containers", name, "/update").text();
            let changed = operation
                .during(async {
                    Ok(operation.engine.post_json::<Value>(&target, Value::Object(body.clone())).await?)
                })
                .await;
            match changed {
                Ok(answer) => {
                    print(name)?;
                    for warning in
                        answer["Warnings"].as_array().into_iter().flatten().filter_map(Value::as_str)
                    {
                        warn(warning);
                    }
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
