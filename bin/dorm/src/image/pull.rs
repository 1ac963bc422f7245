//! `dorm pull` and `push`.

use clap::Args;
use dormouse_client::{Call, Target};
use http::Method;

use super::reference;
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::message::{Shown, show};
use crate::operation::Operation;
use crate::output::print;
use crate::registry;

#[derive(Args)]
pub(crate) struct Pull {
    /// Every tag of the name.
    #[arg(short, long)]
    all_tags: bool,
    /// The platform, if there are several.
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// Say nothing but its full name.
    #[arg(short, long)]
    quiet: bool,
    /// Which one.
    image: String,
}

#[derive(Args)]
pub(crate) struct Push {
    /// Every tag of the name.
    #[arg(short, long)]
    all_tags: bool,
    /// Say nothing but its full name.
    #[arg(short, long)]
    quiet: bool,
    /// Which one.
    image: String,
}

/// Why an image is pulled, and so where its progress belongs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pulled {
    /// It was asked for.
    Wanted { quiet: bool, all: bool },
    /// Something else needs it.
    Missing { quiet: bool },
}

/// Gets an image.
pub(crate) async fn pull(
    operation: &Operation,
    image: &str,
    platform: Option<&str>,
    why: Pulled,
) -> Result<(), Failure> {
    let (name, tag) = reference::split(image);
    let (shown, all) = match why {
        Pulled::Wanted { quiet, all } => (if quiet { Shown::Quiet } else { Shown::Out }, all),
        Pulled::Missing { quiet } => (if quiet { Shown::Quiet } else { Shown::Err }, false),
    };
    let target = Target::new("/images/create")
        .with("fromImage", name)
        .maybe("tag", if all { None } else { Some(tag.unwrap_or("latest")) })
        .maybe("platform", platform);
    let mut call = Call::new(Method::POST, target.text());
    if let Some((name, value)) = registry::authorization(reference::registry(image))? {
        call = call.header(name, value);
    }
    let pulling = async { show(operation.engine.send(call).await?.lines(), shown).await };
    pulling.await.map(drop).map_err(registry::explain)
}

impl Pull {
    pub(crate) async fn run(self, context: &Context) -> Done {
        reference::check(&self.image).map_err(Failure::new)?;
        let named_tag = reference::split(&self.image).1.is_some();
        if self.all_tags && named_tag {
            return Err(
                Failure::new("a tag can't be used with --all-tags").hint("name the image without one")
            );
        }
        if !named_tag && !self.all_tags && !self.quiet {
            print("Using default tag: latest")?;
        }
        let operation = context.operation(format!("dorm pull {}", self.image), self.quiet).await?;
        let why = Pulled::Wanted { quiet: self.quiet, all: self.all_tags };
        operation.during(pull(&operation, &self.image, self.platform.as_deref(), why)).await?;
        print(reference::canonical(&self.image))
    }
}

/// Sends an image to its registry.
pub(super) async fn push(operation: &Operation, image: &str, all: bool, quiet: bool) -> Result<(), Failure> {
    let (name, tag) = reference::split(image);
    let target = Target::of("images", name, "/push")
        .maybe("tag", if all { None } else { Some(tag.unwrap_or("latest")) })
        .text();
    // The engine wants the header even if there is nothing to say.
    let (header, value) = match registry::authorization(reference::registry(image))? {
        Some(known) => known,
        None => registry::nobody(),
    };
    let shown = if quiet { Shown::Quiet } else { Shown::Out };
    let call = Call::new(Method::POST, target).header(header, value);
    let pushing = async { show(operation.engine.send(call).await?.lines(), shown).await };
    pushing.await.map(drop).map_err(registry::explain)
}

impl Push {
    pub(crate) async fn run(self, context: &Context) -> Done {
        reference::check(&self.image).map_err(Failure::new)?;
        if reference::split(&self.image).1.is_none() && !self.all_tags && !self.quiet {
            print("Using default tag: latest")?;
        }
        let operation = context.operation(format!("dorm push {}", self.image), self.quiet).await?;
        operation.during(push(&operation, &self.image, self.all_tags, self.quiet)).await?;
        if self.quiet { print(reference::canonical(&self.image)) } else { Ok(SUCCESS) }
    }
}
