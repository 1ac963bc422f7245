//! `dorm why`: why a VM is awake or asleep.

use std::io::{self, Write};

use clap::Args;
use dormouse_api::{SessionName, Why};

use crate::arguments::Format;
use crate::context::Context;
use crate::error::{Done, SUCCESS};
use crate::output::print_json;

#[derive(Args)]
pub(crate) struct WhyArguments {
    /// Which session.
    name: Option<SessionName>,
    /// How.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl WhyArguments {
    /// Wakes nothing.
    pub(crate) async fn run(self, context: &Context) -> Done {
        let control = context.control(&context.pick(self.name)).await?;
        let why: Why = control.get("/v1/why").await?;
        if self.format == Format::Json {
            return print_json(&why);
        }
        let mut out = io::stdout().lock();
        for line in why.lines {
            writeln!(out, "{line}")?;
        }
        if let Some(client) = why.woken_by {
            writeln!(out, "woken by {client}")?;
        }
        for warning in why.warnings {
            writeln!(out, "warning: {warning}")?;
        }
        Ok(SUCCESS)
    }
}
