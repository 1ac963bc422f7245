//! Other clients on a session: `dorm docker-env`, `docker-context` and `dial-stdio`.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use dormouse_api::SessionName;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncWriteExt, copy};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::output::{print, say};
use crate::registry::{Config, docker_folder};

/// Variables that lead docker's clients to another engine, or have them speak TLS on a socket. Some of them heed a context's
/// name before `DOCKER_HOST`.
const IN_THE_WAY: &[&str] = &["DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "DOCKER_TLS", "DOCKER_CONTEXT"];

#[derive(Args)]
pub(crate) struct DockerEnv {
    /// Take it back.
    #[arg(short, long)]
    unset: bool,
}

/// How the description of a context begins that is ours.
const DESCRIPTION: &str = "Dormouse session ";

/// Where docker's configuration names the context in use.
const IN_USE: &str = "currentContext";

/// `dorm docker-context`.
#[derive(Subcommand)]
pub(crate) enum DockerContext {
    /// Make a context of docker's client that leads to a session, and print its name.
    Install(Install),
    /// Remove it.
    Remove(Install),
}

#[derive(Args)]
pub(crate) struct Install {
    /// What to call it; dorm, or dorm- and the session's name, when absent.
    #[arg(long)]
    name: Option<String>,
}

impl DockerEnv {
    /// Prints what a shell has to evaluate, `eval "$(dorm docker-env)"`: without the quotes as well, which makes one line of it.
    pub(crate) async fn run(self, context: &Context) -> Done {
        if self.unset {
            return print("unset DOCKER_HOST");
        }
        let info = context.open(&context.pick(None)).await?;
        let host = format!("unix://{}", info.docker_socket.display());
        print(format!("export DOCKER_HOST={};", quoted(&host)))?;
        print(format!("unset {};", IN_THE_WAY.join(" ")))
    }
}

/// As a word of a shell.
fn quoted(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/:._-".contains(&byte);
    if text.bytes().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

impl DockerContext {
    pub(crate) async fn run(self, context: &Context) -> Done {
        match self {
            Self::Install(install) => install.install(context).await,
            Self::Remove(install) => install.remove(context),
        }
    }
}

impl Install {
    fn name(&self, session: &SessionName) -> Result<String, Failure> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None if session.is_default() => "dorm".to_owned(),
            None => format!("dorm-{session}"),
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
        if name == "default"
            || !name.bytes().all(plain)
            || !name.starts_with(|first: char| first.is_ascii_alphanumeric())
        {
            return Err(Failure::new(format!("{name:?} can't be a context's name"))
                .hint("try letters, digits and '-'"));
        }
        Ok(name)
    }

    /// A context's folder is called by the hash of its name: so docker's client has it.
    fn folder(name: &str) -> Result<PathBuf, Failure> {
        let hash: String = Sha256::digest(name).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(docker_folder()?.join("contexts/meta").join(hash))
    }

    async fn install(&self, context: &Context) -> Done {
        let session = context.pick(None);
        let name = self.name(&session)?;
        let folder = Self::folder(&name)?;
        // One of ours is replaced.
        is_there(&folder, &name)?;
        let info = context.open(&session).await?;
        let meta = serde_json::json!({
            "Name": name,
            "Metadata": { "Description": format!("{DESCRIPTION}{session}") },
            "Endpoints": { "docker": { "Host": format!("unix://{}", info.docker_socket.display()), "SkipTLSVerify": false } },
        });
        let failed = |error: io::Error| Failure::new(format!("can't write to {}: {error}", folder.display()));
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let beside = folder.join(format!("meta.json.{}", std::process::id()));
        std::fs::write(&beside, meta.to_string()).map_err(failed)?;
        std::fs::rename(&beside, folder.join("meta.json")).map_err(failed)?;
        print(name)
    }

    fn remove(&self, context: &Context) -> Done {
        let name = self.name(&context.pick(None))?;
        let folder = Self::folder(&name)?;
        if !is_there(&folder, &name)? {
            return Err(
                Failure::new(format!("there is no context {name:?}")).hint("`docker context ls` lists them")
            );
        }
        // First, so that docker is never led to a context that is gone.
        let mut config = Config::read()?;
        if leave(&mut config.values, &name) {
            config.write()?;
            say(format_args!("{name} was in use: docker uses its default context again"));
        }
        std::fs::remove_dir_all(&folder)
            .map_err(|error| Failure::new(format!("can't remove {}: {error}", folder.display())))?;
        print(name)
    }
}

/// Is there a context in this folder? One that isn't ours is its user's, to be left alone.
fn is_there(folder: &Path, name: &str) -> Result<bool, Failure> {
    let path = folder.join("meta.json");
    match std::fs::read(&path) {
        Ok(meta) if is_ours(&meta) => Ok(true),
        Ok(_) => Err(Failure::new(format!("the context {name:?} isn't one that dorm made"))
            .hint(format!("choose another with --name; `docker context rm {name}` removes this one"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Failure::new(format!("can't read {}: {error}", path.display()))),
    }
}

fn is_ours(meta: &[u8]) -> bool {
    let meta: Value = serde_json::from_slice(meta).unwrap_or_default();
    meta["Metadata"]["Description"].as_str().is_some_and(|text| text.starts_with(DESCRIPTION))
}

/// Has docker use its default context, if it uses this one. Does it change anything?
fn leave(config: &mut Map<String, Value>, name: &str) -> bool {
    if config.get(IN_USE).and_then(Value::as_str) != Some(name) {
        return false;
    }
    // Not `remove`, which takes the others out of their order.
    config.retain(|key, _| key != IN_USE);
    true
}

/// Joins standard input and output with the Docker socket, for `ssh://` and the like.
pub(crate) async fn dial_stdio(context: &Context) -> Done {
    let info = context.serving(&context.pick(None)).await?;
    let engine = UnixStream::connect(&info.docker_socket).await.map_err(|error| {
        Failure::new(format!("nobody answers on {}: {error}", info.docker_socket.display()))
    })?;
    let (mut from, mut to) = engine.into_split();
    let sending = tokio::spawn(async move {
        let mut typed = crate::stream::input();
        while let Some(bytes) = typed.recv().await {
            to.write_all(&bytes).await?;
        }
        to.shutdown().await
    });
    let mut out = tokio::io::stdout();
    tokio::select! {
        copied = copy(&mut from, &mut out) => {
            copied?;
            out.flush().await?;
        }
        // The end of what is typed is not the end of what is answered; but nobody is left to hear this.
        () = unread() => {}
    }
    sending.abort();
    Ok(SUCCESS)
}

/// Waits until nobody is left who could read standard output. An engine that has nothing to say is never written for, so
/// only asking tells. A thread of its own, which ends with the process.
async fn unread() {
    let (gone, is_gone) = oneshot::channel::<()>();
    std::thread::spawn(move || {
        let out = rustix::stdio::stdout();
        // Errors and hang-ups are told though nothing is asked for, see poll(2).
        while let Err(Errno::INTR) = poll(&mut [PollFd::from_borrowed_fd(out, PollFlags::empty())], None) {}
        let _ = gone.send(());
    });
    let _ = is_gone.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_of_a_shell() {
        assert_eq!(
            quoted("unix:///run/user/7/dormouse/docker.sock"),
            "unix:///run/user/7/dormouse/docker.sock"
        );
        assert_eq!(quoted("unix:///a b/it's"), "'unix:///a b/it'\\''s'");
    }

    #[test]
    fn a_context_lies_where_dockers_client_looks_for_it() {
        let folder = Install::folder("dorm").ok().unwrap();
        let hash = "50c49b07ad488dd1ed430a528deba67fd6e0f28b48cb2b7dce28a65001e82fc8";
        assert_eq!(folder.file_name().unwrap().to_str(), Some(hash));
        assert!(folder.parent().unwrap().ends_with("contexts/meta"));
    }

    #[test]
    fn only_a_context_that_is_ours_is_there_to_be_replaced_or_removed() {
        let folder = tempfile::tempdir().unwrap();
        let found = || is_there(folder.path(), "work");
        assert!(!found().unwrap());
        let meta = folder.path().join("meta.json");
        std::fs::write(&meta, r#"{"Metadata":{"Description":"Dormouse session two"}}"#).unwrap();
        assert!(found().unwrap());
        for others in [r#"{"Metadata":{"Description":"the cluster"}}"#, r#"{"Metadata":{}}"#, "nonsense"] {
            std::fs::write(&meta, others).unwrap();
            let refused = found().unwrap_err();
            assert_eq!(refused.message(), "the context \"work\" isn't one that dorm made", "{others}");
        }
    }

    #[test]
    fn a_context_that_goes_is_in_use_no_longer_and_the_rest_stays_as_it_was() {
        let text = r#"{"psFormat":"x","currentContext":"dorm","auths":{},"credsStore":"pass"}"#;
        let mut config: Map<String, Value> = serde_json::from_str(text).unwrap();
        assert!(!leave(&mut config, "dorm-two"));
        assert_eq!(serde_json::to_string(&config).unwrap(), text);
        assert!(leave(&mut config, "dorm") && !leave(&mut config, "dorm"));
        let rest = r#"{"psFormat":"x","auths":{},"credsStore":"pass"}"#;
        assert_eq!(serde_json::to_string(&config).unwrap(), rest);
    }
}
