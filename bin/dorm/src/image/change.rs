//! `dorm tag` and `rmi`.

use clap::Args;
use dormouse_client::{Engine, Target};
use serde_json::Value;

use super::reference;
use crate::context::{Context, nearest};
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::output::print;

#[derive(Args)]
pub(crate) struct Tag {
    /// Which one.
    source: String,
    /// Its other name.
    target: String,
}

#[derive(Args)]
pub(crate) struct Remove {
    /// Also those that containers use, and say nothing of those that don't exist.
    #[arg(short, long)]
    force: bool,
    /// Leave what they are made from.
    #[arg(long)]
    no_prune: bool,
    /// Which ones.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

impl Tag {
    pub(crate) async fn run(self, context: &Context) -> Done {
        reference::check(&self.target).map_err(Failure::new)?;
        if self.target.contains('@') {
            return Err(Failure::new("a name that is given can't have a digest")
                .hint("leave what follows the @ away"));
        }
        let operation = context.operation(format!("dorm tag {}", self.source), false).await?;
        let (name, tag) = reference::split(&self.target);
        let target = Target::of("images", &self.source, "/tag").with("repo", name).maybe("tag", tag).text();
        operation
            .during(async {
                match operation.engine.post::<Value>(&target).await {
                    Err(error) if error.is_not_found() => {
                        Err(unknown(&operation.engine, &self.source, error.into()).await)
                    }
                    done => Ok(done.map(|_| SUCCESS)?),
                }
            })
            .await
    }
}

impl Remove {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let operation = context.operation(format!("dorm rmi {}", self.images.join(" ")), false).await?;
        let mut code = SUCCESS;
        for name in &self.images {
            let target = Target::of("images", name, "")
                .when("force", self.force)
                .when("noprune", self.no_prune)
                .text();
            let removed = operation.during(async {
                match operation.engine.delete::<Vec<Value>>(&target).await {
                    Err(error) if self.force && error.is_not_found() => Ok(Vec::new()),
                    Err(error) if error.is_not_found() => {
                        Err(unknown(&operation.engine, name, error.into()).await)
                    }
                    removed => Ok(removed?),
                }
            });
            match removed.await {
                Ok(lines) => {
                    for line in lines {
                        for what in ["Untagged", "Deleted"] {
                            if let Some(name) = line[what].as_str() {
                                print(format!("{what}: {name}"))?;
                            }
                        }
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

/// An error about an image that the engine doesn't have, with the name that was probably meant.
pub(crate) async fn unknown(engine: &Engine, name: &str, failure: Failure) -> Failure {
    let Ok(known) = engine.get::<Vec<Value>>("/images/json").await else { return failure };
    let tags =
        known.iter().filter_map(|image| image["RepoTags"].as_array()).flatten().filter_map(Value::as_str);
    match nearest(&reference::tagged(name), tags) {
        Some(near) => failure.hint(format!("did you mean {near:?}?")),
        None => failure.hint("`dorm images` lists what there is"),
    }
}
