//! A UDP door: each source that sends has a stream of its own to the guest, as long as something is said.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dormouse_agent_proto::{DATAGRAM_BYTES_MAX, Target, decode_datagram, encode_datagram};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::Ports;
use super::door::enter;
use super::published::{Behind, Door};

/// A source that was silent, and heard nothing, for so long is forgotten.
const SILENT_AFTER: Duration = Duration::from_secs(60);

/// Datagrams of one source that may wait, for a VM that is being woken or for a slow guest. More are lost, as on any
/// network.
const QUEUE: usize = 32;

/// Sources of one door. Beyond them who has been silent longest is forgotten: a client that takes a port of its own for each
/// question, as those of DNS do, must not take the streams of all others.
const SOURCES_MAX: usize = 128;

/// One that sends.
struct Source {
    queue: mpsc::Sender<Vec<u8>>,
    heard: Instant,
}

/// Passes datagrams on until the door is closed.
pub(super) async fn serve(socket: UdpSocket, ports: Ports, door: Door, behind: watch::Receiver<Behind>) {
    let socket = Arc::new(socket);
    let mut sources: HashMap<SocketAddr, Source> = HashMap::new();
    let mut payload = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let Some(mut pass) = ports.shared.entrance.pass().await else { return };
        let (count, source) = match pass.unless_closed(socket.recv_from(&mut payload)).await {
            Some(Ok(received)) => received,
            None => continue,
            // Somebody refused an answer of ours; or the host is short of memory.
            Some(Err(error)) => {
                tracing::debug!(%door, %error, "can't receive");
                drop(pass);
                sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let datagram = payload[..count].to_vec();
        let Some(datagram) = left(&mut sources, source, datagram) else { continue };
        sources.retain(|_, source| !source.queue.is_closed());
        make_room(&mut sources);
        let Ok(permit) = Arc::clone(&ports.shared.forwards).try_acquire_owned() else {
            tracing::debug!(%door, "too many sources of datagrams");
            continue;
        };
        let (queue, datagrams) = mpsc::channel(QUEUE);
        let _ = queue.try_send(datagram);
        sources.insert(source, Source { queue, heard: Instant::now() });
        let (socket, ports, behind) = (Arc::clone(&socket), ports.clone(), behind.clone());
        tokio::spawn(async move {
            if let Err(reason) = forward(&socket, source, datagrams, &ports, door, behind).await {
                tracing::debug!(%door, %source, reason, "datagrams were not forwarded");
            }
            drop(permit);
        });
    }
}

/// Gives a datagram to the task of its source; gives it back if there is none.
fn left(sources: &mut HashMap<SocketAddr, Source>, source: SocketAddr, datagram: Vec<u8>) -> Option<Vec<u8>> {
    let Some(source) = sources.get_mut(&source) else { return Some(datagram) };
    source.heard = Instant::now();
    match source.queue.try_send(datagram) {
        Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => None,
        Err(mpsc::error::TrySendError::Closed(datagram)) => Some(datagram),
    }
}

/// For one more. Who is forgotten ends with what was meant for it.
fn make_room(sources: &mut HashMap<SocketAddr, Source>) {
    if sources.len() >= SOURCES_MAX
        && let Some(silent) =
            sources.iter().min_by_key(|(_, source)| source.heard).map(|(address, _)| *address)
    {
        sources.remove(&silent);
    }
}

async fn forward(
    socket: &UdpSocket,
    source: SocketAddr,
    mut datagrams: mpsc::Receiver<Vec<u8>>,
    ports: &Ports,
    door: Door,
    behind: watch::Receiver<Behind>,
) -> Result<(), String> {
    // A socket for datagrams is connected at once: none waits for another.
    let under_way = Semaphore::new(1);
    let (lease, stream) = enter(ports, source, door, &behind, Target::Udp, &under_way).await?;
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let ended = lease.ended();
    tokio::pin!(ended);
    let mut buffer = Vec::new();
    loop {
        let said = async {
            tokio::select! {
                datagram = datagrams.recv() => {
                    let Some(datagram) = datagram else { return false };
                    let Some(frame) = encode_datagram(&datagram) else { return true };
                    to_guest.write_all(&frame).await.is_ok() && to_guest.flush().await.is_ok()
                }
                read = from_guest.read_buf(&mut buffer) => matches!(read, Ok(1..)),
                reason = &mut ended => {
                    tracing::debug!(reason, "datagrams lost their VM");
                    false
                }
            }
        };
        if !timeout(SILENT_AFTER, said).await.unwrap_or(false) {
            return Ok(());
        }
        while let Some((payload, used)) = decode_datagram(&buffer) {
            let _ = socket.send_to(payload, source).await;
            buffer.drain(..used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_source_too_many_takes_the_place_of_who_was_silent_longest() {
        let mut sources = HashMap::new();
        let address = |number: usize| SocketAddr::from(([127, 0, 0, 1], u16::try_from(number + 1).unwrap()));
        let mut tasks = Vec::new();
        for number in 0..SOURCES_MAX {
            tokio::time::advance(Duration::from_millis(1)).await;
            let (queue, datagrams) = mpsc::channel(QUEUE);
            tasks.push(datagrams);
            sources.insert(address(number), Source { queue, heard: Instant::now() });
        }
        assert_eq!(left(&mut sources, address(0), b"still here".to_vec()), None);
        make_room(&mut sources);
        assert!(sources.contains_key(&address(0)) && !sources.contains_key(&address(1)));
        assert_eq!(tasks[1].recv().await, None, "its task ends");
        make_room(&mut sources);
        assert_eq!(sources.len(), SOURCES_MAX - 1, "there is room");
    }
}
