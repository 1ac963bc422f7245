//! `dorm inspect`, and that of each kind of thing: the engine's own words, in order.

use std::io::{self, Write};

use clap::{Args, ValueEnum};
use dormouse_client::{Call, Engine, EngineError, Target};
use http::Method;
use serde_json::Value;

use crate::context::{Context, nearest};
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::format::indent::indent;
use crate::format::template::Template;

/// What can be inspected, in the order in which a name is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    Container,
    Image,
    Network,
    Volume,
}

/// Things of one kind.
#[derive(Args)]
pub(crate) struct Names {
    /// json, or a template.
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    /// Their sizes as well, for containers.
    #[arg(short, long)]
    size: bool,
    /// Which ones.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// `dorm inspect`.
#[derive(Args)]
pub(crate) struct Inspect {
    /// Of this kind only.
    #[arg(long, value_enum, value_name = "KIND")]
    r#type: Option<Kind>,
    #[command(flatten)]
    names: Names,
}

impl Kind {
    fn target(self, name: &str, size: bool) -> String {
        match self {
            Self::Container => Target::of("containers", name, "/json").when("size", size).text(),
            Self::Image => Target::of("images", name, "/json").text(),
            Self::Network => Target::of("networks", name, "").text(),
            Self::Volume => Target::of("volumes", name, "").text(),
        }
    }

    /// An error about a thing that the engine doesn't have, with the name that was probably meant.
    pub(crate) async fn unknown(self, engine: &Engine, name: &str, failure: Failure) -> Failure {
        let (list, hint) = match self {
            Self::Container => return crate::container::unknown(engine, name, failure).await,
            Self::Image => return crate::image::unknown(engine, name, failure).await,
            Self::Network => ("/networks", "`dorm network ls` lists what there is"),
            Self::Volume => ("/volumes", "`dorm volume ls` lists what there is"),
        };
        let Ok(known) = engine.get::<Value>(list).await else { return failure };
        let known = known.as_array().or_else(|| known["Volumes"].as_array()).cloned().unwrap_or_default();
        match nearest(name, known.iter().filter_map(|thing| thing["Name"].as_str())) {
            Some(near) => failure.hint(format!("did you mean {near:?}?")),
            None => failure.hint(hint),
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Image => "image",
            Self::Network => "network",
            Self::Volume => "volume",
        }
    }
}

impl Inspect {
    pub(crate) async fn run(self, context: &Context) -> Done {
        match self.r#type {
            Some(kind) => self.names.run(context, kind).await,
            None => {
                self.names.look(context, &[Kind::Container, Kind::Image, Kind::Network, Kind::Volume]).await
            }
        }
    }
}

impl Names {
    /// Prints things of one kind.
    pub(crate) async fn run(self, context: &Context, kind: Kind) -> Done {
        self.look(context, &[kind]).await
    }

    /// Prints what is found, tells of what is not, and goes on.
    async fn look(self, context: &Context, kinds: &[Kind]) -> Done {
        let template = match self.format.as_deref() {
            None | Some("json") => None,
            Some(text) => Some(Template::new(text).map_err(Failure::new)?),
        };
        let operation = context.reading().await?;
        let mut found = Vec::new();
        let mut code = SUCCESS;
        for name in &self.names {
            match operation.during(one(&operation.engine, kinds, name, self.size)).await {
                Ok(text) => found.push(text),
                Err(failure) => {
                    failure.report();
                    code = FAILED;
                }
            }
        }
        let mut out = io::stdout().lock();
        match template {
            Some(template) => {
                for text in &found {
                    let value: Value = serde_json::from_str(text).map_err(Failure::new)?;
                    writeln!(
                        out,
                        "{}",
                        template.apply(&value).map_err(|error| Failure::new(format!("template: {error}")))?
                    )?;
                }
            }
            None if self.format.is_some() => writeln!(out, "[{}]", found.join(","))?,
            None => writeln!(out, "{}", indent(&format!("[{}]", found.join(",")), "    "))?,
        }
        Ok(code)
    }
}

/// The engine's own text about the first thing of that name.
async fn one(engine: &Engine, kinds: &[Kind], name: &str, size: bool) -> Result<String, Failure> {
    let mut last = None;
    for kind in kinds {
        let said =
            async { engine.send(Call::new(Method::GET, kind.target(name, size))).await?.bytes().await };
        match said.await {
            Ok(bytes) => {
                return String::from_utf8(bytes.to_vec())
                    .map(|text| text.trim_end().to_owned())
                    .map_err(Failure::new);
            }
            Err(error) if error.is_not_found() => last = Some(error),
            // An image's name is no volume's: the next kind may have it.
            Err(EngineError::Refused { status: 400, .. }) if kinds.len() > 1 => {}
            Err(error) => return Err(error.into()),
        }
    }
    let what = match kinds {
        [kind] => kind.word(),
        _ => "object",
    };
    Err(match (last, kinds) {
        (Some(error), [Kind::Container]) => Kind::Container.unknown(engine, name, error.into()).await,
        (Some(_), [kind]) => {
            kind.unknown(engine, name, Failure::new(format!("No such {what}: {name}"))).await
        }
        _ => Failure::new(format!("No such {what}: {name}")),
    })
}
