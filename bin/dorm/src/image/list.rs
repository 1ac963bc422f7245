//! `dorm images`.

use clap::Args;
use dormouse_client::Target;
use serde_json::Value;

use super::reference;
use crate::context::Context;
use crate::error::Done;
use crate::format::listing::{Listing, Row};
use crate::format::units;
use crate::value::filters;

/// What stands where there is nothing.
const NONE: &str = "<none>";

#[derive(Args)]
pub(crate) struct List {
    /// Also those that others are made from.
    #[arg(short, long)]
    all: bool,
    /// Digests as well.
    #[arg(long)]
    digests: bool,
    /// Only those that fit: NAME=VALUE.
    #[arg(short, long, value_name = "FILTER", value_parser = crate::value::filter)]
    filter: Vec<String>,
    /// table, json, or a template.
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Cut nothing off.
    #[arg(long)]
    no_trunc: bool,
    /// Ids only.
    #[arg(short, long)]
    quiet: bool,
    /// Everything of each: --digests and --no-trunc.
    #[arg(long)]
    verbose: bool,
    /// Only those of this name.
    image: Option<String>,
}

pub(crate) const COLUMNS: &[(&str, &str)] = &[
    ("ID", "IMAGE ID"),
    ("Repository", "REPOSITORY"),
    ("Tag", "TAG"),
    ("Digest", "DIGEST"),
    ("CreatedSince", "CREATED"),
    ("CreatedAt", "CREATED AT"),
    ("Size", "SIZE"),
    ("VirtualSize", "SIZE"),
    ("SharedSize", "SHARED SIZE"),
    ("UniqueSize", "UNIQUE SIZE"),
    ("Containers", "CONTAINERS"),
];

impl List {
    pub(crate) async fn run(mut self, context: &Context) -> Done {
        self.digests |= self.verbose;
        self.no_trunc |= self.verbose;
        self.filter.extend(self.image.as_ref().map(|name| format!("reference={name}")));
        let target =
            Target::new("/images/json").when("all", self.all).maybe("filters", filters(&self.filter)?).text();
        let operation = context.reading().await?;
        let images: Vec<Value> = operation.during(async { Ok(operation.engine.get(&target).await?) }).await?;
        let usual: &[&str] = if self.digests {
            &["Repository", "Tag", "Digest", "ID", "CreatedSince", "Size"]
        } else {
            &["Repository", "Tag", "ID", "CreatedSince", "Size"]
        };
        let digests = self.digests || self.format.as_deref().is_some_and(|format| format.contains(".Digest"));
        let mut listing = Listing::new(COLUMNS, usual);
        let now = jiff::Timestamp::now().as_second();
        for image in &images {
            for (name, tag, digest) in names(image, digests) {
                listing.push(
                    row(image, !self.no_trunc, now)
                        .with("Repository", name)
                        .with("Tag", tag)
                        .with("Digest", digest),
                );
            }
        }
        listing.print(self.format.as_deref(), self.quiet.then_some("ID"))
    }
}

/// A list's row, but for the names.
pub(crate) fn row(image: &Value, cut: bool, now: i64) -> Row {
    let id = image["Id"].as_str().unwrap_or_default();
    let created = image["Created"].as_i64().unwrap_or(0);
    let bytes = image["Size"].as_f64().unwrap_or(0.0);
    Row::default()
        .with("ID", if cut { units::short_id(id) } else { id })
        .with(
            "CreatedSince",
            if created <= 0 { "N/A".to_owned() } else { format!("{} ago", units::duration(now - created)) },
        )
        .with("CreatedAt", units::go_time(created))
        .with("VirtualSize", units::size_in_four_digits(bytes))
        .with("Size", units::size(bytes))
        .with("SharedSize", "N/A")
        .with("UniqueSize", "N/A")
        .with("Containers", "N/A")
}

/// The rows of an image: name, tag, digest.
pub(crate) fn names(image: &Value, with_digests: bool) -> Vec<(String, String, String)> {
    let list = |key: &str| -> Vec<String> {
        let names = image[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        names.filter(|name| !name.starts_with(NONE)).map(str::to_owned).collect()
    };
    let (tags, digests) = (list("RepoTags"), list("RepoDigests"));
    let mut rows = Vec::new();
    for tagged in &tags {
        let (name, tag) = reference::split(tagged);
        let of_name: Vec<_> =
            digests.iter().filter_map(|digest| digest.strip_prefix(name)?.strip_prefix('@')).collect();
        let shown = if with_digests && !of_name.is_empty() { of_name } else { vec![NONE] };
        for digest in shown {
            rows.push((name.to_owned(), tag.unwrap_or(NONE).to_owned(), digest.to_owned()));
        }
    }
    for digested in &digests {
        let (name, digest) = digested.split_once('@').unwrap_or((digested, NONE));
        if rows.iter().all(|(known, _, _)| known != name) {
            let digest = if with_digests { digest } else { NONE };
            rows.push((name.to_owned(), NONE.to_owned(), digest.to_owned()));
        }
    }
    if rows.is_empty() {
        rows.push((NONE.to_owned(), NONE.to_owned(), NONE.to_owned()));
    }
    rows
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_image_has_a_row_for_each_of_its_names() {
        let row = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        let image = json!({"RepoTags": ["a:1", "a:2"], "RepoDigests": ["a@sha256:ff", "b@sha256:ff"]});
        assert_eq!(names(&image, false), [row("a", "1", NONE), row("a", "2", NONE), row("b", NONE, NONE)]);
        assert_eq!(names(&image, true)[0], row("a", "1", "sha256:ff"));
        assert_eq!(names(&json!({"RepoTags": null}), false), [row(NONE, NONE, NONE)]);
    }
}
