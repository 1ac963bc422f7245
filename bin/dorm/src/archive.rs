//! Archives that come and go: files, standard input and output, folders.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;

use bytes::Bytes;
use dormouse_client::{JsonLines, Payload};
use futures_util::stream;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use crate::error::Failure;
use crate::progress::Progress;

/// Bytes that are sent at once.
const CHUNK: usize = 64 * 1024;
/// Chunks that wait to be sent.
const QUEUE: usize = 4;

/// Where an archive's bytes are written to.
pub(crate) struct Sink {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    buffer: Vec<u8>,
}

impl Sink {
    fn pass(&mut self) -> io::Result<()> {
        let piece = Bytes::from(std::mem::take(&mut self.buffer));
        // The engine may have read enough, or said no.
        self.pieces.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= CHUNK {
            self.pass()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.pass() }
    }
}

/// An archive that is written by `make` while it is sent. What goes wrong there breaks the request off, and is what its
/// user is told.
pub(crate) fn made(make: impl FnOnce(&mut Sink) -> io::Result<()> + Send + 'static) -> Payload {
    let (pieces, queue) = mpsc::channel(QUEUE);
    thread::spawn(move || {
        let mut sink = Sink { pieces, buffer: Vec::new() };
        if let Err(error) = make(&mut sink).and_then(|()| sink.flush()) {
            let _ = sink.pieces.blocking_send(Err(error));
        }
    });
    Payload::archive(stream::unfold(queue, async |mut queue| queue.recv().await.map(|piece| (piece, queue))))
}

/// Names what couldn't be read: neither the system nor `tar` does.
pub(crate) fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("can't read {}: {error}", path.display()))
}

/// What is in a folder, in the order of names, so that the same folder is the same archive.
pub(crate) fn entries(folder: &Path) -> io::Result<Vec<fs::DirEntry>> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = entries.map_err(unreadable(folder))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// Adds a file, a link, or a folder without what is in it.
pub(crate) fn append(archive: &mut tar::Builder<&mut dyn Write>, path: &Path, name: &Path) -> io::Result<()> {
    archive.append_path_with_name(path, name).map_err(unreadable(path))
}

/// An archive from a file, or from standard input for `-`.
pub(crate) fn read(path: &Path, progress: Progress) -> Result<Payload, Failure> {
    let input = path == Path::new("-");
    let name = PathBuf::from(if input { Path::new("standard input") } else { path });
    let mut from: Box<dyn Read + Send> = if input {
        if io::stdin().is_terminal() {
            return Err(Failure::new("an archive can't be typed").hint("pipe it in, or name a file"));
        }
        Box::new(io::stdin())
    } else {
        let file = File::open(path).map_err(unreadable(path))?;
        if file.metadata()?.is_dir() {
            return Err(Failure::new(format!("{} is a folder", path.display())).hint("an archive is a file"));
        }
        Box::new(file)
    };
    Ok(made(move |sink| {
        let mut buffer = vec![0; CHUNK];
        loop {
            let length = from.read(&mut buffer).map_err(unreadable(&name))?;
            if length == 0 {
                return Ok(());
            }
            sink.write_all(&buffer[..length])?;
            progress.advance(length as u64);
        }
    }))
}

/// Writes what comes to a file, which is there only once it is complete, or to standard output.
pub(crate) async fn write(
    mut from: JsonLines,
    to: Option<PathBuf>,
    progress: Progress,
) -> Result<(), Failure> {
    let Some(path) = to else {
        let mut out = tokio::io::stdout();
        while let Some(bytes) = from.bytes().await.map_err(broken)? {
            out.write_all(&bytes).await?;
            progress.advance(bytes.len() as u64);
        }
        return Ok(out.flush().await?);
    };
    let (file, beside) = Beside::create(&path)?;
    let failed = |error: io::Error| Failure::new(format!("can't write {}: {error}", path.display()));
    let mut file = tokio::fs::File::from_std(file);
    while let Some(bytes) = from.bytes().await.map_err(broken)? {
        file.write_all(&bytes).await.map_err(failed)?;
        progress.advance(bytes.len() as u64);
    }
    file.flush().await.map_err(failed)?;
    beside.keep()
}

/// A file beside the one that is wanted, which takes its place once it is complete, and is gone otherwise.
#[derive(Debug)]
pub(crate) struct Beside {
    path: PathBuf,
    wanted: PathBuf,
}

impl Beside {
    /// Makes it, and opens it.
    pub(crate) fn create(wanted: &Path) -> Result<(File, Self), Failure> {
        let name = wanted.file_name().unwrap_or_default().to_string_lossy();
        let path = wanted.with_file_name(format!(".{name}.{}", std::process::id()));
        let file = File::create(&path)
            .map_err(|error| Failure::new(format!("can't write {}: {error}", wanted.display())))?;
        Ok((file, Self { path, wanted: wanted.to_owned() }))
    }

    /// It is complete.
    pub(crate) fn keep(self) -> Result<(), Failure> {
        std::fs::rename(&self.path, &self.wanted)
            .map_err(|error| Failure::new(format!("can't write {}: {error}", self.wanted.display())))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // After a rename there is none.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Unpacks an archive that is written to the pipe into a folder, which is made.
pub(crate) fn unpacking(
    folder: PathBuf,
) -> Result<(io::PipeWriter, tokio::task::JoinHandle<Result<(), Failure>>), Failure> {
    let failed = move |error: io::Error, folder: &Path| {
        Failure::new(format!("can't write {}: {error}", folder.display()))
    };
    std::fs::create_dir_all(&folder).map_err(|error| failed(error, &folder))?;
    let (reader, writer) = io::pipe()?;
    let work = tokio::task::spawn_blocking(move || {
        let mut archive = tar::Archive::new(reader);
        // Files are ours, as with docker; nothing leads out of the folder: `tar` sees to it.
        archive.set_preserve_ownerships(false);
        archive.unpack(&folder).map_err(|error| failed(error, &folder))
    });
    Ok((writer, work))
}

fn broken(error: dormouse_client::ClientError) -> Failure {
    Failure::lost("the archive broke off", error)
}

/// Binary data on a terminal helps nobody.
pub(crate) fn refuse_terminal(to: Option<&Path>) -> Result<(), Failure> {
    if to.is_none() && io::stdout().is_terminal() {
        return Err(
            Failure::new("an archive is not written to a terminal").hint("name a file with -o, or redirect")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use dormouse_client::{Call, Engine};

    use super::*;

    /// It can be opened, and nothing lies at its beginning, for root neither.
    const BROKEN: &str = "/proc/self/mem";

    #[test]
    fn what_cant_be_added_to_an_archive_is_named_whatever_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut packed = Vec::<u8>::new();
        let mut archive = tar::Builder::new(&mut packed as &mut dyn Write);
        let missing = folder.path().join("missing");
        for path in [Path::new(BROKEN), missing.as_path()] {
            let error = append(&mut archive, path, Path::new("x")).unwrap_err();
            assert!(error.to_string().starts_with(&format!("can't read {}: ", path.display())), "{error}");
        }
        let error = entries(&missing).unwrap_err();
        assert!(error.to_string().starts_with(&format!("can't read {}: ", missing.display())), "{error}");
    }

    #[tokio::test]
    async fn a_file_that_breaks_off_while_it_is_sent_is_told_as_such_and_no_engine_went_away() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        // Nobody needs to answer.
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let payload = read(Path::new(BROKEN), Progress::none()).unwrap();
        let call = Call::new(http::Method::POST, "/images/load").payload(payload);
        let failure = Failure::from(Engine::new(&socket).send(call).await.unwrap_err());
        assert!(matches!(failure, Failure::Said(_)), "{failure:?}");
        assert!(failure.message().starts_with(&format!("can't read {BROKEN}: ")), "{failure:?}");
    }
}
