//! 64 streams into containers and back at once, every byte of which is looked at, beside one that nobody reads:
//! `scripts/test-long streams`.
#![cfg(feature = "long")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dormouse_api::{CreateSession, IdleTimeout};
use dormouse_vm_tests::figure;
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Streams of execs, and of containers that are attached to.
const EXECS: usize = 56;
const ATTACHED: usize = 8;

/// So many processes and their streams don't fit into a session's usual memory: the engine was out of it at the 48th exec.
const MEMORY_MIB: u64 = 3072;

/// What goes through all of them together in each direction, in bytes, over all runs at one commit.
const GOAL: u64 = 10_000_000_000;

/// How long one run streams at most.
const STREAMING: Duration = Duration::from_secs(25 * 60);

/// What is written at a time, in bytes.
const PIECE: usize = 256 * 1024;

/// A stream that moves nothing for so long is stuck.
const MOVES_WITHIN: Duration = Duration::from_secs(300);

/// The bytes of one stream: no two streams', and no two places', are alike.
struct Bytes(u64);

impl Bytes {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            // xorshift64*, as Vigna gives it.
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            chunk.copy_from_slice(&self.0.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes()[..chunk.len()]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streams_lose_nothing_and_one_that_nobody_reads_holds_none_up() -> Result<()> {
    let state = std::env::var("DORM_TEST_STATE").context("run it by scripts/test-long")?;
    let state = PathBuf::from(state).join("streamed");
    let before: u64 =
        std::fs::read_to_string(&state).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let stage = Stage::new()?;
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Seconds(3600);
    wish.memory_mib = Some(MEMORY_MIB);
    let session = stage.make(&wish).await?;
    stage.load_busybox(&session).await?;
    let socket = session.docker_socket.clone();
    stage.succeed(&session, &["run", "--detach", "--name", "execs", "busybox", "sleep", "1000000"]).await?;
    let mut streams = Vec::new();
    for number in 0..ATTACHED {
        let name = format!("attached{number}");
        stage
            .succeed(&session, &["run", "--detach", "--interactive", "--name", &name, "busybox", "cat"])
            .await?;
        let path = format!("/containers/{name}/attach?stream=1&stdin=1&stdout=1");
        streams.push(upgrade(&socket, &path, "").await?.echoing().await?);
    }
    for _ in 0..EXECS {
        streams.push(exec(&socket, &["cat"], true).await?.echoing().await?);
    }
    // Its engine, its relay and its channel are full at once, and stay so.
    let stalled = exec(&socket, &["yes"], false).await?;

    let (begun, left) =
        (Instant::now(), Arc::new(AtomicU64::new(GOAL.saturating_sub(before).max(64 * PIECE as u64))));
    let mut running = JoinSet::new();
    for (number, stream) in streams.into_iter().enumerate() {
        let seed = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(number as u64 + 1);
        running.spawn(there_and_back(stream, seed, Arc::clone(&left), begun + STREAMING));
    }
    let (mut total, mut least) = (0, u64::MAX);
    while let Some(done) = running.join_next().await {
        let bytes = done??;
        total += bytes;
        least = least.min(bytes);
    }
    let took = begun.elapsed();
    drop(stalled);
    if let Some(folder) = state.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&state, (before + total).to_string())?;
    figure("64 streams both ways", took);
    println!("figure: streamed each way in this run = {} MB", total / 1_000_000);
    println!("figure: streamed each way in all runs = {} MB", (before + total) / 1_000_000);
    println!("figure: the stream that got least = {} MB", least / 1_000_000);
    println!("figure: each way, together = {} kB/s", u128::from(total) / took.as_millis().max(1));
    ensure!(least > 0, "a stream moved nothing");
    ensure!(
        before + total >= GOAL,
        "as far as that nothing was lost; run it again, to add up to {GOAL} bytes"
    );
    Ok(())
}

/// Writes until all streams together have had enough, or the time is over, and reads the same. Tells how much it was.
async fn there_and_back(stream: Upgraded, seed: u64, left: Arc<AtomicU64>, deadline: Instant) -> Result<u64> {
    let Upgraded { stream, beyond } = stream;
    let (reader, mut writer) = stream.into_split();
    let (tell, mut told) = watch::channel(None);
    let writing = async move {
        let (mut bytes, mut piece, mut written) = (Bytes(seed), vec![0; PIECE], 0);
        loop {
            let more = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                (left > 0).then(|| left.saturating_sub(PIECE as u64))
            });
            // Everybody writes something.
            if written > 0 && (more.is_err() || Instant::now() > deadline) {
                break;
            }
            bytes.fill(&mut piece);
            timeout(MOVES_WITHIN, writer.write_all(&piece)).await.context("nothing is taken")??;
            written += PIECE as u64;
        }
        tell.send_replace(Some(written));
        // The engine ends an attached stream with its input: it stays open until all is back.
        anyhow::Ok(writer)
    };
    let reading = async move {
        let mut frames = Frames { reader, bytes: beyond };
        let (mut bytes, mut expected, mut read) = (Bytes(seed), Vec::new(), 0);
        while *told.borrow_and_update() != Some(read) {
            let payload = tokio::select! {
                payload = timeout(MOVES_WITHIN, frames.next()) => payload.context("nothing comes")??,
                Ok(()) = told.changed() => continue,
            };
            let payload = payload.with_context(|| format!("the stream ends after {read} bytes"))?;
            let have = expected.len();
            let wanted = payload.len().saturating_sub(have).next_multiple_of(8);
            expected.resize(have + wanted, 0);
            bytes.fill(&mut expected[have..]);
            ensure!(
                expected[..payload.len()] == payload,
                "other bytes come back within {} of {read}",
                payload.len()
            );
            expected.drain(..payload.len());
            read += payload.len() as u64;
        }
        anyhow::Ok(read)
    };
    let (_open, read) = tokio::try_join!(writing, reading)?;
    Ok(read)
}

/// What an engine sends of a process without a terminal: kind, length, payload.
struct Frames {
    reader: tokio::net::unix::OwnedReadHalf,
    bytes: Vec<u8>,
}

impl Frames {
    const HEADER: usize = 8;

    async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(header) = self.bytes.first_chunk::<{ Self::HEADER }>() {
                ensure!(header[..4] == [1, 0, 0, 0], "{header:?} is no frame of standard output");
                let length = u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize;
                if self.bytes.len() >= Self::HEADER + length {
                    let rest = self.bytes.split_off(Self::HEADER + length);
                    let mut frame = std::mem::replace(&mut self.bytes, rest);
                    return Ok(Some(frame.split_off(Self::HEADER)));
                }
            }
            if self.reader.read_buf(&mut self.bytes).await? == 0 {
                ensure!(self.bytes.is_empty(), "the stream ends within a frame");
                return Ok(None);
            }
        }
    }
}

/// A connection that has become a stream, and what came of it with the answer's head.
struct Upgraded {
    stream: UnixStream,
    beyond: Vec<u8>,
}

impl Upgraded {
    /// Once its program runs: an engine answers before that, and an emulated processor starts no 64 of them at once in any
    /// time that tells a stream that is stuck.
    async fn echoing(mut self) -> Result<Self> {
        const ECHO: [u8; Frames::HEADER + 1] = [1, 0, 0, 0, 0, 0, 0, 1, b'?'];
        self.stream.write_all(b"?").await?;
        let echo = async {
            while self.beyond.len() < ECHO.len() {
                ensure!(self.stream.read_buf(&mut self.beyond).await? > 0, "the stream ends");
            }
            Ok(())
        };
        timeout(MOVES_WITHIN, echo).await.context("its program doesn't start")??;
        ensure!(self.beyond == ECHO, "{:?} is no echo", self.beyond);
        self.beyond.clear();
        Ok(self)
    }
}

async fn exec(socket: &Path, command: &[&str], with_input: bool) -> Result<Upgraded> {
    let wish =
        serde_json::json!({ "AttachStdin": with_input, "AttachStdout": true, "Cmd": command }).to_string();
    let (_, head, body) = ask(socket, "/containers/execs/exec", &wish, "Connection: close\r\n").await?;
    let made: serde_json::Value = serde_json::from_slice(&body).with_context(|| head.clone())?;
    let id = made["Id"].as_str().with_context(|| head.clone())?;
    upgrade(socket, &format!("/exec/{id}/start"), r#"{"Detach":false,"Tty":false}"#).await
}

async fn upgrade(socket: &Path, path: &str, body: &str) -> Result<Upgraded> {
    let (stream, head, beyond) = ask(socket, path, body, "Connection: Upgrade\r\nUpgrade: tcp\r\n").await?;
    ensure!(head.starts_with("HTTP/1.1 101 "), "{head}");
    Ok(Upgraded { stream, beyond })
}

/// Posts, and gives the answer's head and what came behind it: all of it if the connection is to be closed.
async fn ask(socket: &Path, path: &str, body: &str, lines: &str) -> Result<(UnixStream, String, Vec<u8>)> {
    let mut stream = UnixStream::connect(socket).await?;
    let length = body.len();
    let request = format!(
        "POST /v1.45{path} HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\n{lines}\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await?;
    let (mut bytes, closes) = (Vec::new(), lines.contains("close"));
    let reading = async {
        loop {
            let ended = stream.read_buf(&mut bytes).await? == 0;
            let head = bytes.windows(4).position(|window| window == b"\r\n\r\n");
            match head {
                Some(head) if ended || !closes => break anyhow::Ok(head + 4),
                _ if ended => bail!("{path}: the answer breaks off"),
                _ => {}
            }
        }
    };
    let head = timeout(STATE_WITHIN, reading).await.with_context(|| format!("{path} isn't answered"))??;
    let rest = bytes.split_off(head);
    Ok((stream, String::from_utf8_lossy(&bytes).into_owned(), rest))
}
