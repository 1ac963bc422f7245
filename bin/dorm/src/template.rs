//! `dorm template`: frozen VMs that new sessions are copied from.

use std::io::{self, Write};

use clap::{Args, Subcommand};
use dormouse_api::{CreateTemplate, TemplateInfo};

use crate::arguments::Format;
use crate::context::Context;
use crate::error::{Done, SUCCESS};
use crate::output::{print, print_json};
use crate::value::size;

/// Enough of a template's name to tell it from the others.
const SHORT_NAME: usize = 12;

#[derive(Subcommand)]
pub(crate) enum Template {
    /// List the templates.
    #[command(visible_alias = "list")]
    Ls {
        /// How.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Make the template for sessions of this size, if there is none.
    Build(Build),
    /// Remove templates. Sessions that were copied from them don't need them.
    #[command(visible_alias = "remove")]
    Rm {
        /// Which ones.
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove the templates that no new session would be made from.
    Prune,
}

#[derive(Args)]
pub(crate) struct Build {
    /// Virtual CPUs.
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// RAM, e.g. 2G.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
}

impl Template {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let service = context.service().await?;
        match self {
            Self::Ls { format } => list(&service.templates().await?, format),
            Self::Build(Build { cpus, memory }) => {
                let wish = CreateTemplate { cpus, memory_mib: memory.map(|bytes| bytes >> 20) };
                print(service.make_template(&wish).await?.name)
            }
            Self::Rm { names } => {
                let templates = service.templates().await?;
                for typed in names {
                    // A part of a name that only one has is as good as the whole.
                    let mut meant = templates.iter().filter(|template| template.name.starts_with(&typed));
                    let name = match (meant.next(), meant.next()) {
                        (Some(template), None) => &template.name,
                        _ => &typed,
                    };
                    service.remove_template(name).await?;
                    print(name)?;
                }
                Ok(SUCCESS)
            }
            Self::Prune => {
                for name in service.prune_templates().await? {
                    print(name)?;
                }
                Ok(SUCCESS)
            }
        }
    }
}

fn list(templates: &[TemplateInfo], format: Format) -> Done {
    if format == Format::Json {
        return print_json(&templates);
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{:<SHORT_NAME$}  {:>4}  {:>9}  {:>9}  MADE", "NAME", "CPUS", "MEMORY", "ON DISK")?;
    for template in templates {
        let TemplateInfo { name, cpus, memory_mib, made_at, used_bytes, .. } = template;
        let name = name.get(..SHORT_NAME).unwrap_or(name);
        let used_mib = used_bytes >> 20;
        writeln!(
            out,
            "{name:<SHORT_NAME$}  {cpus:>4}  {memory_mib:>5} MiB  {used_mib:>5} MiB  {made_at:.0}"
        )?;
    }
    Ok(SUCCESS)
}
