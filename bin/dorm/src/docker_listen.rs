//! `dorm docker-listen`: the Docker socket over TCP, for who has a client certificate. It runs until it is ended, and a VM
//! that sleeps is woken by what its clients ask, as on the socket itself.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::copy_bidirectional;
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
        let socket = context.open(&context.pick(None)).await?.docker_socket;
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

/// Either side may end its half first, as with docker's hijacked connections.
async fn serve(stream: TcpStream, tls: &TlsAcceptor, socket: &Path) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut client = timeout(HANDSHAKE_WITHIN, tls.accept(stream)).await??;
    let mut engine = UnixStream::connect(socket).await?;
    // How a connection ends is between the two: docker's client goes without a word.
    let _ = copy_bidirectional(&mut client, &mut engine).await;
    Ok(())
}
