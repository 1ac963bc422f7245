//! What `--secret`, `--ssh` and `--output` take.

use std::io;
use std::path::{Path, PathBuf};

/// Largest secret, in bytes; BuildKit's.
pub(super) const SECRET_BYTES_MAX: u64 = 512_000;

/// A secret: its id, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Secret {
    id: String,
    from: From,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum From {
    File(PathBuf),
    /// A variable; one that is named and isn't there is empty.
    Variable(String),
    /// The variable of the same name, which must be there.
    Same,
}

/// An SSH agent: its id, and its socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Agent {
    pub(super) id: String,
    pub(super) socket: Option<PathBuf>,
}

/// What a build comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Output {
    /// An image in the engine.
    Image,
    /// The image, sent to its registry.
    Push,
    /// The image, written as `dorm save` does; `None`: to standard output.
    Saved(Option<PathBuf>),
    /// Its files as a tar archive; `None`: to standard output.
    Tar(Option<PathBuf>),
    /// Its files in a folder.
    Folder(PathBuf),
    /// Nothing but what the next builds use.
    Cache,
}

/// Splits a line of CSV (RFC 4180).
fn fields(text: &str) -> Result<Vec<String>, String> {
    let mut fields = vec![String::new()];
    let mut letters = text.chars().peekable();
    let mut quoted = false;
    while let Some(letter) = letters.next() {
        let Some(field) = fields.last_mut() else { break };
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => {
                letters.next();
                field.push('"');
            }
            '"' if quoted => quoted = false,
            '"' if field.is_empty() => quoted = true,
            ',' if !quoted => fields.push(String::new()),
            other => field.push(other),
        }
    }
    if quoted { Err(format!("{text:?} ends within quotes")) } else { Ok(fields) }
}

/// The fields as names, in small letters, and values.
fn values(text: &str) -> Result<Vec<(String, String)>, String> {
    let pair = |field: String| {
        let (name, value) = field.split_once('=').ok_or_else(|| format!("{field:?} is no NAME=VALUE"))?;
        Ok((name.to_ascii_lowercase(), value.to_owned()))
    };
    fields(text)?.into_iter().map(pair).collect()
}

/// `id=NAME[,type=file|env][,env=VARIABLE][,src=FILE]`.
pub(crate) fn secret(text: &str) -> Result<Secret, String> {
    let (mut id, mut kind, mut variable, mut file) = (None, None, None, None);
    for (name, value) in values(text)? {
        match name.as_str() {
            "id" => id = Some(value),
            "type" if value == "file" || value == "env" => kind = Some(value),
            "type" => return Err(format!("a secret's type is file or env, not {value:?}")),
            "env" => variable = Some(value),
            "src" | "source" => file = Some(value),
            other => return Err(format!("a secret has no {other:?}")),
        }
    }
    let id = id.filter(|id| !id.is_empty()).ok_or("a secret needs an id: id=NAME")?;
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "_-.".contains(letter);
    if id.starts_with('-') || !id.chars().all(plain) {
        return Err(format!("{id:?} is no id of a secret: letters, digits, and _ - . are"));
    }
    let from = match (kind.as_deref(), variable, file) {
        (_, Some(variable), _) => From::Variable(variable),
        // With `type=env`, `src` names the variable.
        (Some("env"), None, Some(variable)) => From::Variable(variable),
        (_, None, Some(file)) => From::File(file.into()),
        (Some("file"), None, None) => From::File(id.clone().into()),
        (_, None, None) => From::Same,
    };
    Ok(Secret { id, from })
}

impl Secret {
    /// Its id, and what it is.
    pub(super) fn read(&self) -> Result<(String, Vec<u8>), String> {
        let data = match &self.from {
            From::Variable(name) => std::env::var(name).unwrap_or_default().into_bytes(),
            From::Same => std::env::var(&self.id)
                .map_err(|_| format!("there is no variable {}: name a file with src=FILE", self.id))?
                .into_bytes(),
            From::File(path) => bounded(path).map_err(|error| {
                format!("can't read the secret {} from {}: {error}", self.id, path.display())
            })?,
        };
        if data.len() as u64 > SECRET_BYTES_MAX {
            return Err(format!("the secret {} is longer than {SECRET_BYTES_MAX} bytes", self.id));
        }
        Ok((self.id.clone(), data))
    }
}

/// One byte more than may be says that it is too long.
fn bounded(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut data = Vec::new();
    std::fs::File::open(path)?.take(SECRET_BYTES_MAX + 1).read_to_end(&mut data)?;
    Ok(data)
}

/// `default`, or `ID=SOCKET`.
pub(crate) fn agent(text: &str) -> Result<Agent, String> {
    let (id, socket) = match text.split_once('=') {
        Some((id, socket)) => (id, Some(PathBuf::from(socket))),
        None => (text, None),
    };
    if id.is_empty() {
        return Err("an SSH agent needs an id: default, or ID=SOCKET".to_owned());
    }
    Ok(Agent { id: id.to_owned(), socket })
}

/// `FOLDER`, `-`, or `type=local|tar|docker|oci|image|registry|cacheonly[,dest=PATH][,push=true]`.
pub(crate) fn output(text: &str) -> Result<Output, String> {
    if text == "-" {
        return Ok(Output::Tar(None));
    }
    if !text.contains('=') {
        return if text.is_empty() {
            Err("it goes nowhere".to_owned())
        } else {
            Ok(Output::Folder(text.into()))
        };
    }
    let (mut kind, mut to, mut push) = (String::new(), None, false);
    for (name, value) in values(text)? {
        match name.as_str() {
            "type" => kind = value,
            "dest" => to = Some(value),
            "push" => push = value.parse().map_err(|_| format!("push is true or false, not {value:?}"))?,
            "tar" if value == "true" => {}
            other => return Err(format!("an output has no {other:?}")),
        }
    }
    let file = |to: Option<String>| to.filter(|to| to != "-").map(PathBuf::from);
    match (kind.as_str(), to) {
        ("local", Some(to)) => Ok(Output::Folder(to.into())),
        ("local", None) => Err("type=local needs dest=FOLDER".to_owned()),
        ("tar", to) => Ok(Output::Tar(file(to))),
        ("oci", to) | ("docker", to @ Some(_)) => Ok(Output::Saved(file(to))),
        ("docker" | "image", None) if !push => Ok(Output::Image),
        ("image" | "registry", None) => Ok(Output::Push),
        ("cacheonly", None) => Ok(Output::Cache),
        ("image" | "registry" | "cacheonly" | "docker", _) => {
            Err(format!("type={kind} and these options exclude each other"))
        }
        ("", _) => Err("an output needs a type: type=tar".to_owned()),
        (other, _) => Err(format!(
            "there is no output of type {other:?}: local, tar, docker, oci, image, registry, cacheonly are"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_come_from_files_and_variables_and_are_bounded() {
        let from = |text: &str| secret(text).map(|secret| secret.from);
        assert_eq!(from("id=a,src=/x,y"), Err("\"y\" is no NAME=VALUE".to_owned()));
        assert_eq!(from("id=a,\"src=/x,y\""), Ok(From::File("/x,y".into())));
        assert_eq!(from("id=a,source=/x"), Ok(From::File("/x".into())));
        assert_eq!(from("id=a,src=/x,env=B"), Ok(From::Variable("B".to_owned())));
        assert_eq!(from("type=env,id=a,src=B"), Ok(From::Variable("B".to_owned())));
        assert_eq!(from("type=file,id=a"), Ok(From::File("a".into())));
        assert_eq!(from("id=a"), Ok(From::Same));
        for bad in ["", "a", "id=", "id=-a", "id=a b", "src=/x", "id=a,type=x", "id=a,mode=1", "id=\"a"] {
            assert!(secret(bad).is_err(), "{bad}");
        }
        assert_eq!(
            secret("id=a,env=DORM_NO_SUCH_VARIABLE").unwrap().read(),
            Ok(("a".to_owned(), Vec::new()))
        );
        assert!(secret("id=DORM_NO_SUCH_VARIABLE").unwrap().read().is_err());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        for (length, fits) in [(512_000, true), (512_001, false)] {
            std::fs::write(&path, vec![0; length]).unwrap();
            assert_eq!(secret(&format!("id=a,src={}", path.display())).unwrap().read().is_ok(), fits);
        }
    }

    #[test]
    fn outputs_are_written_as_docker_has_them() {
        for (text, expected) in [
            ("-", Output::Tar(None)),
            ("out", Output::Folder("out".into())),
            ("type=local,dest=out", Output::Folder("out".into())),
            ("type=tar", Output::Tar(None)),
            ("type=tar,dest=-", Output::Tar(None)),
            ("TYPE=tar,dest=a.tar", Output::Tar(Some("a.tar".into()))),
            ("type=docker", Output::Image),
            ("type=docker,dest=a.tar", Output::Saved(Some("a.tar".into()))),
            ("type=oci", Output::Saved(None)),
            ("type=image", Output::Image),
            ("type=image,push=true", Output::Push),
            ("type=registry", Output::Push),
            ("type=cacheonly", Output::Cache),
        ] {
            assert_eq!(output(text), Ok(expected), "{text}");
        }
        for bad in [
            "",
            "type=",
            "type=x",
            "type=local",
            "type=tar,push=x",
            "dest=a",
            "type=registry,dest=a",
            "type=oci,tar=false",
        ] {
            assert!(output(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_agent_has_an_id_and_maybe_a_socket() {
        assert_eq!(agent("default"), Ok(Agent { id: "default".to_owned(), socket: None }));
        assert_eq!(agent("a=/s"), Ok(Agent { id: "a".to_owned(), socket: Some("/s".into()) }));
        assert!(agent("").is_err() && agent("=/s").is_err());
    }
}
