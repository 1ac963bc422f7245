//! `dorm history`.

use clap::Args;
use dormouse_client::Target;
use serde_json::Value;

use super::change::unknown;
use crate::context::Context;
use crate::error::Done;
use crate::format::listing::{Listing, Row};
use crate::format::units;

/// Longest command that is shown.
const COMMAND_WIDTH: usize = 45;

#[derive(Args)]
pub(crate) struct History {
    /// table, json, or a template.
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Sizes and times in words.
    #[arg(short = 'H', long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", hide_default_value = true, action = clap::ArgAction::Set)]
    human: bool,
    /// Cut nothing off.
    #[arg(long)]
    no_trunc: bool,
    /// Ids only.
    #[arg(short, long)]
    quiet: bool,
    /// Which one.
    image: String,
}

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "IMAGE"),
    ("CreatedSince", "CREATED"),
    ("CreatedAt", "CREATED AT"),
    ("CreatedBy", "CREATED BY"),
    ("Size", "SIZE"),
    ("Comment", "COMMENT"),
];

impl History {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let target = Target::of("images", &self.image, "/history").text();
        let operation = context.reading().await?;
        let layers: Vec<Value> = operation
            .during(async {
                match operation.engine.get(&target).await {
                    Err(error) if error.is_not_found() => {
                        Err(unknown(&operation.engine, &self.image, error.into()).await)
                    }
                    layers => Ok(layers?),
                }
            })
            .await?;
        let since = if self.human { "CreatedSince" } else { "CreatedAt" };
        let mut listing = Listing::new(COLUMNS, &["ID", since, "CreatedBy", "Size", "Comment"]);
        let now = jiff::Timestamp::now().as_second();
        for layer in &layers {
            listing.push(self.row(layer, now));
        }
        listing.print(self.format.as_deref(), self.quiet.then_some("ID"))
    }

    fn row(&self, layer: &Value, now: i64) -> Row {
        let text = |key: &str| layer[key].as_str().unwrap_or_default();
        let created = layer["Created"].as_i64().unwrap_or(0);
        let command = text("CreatedBy").replace('\t', " ");
        let size = layer["Size"].as_f64().unwrap_or(0.0);
        let at = jiff::Timestamp::from_second(created).map(|time| {
            time.to_zoned(jiff::tz::TimeZone::system())
                .strftime("%Y-%m-%dT%H:%M:%S%:z")
                .to_string()
                .replace("+00:00", "Z")
        });
        Row::default()
            .with("ID", if self.no_trunc { text("Id") } else { units::short_id(text("Id")) })
            .with(
                "CreatedSince",
                if created > 0 {
                    format!("{} ago", units::duration(now - created))
                } else {
                    "N/A".to_owned()
                },
            )
            .with("CreatedAt", at.unwrap_or_default())
            .with("CreatedBy", if self.no_trunc { command } else { units::ellipsis(&command, COMMAND_WIDTH) })
            .with("Size", if self.human { units::size(size) } else { format!("{size}") })
            .with("Comment", text("Comment"))
    }
}
