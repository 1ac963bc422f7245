//! The settings file: what new sessions get where nothing is asked for.
//!
//! A line that makes no sense never stands in the way: it is told, and the default is used.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use dormouse_api::{
    CrashPolicy, CreateSession, IdleAction, IdleTimeout, check_authority, check_insecure, check_mirror,
};
use toml_edit::{Document, DocumentMut, Item, Table, Value};

/// Longest file that is read, in bytes.
const BYTES_MAX: u64 = 256 * 1024;

/// One thing that can be set.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// `TABLE.NAME`, as in the file.
    pub name: &'static str,
    /// What it is, in one line.
    pub about: &'static str,
    /// What it is when nothing is set, in words.
    pub default: &'static str,
    /// A value that may be set, as it is written in the file.
    pub example: &'static str,
    take: fn(&str, &mut CreateSession) -> Result<(), String>,
}

/// Everything that can be set.
pub const KEYS: &[Key] = &[
    Key {
        name: "session.cpus",
        about: "Virtual CPUs of a new session",
        default: "all of the host's, up to 4",
        example: "2",
        take: |text, wish| whole(text).map(|cpus| wish.cpus = Some(cpus)),
    },
    Key {
        name: "session.memory",
        about: "RAM of a new session",
        default: "a quarter of the host's, within 1..8 GiB; 1 GiB without KVM",
        example: "\"2G\"",
        take: |text, wish| size(text).map(|bytes| wish.memory_mib = Some(bytes >> 20)),
    },
    Key {
        name: "session.storage-size",
        about: "Size of a new session's disk, which takes only what is used",
        default: "64 GiB",
        example: "\"32G\"",
        take: |text, wish| size(text).map(|bytes| wish.storage_bytes = Some(bytes)),
    },
    Key {
        name: "session.idle-timeout",
        about: "Seconds from the last use to the sleep, or \"never\"",
        default: "30",
        example: "60",
        take: |text, wish| text.parse::<IdleTimeout>().map(|timeout| wish.idle_timeout = timeout),
    },
    Key {
        name: "session.doze",
        about: "Seconds that the VM then stands still, in memory, before it is put to sleep; 0: not at all",
        default: "0",
        example: "600",
        take: |text, wish| {
            let seconds = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
            wish.doze_seconds = seconds;
            Ok(())
        },
    },
    Key {
        name: "session.idle-action",
        about: "How a VM is put to sleep: \"suspend\" keeps its memory, \"stop\" shuts it down",
        default: "\"suspend\" where it works",
        example: "\"stop\"",
        take: |text, wish| {
            wish.idle_action = match text {
                "suspend" => IdleAction::Suspend,
                "stop" => IdleAction::Stop,
                _ => return Err(format!("{text:?} is neither \"suspend\" nor \"stop\"")),
            };
            Ok(())
        },
    },
    Key {
        name: "session.crash",
        about: "What follows a crash of a VM: \"reopen\" or \"terminate\"",
        default: "\"reopen\"",
        example: "\"terminate\"",
        take: |text, wish| {
            wish.crash = match text {
                "reopen" => CrashPolicy::Reopen,
                "terminate" => CrashPolicy::Terminate,
                _ => return Err(format!("{text:?} is neither \"reopen\" nor \"terminate\"")),
            };
            Ok(())
        },
    },
    Key {
        name: "session.boot-timeout",
        about: "Longest start of a VM, in seconds",
        default: "240",
        example: "120",
        take: |text, wish| whole(text).map(|seconds| wish.boot_timeout_seconds = Some(seconds)),
    },
    Key {
        name: "session.registry-mirrors",
        about: "Registries that a new session's engine asks before Docker Hub, separated by commas",
        default: "none",
        example: "\"https://mirror.example.org\"",
        take: |text, wish| list(text, check_mirror).map(|mirrors| wish.registries.mirrors = mirrors),
    },
    Key {
        name: "session.insecure-registries",
        about: "Registries that a new session's engine speaks to without TLS, separated by commas",
        default: "none",
        example: "\"registry.lan:5000\"",
        take: |text, wish| list(text, check_insecure).map(|insecure| wish.registries.insecure = insecure),
    },
    Key {
        name: "session.registry-authorities",
        about: "Certificates of authorities that a new session's engine trusts beside the host's: files or folders, \
                separated by commas",
        default: "none",
        example: "\"/etc/ssl/company.pem\"",
        take: |text, wish| {
            let paths = list(text, |path| check_authority(Path::new(path)))?;
            wish.registries.authorities = paths.into_iter().map(Into::into).collect();
            Ok(())
        },
    },
    Key {
        name: "session.publish-address",
        about: "Where ports of a new session's containers are published that name no address",
        default: "127.0.0.1",
        example: "\"0.0.0.0\"",
        take: |text, wish| {
            let address = text.parse().map_err(|_| format!("{text:?} is no address"))?;
            wish.publish_address = Some(address);
            Ok(())
        },
    },
    Key {
        name: "session.asleep-answers",
        about: "Are reads of a new session's engine answered without waking it, \"on\" or \"off\"",
        default: "\"on\"",
        example: "\"off\"",
        take: |text, wish| {
            wish.asleep_answers = match text {
                "on" => Some(true),
                "off" => Some(false),
                _ => return Err(format!("{text:?} is neither \"on\" nor \"off\"")),
            };
            Ok(())
        },
    },
    Key {
        name: "snapshots.limit",
        about: "What the snapshots of all sleeping sessions may take together; the oldest are given up",
        default: "a quarter of the file system",
        example: "\"20G\"",
        // No matter of one session's.
        take: |text, _| size(text).map(drop),
    },
    Key {
        name: "snapshots.compress-after",
        about: "Seconds that a session has slept when its snapshot is compressed, or \"never\"",
        default: "3600",
        example: "600",
        take: |text, _| text.parse::<IdleTimeout>().map(drop),
    },
];

/// What is set, and what was wrong with the rest.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct UserSettings {
    values: Vec<(&'static str, String)>,
    warnings: Vec<String>,
}

fn whole<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?} is no whole number in range"))
}

fn list(text: &str, check: fn(&str) -> Result<(), String>) -> Result<Vec<String>, String> {
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    items.map(|item| check(item).map(|()| item.to_owned())).collect()
}

/// A number of bytes with an optional binary unit: `512m`, `1.5g`, `2GiB`, `1073741824`.
///
/// # Errors
/// In words, when it is none, or too large.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: try 512M or 2G");
    let end = text.find(|letter: char| letter.is_ascii_alphabetic()).unwrap_or(text.len());
    let shift = match text[end..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let digits = text[..end].trim_end();
    if let Ok(number) = digits.parse::<u64>() {
        return number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"));
    }
    if !digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return Err(wrong());
    }
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    #[expect(clippy::cast_precision_loss, reason = "a fraction of a size is an approximation anyway")]
    let bytes = number * (1_u64 << shift) as f64;
    if bytes < 9e18 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is positive and in range"
        )]
        return Ok(bytes as u64);
    }
    Err(format!("{text:?} is too large"))
}

/// The key of this name.
fn key(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// A value without its quotes.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.value().clone()),
        Value::Integer(number) => Some(number.value().to_string()),
        _ => None,
    }
}

/// Would this do for a key?
fn check(key: &Key, text: &str) -> Result<(), String> {
    (key.take)(text, &mut CreateSession::named(dormouse_api::SessionName::default()))
}

impl UserSettings {
    /// Reads a file; one that isn't there sets nothing.
    ///
    /// # Errors
    /// When it is there and can't be read.
    pub fn read(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(found) if found.len() > BYTES_MAX => Err(io::Error::other("it is too long")),
            Ok(_) => Ok(Self::parse(&fs::read_to_string(path)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Understands a file's text as far as it makes sense.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut settings = Self::default();
        let line = |span: Option<std::ops::Range<usize>>| {
            let start = span.map_or(0, |span| span.start).min(text.len());
            text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1
        };
        let document = match Document::parse(text) {
            Ok(document) => document,
            Err(error) => {
                let line = line(error.span());
                settings
                    .warnings
                    .push(format!("line {line}: {}; nothing of the file is used", error.message()));
                return settings;
            }
        };
        for (table, item) in document.as_table() {
            let Some(entries) = item.as_table_like() else {
                settings.warnings.push(format!("line {}: there is no setting {table:?}", line(item.span())));
                continue;
            };
            for (name, item) in entries.iter() {
                let (name, line) = (format!("{table}.{name}"), line(item.span()));
                match (key(&name), item.as_value().and_then(plain)) {
                    (None, _) => settings.warnings.push(format!("line {line}: there is no setting {name:?}")),
                    (Some(key), Some(value)) => match check(key, &value) {
                        Ok(()) => settings.values.push((key.name, value)),
                        Err(why) => {
                            settings.warnings.push(format!("line {line}: {name}: {why}; the default is used"))
                        }
                    },
                    (Some(_), None) => {
                        settings.warnings.push(format!(
                            "line {line}: {name} is neither text nor a number; the default is used"
                        ));
                    }
                }
            }
        }
        settings
    }

    /// What is wrong in the file, a line each.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The value of a key, if it is set.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str())
    }

    /// Gives a new session what is set.
    pub fn apply(&self, wish: &mut CreateSession) {
        for (name, value) in &self.values {
            if let Some(key) = key(name) {
                // It was checked when it was read.
                let _ = (key.take)(value, wish);
            }
        }
    }

    /// Sets a key in a file, whose other lines stay as they are.
    ///
    /// # Errors
    /// In words, when there is no such key, the value won't do, or the file can't be written.
    pub fn set(path: &Path, name: &str, value: &str) -> Result<(), String> {
        let key = key(name).ok_or_else(|| format!("there is no setting {name:?}"))?;
        check(key, value)?;
        let old = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(format!("can't read {}: {error}", path.display())),
        };
        let mut document: DocumentMut = old.parse().map_err(|error: toml_edit::TomlError| {
            format!("{} makes no sense: {}", path.display(), error.message())
        })?;
        let (table, entry) = name.split_once('.').unwrap_or(("session", name));
        let item = document.entry(table).or_insert_with(|| Item::Table(Table::new()));
        let value = value.parse::<i64>().map_or_else(|_| Value::from(value), Value::from);
        let entries =
            item.as_table_like_mut().ok_or_else(|| format!("{table:?} is no table in {}", path.display()))?;
        entries.insert(entry, Item::Value(value));
        write(path, &document.to_string()).map_err(|error| format!("can't write {}: {error}", path.display()))
    }

    /// Makes a file anew in which every key stands as a comment.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn reset(path: &Path) -> io::Result<()> {
        let mut text = String::from(
            "# What new sessions get where nothing is asked for. `dorm settings show` tells what is in force.\n",
        );
        let mut table = "";
        for key in KEYS {
            let (of, name) = key.name.split_once('.').unwrap_or(("", key.name));
            if of != table {
                table = of;
                text.push_str(&format!("\n[{table}]\n"));
            }
            text.push_str(&format!(
                "# {}. Default: {}.\n# {name} = {}\n",
                key.about, key.default, key.example
            ));
        }
        write(path, &text)
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = path.with_extension(format!("toml.{}", std::process::id()));
    let mut file = fs::File::create(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(text: &str) -> CreateSession {
        let mut wish = CreateSession::named("work".parse().unwrap());
        UserSettings::parse(text).apply(&mut wish);
        wish
    }

    #[test]
    fn what_is_set_is_what_new_sessions_get() {
        let text = "[session]\ncpus = 3\nmemory = \"2G\"\nidle-timeout = \"never\"\nidle-action = \"stop\"\ndoze = 600\n\
            registry-mirrors = \"http://a, https://b:5000\"\npublish-address = \"::\"\nasleep-answers = \"off\"\n";
        assert!(UserSettings::parse(text).warnings().is_empty());
        let wish = wish(text);
        assert_eq!((wish.cpus, wish.memory_mib), (Some(3), Some(2048)));
        assert_eq!((wish.idle_timeout, wish.idle_action), (IdleTimeout::Never, IdleAction::Stop));
        assert_eq!(wish.doze_seconds, 600);
        assert_eq!(wish.registries.mirrors, ["http://a", "https://b:5000"]);
        assert_eq!((wish.publish_address, wish.asleep_answers), (Some("::".parse().unwrap()), Some(false)));
    }

    #[test]
    fn a_bad_line_is_told_with_its_number_and_the_default_is_used() {
        let settings =
            UserSettings::parse("[session]\ncpus = \"many\"\ncolour = 1\nmemory = true\n\n[other]\nx = 1\n");
        let warnings = settings.warnings().join("\n");
        for part in [
            "line 2: session.cpus",
            "line 3: there is no setting \"session.colour\"",
            "line 4: session.memory",
            "line 7",
        ] {
            assert!(warnings.contains(part), "{part}: {warnings}");
        }
        assert_eq!(settings.get("session.cpus"), None);
        let broken = UserSettings::parse("[session]\ncpus = 2\nmemory =\n");
        assert!(broken.warnings()[0].starts_with("line 3"), "{:?}", broken.warnings());
        assert_eq!(broken.get("session.cpus"), None);
    }

    #[test]
    fn setting_one_key_leaves_the_rest_of_the_file_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/settings.toml");
        UserSettings::reset(&path).unwrap();
        assert_eq!(UserSettings::read(&path).unwrap(), UserSettings::default());
        UserSettings::set(&path, "session.memory", "3G").unwrap();
        UserSettings::set(&path, "session.cpus", "2").unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("# Longest start of a VM") && text.contains("cpus = 2"), "{text}");
        let settings = UserSettings::read(&path).unwrap();
        assert_eq!((settings.get("session.memory"), settings.get("session.cpus")), (Some("3G"), Some("2")));
        assert!(UserSettings::set(&path, "session.cpus", "x").is_err());
        assert!(UserSettings::set(&path, "nothing", "x").is_err());
        assert_eq!(UserSettings::read(&path).unwrap(), settings);
    }

    #[test]
    fn every_example_may_be_set() {
        for Key { name, example, .. } in KEYS {
            let (table, entry) = name.split_once('.').unwrap();
            let settings = UserSettings::parse(&format!("[{table}]\n{entry} = {example}\n"));
            assert!(settings.warnings().is_empty() && settings.get(name).is_some(), "{name}");
        }
    }

    #[test]
    fn sizes_are_read_as_docker_reads_them() {
        assert_eq!(size("512m"), Ok(512 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("1.5g"), Ok(3 << 29));
        assert_eq!(size("7"), Ok(7));
        for bad in
            ["", "G", "-1", "1x", "1.2.3g", "inf", "1e3", "99999999999999999999", "18446744073709551615k"]
        {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
