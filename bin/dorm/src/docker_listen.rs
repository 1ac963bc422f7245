//! `dorm docker-listen`: the Docker socket over TCP, for who has a client certificate. It runs until it is ended, and a VM
//! that sleeps is woken by what its clients ask, as on the socket itself.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use rustix::net::sockopt;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, split};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::context::Context;
use crate::error::{Done, Failure};
use crate::output::{print, warn};

/// Clients at a time, those that are shaking hands included.
const CLIENTS_MAX: usize = 256;

/// How long a client may take to show its certificate.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);

/// A client that is silent is asked whether it is there as often, as Go's servers do, and how often at most in vain.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEP_ALIVE_TRIES: u32 = 9;

/// Whoever has a client certificate can do in the session all that its owner can. It runs until it is ended.
#[derive(Args)]
pub(crate) struct DockerListen {
    /// Where, e.g. 192.0.2.7:2376.
    address: SocketAddr,
    /// Clients' certificates must be signed by one of these.
    #[arg(long, value_name = "FILE")]
    tlscacert: PathBuf,
    /// This side's certificate, with those between it and its authority.
    #[arg(long, value_name = "FILE")]
    tlscert: PathBuf,
    /// Its key.
    #[arg(long, value_name = "FILE")]
    tlskey: PathBuf,
}

impl DockerListen {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let tls = TlsAcceptor::from(Arc::new(self.tls()?));
        let socket = context.serving(&context.pick(None)).await?.docker_socket;
        let listener = TcpListener::bind(self.address)
            .await
            .map_err(|error| Failure::new(format!("can't listen on {}: {error}", self.address)))?;
        print(format!("tcp://{}", listener.local_addr()?))?;
        let clients = Arc::new(Semaphore::new(CLIENTS_MAX));
        loop {
            let Ok(client) = Arc::clone(&clients).acquire_owned().await else { break };
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let (tls, socket) = (tls.clone(), socket.clone());
                    tokio::spawn(async move {
                        if let Err(error) = serve(stream, &tls, &socket).await {
                            warn(&format!("{peer}: {error}"));
                        }
                        drop(client);
                    });
                }
                Err(error) => {
                    warn(&format!("can't accept: {error}"));
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
        Ok(crate::error::SUCCESS)
    }

    fn tls(&self) -> Result<ServerConfig, Failure> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.tlscacert)? {
            roots.add(certificate).map_err(|error| unusable(&self.tlscacert, &error))?;
        }
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(&self.tlscacert, &error))?;
        let key =
            PrivateKeyDer::from_pem_file(&self.tlskey).map_err(|error| unusable(&self.tlskey, &error))?;
        ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(Failure::new)?
            .with_client_cert_verifier(clients)
            .with_single_cert(certificates(&self.tlscert)?, key)
            .map_err(|error| unusable(&self.tlscert, &error))
    }
}

/// The certificates of a PEM file: one at least.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    let found = read().map_err(|error| unusable(path, &error))?;
    if found.is_empty() {
        return Err(unusable(path, &"there is no certificate in it"));
    }
    Ok(found)
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("can't use {}: {error}", path.display()))
        .hint("certificates and keys are PEM files, as those of dockerd's --tlsverify")
}

async fn serve(stream: TcpStream, tls: &TlsAcceptor, socket: &Path) -> io::Result<()> {
    stream.set_nodelay(true)?;
    keep_alive(&stream)?;
    let connection = TcpStream::from_std(stream.as_fd().try_clone_to_owned()?.into())?;
    let client = timeout(HANDSHAKE_WITHIN, tls.accept(stream)).await??;
    let engine = UnixStream::connect(socket).await?;
    // How a connection ends is between the two: docker's client goes without a word.
    let _ = carry(client, &connection, engine).await;
    Ok(())
}

/// A client that has vanished is noticed although nothing is said.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEP_ALIVE_EVERY)?;
    sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE_EVERY)?;
    Ok(sockopt::set_tcp_keepcnt(stream, KEEP_ALIVE_TRIES)?)
}

/// Either side may end its half first, as with docker's hijacked connections: a client does so within TLS, and what it asked
/// for goes on. One whose connection has ended as well wants nothing any more.
async fn carry(
    client: impl AsyncRead + AsyncWrite,
    connection: &TcpStream,
    engine: UnixStream,
) -> io::Result<()> {
    let (mut from_client, mut to_client) = split(client);
    let (mut from_engine, mut to_engine) = split(engine);
    let up = async {
        copy(&mut from_client, &mut to_engine).await?;
        to_engine.shutdown().await
    };
    let down = async {
        copy(&mut from_engine, &mut to_client).await?;
        to_client.shutdown().await
    };
    tokio::pin!(up, down);
    tokio::select! {
        sent = &mut up => {
            sent?;
            tokio::select! {
                told = down => told,
                () = until_ended(connection) => Ok(()),
            }
        }
        told = &mut down => {
            told?;
            up.await
        }
    }
}

/// Waits for the end of a connection on which nothing more is to come.
async fn until_ended(connection: &TcpStream) {
    while connection.readable().await.is_ok() {
        match connection.try_read(&mut [0; 1024]) {
            Ok(1..) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};

    use super::*;

    /// A connection as both ends have it, what TLS makes of it here in its stead, and the engine's end.
    struct Stage {
        client: TcpStream,
        within: DuplexStream,
        engine: UnixStream,
        carrying: tokio::task::JoinHandle<io::Result<()>>,
    }

    async fn stage() -> Stage {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (connection, _) = listener.accept().await.unwrap();
        keep_alive(&connection).unwrap();
        assert!(sockopt::socket_keepalive(&connection).unwrap());
        let (within, tls) = duplex(1024);
        let (engine, relay) = UnixStream::pair().unwrap();
        let carrying = tokio::spawn(async move { carry(tls, &connection, relay).await });
        Stage { client, within, engine, carrying }
    }

    #[tokio::test]
    async fn a_client_that_has_ended_its_half_hears_the_engine_out() {
        let Stage { client, mut within, mut engine, carrying } = stage().await;
        within.write_all(b"input").await.unwrap();
        within.shutdown().await.unwrap();
        let mut input = String::new();
        engine.read_to_string(&mut input).await.unwrap();
        assert_eq!(input, "input");
        engine.write_all(b"output").await.unwrap();
        drop(engine);
        let mut output = String::new();
        within.read_to_string(&mut output).await.unwrap();
        assert_eq!(output, "output");
        carrying.await.unwrap().unwrap();
        drop(client);
    }

    #[tokio::test]
    async fn a_client_whose_connection_ends_is_gone_although_the_engine_is_silent() {
        let Stage { client, mut within, mut engine, carrying } = stage().await;
        within.shutdown().await.unwrap();
        assert_eq!(engine.read(&mut [0]).await.unwrap(), 0);
        assert!(!carrying.is_finished());
        drop(client);
        carrying.await.unwrap().unwrap();
        assert!(engine.write_all(b"late").await.is_err());
    }
}
