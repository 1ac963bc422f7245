//! `dorm settings`: what new sessions get where nothing is asked for.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::Command;

use clap::{Args, Subcommand};
use dormouse_client::{Home, KEYS, UserSettings};
use serde_json::{Map, Value};

use crate::arguments::Format;
use crate::context::nearest;
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::format::table::align;
use crate::output::{print, print_json, warn};

/// `dorm settings`.
#[derive(Args)]
pub(crate) struct SettingsArguments {
    #[command(subcommand)]
    command: Option<SettingsCommand>,
}

#[derive(Subcommand)]
enum SettingsCommand {
    /// Tell every setting, and whether it is set.
    Show {
        /// How.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Print one setting; nothing if it isn't set.
    Get {
        /// Which one.
        key: String,
    },
    /// Set one.
    Set {
        /// Which one.
        key: String,
        /// To what.
        value: String,
    },
    /// Open the file in an editor.
    Edit,
    /// Make the file anew, with nothing set.
    Reset,
}

fn path() -> Result<PathBuf, Failure> {
    Ok(Home::from_env()?.settings())
}

/// What is set; what makes no sense is told and left out.
pub(crate) fn read() -> Result<UserSettings, Failure> {
    let path = path()?;
    let settings = UserSettings::read(&path)
        .map_err(|error| Failure::new(format!("can't read {}: {error}", path.display())))?;
    for warning in settings.warnings() {
        warn(&format!("{}, {warning}", path.display()));
    }
    Ok(settings)
}

fn unknown(key: &str) -> Failure {
    let failure = Failure::new(format!("there is no setting {key:?}"));
    match nearest(key, KEYS.iter().map(|key| key.name)) {
        Some(near) => failure.hint(format!("did you mean {near:?}?")),
        None => failure.hint("`dorm settings show` lists them"),
    }
}

impl SettingsArguments {
    pub(crate) fn run(self) -> Done {
        match self.command.unwrap_or(SettingsCommand::Show { format: Format::Table }) {
            SettingsCommand::Show { format } => show(format),
            SettingsCommand::Get { key } => {
                if !KEYS.iter().any(|known| known.name == key) {
                    return Err(unknown(&key));
                }
                read()?.get(&key).map_or(Ok(SUCCESS), print)
            }
            SettingsCommand::Set { key, value } => {
                if !KEYS.iter().any(|known| known.name == key) {
                    return Err(unknown(&key));
                }
                UserSettings::set(&path()?, &key, &value).map(|()| SUCCESS).map_err(Failure::new)
            }
            SettingsCommand::Edit => edit(),
            SettingsCommand::Reset => {
                let path = path()?;
                UserSettings::reset(&path)
                    .map_err(|error| Failure::new(format!("can't write {}: {error}", path.display())))?;
                print(path.display().to_string())
            }
        }
    }
}

fn show(format: Format) -> Done {
    let settings = read()?;
    if format == Format::Json {
        let values: Map<String, Value> = KEYS
            .iter()
            .map(|key| (key.name.to_owned(), settings.get(key.name).map_or(Value::Null, Value::from)))
            .collect();
        return print_json(&values);
    }
    let mut text = String::from("SETTING\tVALUE\tMEANING\n");
    for key in KEYS {
        let value = settings.get(key.name).map_or_else(|| format!("({})", key.default), str::to_owned);
        text.push_str(&format!("{}\t{value}\t{}\n", key.name, key.about));
    }
    io::stdout().write_all(align(&text).as_bytes())?;
    Ok(SUCCESS)
}

fn edit() -> Done {
    let path = path()?;
    if !io::stdin().is_terminal() {
        return Err(
            Failure::new("an editor needs a terminal").hint("`dorm settings set KEY VALUE` does without")
        );
    }
    if !path.exists() {
        UserSettings::reset(&path)
            .map_err(|error| Failure::new(format!("can't write {}: {error}", path.display())))?;
    }
    let named = |name: &str| std::env::var(name).ok().filter(|editor| !editor.is_empty());
    let editor = named("VISUAL").or_else(|| named("EDITOR")).unwrap_or_else(|| "vi".to_owned());
    // Editors are named with options: `code --wait`.
    let status = Command::new("sh").args(["-c", &format!("{editor} \"$1\""), "sh"]).arg(&path).status()?;
    read()?;
    Ok(if status.success() { SUCCESS } else { FAILED })
}
