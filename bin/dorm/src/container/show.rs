//! `dorm diff`, `port` and `top`.

use std::io::{self, Write};

use clap::Args;
use dormouse_client::Target;
use serde_json::Value;

use super::{inspect, unknown};
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::format::table::aligned;

#[derive(Args)]
pub(crate) struct Diff {
    /// Which one.
    container: String,
}

#[derive(Args)]
pub(crate) struct Port {
    /// Which one.
    container: String,
    /// One of its ports: 80, or 53/udp.
    port: Option<String>,
}

#[derive(Args)]
pub(crate) struct Top {
    /// Which one, and options of ps.
    #[arg(required = true, trailing_var_arg = true, value_name = "CONTAINER [OPTIONS]")]
    line: Vec<String>,
}

impl Diff {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let operation = context.operation(format!("dorm diff {}", self.container), false).await?;
        let target = Target::of("containers", &self.container, "/changes").text();
        let changes: Option<Vec<Value>> = operation
            .during(async {
                match operation.engine.get(&target).await {
                    Err(error) if error.is_not_found() => {
                        Err(unknown(&operation.engine, &self.container, error.into()).await)
                    }
                    changes => Ok(changes?),
                }
            })
            .await?;
        let mut out = io::stdout().lock();
        for change in changes.unwrap_or_default() {
            let kind = match change["Kind"].as_u64() {
                Some(1) => 'A',
                Some(2) => 'D',
                _ => 'C',
            };
            writeln!(out, "{kind} {}", change["Path"].as_str().unwrap_or_default())?;
        }
        Ok(SUCCESS)
    }
}

impl Port {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let operation = context.reading().await?;
        let container = operation.during(inspect(&operation.engine, &self.container)).await?;
        let ports = container["NetworkSettings"]["Ports"].as_object().cloned().unwrap_or_default();
        let bindings = |name: &str| -> Vec<String> {
            let bindings = ports.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
            let text = |binding: &Value| {
                let (address, port) = (
                    binding["HostIp"].as_str().unwrap_or_default(),
                    binding["HostPort"].as_str().unwrap_or_default(),
                );
                if address.contains(':') {
                    format!("[{address}]:{port}")
                } else {
                    format!("{address}:{port}")
                }
            };
            bindings.iter().map(text).collect()
        };
        let mut out = io::stdout().lock();
        if let Some(port) = &self.port {
            let name = if port.contains('/') { port.clone() } else { format!("{port}/tcp") };
            let found = bindings(&name);
            if found.is_empty() {
                return Err(Failure::new(format!("{:?} publishes no port {name}", self.container))
                    .hint("`dorm port` without a port lists all"));
            }
            for binding in found {
                writeln!(out, "{binding}")?;
            }
            return Ok(SUCCESS);
        }
        let mut names: Vec<_> = ports.keys().collect();
        names.sort_by_key(|name| {
            let (number, protocol) = name.split_once('/').unwrap_or((name, ""));
            (number.parse::<u16>().unwrap_or(0), protocol.to_owned())
        });
        for name in names {
            for binding in bindings(name) {
                writeln!(out, "{name} -> {binding}")?;
            }
        }
        Ok(SUCCESS)
    }
}

impl Top {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let (container, options) =
            self.line.split_first().ok_or_else(|| Failure::new("no container was named"))?;
        let operation = context.operation(format!("dorm top {}", container), false).await?;
        let options = options.join(" ");
        let target = Target::of("containers", container, "/top")
            .maybe("ps_args", if options.is_empty() { None } else { Some(options) })
            .text();
        let listed: Value = operation
            .during(async {
                match operation.engine.get(&target).await {
                    Err(error) if error.is_not_found() => {
                        Err(unknown(&operation.engine, container, error.into()).await)
                    }
                    listed => Ok(listed?),
                }
            })
            .await?;
        let line = |cells: &Value| -> String {
            let cells = cells.as_array().into_iter().flatten().filter_map(Value::as_str);
            cells.collect::<Vec<_>>().join("\t") + "\n"
        };
        let processes = listed["Processes"].as_array().cloned().unwrap_or_default();
        let text = line(&listed["Titles"]) + &processes.iter().map(line).collect::<String>();
        io::stdout().write_all(aligned(&text, 20).as_bytes())?;
        Ok(SUCCESS)
    }
}
