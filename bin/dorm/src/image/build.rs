//! `dorm build`.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use dormouse_client::{Payload, Target};
use serde_json::{Value, json};

use super::buildkit::spec::{self, Agent, Output, Secret};
use super::buildkit::{self, Asked, Shown};
use super::ignore::Ignored;
use super::reference;
use crate::archive::{self, unreadable};
use crate::container::variables::pairs;
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::operation::Operation;
use crate::output::{print, warn};
use crate::value::size;

/// Longest Dockerfile that is read, in bytes.
const DOCKERFILE_BYTES_MAX: u64 = 1024 * 1024;

#[derive(Args)]
pub(crate) struct Build {
    /// Set a variable of the build; without a value, take ours.
    #[arg(long, value_name = "NAME[=VALUE]")]
    build_arg: Vec<String>,
    /// The Dockerfile; - for standard input. Containerfile or Dockerfile in the folder when absent.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// What to call the image.
    #[arg(short, long, value_name = "NAME")]
    tag: Vec<String>,
    /// Label it.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    label: Vec<String>,
    /// Stop after this stage.
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Use nothing of earlier builds.
    #[arg(long)]
    no_cache: bool,
    /// Get newer versions of what it is made from.
    #[arg(long)]
    pull: bool,
    /// Say nothing but the image's id.
    #[arg(short, long)]
    quiet: bool,
    /// How it is shown; live on a terminal and plain elsewhere when absent.
    #[arg(long, value_enum, value_name = "HOW", default_value = "auto", hide_default_value = true)]
    progress: How,
    /// The same as --progress plain.
    #[arg(long)]
    verbose: bool,
    /// Give its steps a secret: id=NAME[,src=FILE|,env=VARIABLE].
    #[arg(long, value_name = "SECRET", value_parser = spec::secret)]
    secret: Vec<Secret>,
    /// Give its steps an SSH agent: default, or ID=SOCKET.
    #[arg(long, value_name = "AGENT", value_parser = spec::agent)]
    ssh: Vec<Agent>,
    /// What it comes to instead of an image: FOLDER, -, or type=local|tar|oci|docker|image|registry|cacheonly[,dest=PATH].
    #[arg(short, long, value_name = "OUTPUT", value_parser = spec::output)]
    output: Option<Output>,
    /// Write the image's id to this file.
    #[arg(long, value_name = "FILE")]
    iidfile: Option<PathBuf>,
    /// The platform to build for.
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// The network of its steps: default, none, or host (the VM).
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// One more line of its steps' /etc/hosts.
    #[arg(long, value_name = "HOST:ADDRESS")]
    add_host: Vec<String>,
    /// Docker's older builder had this; BuildKit's steps have the VM's memory.
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Images whose layers may be used.
    #[arg(long, value_name = "IMAGE")]
    cache_from: Vec<String>,
    /// Docker's older builder had this; BuildKit keeps no containers.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", hide_default_value = true, action = clap::ArgAction::Set)]
    rm: bool,
    /// The folder that it reads; - for a tar archive, or a Dockerfile alone, from standard input.
    path: PathBuf,
}

/// How a build is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum How {
    /// Live on a terminal, plain elsewhere.
    Auto,
    /// Line by line.
    Plain,
    /// Drawn again and again.
    Tty,
    /// Not at all.
    Quiet,
}

/// What is sent to a build, and where its Dockerfile is in it.
struct Sent {
    payload: Payload,
    dockerfile: String,
}

impl Build {
    pub(crate) async fn run(self, context: &Context) -> Done {
        self.tag.iter().try_for_each(|tag| reference::check(tag)).map_err(Failure::new)?;
        if self.memory.is_some() || !self.rm {
            warn("--memory and --rm are of docker's older builder, and do nothing");
        }
        let output = self.output.clone().unwrap_or(Output::Image);
        if matches!(output, Output::Push | Output::Saved(_)) && self.tag.is_empty() {
            return Err(Failure::new("an image that goes elsewhere needs a name").hint("name it with --tag"));
        }
        if let Output::Tar(to) | Output::Saved(to) = &output {
            archive::refuse_terminal(to.as_deref())?;
        }
        let asked = Asked::of(&self.secret, &self.ssh)?;
        let sent = self.sent()?;
        let operation = context
            .operation(format!("dorm build {}", self.path.display()), self.shown() == Shown::Quiet)
            .await?;
        let target = self.request(&sent.dockerfile, &output)?;
        match output {
            Output::Image | Output::Push | Output::Saved(_) => {
                let image = self.image(&operation, target, sent.payload, asked).await?;
                self.deliver(&operation, output, &image).await
            }
            Output::Tar(None) | Output::Cache => {
                let to: Box<dyn Write + Send> = match output {
                    Output::Cache => Box::new(io::sink()),
                    _ => Box::new(io::stdout()),
                };
                let asked = asked.archive(to);
                let built = buildkit::build(&operation, target, sent.payload, asked, self.shown());
                operation.during(built).await.map(|_| SUCCESS)
            }
            Output::Tar(Some(to)) => {
                let (file, beside) = archive::Beside::create(&to)?;
                let asked = asked.archive(Box::new(file));
                operation
                    .during(buildkit::build(&operation, target, sent.payload, asked, self.shown()))
                    .await?;
                beside.keep()?;
                Ok(SUCCESS)
            }
            Output::Folder(to) => {
                let (pipe, unpacking) = archive::unpacking(to)?;
                let asked = asked.archive(Box::new(pipe));
                operation
                    .during(buildkit::build(&operation, target, sent.payload, asked, self.shown()))
                    .await?;
                unpacking.await.map_err(Failure::new)??;
                Ok(SUCCESS)
            }
        }
    }

    fn shown(&self) -> Shown {
        match self.progress {
            _ if self.quiet => Shown::Quiet,
            How::Quiet => Shown::Quiet,
            How::Tty => Shown::Live,
            How::Plain => Shown::Plain,
            How::Auto if self.verbose => Shown::Plain,
            How::Auto => Shown::automatic(),
        }
    }

    /// Builds an image, and gives its id.
    async fn image(
        &self,
        operation: &Operation,
        target: Target,
        payload: Payload,
        asked: Asked,
    ) -> Result<String, Failure> {
        let built = buildkit::build(operation, target, payload, asked, self.shown());
        let id = operation.during(built).await?;
        let id = id.ok_or_else(|| Failure::new("the engine built no image, and doesn't say why"))?;
        if let Some(path) = &self.iidfile {
            fs::write(path, &id)
                .map_err(|error| Failure::new(format!("can't write {}: {error}", path.display())))?;
        }
        Ok(id)
    }

    /// Brings the image to where it belongs.
    async fn deliver(&self, operation: &Operation, output: Output, id: &str) -> Done {
        match output {
            Output::Push => {
                for tag in &self.tag {
                    operation.during(super::pull::push(operation, tag, false, self.quiet)).await?;
                }
            }
            Output::Saved(to) => {
                return operation
                    .during(super::files::save(operation, &self.tag, to))
                    .await
                    .map(|()| SUCCESS);
            }
            Output::Image | Output::Tar(_) | Output::Folder(_) | Output::Cache => {}
        }
        if self.quiet { print(id) } else { Ok(SUCCESS) }
    }

    fn request(&self, dockerfile: &str, output: &Output) -> Result<Target, Failure> {
        let object = |texts: &[String]| {
            if texts.is_empty() { None } else { Some(Value::Object(pairs(texts)).to_string()) }
        };
        let arguments: Vec<String> = self
            .build_arg
            .iter()
            .filter_map(|text| match text.contains('=') {
                true => Some(text.clone()),
                false => std::env::var(text).ok().map(|value| format!("{text}={value}")),
            })
            .collect();
        let mut target = Target::new("/build")
            .with("dockerfile", dockerfile)
            .maybe("buildargs", object(&arguments))
            .maybe("labels", object(&self.label))
            .maybe("target", self.target.as_deref())
            .when("nocache", self.no_cache)
            .when("pull", self.pull)
            .maybe("platform", self.platform.as_deref())
            .maybe("networkmode", self.network.as_deref());
        target = match output {
            Output::Image | Output::Push | Output::Saved(_) => target,
            // A folder is unpacked here. For nothing at all the engine looks for an exporter without a name, and finds none.
            Output::Tar(_) | Output::Folder(_) | Output::Cache => {
                target.with("outputs", r#"[{"Type":"tar","Attrs":{}}]"#)
            }
        };
        if !self.add_host.is_empty() {
            target = target.with("extrahosts", self.add_host.join(","));
        }
        if !self.cache_from.is_empty() {
            target = target.with("cachefrom", json!(self.cache_from).to_string());
        }
        for tag in &self.tag {
            target = target.with("t", tag.as_str());
        }
        Ok(target)
    }

    fn sent(&self) -> Result<Sent, Failure> {
        if self.path == Path::new("-") {
            return self.of_input();
        }
        let folder = self.path.canonicalize().ok().filter(|path| path.is_dir());
        let folder = folder.ok_or_else(|| {
            Failure::new(format!("{} is no folder", self.path.display()))
                .hint("`dorm build .` builds the one that you are in")
        })?;
        let (name, outside) = self.dockerfile(&folder)?;
        let ignored = match fs::read_to_string(folder.join(".dockerignore")) {
            Ok(text) => Ignored::parse(&text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ignored::default(),
            Err(error) => return Err(Failure::new(format!("can't read .dockerignore: {error}"))),
        };
        let dockerfile = name.clone();
        let payload = archive::made(move |sink| {
            let mut archive = tar::Builder::new(sink as &mut dyn Write);
            archive.follow_symlinks(false);
            let keep = |path: &Path| {
                !ignored.leaves_out(path) || path == Path::new(&name) || path == Path::new(".dockerignore")
            };
            append(&mut archive, &folder, Path::new(""), &keep, ignored.has_exceptions())?;
            if let Some(text) = outside {
                let mut header = tar::Header::new_gnu();
                header.set_size(text.len() as u64);
                header.set_mode(0o644);
                archive.append_data(&mut header, &name, text.as_slice())?;
            }
            archive.finish()
        });
        Ok(Sent { payload, dockerfile })
    }

    /// The Dockerfile's name in what is sent, and its text if it isn't in the folder.
    fn dockerfile(&self, folder: &Path) -> Result<(String, Option<Vec<u8>>), Failure> {
        let Some(path) = &self.file else {
            return match (folder.join("Containerfile").exists(), folder.join("Dockerfile").exists()) {
                (true, true) => {
                    Err(Failure::new("there are a Containerfile and a Dockerfile")
                        .hint("choose one with --file"))
                }
                (true, false) => Ok(("Containerfile".to_owned(), None)),
                (false, true) => Ok(("Dockerfile".to_owned(), None)),
                (false, false) => {
                    Err(Failure::new(format!("there is no Dockerfile in {}", folder.display()))
                        .hint("name it with --file"))
                }
            };
        };
        let failed = |error: io::Error| Failure::new(format!("can't read {}: {error}", path.display()));
        // A name that nothing in the folder has.
        let apart = format!(".dockerfile.{}", std::process::id());
        if path == Path::new("-") {
            return Ok((apart, Some(bounded(io::stdin()).map_err(failed)?)));
        }
        let whole = path.canonicalize().map_err(failed)?;
        match whole.strip_prefix(folder) {
            Ok(inside) => Ok((inside.to_string_lossy().into_owned(), None)),
            Err(_) => Ok((apart, Some(bounded(fs::File::open(&whole).map_err(failed)?).map_err(failed)?))),
        }
    }

    /// A tar archive as it is, or a Dockerfile and nothing else.
    fn of_input(&self) -> Result<Sent, Failure> {
        let mut head = vec![0; 262];
        let mut have = 0;
        let mut input = io::stdin();
        while have < head.len() {
            match input.read(&mut head[have..])? {
                0 => break,
                length => have += length,
            }
        }
        head.truncate(have);
        let is_archive = head.get(257..262) == Some(b"ustar")
            || head.starts_with(&[0x1f, 0x8b])
            || head.starts_with(b"BZh")
            || head.starts_with(&[0xfd, b'7', b'z', b'X', b'Z']);
        if is_archive {
            let dockerfile = self
                .file
                .as_ref()
                .map_or_else(|| "Dockerfile".to_owned(), |path| path.to_string_lossy().into_owned());
            let payload = archive::made(move |sink| {
                sink.write_all(&head)?;
                io::copy(&mut input, sink).map(drop).map_err(unreadable(Path::new("standard input")))
            });
            return Ok(Sent { payload, dockerfile });
        }
        let text = bounded(head.as_slice().chain(input))?;
        let payload = archive::made(move |sink| {
            let mut archive = tar::Builder::new(sink as &mut dyn Write);
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, "Dockerfile", text.as_slice())?;
            archive.finish()
        });
        Ok(Sent { payload, dockerfile: "Dockerfile".to_owned() })
    }
}

fn bounded(from: impl Read) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    from.take(DOCKERFILE_BYTES_MAX + 1).read_to_end(&mut text)?;
    if text.len() as u64 > DOCKERFILE_BYTES_MAX {
        return Err(io::Error::other("it is too long for a Dockerfile"));
    }
    Ok(text)
}

/// Adds what is kept of a folder's files.
fn append(
    archive: &mut tar::Builder<&mut dyn Write>,
    folder: &Path,
    below: &Path,
    keep: &impl Fn(&Path) -> bool,
    exceptions: bool,
) -> io::Result<()> {
    for entry in archive::entries(&folder.join(below))? {
        let path = below.join(entry.file_name());
        let kept = keep(&path);
        let kind = entry.file_type().map_err(unreadable(&entry.path()))?;
        if kept && (kind.is_file() || kind.is_dir() || kind.is_symlink()) {
            archive::append(archive, &entry.path(), &path)?;
        }
        if kind.is_dir() && (kept || exceptions) {
            append(archive, folder, &path, keep, exceptions)?;
        }
    }
    Ok(())
}
