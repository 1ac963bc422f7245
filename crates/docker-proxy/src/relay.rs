//! One client connection.
//!
//! ```text
//!        ┌─ answered without the engine ──────────────────────┐
//!        │                                                    ▼
//! head ──┴► lease ─► dial ─► request ──► body ─┐           keep-alive
//!  ▲                         answer ◄── head ◄─┴─► 101, or 200 on an endpoint that hijacks: bytes both ways, the end
//!  └──── keep-alive ◄─────── body
//! ```
//!
//! Bounds: a head has 256 KiB and must be complete 30 s after its first byte; what a client pipelines while its request
//! is served waits in 64 KiB here and else in the socket. A client that closes its connection gives its lease back at
//! once, also while the VM is still starting; only for the answer to a create it is kept for 10 s. (One that closed only
//! its sending side is served to the end.) A client that neither takes nor gives a byte for [`STALLED_AFTER`] while the
//! relay waits for it is served on, but its lease keeps nothing awake until it does.

use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::class::{Class, path_of, tells_paths};
use crate::client::{BUFFER_BYTES, Broken, finish, request_head, until_gone, until_hung_up};
use crate::engine::{Answer, Engine, Lease};
use crate::framing::{BodyFraming, BodyScanner};
use crate::head::{HeadError, HeadScanner, RequestHead, ResponseHead, parse_response};
use crate::mounts::{self, Given};
use crate::stream::{Patience, splice};
use crate::warnings;
use crate::wish::{Chosen, Wish};

/// A client that is waited for so long holds nothing meanwhile: it may be a stopped process, or a pager that nobody
/// scrolls.
pub const STALLED_AFTER: Duration = Duration::from_secs(10 * 60);

/// An answer that is only watched holds nothing after so much silence, until there is more of it.
pub const QUIET_AFTER: Duration = Duration::from_secs(10);

/// An answer of the engine that is read whole, to change it, has at most so many bytes: a list of very many containers.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How long a VM that has lost its engine may take to say why.
const REASON_WITHIN: Duration = Duration::from_secs(1);

/// How long an engine is listened to that creates something for a client that is gone.
const CREATED_WITHIN: Duration = Duration::from_secs(10);

/// How a request ended.
enum Next {
    /// The connection may carry another.
    KeepAlive,
    /// It may not.
    Close,
}

/// Serves a client until it or we are done with the connection.
pub async fn serve<E: Engine>(mut client: UnixStream, engine: E) {
    let mut pending = BytesMut::new();
    loop {
        let (mut reader, mut writer) = client.split();
        let mut answered = false;
        let outcome = exchange(&mut reader, &mut writer, &mut pending, &engine, &mut answered).await;
        match outcome {
            Ok(Next::KeepAlive) => {}
            Ok(Next::Close) => break,
            Err(Broken::Refused(refusal)) if !answered => {
                let _ = writer.write_all(&refusal.to_response()).await;
                break;
            }
            Err(error) => {
                tracing::debug!(%error, "connection ended");
                return;
            }
        }
    }
    finish(client).await;
}

async fn exchange<'client, E: Engine>(
    reader: &mut ReadHalf<'client>,
    writer: &mut WriteHalf<'client>,
    pending: &mut BytesMut,
    engine: &E,
    answered: &mut bool,
) -> Result<Next, Broken> {
    let Some(mut request) = request_head(reader, pending).await? else { return Ok(Next::Close) };
    let class = Class::of(&request.method, &request.target);
    if request.framing == BodyFraming::Empty
        && let Some(answer) = own_answer(engine, &request, class, reader, pending).await?
    {
        *answered = true;
        pass_own(answer, reader, writer, pending).await?;
        return Ok(if request.keep_alive { Next::KeepAlive } else { Next::Close });
    }
    let mut wish = match class {
        Class::Creates => Some(Wish::read(&request, engine, reader, writer, pending).await?),
        _ => None,
    };
    let ready = async {
        let lease = engine.lease(&request, class).await.map_err(Broken::Refused)?;
        match lease.dial().await {
            Ok(stream) => {
                if let Some(wish) = &mut wish {
                    wish.complete(&lease).await?;
                }
                Ok((lease, stream))
            }
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(Broken::refused(503, error)),
            Err(error) => {
                let lost = format!("the engine can't be reached: {error}");
                Err(why_lost(lost, lease.ended()).await)
            }
        }
    };
    let (lease, stream) = tokio::select! {
        biased;
        // Nothing is started for who is gone already.
        gone = until_gone(reader, pending) => return Err(gone),
        ready = ready => ready?,
    };
    let (given, chosen) = match wish {
        Some(wish) => {
            request = request.with_body(&wish.body);
            (wish.given, wish.chosen)
        }
        None => (Vec::new(), Chosen::none(engine)),
    };
    let patience = Patience::default();
    let ended = lease.ended();
    let request = &request;
    let relaying = Relaying {
        session: engine,
        request,
        class,
        given,
        chosen,
        warnings: lease.warnings().to_vec(),
        reader,
        writer,
        pending,
        answered,
        patience: &patience,
    };
    let (relaying, keeping) = (relaying.run(stream), patience.keep(lease));
    tokio::pin!(relaying, ended, keeping);
    tokio::select! {
        biased;
        next = relaying => match next {
            Err(Broken::EngineLost(lost)) => Err(why_lost(lost, ended).await),
            next => next,
        },
        reason = &mut ended => Err(Broken::refused(502, reason)),
        never = &mut keeping => match never {},
    }
}

/// What the session answers itself, which may take until a sleep is over.
async fn own_answer<E: Engine>(
    engine: &E,
    request: &RequestHead,
    class: Class,
    reader: &mut ReadHalf<'_>,
    pending: &mut BytesMut,
) -> Result<Option<Answer>, Broken> {
    tokio::select! {
        biased;
        answer = engine.answer(request, class) => answer.map_err(Broken::Refused),
        gone = until_gone(reader, pending) => Err(gone),
    }
}

/// The end of the connection to the engine is seen before whoever holds the VM is told that it crashed.
async fn why_lost(lost: String, ended: impl Future<Output = String>) -> Broken {
    Broken::refused(502, timeout(REASON_WITHIN, ended).await.unwrap_or(lost))
}

/// Passes an answer on that isn't the engine's.
async fn pass_own(
    answer: Answer,
    reader: &mut ReadHalf<'_>,
    writer: &mut WriteHalf<'_>,
    pending: &mut BytesMut,
) -> Result<(), Broken> {
    match answer {
        Answer::Whole(bytes) => Ok(writer.write_all(&bytes).await?),
        Answer::Stream(head, chunks) => tokio::select! {
            done = pass_chunks(head, chunks, writer) => done,
            gone = until_gone(reader, pending) => Err(gone),
        },
    }
}

async fn pass_chunks(
    head: Bytes,
    mut chunks: mpsc::Receiver<Bytes>,
    writer: &mut WriteHalf<'_>,
) -> Result<(), Broken> {
    writer.write_all(&head).await?;
    while let Some(chunk) = chunks.recv().await {
        let mut coded = format!("{:x}\r\n", chunk.len()).into_bytes();
        coded.extend_from_slice(&chunk);
        coded.extend_from_slice(b"\r\n");
        writer.write_all(&coded).await?;
    }
    Ok(writer.write_all(b"0\r\n\r\n").await?)
}

/// One request on its way to the engine, and the answer on its way back.
struct Relaying<'a, 'client, E: Engine> {
    session: &'a E,
    request: &'a RequestHead,
    class: Class,
    /// Paths of the host that the container is given, if one is created.
    given: Vec<Given>,
    /// And numbers.
    chosen: Chosen<'a, E>,
    /// What is to be told in the answer.
    warnings: Vec<String>,
    reader: &'a mut ReadHalf<'client>,
    writer: &'a mut WriteHalf<'client>,
    pending: &'a mut BytesMut,
    /// Has the client begun to hear an answer, so that no other can be given?
    answered: &'a mut bool,
    patience: &'a Patience,
}

/// What follows an answer's head.
enum After {
    /// Its body, which has passed.
    Answered(ResponseHead),
    /// Another protocol.
    Hijacked,
}

impl<E: Engine> Relaying<'_, '_, E> {
    async fn run(self, mut engine: impl AsyncRead + AsyncWrite + Unpin) -> Result<Next, Broken> {
        let Self { session, request, class, given, chosen, warnings, .. } = self;
        let Self { reader, writer, pending, answered, patience, .. } = self;
        let (mut from_engine, mut to_engine) = tokio::io::split(&mut engine);
        to_engine.write_all(&request.bytes).await.map_err(unreachable)?;
        let body = BodyScanner::new(request.framing);
        let mut upload = Upload { class, body, reader, pending, engine: &mut to_engine, patience };
        let mut answer = EngineAnswer { bytes: BytesMut::new(), scanner: HeadScanner::default() };
        let after = {
            // One future from the head to the end, so that no byte of a body is lost half-way.
            let sending = upload.run();
            tokio::pin!(sending);
            let response = loop {
                let head = tokio::select! {
                    head = answer.head(&mut from_engine, &request.method) => head?,
                    gone = &mut sending => return Err(gone),
                };
                if class == Class::Starts {
                    session.started().await;
                }
                if head.is_interim() {
                    // Behind half of it no other answer would be understood.
                    *answered = true;
                    patience.of(STALLED_AFTER, writer.write_all(&head.bytes)).await?;
                    *answered = false;
                    continue;
                }
                let edit = Edit { session, request, class, given, chosen, warnings: &warnings };
                let telling = async {
                    let head = edit.apply(head, &mut answer, &mut from_engine).await?;
                    *answered = true;
                    patience.of(STALLED_AFTER, writer.write_all(&head.bytes)).await?;
                    Ok::<_, Broken>(head)
                };
                tokio::select! {
                    biased;
                    head = telling => break head?,
                    gone = &mut sending => return Err(gone),
                }
            };
            if response.status == 101
                || (class == Class::Hijacks && response.status == 200 && hijacked(&response))
            {
                After::Hijacked
            } else {
                let body = BodyScanner::new(response.framing);
                tokio::select! {
                    biased;
                    done = pass_body(body, class, &mut answer.bytes, &mut from_engine, writer, patience) => done?,
                    gone = &mut sending => return Err(gone),
                }
                After::Answered(response)
            }
        };
        let sent = upload.body.is_done();
        match after {
            // A body that the engine didn't want stands between this request and the next.
            After::Answered(response) if request.keep_alive && response.keep_alive && sent => {
                Ok(Next::KeepAlive)
            }
            After::Answered(_) => Ok(Next::Close),
            After::Hijacked => {
                writer.write_all(&answer.bytes).await?;
                splice(reader, writer, pending, &mut from_engine, &mut to_engine, patience).await?;
                Ok(Next::Close)
            }
        }
    }
}

/// The way of a request's body to the engine.
struct Upload<'a, 'client, W> {
    class: Class,
    body: BodyScanner,
    reader: &'a mut ReadHalf<'client>,
    pending: &'a mut BytesMut,
    engine: &'a mut W,
    patience: &'a Patience,
}

impl<W: AsyncWrite + Unpin> Upload<'_, '_, W> {
    /// Sends the body on to its end, then waits until the client is gone, and the engine needn't be listened to any more.
    async fn run(&mut self) -> Broken {
        let gone = self.all().await;
        // An engine may create what its client doesn't wait for. What belongs to that has to be known here.
        if self.class == Class::Creates && matches!(gone, Broken::ClientGone) {
            sleep(CREATED_WITHIN).await;
        }
        gone
    }

    async fn all(&mut self) -> Broken {
        while !self.body.is_done() {
            match self.part().await {
                Ok(true) => {}
                // An engine that has answered early reads no more; its answer counts.
                Ok(false) => break,
                Err(error) => return error,
            }
        }
        until_gone(self.reader, self.pending).await
    }

    /// Sends on what there is, or waits for more of it. `false`: the engine doesn't read any more.
    async fn part(&mut self) -> Result<bool, Broken> {
        if self.pending.is_empty() {
            self.pending.reserve(BUFFER_BYTES);
            if self.patience.of(STALLED_AFTER, self.reader.read_buf(self.pending)).await? == 0 {
                return Err(Broken::ClientGone);
            }
        }
        let used = self.body.advance(self.pending, |_| {}).map_err(|error| Broken::refused(400, error))?;
        let part = self.pending.split_to(used);
        let passed =
            async { self.engine.write_all(&part).await.is_ok() && self.engine.flush().await.is_ok() };
        tokio::select! {
            passed = passed => Ok(passed),
            // An engine that reads slowly must not hide that nobody wants its answer.
            gone = until_hung_up(self.reader.as_ref()) => Err(gone),
        }
    }
}

/// dockerd answers 200 to clients that send no `Upgrade`, and turns the connection into a stream all the same.
fn hijacked(response: &ResponseHead) -> bool {
    response.framing == BodyFraming::UntilClose
}

/// What came of the engine's answer beyond what was parsed.
struct EngineAnswer {
    bytes: BytesMut,
    scanner: HeadScanner,
}

impl EngineAnswer {
    /// The whole body, within bounds: what it says, and as it came.
    async fn body(
        &mut self,
        framing: BodyFraming,
        engine: &mut (impl AsyncRead + Unpin),
    ) -> Result<(Vec<u8>, Vec<u8>), Broken> {
        let (mut scanner, mut body, mut raw) = (BodyScanner::new(framing), Vec::new(), Vec::new());
        loop {
            let used = scanner
                .advance(&self.bytes, |part| body.extend_from_slice(part))
                .map_err(|error| Broken::refused(502, error))?;
            raw.extend_from_slice(&self.bytes.split_to(used));
            if scanner.is_done() {
                return Ok((body, raw));
            }
            if body.len() > ANSWER_BYTES_MAX {
                return Err(Broken::refused(502, "the engine's answer is too long"));
            }
            if engine.read_buf(&mut self.bytes).await.map_err(unreachable)? == 0 {
                return match scanner.is_until_close() {
                    true => Ok((body, raw)),
                    false => Err(Broken::EngineLost("the engine's answer breaks off".to_owned())),
                };
            }
        }
    }

    /// The next head. Cancel-safe: what was read stays here.
    async fn head(
        &mut self,
        engine: &mut (impl AsyncRead + Unpin),
        method: &str,
    ) -> Result<ResponseHead, Broken> {
        loop {
            if let Some(head) = self.scanner.take(&mut self.bytes).map_err(nonsense)? {
                return parse_response(head, method).map_err(nonsense);
            }
            if engine.read_buf(&mut self.bytes).await.map_err(unreachable)? == 0 {
                let lost = "the engine closed the connection without an answer";
                return Err(Broken::EngineLost(lost.to_owned()));
            }
        }
    }
}

/// What becomes of an answer on its way to the client.
struct Edit<'a, E: Engine> {
    session: &'a E,
    request: &'a RequestHead,
    class: Class,
    given: Vec<Given>,
    chosen: Chosen<'a, E>,
    warnings: &'a [String],
}

impl<E: Engine> Edit<'_, E> {
    /// The answer with what there is to be told, in its head and in the body of one whose clients show it; and with the
    /// host's paths where the engine names the VM's. What was given to a container is known before the client knows of it.
    async fn apply(
        self,
        head: ResponseHead,
        answer: &mut EngineAnswer,
        engine: &mut (impl AsyncRead + Unpin),
    ) -> Result<ResponseHead, Broken> {
        let Self { session, request, class, given, chosen, warnings } = self;
        let head =
            if warnings.is_empty() { head } else { head.with_lines(&warnings::header_lines(warnings)) };
        let path = path_of(&request.target);
        let is_new = class == Class::Creates && path == "/containers/create" && head.status == 201;
        let names_paths = match class {
            Class::Reads => tells_paths(&request.target),
            // What went wrong with a mount.
            Class::Creates | Class::Starts => head.status >= 400 || path == "/volumes/create",
            _ => false,
        };
        let is_given = !(given.is_empty() && chosen.is_empty());
        let is_read = is_new && (is_given || !warnings.is_empty()) || names_paths;
        if !is_read || head.framing == BodyFraming::Empty {
            return Ok(head);
        }
        let (body, raw) = answer.body(head.framing, engine).await?;
        if is_new
            && is_given
            && let Some(id) = created(&body)
        {
            session.created(&id, given, chosen.take()).await;
        }
        let told =
            if is_new && !warnings.is_empty() { warnings::add_to_created(&body, warnings) } else { None };
        let restored = if names_paths { session.restore(&body) } else { None };
        Ok(match told.or(restored) {
            Some(body) => head.with_body(&body),
            None => head.with_raw_body(&raw),
        })
    }
}

/// The id of a container that was created.
fn created(answer: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let id = answer.as_object()?.iter().find(|(name, _)| mounts::is(name, "Id"))?.1;
    id.as_str().map(str::to_owned)
}

fn nonsense(error: HeadError) -> Broken {
    Broken::refused(502, format!("the engine's answer makes no sense: {error}"))
}

fn unreachable(error: io::Error) -> Broken {
    Broken::EngineLost(format!("the connection to the engine broke: {error}"))
}

/// Passes the answer's body on to its end.
async fn pass_body(
    mut body: BodyScanner,
    class: Class,
    bytes: &mut BytesMut,
    engine: &mut (impl AsyncRead + Unpin),
    client: &mut WriteHalf<'_>,
    patience: &Patience,
) -> Result<(), Broken> {
    let _never_held = matches!(class, Class::Weak | Class::Events).then(|| patience.lose());
    while !body.is_done() {
        if bytes.is_empty() {
            bytes.reserve(BUFFER_BYTES);
            let reading = engine.read_buf(bytes);
            let count = match class {
                Class::Follows => patience.of(QUIET_AFTER, reading).await?,
                _ => reading.await?,
            };
            if count == 0 {
                return match body.is_until_close() {
                    true => Ok(()),
                    false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                };
            }
        }
        let used = body.advance(bytes, |_| {}).map_err(|error| Broken::refused(502, error))?;
        patience.of(STALLED_AFTER, client.write_all(&bytes.split_to(used))).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
