//! Datagrams between a stream of the host and a container.

use std::io;
use std::net::SocketAddr;

use dormouse_agent_proto::{DATAGRAM_BYTES_MAX, decode_datagram, encode_datagram};
use dormouse_mux::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;

/// A socket that speaks to this address only.
pub(crate) async fn connect(address: &str) -> io::Result<UdpSocket> {
    let address: SocketAddr =
        address.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(address).await?;
    Ok(socket)
}

/// Passes datagrams on until the host ends the stream: it knows how long nobody has said anything.
pub(crate) async fn relay(stream: Stream, socket: UdpSocket) {
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let out = async {
        let mut buffer = Vec::new();
        while let Ok(1..) = from_host.read_buf(&mut buffer).await {
            while let Some((payload, used)) = decode_datagram(&buffer) {
                // As on any network: what can't be delivered is lost.
                let _ = socket.send(payload).await;
                buffer.drain(..used);
            }
        }
    };
    let back = async {
        let mut payload = vec![0; DATAGRAM_BYTES_MAX];
        loop {
            // A refusal is an answer to an earlier datagram; the container may listen again.
            let Ok(count) = socket.recv(&mut payload).await else { continue };
            let Some(frame) = encode_datagram(&payload[..count]) else { continue };
            if to_host.write_all(&frame).await.is_err() || to_host.flush().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = out => {}
        () = back => {}
    }
}
