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
    let beside = path.with_file_name(format!(
        ".{}.{}",
        path.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id()
    ));
    let failed = |error: io::Error| Failure::new(format!("can't write {}: {error}", path.display()));
    let written = async {
        let mut file = tokio::fs::File::create(&beside).await.map_err(failed)?;
        while let Some(bytes) = from.bytes().await.map_err(broken)? {
            file.write_all(&bytes).await.map_err(failed)?;
            progress.advance(bytes.len() as u64);
        }
        file.flush().await.map_err(failed)?;
        std::fs::rename(&beside, &path).map_err(failed)
    }
    .await;
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written
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
