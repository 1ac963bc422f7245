//! Registries: who one is there, as docker's clients keep it in `~/.docker/config.json` and in credential helpers.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use clap::{Args, Subcommand};
use http::{HeaderName, HeaderValue};
use serde_json::{Map, Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::context::Context;
use crate::error::{Done, Failure};
use crate::image::reference::HUB;
use crate::output::{print, say, warn};
use crate::terminal::Mode;

/// The statuses of a command that these signals end, as shells have them.
const INTERRUPTED: u8 = 130;
const TERMINATED: u8 = 143;

/// What docker's clients call the registry of names that have none.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// `dorm registry`.
#[derive(Subcommand)]
pub(crate) enum Registry {
    /// Log in to a registry.
    Login(Login),
    /// Log out of a registry.
    Logout(Logout),
}

#[derive(Args)]
pub(crate) struct Login {
    /// Who.
    #[arg(short, long, value_name = "NAME")]
    username: Option<String>,
    /// The password, which others may see in the list of processes.
    #[arg(short, long, value_name = "PASSWORD", conflicts_with = "password_stdin")]
    password: Option<String>,
    /// Read the password from standard input.
    #[arg(long, requires = "username")]
    password_stdin: bool,
    /// Where; Docker Hub when absent.
    server: Option<String>,
}

#[derive(Args)]
pub(crate) struct Logout {
    /// Where; Docker Hub when absent.
    server: Option<String>,
}

/// Runs one of the commands under `dorm registry`.
pub(crate) async fn run(context: &Context, command: Registry) -> Done {
    match command {
        Registry::Login(login) => login.run(context).await,
        Registry::Logout(logout) => logout.run(),
    }
}

/// Where docker's clients keep what they know.
pub(crate) fn docker_folder() -> Result<PathBuf, Failure> {
    let named = std::env::var_os("DOCKER_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
    named.or_else(home).ok_or_else(|| Failure::new("can't tell where docker's configuration is: set HOME"))
}

/// Docker's configuration, and where it lies.
pub(crate) struct Config {
    path: PathBuf,
    pub(crate) values: Map<String, Value>,
}

impl Config {
    pub(crate) fn read() -> Result<Self, Failure> {
        let folder = docker_folder()?;
        let path = folder.join("config.json");
        let values = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| Failure::new(format!("{} makes no sense: {error}", path.display())))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Map::new(),
            Err(error) => return Err(Failure::new(format!("can't read {}: {error}", path.display()))),
        };
        Ok(Self { path, values })
    }

    pub(crate) fn write(&self) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::new(format!("can't write {}: {error}", self.path.display()));
        let place = followed(&self.path);
        if let Some(folder) = place.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        let beside = place.with_extension(format!("json.{}", std::process::id()));
        let mut options = fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create_new(true), 0o600);
        let mut file = options.open(&beside).map_err(failed)?;
        let text = serde_json::to_string_pretty(&self.values).map_err(Failure::new)?;
        file.write_all(text.as_bytes()).and_then(|()| fs::rename(&beside, &place)).map_err(failed)
    }

    /// The program that keeps this registry's password, if one does.
    fn helper(&self, server: &str) -> Option<String> {
        let own = self.values.get("credHelpers").and_then(|helpers| helpers.get(server));
        let name = own.or_else(|| self.values.get("credsStore"))?.as_str().filter(|name| !name.is_empty())?;
        Some(format!("docker-credential-{name}"))
    }

    /// Who one is at a registry; `None`: nobody.
    fn identity(&self, server: &str) -> Result<Option<Value>, Failure> {
        if let Some(helper) = self.helper(server) {
            let Some(answer) = ask(&helper, "get", server)? else { return Ok(None) };
            let said: Value = serde_json::from_slice(&answer)
                .map_err(|error| Failure::new(format!("{helper} makes no sense: {error}")))?;
            let (name, secret) = (&said["Username"], &said["Secret"]);
            // By this name helpers say that the secret is a token.
            return Ok(Some(if name == "<token>" {
                json!({ "identitytoken": secret, "serveraddress": server })
            } else {
                json!({ "username": name, "password": secret, "serveraddress": server })
            }));
        }
        let Some(entry) = self.entry(server) else { return Ok(None) };
        if let Some(token) = entry["identitytoken"].as_str().filter(|token| !token.is_empty()) {
            return Ok(Some(json!({ "identitytoken": token, "serveraddress": server })));
        }
        let decoded = entry["auth"].as_str().and_then(|auth| STANDARD.decode(auth).ok());
        let pair = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = pair.as_deref().and_then(|pair| pair.trim_end_matches('\0').split_once(':'));
        Ok(pair.map(
            |(name, password)| json!({ "username": name, "password": password, "serveraddress": server }),
        ))
    }

    /// What is kept of a registry: under its key, or under an address of it, as older clients did.
    fn entry(&self, server: &str) -> Option<&Value> {
        let auths = self.values.get("auths")?.as_object()?;
        let of_address = || auths.iter().find(|(address, _)| key(address) == server);
        auths.get(server).or_else(|| of_address().map(|(_, entry)| entry))
    }

    /// Drops all that is kept of a registry. Was there any?
    fn forget(&mut self, server: &str) -> bool {
        let Some(auths) = self.values.get_mut("auths").and_then(Value::as_object_mut) else { return false };
        let before = auths.len();
        auths.retain(|address, _| key(address) != server);
        auths.len() < before
    }
}

/// Where a file really lies, or is to lie: whoever keeps their configuration elsewhere has put a link in its place.
fn followed(path: &Path) -> PathBuf {
    match fs::canonicalize(path) {
        Ok(place) => place,
        // One that leads to nothing yet is followed as well. One that leads in a circle is another error.
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(path) {
            Ok(to) => followed(&path.with_file_name(to)),
            Err(_) => path.to_owned(),
        },
        Err(_) => path.to_owned(),
    }
}

/// Asks a credential helper; `None` if it knows nothing.
fn ask(helper: &str, what: &str, input: &str) -> Result<Option<Vec<u8>>, Failure> {
    let failed = |error: io::Error| {
        Failure::new(format!("can't run {helper}: {error}")).hint("docker's config.json names it")
    };
    let mut child = Command::new(helper)
        .arg(what)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that doesn't read has its reasons, and says so by its status.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    Ok(output.status.success().then_some(output.stdout))
}

/// What docker's clients call a registry: its host and its port, whatever address of it was typed.
fn key(server: &str) -> &str {
    let bare = server.strip_prefix("https://").or_else(|| server.strip_prefix("http://")).unwrap_or(server);
    match bare.split_once('/').map_or(bare, |(host, _)| host) {
        HUB | "index.docker.io" => HUB_KEY,
        host => host,
    }
}

fn header(name: &'static str, value: &Value) -> Result<(HeaderName, HeaderValue), Failure> {
    let text = URL_SAFE.encode(value.to_string());
    Ok((HeaderName::from_static(name), HeaderValue::from_str(&text).map_err(Failure::new)?))
}

/// What tells the engine who one is at a registry.
pub(crate) fn authorization(server: &str) -> Result<Option<(HeaderName, HeaderValue)>, Failure> {
    match Config::read()?.identity(key(server))? {
        Some(identity) => Ok(Some(header("x-registry-auth", &identity)?)),
        None => Ok(None),
    }
}

/// What tells the engine that one is nobody: an empty object.
pub(crate) fn nobody() -> (HeaderName, HeaderValue) {
    (HeaderName::from_static("x-registry-auth"), HeaderValue::from_static("e30="))
}

/// Who one is at a registry, as its users call it; `None`: nobody.
pub(crate) fn identity(server: &str) -> Result<Option<Value>, Failure> {
    Config::read()?.identity(key(server))
}

/// Says where to read on when a registry's certificate isn't trusted.
pub(crate) fn explain(failure: Failure) -> Failure {
    match failure.message().contains("x509:") {
        true => failure.hint("`dorm help registries` tells whose certificates are trusted, and from when on"),
        false => failure,
    }
}

impl Login {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let server = key(self.server.as_deref().unwrap_or(HUB)).to_owned();
        let name = match self.username {
            Some(name) => name,
            None => asked("Username: ", false).await?,
        };
        let password = match self.password {
            Some(password) => {
                warn("a password on the command line is seen by others; use --password-stdin");
                password
            }
            None if self.password_stdin => {
                io::read_to_string(io::stdin())?.trim_end_matches(['\r', '\n']).to_owned()
            }
            None => asked("Password: ", true).await?,
        };
        if name.is_empty() || password.is_empty() {
            return Err(
                Failure::new("a name and a password are needed").hint("give -u NAME, and --password-stdin")
            );
        }
        let body = json!({ "username": name, "password": password, "serveraddress": server });
        let operation = context.operation(format!("dorm login {server}"), false).await?;
        let answer: Value = operation
            .during(async { Ok(operation.engine.post_json("/auth", body).await?) })
            .await
            .map_err(explain)?;
        let token = answer["IdentityToken"].as_str().unwrap_or_default();
        let mut config = Config::read()?;
        if let Some(helper) = config.helper(&server) {
            let (name, secret) =
                if token.is_empty() { (name.as_str(), password.as_str()) } else { ("<token>", token) };
            let entry = json!({ "ServerURL": server, "Username": name, "Secret": secret }).to_string();
            if ask(&helper, "store", &entry)?.is_none() {
                return Err(Failure::new(format!("{helper} did not store the password")));
            }
        } else {
            let mut entry = json!({ "auth": STANDARD.encode(format!("{name}:{password}")) });
            if !token.is_empty() {
                entry["auth"] = STANDARD.encode(format!("{name}:")).into();
                entry["identitytoken"] = token.into();
            }
            let auths = config.values.entry("auths").or_insert_with(|| json!({}));
            auths[&server] = entry;
            config.write()?;
        }
        print(answer["Status"].as_str().unwrap_or("Login Succeeded"))
    }
}

impl Logout {
    pub(crate) fn run(self) -> Done {
        let server = key(self.server.as_deref().unwrap_or(HUB)).to_owned();
        let mut config = Config::read()?;
        let helper = config.helper(&server);
        let listed = config.forget(&server);
        let kept = match helper {
            Some(helper) => {
                ask(&helper, "get", &server)?.is_some() && ask(&helper, "erase", &server)?.is_some()
            }
            None => false,
        };
        if listed {
            config.write()?;
        }
        if listed || kept {
            print(format!("Removing login credentials for {server}"))
        } else {
            print(format!("Not logged in to {server}"))
        }
    }
}

/// Asks on the terminal; a secret is not shown while it is typed. Whoever ends the question gets the terminal back as well.
async fn asked(prompt: &str, secret: bool) -> Result<String, Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::new("nobody can be asked for the name and the password")
            .hint("give -u NAME, and --password-stdin"));
    }
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let silent = if secret { Some(Mode::silent()?) } else { None };
    let _ = write!(io::stderr(), "{prompt}");
    let line = tokio::select! {
        line = typed() => line,
        _ = interrupt.recv() => Err(Failure::new("interrupted").code(INTERRUPTED)),
        _ = terminate.recv() => Err(Failure::new("terminated").code(TERMINATED)),
    };
    drop(silent);
    if secret || line.is_err() {
        say("");
    }
    Ok(line?.trim_end_matches(['\r', '\n']).to_owned())
}

/// One line of standard input.
async fn typed() -> Result<String, Failure> {
    let (sender, line) = tokio::sync::oneshot::channel();
    // A thread of its own: a read can't be taken back, and the process must be able to end without it.
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = sender.send(io::stdin().read_line(&mut line).map(|_| line));
    });
    Ok(line.await.map_err(Failure::new)??)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(auths: &[(&str, &str)]) -> Config {
        let auths: Map<String, Value> = auths
            .iter()
            .map(|(key, name)| {
                ((*key).to_owned(), json!({ "auth": STANDARD.encode(format!("{name}:secret")) }))
            })
            .collect();
        let values = Map::from_iter([("auths".to_owned(), Value::Object(auths))]);
        Config { path: PathBuf::new(), values }
    }

    #[test]
    fn a_registry_has_one_key_whatever_address_of_it_is_typed() {
        for typed in
            ["r.example:5000", "https://r.example:5000", "http://r.example:5000/v2/", "r.example:5000/me"]
        {
            assert_eq!(key(typed), "r.example:5000", "{typed}");
        }
        for typed in ["docker.io", "index.docker.io", "https://docker.io/", HUB_KEY] {
            assert_eq!(key(typed), HUB_KEY, "{typed}");
        }
    }

    #[test]
    fn who_one_is_is_found_under_a_registrys_key_or_else_under_an_address_of_it() {
        let name = |config: &Config, server: &str| {
            config.identity(server).unwrap().map(|identity| identity["username"].as_str().unwrap().to_owned())
        };
        let older = [("https://r.example/v1/", "older"), ("https://index.docker.io/v1/", "hub")];
        let mut kept = config(&older);
        assert_eq!(name(&kept, "r.example").as_deref(), Some("older"));
        assert_eq!(name(&kept, HUB_KEY).as_deref(), Some("hub"));
        assert_eq!(name(&kept, "other.example"), None);
        let newer = config(&[older[0], ("r.example", "newer")]);
        assert_eq!(name(&newer, "r.example").as_deref(), Some("newer"));
        assert!(kept.forget("r.example") && !kept.forget("r.example"));
        assert_eq!((name(&kept, "r.example"), name(&kept, HUB_KEY).as_deref()), (None, Some("hub")));
    }

    #[test]
    fn a_configuration_that_is_kept_elsewhere_stays_there() {
        let home = tempfile::tempdir().unwrap();
        let (docker, dotfiles) = (home.path().join(".docker"), home.path().join("dotfiles"));
        fs::create_dir(&docker).unwrap();
        let link = docker.join("config.json");
        std::os::unix::fs::symlink("../dotfiles/docker.json", &link).unwrap();
        let kept = Config { path: link.clone(), ..config(&[("r.example", "me")]) };
        // There is none yet, and then there is.
        for _ in 0..2 {
            kept.write().unwrap();
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
            assert!(fs::read_to_string(dotfiles.join("docker.json")).unwrap().contains("r.example"));
            assert_eq!(fs::read_dir(&dotfiles).unwrap().count(), 1);
        }
    }
}
