//! Removing what nobody uses: one way for each kind of thing.

use std::io::{self, BufRead, Write};

use clap::Args;
use dormouse_client::{Engine, Target};
use serde_json::Value;

use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::format::units;
use crate::value::filters;

/// What all kinds take.
#[derive(Args)]
pub(crate) struct PruneOptions {
    /// Only those that fit: NAME=VALUE.
    #[arg(long, value_name = "FILTER", value_parser = crate::value::filter)]
    pub(crate) filter: Vec<String>,
    /// Don't ask.
    #[arg(short, long)]
    force: bool,
}

impl PruneOptions {
    /// Is it meant? Asked, unless nobody is to be.
    pub(crate) fn agreed(&self, warning: &str) -> Result<bool, Failure> {
        Ok(self.force || confirmed(warning)?)
    }
}

#[derive(Args)]
pub(crate) struct Prune {
    #[command(flatten)]
    options: PruneOptions,
}

impl Prune {
    pub(crate) async fn run(self, context: &Context) -> Done {
        if !self.options.agreed("This will remove all stopped containers.")? {
            return Ok(SUCCESS);
        }
        let operation = context.operation("dorm container prune", false).await?;
        let pruned = operation.during(containers(&operation.engine, &self.options.filter)).await?;
        pruned.print()
    }
}

/// What was removed.
#[derive(Debug, Default)]
pub(crate) struct Pruned {
    /// A headline, and a line for each thing.
    pub(crate) lines: Vec<String>,
    /// Bytes that are free now.
    pub(crate) bytes: f64,
}

impl Pruned {
    /// Lines for the things under one key of the engine's answer.
    pub(crate) fn of(answer: &Value, key: &str, headline: &str) -> Self {
        let things = answer[key].as_array().cloned().unwrap_or_default();
        let mut lines = Vec::new();
        if !things.is_empty() {
            lines.push(headline.to_owned());
            lines.extend(things.iter().filter_map(Value::as_str).map(str::to_owned));
            lines.push(String::new());
        }
        Self { lines, bytes: answer["SpaceReclaimed"].as_f64().unwrap_or(0.0) }
    }

    /// Adds what was removed after it.
    pub(crate) fn and(&mut self, other: Self) {
        self.lines.extend(other.lines);
        self.bytes += other.bytes;
    }

    /// As docker prints it.
    pub(crate) fn print(&self) -> Done {
        let mut out = io::stdout().lock();
        for line in &self.lines {
            writeln!(out, "{line}")?;
        }
        writeln!(out, "Total reclaimed space: {}", units::size_in_four_digits(self.bytes))?;
        Ok(SUCCESS)
    }
}

/// Removes all stopped containers.
pub(crate) async fn containers(engine: &Engine, filter: &[String]) -> Result<Pruned, Failure> {
    let target = Target::new("/containers/prune").maybe("filters", filters(filter)?).text();
    Ok(Pruned::of(&engine.post(&target).await?, "ContainersDeleted", "Deleted Containers:"))
}

/// Asks whether it is meant. No answer is a no.
fn confirmed(warning: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    write!(out, "WARNING! {warning}\nAre you sure you want to continue? [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}
