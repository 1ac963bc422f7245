//! `dorm import-docker`: the images and volumes of another engine of this machine, a dockerd or podman, come to a session.
//! The other engine keeps what it has.
//!
//! A volume travels as an archive of a container that has it mounted and never runs. The one in the session is called after
//! its volume, and goes last: where it is found, an earlier import was broken off, and the volume is made anew.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use clap::Args;
use dormouse_client::{Call, Engine, JsonLines, Payload, Target};
use futures_util::stream;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::context::Context;
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::message::{Shown, show};
use crate::output::{print, warn};

/// Where a volume is mounted to be read and written.
const PLACE: &str = "/dorm-import";

#[derive(Args)]
pub(crate) struct ImportDocker {
    /// The other engine's socket; the usual places of dockerd and podman when absent.
    #[arg(long, value_name = "SOCKET")]
    from: Option<PathBuf>,
    /// Leave images alone.
    #[arg(long)]
    no_images: bool,
    /// Leave volumes alone.
    #[arg(long, conflicts_with = "no_images")]
    no_volumes: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    id: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Volumes {
    #[serde(default)]
    volumes: Option<Vec<Volume>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Volume {
    name: String,
    driver: String,
    #[serde(default)]
    options: Option<serde_json::Map<String, Value>>,
    #[serde(default)]
    labels: Option<serde_json::Map<String, Value>>,
}

/// From one engine to another.
struct Import<'a> {
    from: Engine,
    to: &'a Engine,
}

impl ImportDocker {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let info = context.open(&context.pick(None)).await?;
        let socket = match &self.from {
            Some(socket) => socket.strip_prefix("unix://").unwrap_or(socket).to_owned(),
            None => look_for(&info.docker_socket)?,
        };
        let from = Engine::unversioned(&socket);
        let _: Value = from
            .get("/info")
            .await
            .map_err(|error| Failure::new(format!("no engine answers on {}: {error}", socket.display())))?;
        let operation = context.operation("dorm import-docker", false).await?;
        operation
            .during(async {
                let import = Import { from, to: &operation.engine };
                let mut failed = 0;
                if !self.no_images {
                    failed += import.images().await?;
                }
                if !self.no_volumes {
                    failed += import.volumes().await?;
                }
                Ok(if failed == 0 { SUCCESS } else { FAILED })
            })
            .await
    }
}

/// The socket of another engine of this machine.
fn look_for(ours: &Path) -> Result<PathBuf, Failure> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let named = std::env::var("DOCKER_HOST").ok();
    let named = named.as_deref().and_then(|host| host.strip_prefix("unix://")).map(PathBuf::from);
    let of_user = ["docker.sock", "podman/podman.sock"];
    let places: Vec<PathBuf> = named
        .into_iter()
        .chain(runtime.iter().flat_map(|runtime| of_user.map(|name| runtime.join(name))))
        .chain(["/run/docker.sock", "/run/podman/podman.sock"].map(PathBuf::from))
        .collect();
    let found = places.iter().find(|place| place.as_path() != ours && UnixStream::connect(place).is_ok());
    found.cloned().ok_or_else(|| {
        let looked: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
        Failure::new(format!("no other engine answers on {}", looked.join(", ")))
            .hint("name its socket with --from; podman listens after `podman system service`")
    })
}

/// What comes, to be sent on.
fn pass_on(lines: JsonLines) -> Payload {
    Payload::archive(stream::unfold(lines, async |mut lines| match lines.bytes().await {
        Ok(Some(bytes)) => Some((Ok(bytes), lines)),
        Ok(None) => None,
        Err(error) => Some((Err(io::Error::other(error.to_string())), lines)),
    }))
}

impl Import<'_> {
    /// Every image that has a name. Tells how many could not be had.
    async fn images(&self) -> Result<u32, Failure> {
        let mut failed = 0;
        for Image { id, repo_tags } in self.from.get::<Vec<Image>>("/images/json").await? {
            let names: Vec<_> = repo_tags
                .unwrap_or_default()
                .into_iter()
                .filter(|name| !name.starts_with("<none>"))
                .collect();
            let mut missing = Vec::new();
            for name in names {
                if self.has_image(&name, &id).await? {
                    print(format!("image {name}: there already"))?;
                } else {
                    missing.push(name);
                }
            }
            if !missing.is_empty()
                && let Err(failure) = self.image(&missing).await
            {
                warn(&format!("image {}: {}", missing.join(", "), failure.message()));
                failed += 1;
            }
        }
        Ok(failed)
    }

    async fn has_image(&self, name: &str, id: &str) -> Result<bool, Failure> {
        match self.to.get::<Value>(&Target::of("images", name, "/json").text()).await {
            Ok(image) => Ok(image["Id"].as_str() == Some(id)),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn image(&self, names: &[String]) -> Result<(), Failure> {
        let target = names.iter().fold(Target::new("/images/get"), |target, name| target.with("names", name));
        let archive = self.from.send(Call::new(Method::GET, target.text())).await?.lines();
        let load = Target::new("/images/load").with("quiet", "1").text();
        let loaded = self.to.send(Call::new(Method::POST, load).payload(pass_on(archive))).await?;
        show(loaded.lines(), Shown::Out).await?;
        Ok(())
    }

    /// Every volume of files. Tells how many could not be had.
    async fn volumes(&self) -> Result<u32, Failure> {
        let mut failed = 0;
        let volumes = self.from.get::<Volumes>("/volumes").await?.volumes.unwrap_or_default();
        for volume in volumes {
            let name = &volume.name;
            let outcome = if volume.driver != "local"
                || volume.options.as_ref().is_some_and(|options| !options.is_empty())
            {
                Err(Failure::new("it is no plain folder of the engine's"))
            } else {
                self.volume(&volume).await
            };
            match outcome {
                Ok(true) => drop(print(format!("volume {name}"))?),
                Ok(false) => drop(print(format!("volume {name}: there already"))?),
                Err(failure) => {
                    warn(&format!("volume {name}: {}", failure.message()));
                    failed += 1;
                }
            }
        }
        Ok(failed)
    }

    /// `false`: the session has one of that name.
    async fn volume(&self, volume: &Volume) -> Result<bool, Failure> {
        let name = &volume.name;
        let holder = format!("dorm-import-{name}");
        let there = Target::of("volumes", name, "").text();
        if self.is_there(&there).await? {
            if !self.is_there(&Target::of("containers", &holder, "/json").text()).await? {
                return Ok(false);
            }
            remove(self.to, "containers", &holder).await?;
            remove(self.to, "volumes", name).await?;
        }
        let source = hold(&self.from, name, None).await?;
        let copied = self.copy(volume, &source, &holder).await;
        remove(&self.from, "containers", &source).await?;
        copied.map(|()| true)
    }

    async fn copy(&self, volume: &Volume, source: &str, holder: &str) -> Result<(), Failure> {
        let name = &volume.name;
        let wish = json!({ "Name": name, "Driver": "local", "Labels": volume.labels });
        let archive = Target::of("containers", source, "/archive").with("path", PLACE).text();
        let archive = self.from.send(Call::new(Method::GET, archive)).await?.lines();
        let _: Value = self.to.post_json("/volumes/create", wish).await?;
        let holder = hold(self.to, name, Some(holder)).await?;
        // The archive's one folder is the place itself.
        let target =
            Target::of("containers", &holder, "/archive").with("path", "/").with("copyUIDGID", "1").text();
        self.to.send(Call::new(Method::PUT, target).payload(pass_on(archive))).await?;
        remove(self.to, "containers", &holder).await
    }

    async fn is_there(&self, path: &str) -> Result<bool, Failure> {
        match self.to.get::<Value>(path).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// A container that never runs and has the volume mounted: its name or id.
async fn hold(engine: &Engine, volume: &str, name: Option<&str>) -> Result<String, Failure> {
    let images: Vec<Image> = engine.get("/images/json").await?;
    let image = images.first().ok_or_else(|| {
        Failure::new("an engine without any image can't be asked for a volume's files")
            .hint("pull one into it")
    })?;
    let wish = json!({
        "Image": image.id, "Cmd": ["true"], "HostConfig": { "Binds": [format!("{volume}:{PLACE}")] },
    });
    let made: Value =
        engine.post_json(&Target::new("/containers/create").maybe("name", name).text(), wish).await?;
    made["Id"].as_str().map(str::to_owned).ok_or_else(|| Failure::new("the engine made no container"))
}

async fn remove(engine: &Engine, kind: &str, name: &str) -> Result<(), Failure> {
    let _: Value = engine.delete(&Target::of(kind, name, "").text()).await?;
    Ok(())
}
