//! A UDP door: each source that sends has a stream of its own to the guest, as long as something is said.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dormouse_agent_proto::{DATAGRAM_BYTES_MAX, Target, decode_datagram, encode_datagram};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::Ports;
use super::door::enter;
use super::published::{Behind, Door};

/// A source that was silent, and heard nothing, for so long is forgotten.
const SILENT_AFTER: Duration = Duration::from_secs(60);

/// Datagrams of one source that may wait, for a VM that is being woken or for a slow guest. More are lost, as on any
/// network.
const QUEUE: usize = 32;

/// Passes datagrams on until the door is closed.
pub(super) async fn serve(socket: UdpSocket, ports: Ports, door: Door, behind: watch::Receiver<Behind>) {
    let socket = Arc::new(socket);
    let mut sources: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
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
        let Some(datagram) = left(&sources, source, datagram) else { continue };
        sources.retain(|_, queue| !queue.is_closed());
        let Ok(permit) = Arc::clone(&ports.shared.forwards).try_acquire_owned() else {
            tracing::debug!(%door, "too many sources of datagrams");
            continue;
        };
        let (queue, datagrams) = mpsc::channel(QUEUE);
        let _ = queue.try_send(datagram);
        sources.insert(source, queue);
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
fn left(
    sources: &HashMap<SocketAddr, mpsc::Sender<Vec<u8>>>,
    source: SocketAddr,
    datagram: Vec<u8>,
) -> Option<Vec<u8>> {
    let Some(queue) = sources.get(&source) else { return Some(datagram) };
    match queue.try_send(datagram) {
        Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => None,
        Err(mpsc::error::TrySendError::Closed(datagram)) => Some(datagram),
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
    let (lease, stream) = enter(ports, source, door, &behind, Target::Udp).await?;
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
