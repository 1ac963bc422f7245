//! `dorm image prune`.

use clap::Args;
use dormouse_client::{Engine, Target};
use serde_json::Value;

use crate::container::prune::{PruneOptions, Pruned};
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::value::filters;

#[derive(Args)]
pub(crate) struct Prune {
    /// All that no container uses, not only those without a name.
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    options: PruneOptions,
}

impl Prune {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let warning = if self.all {
            "This will remove all images without at least one container associated to them."
        } else {
            "This will remove all dangling images."
        };
        if !self.options.agreed(warning)? {
            return Ok(SUCCESS);
        }
        let operation = context.operation("dorm image prune", false).await?;
        let pruned = operation.during(images(&operation.engine, self.all, &self.options.filter)).await?;
        pruned.print()
    }
}

/// Removes images that nobody uses.
pub(crate) async fn images(engine: &Engine, all: bool, filter: &[String]) -> Result<Pruned, Failure> {
    let mut filter = filter.to_vec();
    filter.push(format!("dangling={}", !all));
    let target = Target::new("/images/prune").maybe("filters", filters(&filter)?).text();
    let answer: Value = engine.post(&target).await?;
    let mut pruned = Pruned { lines: Vec::new(), bytes: answer["SpaceReclaimed"].as_f64().unwrap_or(0.0) };
    let deleted = answer["ImagesDeleted"].as_array().cloned().unwrap_or_default();
    if !deleted.is_empty() {
        pruned.lines.push("Deleted Images:".to_owned());
        for line in &deleted {
            match (line["Untagged"].as_str(), line["Deleted"].as_str()) {
                (Some(name), _) if !name.is_empty() => pruned.lines.push(format!("untagged: {name}")),
                (_, Some(name)) => pruned.lines.push(format!("deleted: {name}")),
                _ => {}
            }
        }
        pruned.lines.push(String::new());
    }
    Ok(pruned)
}
