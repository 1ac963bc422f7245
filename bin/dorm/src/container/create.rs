//! `create`, and the options that it shares with `run`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use dormouse_client::Target;
use serde::Deserialize;
use serde_json::Value;

use super::options::Options;
use crate::context::Context;
use crate::error::{Done, Failure};
use crate::image::pull::{Pulled, pull};
use crate::operation::Operation;
use crate::output::{print, say, warn};

/// `dorm create`.
#[derive(Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) made: Made,
}

/// What is made: the options, the image, and what runs in it.
#[derive(Args)]
pub(crate) struct Made {
    #[command(flatten)]
    pub(crate) options: Options,
    /// When to pull the image.
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub(crate) pull: Pull,
    /// Write the container's id to this file, which must not exist.
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// Say nothing but the result.
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// What it is made from, and what to run in it instead of the image's own command.
    ///
    /// What follows the image is the container's, options included.
    #[arg(required = true, trailing_var_arg = true, value_name = "IMAGE [COMMAND]")]
    line: Vec<String>,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pull {
    #[default]
    Missing,
    Always,
    Never,
}

/// The engine's word about a new container.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    id: String,
    #[serde(default)]
    warnings: Option<Vec<String>>,
}

impl Create {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let body = self.made.body(true)?;
        let operation =
            context.operation(format!("dorm create {}", self.made.image()), self.made.quiet).await?;
        let id = operation.during(self.made.make(&operation, body)).await?;
        print(id)
    }
}

impl Made {
    /// What it is made from.
    pub(crate) fn image(&self) -> &str {
        &self.line[0]
    }

    /// What the engine is asked for. Nothing was started yet: bad values end here.
    pub(crate) fn body(&self, attached: bool) -> Result<Value, Failure> {
        if let Some(path) = self.cidfile.as_deref().filter(|path| path.exists()) {
            return Err(Failure::new(format!("the file {} exists already", path.display()))
                .hint("it may be of another container: remove it, or name another"));
        }
        self.options.body(self.image(), &self.line[1..], attached).map_err(Failure::new)
    }

    /// Makes the container, pulling the image as it was asked for, and gives its id.
    pub(crate) async fn make(&self, operation: &Operation, body: Value) -> Result<String, Failure> {
        let platform = self.options.platform.as_deref();
        if self.pull == Pull::Always {
            pull(operation, self.image(), platform, Pulled::Missing { quiet: self.quiet }).await?;
        }
        let target = Target::new("/containers/create")
            .maybe("name", self.options.name.as_deref())
            .maybe("platform", platform)
            .text();
        let answer = match operation.engine.post_json::<Answer>(&target, body.clone()).await {
            Err(error) if self.pull == Pull::Missing && lacks_image(&error) => {
                if !self.quiet {
                    let name = crate::image::reference::tagged(self.image());
                    say(format_args!("Unable to find image '{name}' locally"));
                }
                pull(operation, self.image(), platform, Pulled::Missing { quiet: self.quiet }).await?;
                operation.engine.post_json::<Answer>(&target, body).await?
            }
            answer => answer.map_err(|error| {
                let missing = lacks_image(&error);
                let failure = Failure::from(error);
                if missing {
                    failure.hint("`dorm images` lists what there is; `dorm pull` or `dorm load` gets more")
                } else {
                    failure
                }
            })?,
        };
        for warning in answer.warnings.unwrap_or_default() {
            warn(&warning);
        }
        if let Some(path) = &self.cidfile {
            let file = OpenOptions::new().write(true).create_new(true).open(path);
            file.and_then(|mut file| file.write_all(answer.id.as_bytes()))
                .map_err(|error| Failure::new(format!("can't write {}: {error}", path.display())))?;
        }
        Ok(answer.id)
    }
}

/// Has the engine no image of this name, or none for the platform?
fn lacks_image(error: &dormouse_client::EngineError) -> bool {
    let said = error.to_string();
    error.is_not_found()
        && (said.contains("No such image") || said.contains("does not match the specified platform"))
}
