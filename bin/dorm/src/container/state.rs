//! Commands that start, stop and remove containers.

use clap::Args;
use dormouse_client::{Engine, EngineError, Target};
use serde_json::Value;

use super::run::{Exit, attach_target, failed_start, start};
use super::{inspect, unknown};
use crate::context::Context;
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::operation::Operation;
use crate::output::print;
use crate::stream::{Attached, Subject};
use crate::terminal::{DetachKeys, Mode};

/// Containers, and nothing else.
#[derive(Args)]
pub(crate) struct Names {
    /// Which ones.
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct Start {
    /// Join its output, pass signals on, and end with its exit code.
    #[arg(short, long)]
    attach: bool,
    /// Join its input.
    #[arg(short, long)]
    interactive: bool,
    /// The keys that leave it running.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", hide_default_value = true)]
    detach_keys: DetachKeys,
    /// Which ones.
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct Stop {
    /// The signal that asks for it.
    #[arg(short, long, value_name = "SIGNAL")]
    signal: Option<String>,
    /// Seconds until it is ended by force; -1 waits for ever.
    #[arg(short, long, value_name = "SECONDS", allow_hyphen_values = true)]
    time: Option<i64>,
    /// Which ones.
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct Restart {
    #[command(flatten)]
    stop: Stop,
}

#[derive(Args)]
pub(crate) struct Kill {
    /// The signal.
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL")]
    signal: String,
    /// Which ones.
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct Remove {
    /// Also those that run, and say nothing of those that don't exist.
    #[arg(short, long)]
    force: bool,
    /// Their anonymous volumes as well.
    #[arg(short, long)]
    volumes: bool,
    /// The link of this name, not the container.
    #[arg(short, long)]
    link: bool,
    /// Which ones.
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// Does something to each container, goes on after one that fails, and prints the names of those that went well.
async fn each(
    context: &Context,
    what: &str,
    containers: &[String],
    work: impl AsyncFn(&Engine, &str) -> Result<Option<String>, EngineError>,
) -> Done {
    let operation = context.operation(format!("dorm {what} {}", containers.join(" ")), false).await?;
    let mut code = SUCCESS;
    for name in containers {
        let done = operation.during(async {
            match work(&operation.engine, name).await {
                Ok(text) => Ok(text),
                Err(error) if error.is_not_found() => {
                    Err(unknown(&operation.engine, name, error.into()).await)
                }
                Err(error) => Err(error.into()),
            }
        });
        match done.await {
            Ok(Some(text)) => {
                print(text)?;
            }
            Ok(None) => {}
            Err(failure @ (Failure::Said(_) | Failure::Lost(_))) => {
                failure.report();
                code = FAILED;
            }
            Err(Failure::BrokenPipe) => return Err(Failure::BrokenPipe),
        }
    }
    Ok(code)
}

/// A POST about one container; its name when it went well.
async fn post(engine: &Engine, target: Target, name: &str) -> Result<Option<String>, EngineError> {
    engine.post::<Value>(&target.text()).await.map(|_| Some(name.to_owned()))
}

impl Names {
    /// `pause` and `unpause`.
    pub(crate) async fn all(self, context: &Context, what: &'static str) -> Done {
        each(context, what, &self.containers, async |engine, name| {
            post(engine, Target::of("containers", name, &format!("/{what}")), name).await
        })
        .await
    }

    /// Prints each one's exit code.
    pub(crate) async fn wait(self, context: &Context) -> Done {
        each(context, "wait", &self.containers, async |engine, name| {
            let answer: Value = engine.post(&Target::of("containers", name, "/wait").text()).await?;
            Ok(Some(answer["StatusCode"].to_string()))
        })
        .await
    }
}

impl Stop {
    fn target(&self, name: &str, what: &str) -> Target {
        Target::of("containers", name, what)
            .maybe("signal", self.signal.as_deref())
            .maybe("t", self.time.map(|seconds| seconds.to_string()))
    }

    pub(crate) async fn run(self, context: &Context) -> Done {
        each(context, "stop", &self.containers, async |engine, name| {
            post(engine, self.target(name, "/stop"), name).await
        })
        .await
    }
}

impl Restart {
    pub(crate) async fn run(self, context: &Context) -> Done {
        each(context, "restart", &self.stop.containers, async |engine, name| {
            post(engine, self.stop.target(name, "/restart"), name).await
        })
        .await
    }
}

impl Kill {
    pub(crate) async fn run(self, context: &Context) -> Done {
        each(context, "kill", &self.containers, async |engine, name| {
            post(engine, Target::of("containers", name, "/kill").with("signal", self.signal.as_str()), name)
                .await
        })
        .await
    }
}

impl Remove {
    pub(crate) async fn run(self, context: &Context) -> Done {
        each(context, "rm", &self.containers, async |engine, name| {
            let target = Target::of("containers", name, "")
                .when("force", self.force)
                .when("v", self.volumes)
                .when("link", self.link);
            match engine.delete::<Value>(&target.text()).await {
                Err(error) if self.force && error.is_not_found() => Ok(None),
                removed => removed.map(|_| Some(name.to_owned())),
            }
        })
        .await
    }
}

impl Start {
    pub(crate) async fn run(self, context: &Context) -> Done {
        if !self.attach && !self.interactive {
            return each(context, "start", &self.containers, async |engine, name| {
                start(engine, name).await.map(|_| Some(name.to_owned()))
            })
            .await;
        }
        let [name] = self.containers.as_slice() else {
            return Err(Failure::new("the streams of one container only can be joined").hint("name one"));
        };
        let operation = context.operation(format!("dorm start {name}"), false).await?;
        operation.during(self.attached(&operation, name)).await
    }

    async fn attached(&self, operation: &Operation, name: &str) -> Done {
        let engine = &operation.engine;
        let container = inspect(engine, name).await?;
        let config = &container["Config"];
        let tty = config["Tty"].as_bool() == Some(true);
        let input = self.interactive && config["OpenStdin"].as_bool() == Some(true);
        let removed = container["HostConfig"]["AutoRemove"].as_bool() == Some(true);
        let id = container["Id"].as_str().unwrap_or(name).to_owned();
        let stream = engine.hijack(&attach_target(&id, [input, true, true]), Value::Null).await?;
        let exit = Exit::of(engine, &id, if removed { "removed" } else { "next-exit" }).await?;
        let raw = if tty && input { Some(Mode::raw()?) } else { None };
        if let Err(error) = start(engine, &id).await {
            drop(raw);
            return Err(failed_start(error.into()).code(FAILED));
        }
        let subject = Subject { kind: "containers", id };
        let attached =
            Attached { stream, subject, tty, input, detach: self.detach_keys.clone(), proxy: !tty };
        let ended = attached.join(engine).await;
        drop(raw);
        exit.after(ended?).await
    }
}
