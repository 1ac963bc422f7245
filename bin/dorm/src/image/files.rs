//! `dorm load`, `save` and `import`: images as files.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use clap::Args;
use dormouse_client::{Call, Target};
use http::{Method, header};

use super::reference;
use crate::archive;
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::message::{Shown, show};
use crate::operation::Operation;
use crate::progress::Progress;

#[derive(Args)]
pub(crate) struct Load {
    /// The archive; standard input when absent or -.
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Say nothing but what was loaded.
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Args)]
pub(crate) struct Save {
    /// Write to this file.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Which ones.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

#[derive(Args)]
pub(crate) struct Import {
    /// A line of a Dockerfile to apply.
    #[arg(short, long, value_name = "LINE")]
    change: Vec<String>,
    /// What for.
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// The platform that its files are for.
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// Print the whole id, as is done anyway.
    #[arg(long)]
    no_trunc: bool,
    /// The archive, - for standard input, or a URL that the engine reads.
    file: PathBuf,
    /// What to call it.
    image: Option<String>,
}

fn progress(what: &str, path: &Path, quiet: bool) -> Progress {
    let length =
        std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|metadata| metadata.len());
    if quiet { Progress::none() } else { Progress::bytes(what, length) }
}

impl Load {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let input = self.input.unwrap_or_else(|| "-".into());
        let payload = archive::read(&input, progress("loading", &input, self.quiet))?;
        let operation = context.operation("dorm load", self.quiet).await?;
        let target = Target::new("/images/load").with("quiet", "1").text();
        operation
            .during(async {
                let call = Call::new(Method::POST, target).payload(payload);
                let reply = operation.engine.send(call).await?;
                let lines = reply.header(header::CONTENT_TYPE.as_str()) == Some("application/json");
                if lines {
                    show(reply.lines(), Shown::Out).await?;
                }
                Ok(SUCCESS)
            })
            .await
    }
}

impl Save {
    pub(crate) async fn run(self, context: &Context) -> Done {
        archive::refuse_terminal(self.output.as_deref())?;
        let operation = context.operation(format!("dorm save {}", self.images.join(" ")), false).await?;
        operation.during(save(&operation, &self.images, self.output)).await.map(|()| SUCCESS)
    }
}

/// Writes images as a tar archive, `None`: to standard output.
pub(super) async fn save(
    operation: &Operation,
    images: &[String],
    to: Option<PathBuf>,
) -> Result<(), Failure> {
    let mut target = Target::new("/images/get");
    for image in images {
        target = target.with("names", image.as_str());
    }
    let reply = operation.engine.send(Call::new(Method::GET, target.text())).await?;
    archive::write(reply.lines(), to, Progress::bytes("saving", None)).await
}

impl Import {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let url =
            self.file.to_str().filter(|text| text.starts_with("http://") || text.starts_with("https://"));
        let (name, tag) = match &self.image {
            Some(image) => {
                reference::check(image).map_err(Failure::new)?;
                let (name, tag) = reference::split(image);
                (Some(name), tag)
            }
            None => (None, None),
        };
        let mut target = Target::new("/images/create")
            .with("fromSrc", url.unwrap_or("-"))
            .maybe("repo", name)
            .maybe("tag", tag)
            .maybe("message", self.message.as_deref())
            .maybe("platform", self.platform.as_deref());
        for change in &self.change {
            target = target.with("changes", change.as_str());
        }
        let mut call = Call::new(Method::POST, target.text());
        if url.is_none() {
            let quiet = !io::stderr().is_terminal();
            call = call.payload(archive::read(&self.file, progress("importing", &self.file, quiet))?);
        }
        let operation = context.operation(format!("dorm import {}", self.file.display()), false).await?;
        operation
            .during(async {
                let reply = operation.engine.send(call).await?;
                show(reply.lines(), Shown::Out).await?;
                Ok(SUCCESS)
            })
            .await
    }
}
