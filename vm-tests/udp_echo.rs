//! Sends every datagram back. Compiled by the test that runs it in a container, where nothing but this program is.

use std::net::UdpSocket;

fn main() -> std::io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:7")?;
    let mut buffer = [0; 65_507];
    loop {
        let (count, source) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..count], source)?;
    }
}
