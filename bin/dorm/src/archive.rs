//! Archives that come and go: files, standard input and output, folders.

use std::fs::File;
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

/// An archive that is written by `make` while it is sent. What goes wrong there breaks the request off.
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

/// An archive from a file, or from standard input for `-`.
pub(crate) fn read(path: &Path, progress: Progress) -> Result<Payload, Failure> {
    let mut from: Box<dyn Read + Send> = if path == Path::new("-") {
        if io::stdin().is_terminal() {
            return Err(Failure::new("an archive can't be typed").hint("pipe it in, or name a file"));
        }
        Box::new(io::stdin())
    } else {
        let file = File::open(path)
            .map_err(|error| Failure::new(format!("can't read {}: {error}", path.display())))?;
        if file.metadata()?.is_dir() {
            return Err(Failure::new(format!("{} is a folder", path.display())).hint("an archive is a file"));
        }
        Box::new(file)
    };
    Ok(made(move |sink| {
        let mut buffer = vec![0; CHUNK];
        loop {
            let length = from.read(&mut buffer)?;
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
    Failure::Lost(format!("the archive broke off: {error}"))
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
