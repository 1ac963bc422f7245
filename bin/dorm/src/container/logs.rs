//! `dorm logs`.

use clap::Args;
use dormouse_client::{Call, Target};
use http::Method;

use super::inspect;
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::operation::Operation;
use crate::stream::Output;
use crate::value::moment;

#[derive(Args)]
pub(crate) struct Logs {
    /// Which one.
    container: String,
    /// Go on until it ends, or until interrupted.
    #[arg(short, long)]
    follow: bool,
    /// So many lines of the end, or all.
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = tail)]
    tail: String,
    /// The time before each line.
    #[arg(short, long)]
    timestamps: bool,
    /// From this time on: 2024-05-01T12:00:00Z, seconds since 1970, or 10m ago.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Up to this time.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// What the log's driver adds to each line.
    #[arg(long)]
    details: bool,
}

fn tail(text: &str) -> Result<String, String> {
    if text == "all" || text.parse::<u64>().is_ok() {
        return Ok(text.to_owned());
    }
    // Docker takes what is no number for all.
    text.parse::<i64>()
        .map(|_| "all".to_owned())
        .map_err(|_| format!("{text:?} is neither a number nor \"all\""))
}

impl Logs {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let moments = [&self.since, &self.until].map(|time| time.as_deref().map(moment).transpose());
        let [since, until] = moments.map(|time| time.map_err(Failure::new));
        let (since, until) = (since?, until?);
        let operation = context.operation(format!("dorm logs {}", self.container), false).await?;
        operation.during(self.in_engine(&operation, since, until)).await
    }

    async fn in_engine(&self, operation: &Operation, since: Option<String>, until: Option<String>) -> Done {
        let engine = &operation.engine;
        let container = inspect(engine, &self.container).await?;
        let id = container["Id"].as_str().unwrap_or(&self.container);
        let target = Target::of("containers", id, "/logs")
            .with("stdout", "1")
            .with("stderr", "1")
            .when("follow", self.follow)
            .when("timestamps", self.timestamps)
            .when("details", self.details)
            .with("tail", self.tail.as_str())
            .maybe("since", since)
            .maybe("until", until);
        let reply = engine.send(Call::new(Method::GET, target.text())).await?;
        let mut output = Output::new(container["Config"]["Tty"].as_bool() == Some(true));
        let mut lines = reply.lines();
        loop {
            match lines.bytes().await {
                Ok(Some(bytes)) => output.write(&bytes).await?,
                Ok(None) => return Ok(SUCCESS),
                Err(error) => return Err(Failure::Lost(format!("the log broke off: {error}"))),
            }
        }
    }
}
