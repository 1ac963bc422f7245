//! Registries: who one is there, as docker's clients keep it in `~/.docker/config.json` and in credential helpers.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
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
struct Config {
    path: PathBuf,
    values: Map<String, Value>,
}

impl Config {
    fn read() -> Result<Self, Failure> {
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

    fn write(&self) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::new(format!("can't write {}: {error}", self.path.display()));
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        let beside = self.path.with_extension(format!("json.{}", std::process::id()));
        let mut options = fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create_new(true), 0o600);
        let mut file = options.open(&beside).map_err(failed)?;
        let text = serde_json::to_string_pretty(&self.values).map_err(Failure::new)?;
        file.write_all(text.as_bytes()).and_then(|()| fs::rename(&beside, &self.path)).map_err(failed)
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
        let Some(entry) = self.values.get("auths").and_then(|auths| auths.get(server)) else {
            return Ok(None);
        };
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

fn key(server: &str) -> &str {
    if server == HUB || server == "index.docker.io" { HUB_KEY } else { server }
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
        let listed = config
            .values
            .get_mut("auths")
            .and_then(Value::as_object_mut)
            .is_some_and(|auths| auths.remove(&server).is_some());
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
