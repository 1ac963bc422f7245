//! `dorm search`.

use clap::Args;
use dormouse_client::Target;
use serde_json::Value;

use crate::context::Context;
use crate::error::Done;
use crate::format::listing::{Listing, Row};
use crate::value::filters;

/// Longest description in a table, in characters; docker's.
const DESCRIPTION_MAX: usize = 45;

#[derive(Args)]
pub(crate) struct Search {
    /// Only those that fit: NAME=VALUE.
    #[arg(short, long, value_name = "FILTER", value_parser = crate::value::filter)]
    filter: Vec<String>,
    /// table, json, or a template.
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// At most so many.
    #[arg(long, value_name = "N")]
    limit: Option<u32>,
    /// Cut nothing off.
    #[arg(long)]
    no_trunc: bool,
    /// What for.
    term: String,
}

const COLUMNS: &[(&str, &str)] = &[
    ("Name", "NAME"),
    ("Description", "DESCRIPTION"),
    ("StarCount", "STARS"),
    ("IsOfficial", "OFFICIAL"),
    ("IsAutomated", "AUTOMATED"),
];

impl Search {
    /// It is the engine that asks.
    pub(crate) async fn run(self, context: &Context) -> Done {
        let target = Target::new("/images/search")
            .with("term", self.term.as_str())
            .maybe("limit", self.limit.map(|limit| limit.to_string()))
            .maybe("filters", filters(&self.filter)?)
            .text();
        let operation = context.operation(format!("dorm search {}", self.term), false).await?;
        let found: Vec<Value> = operation.during(async { Ok(operation.engine.get(&target).await?) }).await?;
        let mut listing = Listing::new(COLUMNS, &["Name", "Description", "StarCount", "IsOfficial"]);
        for image in &found {
            listing.push(row(image, !self.no_trunc));
        }
        listing.print(self.format.as_deref(), None)
    }
}

fn row(image: &Value, cut: bool) -> Row {
    let mark = |key: &str| if image[key].as_bool() == Some(true) { "[OK]" } else { "" };
    let text = image["description"].as_str().unwrap_or_default().replace(['\n', '\r'], " ");
    let text = if cut && text.chars().count() > DESCRIPTION_MAX {
        text.chars().take(DESCRIPTION_MAX - 1).chain(['…']).collect()
    } else {
        text
    };
    Row::default()
        .with("Name", image["name"].as_str().unwrap_or_default())
        .with("Description", text)
        .with("StarCount", image["star_count"].as_i64().unwrap_or(0).to_string())
        .with("IsOfficial", mark("is_official"))
        .with("IsAutomated", mark("is_automated"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_found_is_told_as_docker_does() {
        let image =
            json!({ "name": "a/b", "description": "x".repeat(60), "star_count": 3, "is_official": true });
        let mut listing = Listing::new(COLUMNS, &["Name", "Description", "StarCount", "IsOfficial"]);
        listing.push(row(&image, true));
        let cut = format!("{}…", "x".repeat(44));
        let table = listing.text(Some("{{.Name}} {{.Description}} {{.StarCount}} {{.IsOfficial}}"), None);
        assert_eq!(table.unwrap(), format!("a/b {cut} 3 [OK]\n"));
    }
}
