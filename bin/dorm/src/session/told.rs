//! `dorm session events` and `trace`: what hooks are told, and what the lifecycle did step by step.

use std::io::{self, Write};

use clap::Args;
use dormouse_api::SessionName;

use crate::context::Context;
use crate::error::{Done, SUCCESS};

#[derive(Args)]
pub(crate) struct Events {
    /// Which one.
    name: Option<SessionName>,
    /// Go on until interrupted.
    #[arg(short, long)]
    follow: bool,
}

#[derive(Args)]
pub(crate) struct Trace {
    /// Which one.
    name: Option<SessionName>,
    /// What a host left that crashed, instead of the present one's.
    #[arg(long)]
    crash: bool,
}

impl Events {
    pub(crate) async fn run(self, context: &Context) -> Done {
        pass(context, self.name, &format!("/v1/events?follow={}", self.follow)).await
    }
}

impl Trace {
    pub(crate) async fn run(self, context: &Context) -> Done {
        pass(context, self.name, &format!("/v1/trace?crash={}", self.crash)).await
    }
}

async fn pass(context: &Context, name: Option<SessionName>, path: &str) -> Done {
    let mut lines = context.control(&context.pick(name)).await?.lines(path).await?;
    while let Some(bytes) = lines.bytes().await? {
        let mut out = io::stdout().lock();
        out.write_all(&bytes)?;
        out.flush()?;
    }
    Ok(SUCCESS)
}
