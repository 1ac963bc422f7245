//! `dorm cp` and `export`.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use clap::Args;
use dormouse_client::{Call, Engine, Target};
use http::Method;
use serde::Deserialize;
use serde_json::Value;

use super::unknown;
use crate::archive::{self, unreadable};
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::operation::Operation;
use crate::progress::Progress;

#[derive(Args)]
pub(crate) struct Copy {
    /// Keep owners; the engine keeps numbers anyway.
    #[arg(short, long)]
    archive: bool,
    /// Follow a link that is named.
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Say nothing.
    #[arg(short, long)]
    quiet: bool,
    /// CONTAINER:PATH, a path here, or - for a tar archive.
    source: String,
    /// The same.
    destination: String,
}

#[derive(Args)]
pub(crate) struct Export {
    /// Which one.
    container: String,
    /// Write to this file.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    There { container: String, path: String },
    Here(String),
}

impl Side {
    /// A colon after a name means a container, unless the name looks like a path.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((container, path)) if !container.is_empty() && !container.starts_with(['/', '.']) => {
                Self::There { container: container.to_owned(), path: path.to_owned() }
            }
            _ => Self::Here(text.to_owned()),
        }
    }
}

/// What is at a path in a container.
#[derive(Debug, Deserialize)]
struct Stat {
    name: String,
    mode: u32,
    #[serde(rename = "linkTarget")]
    link_target: String,
}

/// Go's bit for a folder in a mode.
const GO_FOLDER: u32 = 1 << 31;
/// Go's bit for a symbolic link.
const GO_LINK: u32 = 1 << 27;

impl Stat {
    fn is_folder(&self) -> bool {
        self.mode & GO_FOLDER != 0
    }

    /// Is it a folder's contents, and not the folder, that are sent? By these names the engine calls what was asked for
    /// as `/dir/.`, or as the root.
    fn is_contents(&self) -> bool {
        self.is_folder() && matches!(self.name.as_str(), "." | "/")
    }
}

impl Copy {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let sides = (Side::parse(&self.source), Side::parse(&self.destination));
        let reason = format!("dorm cp {} {}", self.source, self.destination);
        match sides {
            (Side::There { container, path }, Side::Here(to)) => {
                if to == "-" {
                    archive::refuse_terminal(None)?;
                }
                let operation = context.operation(reason, self.quiet).await?;
                operation.during(self.copy_out(&operation, &container, &path, &to)).await
            }
            (Side::Here(from), Side::There { container, path }) => {
                if from == "-" && io::stdin().is_terminal() {
                    return Err(Failure::new("an archive can't be typed").hint("pipe it in"));
                }
                if from != "-" {
                    fs::symlink_metadata(&from)
                        .map_err(|error| Failure::new(format!("can't read {from}: {error}")))?;
                }
                let operation = context.operation(reason, self.quiet).await?;
                operation.during(self.copy_in(&operation, &from, &container, &path)).await
            }
            (Side::There { .. }, Side::There { .. }) => {
                Err(Failure::new("copying between containers is not supported")
                    .hint("pipe one copy into another: `dorm cp A:/x - | dorm cp - B:/`"))
            }
            (Side::Here(_), Side::Here(_)) => {
                Err(Failure::new("one side must be in a container").hint("CONTAINER:PATH names it"))
            }
        }
    }

    async fn copy_out(&self, operation: &Operation, container: &str, path: &str, to: &str) -> Done {
        let engine = &operation.engine;
        let (mut path, mut link) = (path.to_owned(), None);
        if self.follow_link
            && let Some(stat) = stat(engine, container, &path).await?
            && stat.mode & GO_LINK != 0
        {
            // What is copied is called as the link is.
            link = Path::new(&path).file_name().map(|name| name.to_string_lossy().into_owned());
            path = stat.link_target;
        }
        let target = Target::of("containers", container, "/archive").with("path", path.as_str()).text();
        let reply = match engine.send(Call::new(Method::GET, target)).await {
            Err(error) if error.to_string().starts_with("No such container") => {
                return Err(unknown(engine, container, error.into()).await);
            }
            reply => reply?,
        };
        let stat = reply.header("x-docker-container-path-stat").and_then(decoded);
        let progress = self.progress();
        if to == "-" {
            archive::write(reply.lines(), None, progress).await?;
            return Ok(SUCCESS);
        }
        let stat = stat.ok_or_else(|| Failure::new("the engine doesn't say what it sends"))?;
        let (folder, name) = place(Path::new(to), to.ends_with('/'), &stat)?;
        let name = name.or(link);
        // Unpacked beside its place, so that what a container says its files are called can't name another.
        let beside = folder.join(format!(".dorm-cp.{}", std::process::id()));
        fs::create_dir(&beside)
            .map_err(|error| Failure::new(format!("can't write to {}: {error}", folder.display())))?;
        let packed = beside.join("archive.tar");
        let copied = match archive::write(reply.lines(), Some(packed.clone()), progress).await {
            Ok(()) => unpack(&packed, &beside, &folder, name.as_deref(), stat.is_contents()),
            Err(failure) => Err(failure),
        };
        let _ = fs::remove_dir_all(&beside);
        copied.map(|()| SUCCESS)
    }

    fn progress(&self) -> Progress {
        if self.quiet { Progress::none() } else { Progress::bytes("copying", None) }
    }

    async fn copy_in(&self, operation: &Operation, from: &str, container: &str, path: &str) -> Done {
        let engine = &operation.engine;
        let mut there = stat(engine, container, path).await?;
        let mut path = path.to_owned();
        if let Some(link) = there.as_ref().filter(|stat| stat.mode & GO_LINK != 0) {
            path = link.link_target.clone();
            there = stat(engine, container, &path).await?;
        }
        let is_folder = there.as_ref().is_some_and(Stat::is_folder);
        let (folder, payload) = if from == "-" {
            if !is_folder {
                return Err(Failure::new(format!("{path:?} in {container:?} is no folder"))
                    .hint("an archive is unpacked into one"));
            }
            (path, archive::read(Path::new("-"), self.progress())?)
        } else {
            let source = Path::new(from);
            let metadata = looked_at(source, self.follow_link)?;
            let (folder, name) = match &there {
                Some(_) if is_folder && from.ends_with("/.") => (path, ".".to_owned()),
                Some(_) if is_folder => (path, base(source)?),
                Some(_) if metadata.is_dir() => {
                    return Err(Failure::new("a folder can't be copied to a file"));
                }
                None if path.ends_with('/') && !metadata.is_dir() => {
                    return Err(
                        Failure::new(format!("{path:?} is no folder in {container:?}")).hint("make it first")
                    );
                }
                _ => split_parent(&path),
            };
            (folder, packed(source.to_owned(), name, self.follow_link))
        };
        let target = Target::of("containers", container, "/archive")
            .with("path", folder)
            .with("noOverwriteDirNonDir", "true")
            .text();
        match engine.send(Call::new(Method::PUT, target).payload(payload)).await {
            Err(error) if error.to_string().starts_with("No such container") => {
                Err(unknown(engine, container, error.into()).await)
            }
            Err(error) => Err(error.into()),
            Ok(_) => Ok(SUCCESS),
        }
    }
}

/// What is at a path; `None` if nothing is.
async fn stat(engine: &Engine, container: &str, path: &str) -> Result<Option<Stat>, Failure> {
    let target = Target::of("containers", container, "/archive").with("path", path).text();
    match engine.send(Call::new(Method::HEAD, target)).await {
        Ok(reply) => Ok(reply.header("x-docker-container-path-stat").and_then(decoded)),
        // An answer to HEAD has no message: whether it is the container that is missing has to be asked.
        Err(error) if error.is_not_found() => super::inspect(engine, container).await.map(|_: Value| None),
        Err(error) => Err(error.into()),
    }
}

fn decoded(header: &str) -> Option<Stat> {
    serde_json::from_slice(&base64::engine::general_purpose::STANDARD.decode(header).ok()?).ok()
}

/// The folder that an archive is unpacked into, and the name that its only entry gets; `None`: it keeps its own.
fn place(to: &Path, as_folder: bool, stat: &Stat) -> Result<(PathBuf, Option<String>), Failure> {
    match fs::metadata(to) {
        Ok(there) if there.is_dir() => Ok((to.to_owned(), None)),
        Ok(_) if stat.is_folder() => {
            Err(Failure::new(format!("a folder can't be copied to the file {}", to.display())))
        }
        Err(_) if as_folder && !stat.is_folder() => {
            Err(Failure::new(format!("{} is no folder", to.display())).hint("make it first"))
        }
        _ => {
            let parent =
                to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !parent.is_dir() {
                return Err(Failure::new(format!("{} is no folder", parent.display())).hint("make it first"));
            }
            Ok((parent.to_owned(), Some(base(to)?)))
        }
    }
}

/// Unpacks below `beside`, then moves what came to its place: the only entry, or all of it if that is a folder's contents.
fn unpack(
    packed: &Path,
    beside: &Path,
    folder: &Path,
    name: Option<&str>,
    contents: bool,
) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::new(format!("can't unpack into {}: {error}", folder.display()));
    let mut entries = tar::Archive::new(fs::File::open(packed).map_err(failed)?);
    entries.set_preserve_mtime(true);
    let Some(name) = name else {
        // Never outside of the folder, whatever the entries are called or linked to.
        return entries.unpack(folder).map_err(failed);
    };
    let inside = beside.join("files");
    fs::create_dir(&inside).map_err(failed)?;
    entries.unpack(&inside).map_err(failed)?;
    let from = if contents {
        inside
    } else {
        let first = fs::read_dir(&inside).map_err(failed)?.next().transpose().map_err(failed)?;
        let Some(first) = first else { return Ok(()) };
        first.path()
    };
    fs::rename(from, folder.join(name)).map_err(failed)
}

/// What is at a path here; a link as it is, unless it is to be followed.
fn looked_at(path: &Path, follow: bool) -> io::Result<fs::Metadata> {
    let metadata = if follow || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        fs::metadata(path)
    } else {
        fs::symlink_metadata(path)
    };
    metadata.map_err(unreadable(path))
}

/// An archive of one file or folder, which is called `name` in it.
fn packed(source: PathBuf, name: String, follow: bool) -> dormouse_client::Payload {
    archive::made(move |sink| {
        let mut archive = tar::Builder::new(sink as &mut dyn Write);
        pack(&mut archive, &source, Path::new(&name), follow)?;
        archive.finish()
    })
}

fn pack(
    archive: &mut tar::Builder<&mut dyn Write>,
    source: &Path,
    name: &Path,
    follow: bool,
) -> io::Result<()> {
    let metadata = looked_at(source, follow)?;
    archive.follow_symlinks(follow);
    append(archive, source, name, &metadata)?;
    archive.follow_symlinks(false);
    if metadata.is_dir() { append_contents(archive, source, name) } else { Ok(()) }
}

/// Adds what is in a folder, but for sockets: no archive can have one, and docker leaves them out as well.
fn append_contents(
    archive: &mut tar::Builder<&mut dyn Write>,
    folder: &Path,
    below: &Path,
) -> io::Result<()> {
    for entry in archive::entries(folder)? {
        let (path, name) = (entry.path(), below.join(entry.file_name()));
        let metadata = entry.metadata().map_err(unreadable(&path))?;
        if metadata.file_type().is_socket() {
            continue;
        }
        append(archive, &path, &name, &metadata)?;
        if metadata.is_dir() {
            append_contents(archive, &path, &name)?;
        }
    }
    Ok(())
}

/// Adds a file, a link, a pipe, a device, or a folder without what is in it.
fn append(
    archive: &mut tar::Builder<&mut dyn Write>,
    path: &Path,
    name: &Path,
    metadata: &fs::Metadata,
) -> io::Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_dir() || kind.is_symlink() {
        return archive::append(archive, path, name);
    }
    if kind.is_socket() {
        return Err(io::Error::other(format!("can't copy {}: it is a socket", path.display())));
    }
    // By hand: the builder would call it by its path here.
    let mut header = tar::Header::new_gnu();
    header.set_metadata(metadata);
    header.set_device_major(rustix::fs::major(metadata.rdev()))?;
    header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
    archive.append_data(&mut header, name, io::empty())
}

fn base(path: &Path) -> Result<String, Failure> {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().or_else(|| whole.file_name());
    name.map(|name| name.to_string_lossy().into_owned()).ok_or_else(|| {
        Failure::new(format!("{} has no name", path.display())).hint("add /. for what is in it")
    })
}

fn split_parent(path: &str) -> (String, String) {
    let path = path.trim_end_matches('/');
    match path.rsplit_once('/') {
        Some(("", name)) => ("/".to_owned(), name.to_owned()),
        Some((parent, name)) => (parent.to_owned(), name.to_owned()),
        None => ("/".to_owned(), path.to_owned()),
    }
}

impl Export {
    pub(crate) async fn run(self, context: &Context) -> Done {
        archive::refuse_terminal(self.output.as_deref())?;
        let operation = context.operation(format!("dorm export {}", self.container), false).await?;
        let target = Target::of("containers", &self.container, "/export").text();
        operation
            .during(async {
                let reply = match operation.engine.send(Call::new(Method::GET, target)).await {
                    Err(error) if error.is_not_found() => {
                        return Err(unknown(&operation.engine, &self.container, error.into()).await);
                    }
                    reply => reply?,
                };
                archive::write(reply.lines(), self.output, Progress::bytes("exporting", None)).await
            })
            .await?;
        Ok(SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_means_a_container_unless_it_is_in_a_path() {
        let there =
            |container: &str, path: &str| Side::There { container: container.into(), path: path.into() };
        assert_eq!(Side::parse("c:/a"), there("c", "/a"));
        assert_eq!(Side::parse("c:"), there("c", ""));
        assert_eq!(Side::parse("./c:/a"), Side::Here("./c:/a".into()));
        assert_eq!(Side::parse("/c:/a"), Side::Here("/c:/a".into()));
        assert_eq!(Side::parse("-"), Side::Here("-".into()));
        assert_eq!(split_parent("/a/b/"), ("/a".into(), "b".into()));
        assert_eq!(split_parent("/a"), ("/".into(), "a".into()));
    }

    #[test]
    fn an_archive_from_a_container_never_leaves_the_folder() {
        let home = tempfile::tempdir().unwrap();
        let (folder, beside) = (home.path().join("to"), home.path().join("to/beside"));
        fs::create_dir_all(&beside).unwrap();
        let packed = beside.join("archive.tar");
        let mut archive = tar::Builder::new(fs::File::create(&packed).unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(0o644);
        // By hand: the builder itself refuses such a name.
        header.as_old_mut().name[..10].copy_from_slice(b"../outside");
        header.set_cksum();
        archive.append(&header, b"x".as_slice()).unwrap();
        archive.finish().unwrap();
        let _ = unpack(&packed, &beside, &folder, None, false);
        assert!(!home.path().join("outside").exists());
    }

    /// What `NEW` is after an archive of these was unpacked as it.
    fn unpacked(names: &[&str], contents: bool) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        let beside = home.path().join("beside");
        fs::create_dir(&beside).unwrap();
        let packed = beside.join("archive.tar");
        let mut archive = tar::Builder::new(fs::File::create(&packed).unwrap());
        for name in names {
            let mut header = tar::Header::new_gnu();
            let kind = if name.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular };
            header.set_entry_type(kind);
            header.set_size(0);
            header.set_mode(0o755);
            archive.append_data(&mut header, name, io::empty()).unwrap();
        }
        archive.finish().unwrap();
        unpack(&packed, &beside, home.path(), Some("NEW"), contents).unwrap();
        home
    }

    #[test]
    fn a_folders_contents_are_a_folder_however_many_they_are() {
        let is_folder = |home: &tempfile::TempDir, path: &str| home.path().join(path).is_dir();
        assert!(is_folder(&unpacked(&["./"], true), "NEW"));
        let one = unpacked(&["./", "./only/"], true);
        assert!(is_folder(&one, "NEW/only"));
        let two = unpacked(&["./", "./a/", "./b/"], true);
        assert!(is_folder(&two, "NEW/a") && is_folder(&two, "NEW/b"));
        let itself = unpacked(&["dir/", "dir/only/"], false);
        assert!(is_folder(&itself, "NEW/only"));
        assert!(unpacked(&["file"], false).path().join("NEW").is_file());
    }

    #[test]
    fn the_engine_calls_a_folders_contents_by_no_name_of_their_own() {
        let stat = |name: &str, mode| Stat { name: name.to_owned(), mode, link_target: String::new() };
        assert!(stat(".", GO_FOLDER | 0o755).is_contents() && stat("/", GO_FOLDER | 0o755).is_contents());
        assert!(!stat("dir", GO_FOLDER | 0o755).is_contents() && !stat(".", 0o644).is_contents());
    }

    /// The names in an archive of this.
    fn names_in(source: &Path, name: &str) -> Vec<String> {
        let mut packed = Vec::<u8>::new();
        let mut archive = tar::Builder::new(&mut packed as &mut dyn Write);
        pack(&mut archive, source, Path::new(name), false).unwrap();
        archive.finish().unwrap();
        drop(archive);
        let mut archive = tar::Archive::new(packed.as_slice());
        let entries = archive.entries().unwrap();
        entries.map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
    }

    #[test]
    fn all_of_a_folder_is_packed_but_its_sockets() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("folder");
        fs::create_dir_all(folder.join("sub")).unwrap();
        fs::write(folder.join("sub/file"), "x").unwrap();
        std::os::unix::fs::symlink("nowhere", folder.join("link")).unwrap();
        mknodat(CWD, folder.join("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let socket = folder.join("sub/socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(names_in(&folder, "x"), ["x", "x/link", "x/pipe", "x/sub", "x/sub/file"]);
        assert_eq!(names_in(&folder.join("pipe"), "p"), ["p"]);
        let mut nowhere = io::sink();
        let mut archive = tar::Builder::new(&mut nowhere as &mut dyn Write);
        let error = pack(&mut archive, &socket, Path::new("s"), false).unwrap_err();
        assert_eq!(error.to_string(), format!("can't copy {}: it is a socket", socket.display()));
    }
}
