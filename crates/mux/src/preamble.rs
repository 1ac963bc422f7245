//! How host and guest find each other on a port that may still hold an earlier peer's bytes.

use std::io;
use std::time::Duration;

use dormouse_agent_proto::{Boot, Nonce, PREAMBLE_LINE_MAX};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

/// What was sent before the guest opened the port may be lost, and so is what comes while it looks whether there is a host:
/// so ask again. Soon, for a guest that was resumed answers within some 50 to 80 ms.
const RESEND_AFTER: Duration = Duration::from_millis(20);

/// A guest that is booting opens the port late.
const RESEND_WITHIN: Duration = Duration::from_millis(500);

/// Why host and guest didn't find each other.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The other side said nothing that makes sense in time.
    #[error("the guest did not answer in time")]
    Late,
    /// The channel broke.
    #[error("the channel to the guest broke: {0}")]
    Io(#[from] io::Error),
}

/// The host's side. Returns which guest kernel answered.
///
/// # Errors
/// See [`HandshakeError`].
pub async fn connect<T>(io: &mut T, nonce: Nonce, deadline: Instant) -> Result<Boot, HandshakeError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    timeout_at(deadline, async {
        let mut line = Line::default();
        let boot = ask(io, nonce, &mut line).await?;
        io.write_all(nonce.go().as_bytes()).await?;
        while !nonce.is_ready(&line.next(io).await?) {}
        Ok(boot)
    })
    .await
    .map_err(|_| HandshakeError::Late)?
}

async fn ask<T>(io: &mut T, nonce: Nonce, line: &mut Line) -> io::Result<Boot>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let begun = Instant::now();
    loop {
        io.write_all(nonce.to_guest().as_bytes()).await?;
        // Ever more rarely: a port that nobody opens holds only so much.
        let resend = Instant::now() + (begun.elapsed() / 4).clamp(RESEND_AFTER, RESEND_WITHIN);
        // `line` outlives the round, so that an answer in two halves around a repeated question is still one line.
        while let Ok(line) = timeout_at(resend, line.next(io)).await {
            if let Ok(boot) = nonce.from_guest(&line?) {
                return Ok(boot);
            }
        }
    }
}

/// The guest's side: waits for a host as long as it takes, and answers.
///
/// # Errors
/// When the channel breaks.
pub async fn answer<T>(io: &mut T, boot: Boot) -> io::Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut line = Line::default();
    let mut answered = None;
    loop {
        let line = line.next(io).await?;
        if let Ok(nonce) = Nonce::from_host(&line) {
            io.write_all(nonce.to_host(boot).as_bytes()).await?;
            io.flush().await?;
            answered = Some(nonce);
        } else if let Some(nonce) = answered.filter(|nonce| nonce.is_go(&line)) {
            io.write_all(nonce.ready().as_bytes()).await?;
            return io.flush().await;
        }
    }
}

/// Bytes until the next line end; over-long lines are dropped.
#[derive(Debug, Default)]
struct Line {
    bytes: Vec<u8>,
}

impl Line {
    async fn next(&mut self, io: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
        loop {
            // One byte at a time: what follows the last line belongs to yamux.
            match io.read_u8().await? {
                b'\n' => return Ok(std::mem::take(&mut self.bytes)),
                _ if self.bytes.len() >= PREAMBLE_LINE_MAX => self.bytes.clear(),
                byte => self.bytes.push(byte),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn host_and_guest_find_each_other_among_stale_bytes() {
        let (mut host, mut guest) = duplex(4096);
        guest.write_all(b"half a frame of an earlier ho").await.unwrap();
        host.write_all(&[0, 1, 2, 0xff]).await.unwrap();
        let answering = tokio::spawn(async move {
            answer(&mut guest, Boot(9)).await.unwrap();
            guest
        });
        let deadline = Instant::now() + Duration::from_secs(5);
        assert_eq!(connect(&mut host, Nonce(4), deadline).await.unwrap(), Boot(9));
        let mut guest = answering.await.unwrap();
        host.write_all(b"yamux").await.unwrap();
        let mut next = [0; 5];
        guest.read_exact(&mut next).await.unwrap();
        assert_eq!(&next, b"yamux", "not a byte of what follows was taken");
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_that_is_lost_costs_no_more_than_a_moment() {
        let (mut host, mut guest) = duplex(4096);
        let start = Instant::now();
        let answering = tokio::spawn(async move {
            let mut lost = Line::default();
            while lost.next(&mut guest).await.unwrap().is_empty() {}
            answer(&mut guest, Boot(9)).await.unwrap();
        });
        let deadline = start + Duration::from_secs(5);
        assert_eq!(connect(&mut host, Nonce(4), deadline).await.unwrap(), Boot(9));
        answering.await.unwrap();
        assert_eq!(start.elapsed(), RESEND_AFTER);
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_that_nobody_opens_is_asked_for_minutes_before_it_is_full() {
        const HELD: usize = 200 * 1024;
        let (mut host, mut guest) = duplex(HELD);
        let start = Instant::now();
        let given_up = connect(&mut host, Nonce(4), start + Duration::from_secs(600)).await;
        assert!(matches!(given_up, Err(HandshakeError::Late)));
        drop(host);
        let mut asked = Vec::new();
        guest.read_to_end(&mut asked).await.unwrap();
        assert!(asked.len() < HELD / 2, "{} bytes", asked.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_guest_is_given_up_at_the_deadline() {
        let (mut host, _guest) = duplex(64 * 1024);
        let start = Instant::now();
        let given_up = connect(&mut host, Nonce(4), start + Duration::from_secs(60)).await;
        assert!(matches!(given_up, Err(HandshakeError::Late)));
        assert_eq!(start.elapsed(), Duration::from_secs(60));
    }
}
