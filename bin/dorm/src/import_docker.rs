//! `dorm import-docker`: the images and volumes of another engine of this machine, a dockerd or podman, come to a session.
//! The other engine keeps what it has.
//!
//! A volume travels as an archive of a container that has it mounted and never runs: a holder. Holders bear a label, so that
//! the next import finds what one that was broken off has left, in both engines: a volume in the session whose holder is still
//! there isn't whole, and goes with it.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::Args;
use dormouse_client::{Call, Engine, JsonLines, Payload, Target};
use futures_util::{StreamExt as _, stream};
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::context::Context;
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::message::{Shown, show};
use crate::output::{print, warn};

/// Where a volume is mounted to be read and written.
const PLACE: &str = "/dorm-import";

/// The label of holders.
const LABEL: &str = "dormouse.import";

/// Its value in the session.
const INTO: &str = "into";

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
    #[serde(default)]
    repo_digests: Option<Vec<String>>,
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

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Holder {
    id: String,
    #[serde(default)]
    mounts: Vec<Mount>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Mount {
    #[serde(default)]
    name: Option<String>,
    destination: String,
}

/// From one engine to another.
struct Import<'a> {
    from: Engine,
    to: &'a Engine,
    /// Whose holders these are in the other engine, which may be that of several users: a user and a session.
    whose: String,
    /// Podman's socket tells of no owners.
    owners_are_told: bool,
}

impl ImportDocker {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let info = context.open(&context.pick(None)).await?;
        let socket = match &self.from {
            Some(socket) => socket.strip_prefix("unix://").unwrap_or(socket).to_owned(),
            None => look_for(&info.docker_socket)?,
        };
        // Without a version in their paths both speak the newest that they know.
        let from = Engine::unversioned(&socket);
        let ping = from
            .send(Call::new(Method::GET, "/_ping"))
            .await
            .map_err(|error| Failure::new(format!("no engine answers on {}: {error}", socket.display())))?;
        let operation = context.operation("dorm import-docker", false).await?;
        operation
            .during(async {
                let import = Import {
                    from,
                    to: &operation.engine,
                    whose: format!("{}-{}", info.owner, info.name),
                    owners_are_told: ping.header("Libpod-Api-Version").is_none(),
                };
                import.remove_leftovers().await?;
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

/// What came, and what still comes, to be sent on.
fn pass_on(first: Bytes, lines: JsonLines) -> Payload {
    let rest = stream::unfold(lines, async |mut lines| match lines.bytes().await {
        Ok(Some(bytes)) => Some((Ok(bytes), lines)),
        Ok(None) => None,
        Err(error) => Some((Err(io::Error::other(format!("the archive broke off: {error}"))), lines)),
    });
    Payload::archive(stream::iter([Ok(first)]).chain(rest))
}

/// What is a name, and not what stands for none.
fn named(names: Option<Vec<String>>) -> Vec<String> {
    names.unwrap_or_default().into_iter().filter(|name| !name.starts_with("<none>")).collect()
}

impl Import<'_> {
    /// What an import that was broken off has left: holders, and in the session the volumes that they held.
    async fn remove_leftovers(&self) -> Result<(), Failure> {
        for (engine, whose) in [(&self.from, self.whose.as_str()), (self.to, INTO)] {
            let label = json!({ "label": [format!("{LABEL}={whose}")] });
            let left = Target::new("/containers/json").with("all", "1").with("filters", label.to_string());
            for holder in engine.get::<Vec<Holder>>(&left.text()).await? {
                let volume = let_go(engine, &holder.id).await?;
                if let Some(volume) = volume.filter(|_| whose == INTO)
                    && let Err(failure) = remove(engine, "volumes", &volume).await
                {
                    warn(&format!(
                        "volume {volume}: an import left it half, and it stays: {}",
                        failure.message()
                    ));
                }
            }
        }
        Ok(())
    }

    /// Every image that has a name or a digest. Tells how many could not be had.
    async fn images(&self) -> Result<u32, Failure> {
        let (mut failed, mut nameless) = (0, 0);
        for Image { id, repo_tags, repo_digests } in self.from.get::<Vec<Image>>("/images/json").await? {
            let (mut names, digests) = (named(repo_tags), named(repo_digests));
            if names.is_empty() {
                let Some(digest) = digests.first() else {
                    nameless += 1;
                    continue;
                };
                // An archive has no place for a digest.
                print(format!("image {digest}: comes without its digest, as {id}"))?;
                names.push(id.clone());
            }
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
        if nameless > 0 {
            print(format!("images without a name, left where they are: {nameless}"))?;
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
        let archive = pass_on(Bytes::new(), archive);
        let loaded = self.to.send(Call::new(Method::POST, load).payload(archive)).await?;
        show(loaded.lines(), Shown::Out).await?;
        Ok(())
    }

    /// Every volume of files. Tells how many could not be had.
    async fn volumes(&self) -> Result<u32, Failure> {
        let (mut failed, mut copied) = (0, 0);
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
                Ok(true) => {
                    print(format!("volume {name}"))?;
                    copied += 1;
                }
                Ok(false) => drop(print(format!("volume {name}: there already"))?),
                Err(failure) => {
                    warn(&format!("volume {name}: {}", failure.message()));
                    failed += 1;
                }
            }
        }
        if copied > 0 && !self.owners_are_told {
            warn(
                "podman's socket doesn't tell whose a volume's files are: all are root's (`podman volume export` tells)",
            );
        }
        Ok(failed)
    }

    /// `false`: the session has one of that name.
    async fn volume(&self, volume: &Volume) -> Result<bool, Failure> {
        let name = &volume.name;
        if self.has_volume(name).await? {
            return Ok(false);
        }
        let holder = format!("dorm-export-{}-{name}", self.whose);
        let source = hold(&self.from, &holder, &self.whose, &format!("{name}:{PLACE}:ro")).await?;
        let copied = self.copy(volume, &source).await;
        let gone = let_go(&self.from, &source).await;
        copied?;
        gone?;
        Ok(true)
    }

    async fn has_volume(&self, name: &str) -> Result<bool, Failure> {
        match self.to.get::<Value>(&Target::of("volumes", name, "").text()).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Into a volume that is made for it, and goes again if it doesn't come to be whole.
    async fn copy(&self, volume: &Volume, source: &str) -> Result<(), Failure> {
        let name = &volume.name;
        let wish = json!({ "Name": name, "Driver": "local", "Labels": volume.labels });
        let _: Value = self.to.post_json("/volumes/create", wish).await?;
        let filled = async {
            let holder =
                hold(self.to, &format!("dorm-import-{name}"), INTO, &format!("{name}:{PLACE}")).await?;
            let filled = self.fill(source, &holder).await;
            let gone = let_go(self.to, &holder).await;
            filled?;
            gone.map(drop)
        };
        let filled = filled.await;
        if filled.is_err() {
            // What went wrong first is told.
            let _ = remove(self.to, "volumes", name).await;
        }
        filled
    }

    async fn fill(&self, source: &str, holder: &str) -> Result<(), Failure> {
        let archive = Target::of("containers", source, "/archive").with("path", PLACE).text();
        let mut archive = self.from.send(Call::new(Method::GET, archive)).await?.lines();
        let broken = |error| Failure::Lost(format!("the archive broke off: {error}"));
        let first = archive.bytes().await.map_err(broken)?.unwrap_or_default();
        // The archive's one folder is the place itself. Podman takes the place for the root: /, /file.
        let path = if first.starts_with(b"/") { PLACE } else { "/" };
        // Without `copyUIDGID`, which would give all of it to the user of the holder's image.
        let target = Target::of("containers", holder, "/archive").with("path", path).text();
        self.to.send(Call::new(Method::PUT, target).payload(pass_on(first, archive))).await?;
        Ok(())
    }
}

/// A container that never runs and has a volume mounted: its id.
async fn hold(engine: &Engine, name: &str, whose: &str, bind: &str) -> Result<String, Failure> {
    let images: Vec<Image> = engine.get("/images/json").await?;
    let image = images.first().ok_or_else(|| {
        Failure::new("an engine without any image can't be asked for a volume's files")
            .hint("pull one into it")
    })?;
    let wish = json!({
        "Image": image.id, "Cmd": ["true"], "User": "0", "Labels": { LABEL: whose },
        "HostConfig": { "Binds": [bind], "NetworkMode": "none" },
    });
    let made: Value =
        engine.post_json(&Target::new("/containers/create").with("name", name).text(), wish).await?;
    made["Id"].as_str().map(str::to_owned).ok_or_else(|| Failure::new("the engine made no container"))
}

/// Removes a holder with the volumes that its image made it have. Tells which one it held.
///
/// Not by `v=1`: with it podman removes a volume without a name also where it was mounted by the one that it has.
async fn let_go(engine: &Engine, holder: &str) -> Result<Option<String>, Failure> {
    let Holder { id, mounts } = engine.get(&Target::of("containers", holder, "/json").text()).await?;
    remove(engine, "containers", &id).await?;
    let mut held = None;
    for Mount { name, destination } in mounts {
        match name {
            Some(name) if destination == PLACE => held = Some(name),
            Some(name) => remove(engine, "volumes", &name).await?,
            None => {}
        }
    }
    Ok(held)
}

async fn remove(engine: &Engine, kind: &str, name: &str) -> Result<(), Failure> {
    let _: Value = engine.delete(&Target::of(kind, name, "").text()).await?;
    Ok(())
}
