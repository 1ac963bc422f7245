//! `dorm version`.

use clap::Args;
use serde::Serialize;

use crate::arguments::Format;
use crate::context::Context;
use crate::error::Done;
use crate::output::{print, print_json};

#[derive(Args)]
pub(crate) struct VersionArguments {
    /// How.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Who is there. `--format json` has this shape.
#[derive(Serialize)]
struct Versions {
    client: Client,
    service: dormouse_api::Version,
}

#[derive(Serialize)]
struct Client {
    version: &'static str,
    api: u32,
}

impl VersionArguments {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let client = Client { version: env!("CARGO_PKG_VERSION"), api: dormouse_api::API_VERSION };
        if self.format == Format::Table {
            print(format!("dorm {} (API {})", client.version, client.api))?;
        }
        let service = context.service().await?.version().await?;
        match self.format {
            Format::Table => {
                print(format!("dormd {} (API {}, pid {})", service.version, service.api, service.pid))
            }
            Format::Json => print_json(&Versions { client, service }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_versions_are_documented_as_they_are() {
        let service = dormouse_api::Version { version: "0.1.0".to_owned(), api: 1, pid: 4711 };
        let versions = Versions { client: Client { version: "0.1.0", api: 1 }, service };
        let document = include_str!("../../../docs/OUTPUT.md");
        let example = document.split("### version\n\n```json\n").nth(1).unwrap().split("```").next().unwrap();
        let example: serde_json::Value = serde_json::from_str(example).unwrap();
        assert_eq!(serde_json::to_value(versions).unwrap(), example);
    }
}
