//! A socket and a stream made one.

use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::Stream;

/// Bytes that are on their way in one direction at a time.
const BUFFER_BYTES: usize = 32 * 1024;

/// How often a stream that isn't being read is looked at: nothing else tells that its peer has dropped it.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// So many looks must find it dropped before its last bytes are given up that the socket doesn't take.
const LOOKS_MAX: u32 = 3;

/// Passes bytes on in both directions, each to its own end. A side that reads no more may still have much to say: so an
/// error in one direction ends that one only. A stream that its peer has dropped is the end of both, once its last bytes
/// have passed: a socket that has nothing to say would never meet an error.
pub async fn both_ways(socket: &mut (impl AsyncRead + AsyncWrite + Unpin), stream: &mut Stream) {
    let (mut there, mut back) = (Way::new(), Way::new());
    let mut look = interval_at(Instant::now() + LOOK_EVERY, LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looks = 0;
    poll_fn(|context| {
        let is_there = there.poll(context, socket, stream).is_ready();
        let is_back = back.poll(context, stream, socket).is_ready();
        if is_back && (is_there || stream.is_abandoned()) {
            return Poll::Ready(());
        }
        while !back.is_reading() && look.poll_tick(context).is_ready() {
            looks += u32::from(stream.is_abandoned());
            if looks >= if is_back { 1 } else { LOOKS_MAX } {
                return Poll::Ready(());
            }
        }
        Poll::Pending
    })
    .await;
}

/// Bytes in one direction.
struct Way {
    buffer: Vec<u8>,
    /// What of the buffer is still to be passed on.
    left: Range<usize>,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Reading,
    /// All was read; who reads is to be told so.
    Ending,
    Over,
}

impl Way {
    fn new() -> Self {
        Self { buffer: vec![0; BUFFER_BYTES], left: 0..0, stage: Stage::Reading }
    }

    fn is_reading(&self) -> bool {
        self.stage == Stage::Reading && self.left.is_empty()
    }

    /// Passes on what there is, to the end.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<()> {
        loop {
            if !self.left.is_empty() {
                match ready!(Pin::new(&mut *to).poll_write(context, &self.buffer[self.left.clone()])) {
                    Ok(count @ 1..) => self.left.start += count,
                    Ok(0) | Err(_) => (self.left, self.stage) = (0..0, Stage::Over),
                }
                continue;
            }
            match self.stage {
                Stage::Reading => {
                    let mut buffer = ReadBuf::new(&mut self.buffer);
                    match Pin::new(&mut *from).poll_read(context, &mut buffer) {
                        Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                            self.left = 0..buffer.filled().len();
                        }
                        // A side that breaks has ended.
                        Poll::Ready(_) => self.stage = Stage::Ending,
                        Poll::Pending => {
                            let _ = Pin::new(&mut *to).poll_flush(context);
                            return Poll::Pending;
                        }
                    }
                }
                Stage::Ending => {
                    let _ = ready!(Pin::new(&mut *to).poll_shutdown(context));
                    self.stage = Stage::Over;
                }
                Stage::Over => return Poll::Ready(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::*;
    use crate::{Limits, Mux};

    /// A stream of a host to a server in its guest.
    struct Joined {
        client: Stream,
        server: DuplexStream,
        joined: JoinHandle<()>,
        _muxes: (Mux, Mux),
    }

    impl Joined {
        /// After the client has said this.
        async fn with(question: &[u8]) -> Self {
            let (host, guest) = duplex(4096);
            let (host, guest) = (Mux::client(host, Limits::AGENT), Mux::server(guest, Limits::AGENT));
            let mut client = host.open().await.unwrap();
            client.write_all(question).await.unwrap();
            let mut stream = guest.accept().await.unwrap();
            let (mut socket, server) = duplex(64);
            let joined = tokio::spawn(async move { both_ways(&mut socket, &mut stream).await });
            Self { client, server, joined, _muxes: (host, guest) }
        }
    }

    async fn ends(joined: JoinHandle<()>) {
        timeout(Duration::from_secs(60), joined).await.expect("it goes on for ever").unwrap();
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let Joined { mut client, mut server, joined, _muxes } = Joined::with(b"question").await;
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
        ends(joined).await;
    }

    #[tokio::test]
    async fn the_last_words_of_a_side_that_reads_no_more_arrive() {
        let Joined { mut client, server, joined, _muxes } = Joined::with(&[0; 4096]).await;
        let (reader, mut writer) = tokio::io::split(server);
        writer.write_all(b"last words").await.unwrap();
        drop((reader, writer));
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "last words");
        drop(client);
        ends(joined).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_is_half_closed_waits_for_an_answer_however_long() {
        let Joined { mut client, mut server, joined, _muxes } = Joined::with(b"wait").await;
        client.shutdown().await.unwrap();
        tokio::time::sleep(Duration::from_secs(3600)).await;
        server.write_all(b"exit 0").await.unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "exit 0");
        ends(joined).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_left_when_the_stream_is_dropped() {
        let Joined { client, mut server, joined, _muxes } = Joined::with(b"attach").await;
        drop(client);
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "attach");
        ends(joined).await;
        assert!(server.write_all(b"x").await.is_err(), "its socket is closed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_left_when_the_stream_is_dropped_after_its_own_side_was_ended() {
        let Joined { mut client, mut server, joined, _muxes } = Joined::with(b"attach").await;
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        drop(client);
        ends(joined).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_neither_reads_nor_speaks_is_left_when_the_stream_is_dropped() {
        let Joined { client, server: _server, joined, _muxes } = Joined::with(&[0; 4096]).await;
        drop(client);
        ends(joined).await;
    }
}
