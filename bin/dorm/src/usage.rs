//! What takes room in a session's engine, one by one: `dorm system df --verbose`.

use std::io::{self, Write as _};

use serde_json::{Value, json};

use crate::error::{Done, Failure, SUCCESS};
use crate::format::listing::{Listing, Row};
use crate::format::template::Template;
use crate::format::units;
use crate::{container, image, volume};

const CACHE_COLUMNS: &[(&str, &str)] = &[
    ("ID", "CACHE ID"),
    ("Parent", "PARENT"),
    ("CacheType", "CACHE TYPE"),
    ("Size", "SIZE"),
    ("CreatedSince", "CREATED"),
    ("LastUsedSince", "LAST USED"),
    ("UsageCount", "USAGE"),
    ("Shared", "SHARED"),
    ("InUse", "IN USE"),
    ("Description", "DESCRIPTION"),
];

/// Each image, container, volume and part of the build cache, with what it takes.
#[derive(Debug)]
pub(crate) struct Usage {
    images: Listing,
    containers: Listing,
    volumes: Listing,
    cache: Listing,
    /// Bytes of the build cache that images don't take as well.
    cache_bytes: f64,
}

impl Usage {
    /// From the engine's words, at this time: seconds since 1970.
    pub(crate) fn of(used: &Value, now: i64) -> Self {
        let list = |key: &str| used[key].as_array().cloned().unwrap_or_default();
        let mut images = Listing::new(
            image::COLUMNS,
            &["Repository", "Tag", "ID", "CreatedSince", "Size", "SharedSize", "UniqueSize", "Containers"],
        );
        for image in list("Images") {
            images.push(image_row(&image, now));
        }
        let mut containers = Listing::new(
            container::COLUMNS,
            &["ID", "Image", "Command", "LocalVolumes", "Size", "RunningFor", "Status", "Names"],
        );
        for mut container in list("Containers") {
            // What its image takes is told of with the image.
            container["SizeRootFs"] = Value::Null;
            containers.push(container::row(&container, true, now));
        }
        let mut volumes = Listing::new(volume::COLUMNS, &["Name", "Links", "Size"]);
        for volume in list("Volumes") {
            let usage = &volume["UsageData"];
            let row = volume::row(&volume).with("Links", number(usage, "RefCount").to_string());
            volumes.push(row.with("Size", known_size(number(usage, "Size"))));
        }
        let mut parts = list("BuildCache");
        parts.sort_by_key(|part| (moment(part, "LastUsedAt"), part["ID"].as_str().map(str::to_owned)));
        let own = parts.iter().filter(|part| part["Shared"] != true);
        let cache_bytes = own.map(|part| part["Size"].as_f64().unwrap_or(0.0)).sum();
        let usual = &["ID", "CacheType", "Size", "CreatedSince", "LastUsedSince", "UsageCount", "Shared"];
        let mut cache = Listing::new(CACHE_COLUMNS, usual);
        for part in &parts {
            cache.push(cache_row(part, now));
        }
        Self { images, containers, volumes, cache, cache_bytes }
    }

    /// Four tables, or what the format makes of all rows.
    pub(crate) fn print(&self, format: Option<&str>) -> Done {
        let text = match format.unwrap_or("table") {
            "table" => self.tables()?,
            "json" => self.rows().to_string() + "\n",
            template => Template::new(template)
                .and_then(|template| template.apply(&self.rows()))
                .map_err(Failure::new)?,
        };
        io::stdout().write_all(text.as_bytes())?;
        Ok(SUCCESS)
    }

    fn tables(&self) -> Result<String, Failure> {
        let table = |listing: &Listing| listing.text(None, None);
        let cache = units::size_in_four_digits(self.cache_bytes);
        Ok(format!(
            "Images space usage:\n\n{}\nContainers space usage:\n\n{}\nLocal Volumes space usage:\n\n{}\n\
             Build cache usage: {cache}\n\n{}",
            table(&self.images)?,
            table(&self.containers)?,
            table(&self.volumes)?,
            table(&self.cache)?
        ))
    }

    fn rows(&self) -> Value {
        json!({
            "Images": self.images.rows(),
            "Containers": self.containers.rows(),
            "Volumes": self.volumes.rows(),
            "BuildCache": self.cache.rows(),
        })
    }
}

fn number(value: &Value, key: &str) -> i64 {
    value[key].as_i64().unwrap_or(-1)
}

/// The engine says -1 where it hasn't looked.
#[expect(clippy::cast_precision_loss, reason = "it is shown in four digits")]
fn known_size(bytes: i64) -> String {
    if bytes < 0 { "N/A".to_owned() } else { units::size_in_four_digits(bytes as f64) }
}

/// Seconds since 1970.
fn moment(value: &Value, key: &str) -> Option<i64> {
    Some(value[key].as_str()?.parse::<jiff::Timestamp>().ok()?.as_second())
}

/// Under its first name alone.
fn image_row(image: &Value, now: i64) -> Row {
    let (name, tag, digest) = image::names(image, false).swap_remove(0);
    let (size, shared) = (number(image, "Size"), number(image, "SharedSize"));
    let containers = number(image, "Containers");
    image::row(image, true, now)
        .with("Repository", name)
        .with("Tag", tag)
        .with("Digest", digest)
        .with("SharedSize", known_size(shared))
        .with("UniqueSize", if shared < 0 { "N/A".to_owned() } else { known_size(size - shared) })
        .with("Containers", if containers < 0 { "N/A".to_owned() } else { containers.to_string() })
}

fn cache_row(part: &Value, now: i64) -> Row {
    let text = |key: &str| part[key].as_str().unwrap_or_default();
    let ago = |key: &str| {
        moment(part, key).map_or_else(String::new, |then| format!("{} ago", units::duration(now - then)))
    };
    let id = text("ID");
    Row::default()
        .with("ID", units::short_id(id))
        .with("Parent", text("Parent"))
        .with("CacheType", text("Type"))
        .with("Description", text("Description"))
        .with("Size", known_size(number(part, "Size")))
        .with("CreatedSince", ago("CreatedAt"))
        .with("LastUsedSince", ago("LastUsedAt"))
        .with("UsageCount", number(part, "UsageCount").max(0).to_string())
        .with("Shared", (part["Shared"] == true).to_string())
        .with("InUse", (part["InUse"] == true).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage() -> Usage {
        let used = json!({
            "Images": [{
                "Id": "sha256:0123456789abcdef", "RepoTags": ["a:1", "a:2"], "Created": 1_714_560_000,
                "Size": 2_000_000, "SharedSize": 500_000, "Containers": 2,
            }],
            "Containers": [{
                "Id": "fedcba9876543210", "Names": ["/one"], "Image": "a:1", "ImageID": "sha256:01", "Command": "sh",
                "Created": 1_714_560_000, "Status": "Up", "State": "running", "SizeRw": 12, "SizeRootFs": 2_000_012,
            }],
            "Volumes": [{ "Name": "v", "Driver": "local", "UsageData": { "RefCount": 1, "Size": -1 } }],
            "BuildCache": [
                { "ID": "later0123456789", "Type": "regular", "Size": 1500, "CreatedAt": "2024-05-01T10:40:00Z",
                  "LastUsedAt": "2024-05-01T10:40:01.5Z", "UsageCount": 3, "Shared": false },
                { "ID": "never", "Type": "source.local", "Size": 700, "CreatedAt": "2024-05-01T10:40:00Z", "Shared": true },
            ],
        });
        Usage::of(&used, 1_714_560_180)
    }

    #[test]
    fn each_thing_has_a_row_with_what_it_takes() {
        let Ok(text) = usage().tables() else { panic!("tables") };
        let rows: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
            .collect();
        let has = |row: &[&str]| assert!(rows.iter().any(|found| found == row), "{row:?} in\n{text}");
        has(&["a", "1", "0123456789ab", "3 minutes ago", "2MB", "500kB", "1.5MB", "2"]);
        has(&["fedcba987654", "a:1", "\"sh\"", "0", "12B", "3 minutes ago", "Up", "one"]);
        has(&["v", "1", "N/A"]);
        // What images take as well isn't counted again.
        has(&["Build cache usage: 1.5kB"]);
        has(&["later0123456", "regular", "1.5kB", "3 minutes ago", "2 minutes ago", "3", "false"]);
        assert!(text.find("never").unwrap() < text.find("later").unwrap(), "{text}");
    }

    #[test]
    fn a_template_sees_all_rows() {
        let template =
            Template::new("{{range .Images}}{{.Repository}}:{{.Tag}} {{end}}{{len .BuildCache}}").unwrap();
        assert_eq!(template.apply(&usage().rows()).unwrap(), "a:1 2");
    }
}
