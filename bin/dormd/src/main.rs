//! The service: the table of sessions, and the factory that makes their VMs.

mod api;
mod factory;
mod host;
mod leftovers;
mod settings;
mod storage;
mod table;

use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use dormouse_client::Home;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use rustix::fs::{FlockOperation, flock};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::table::Table;

#[derive(Parser)]
#[command(about = "Keeps a user's sessions and makes their VMs; `dorm` starts it", version)]
struct Arguments {
    /// A descriptor on which to say "ready" once it listens. None of the standard ones: it is closed afterwards, and
    /// what is opened next would take its number and be lost to our children.
    #[arg(long, value_parser = clap::value_parser!(RawFd).range(3..))]
    ready_fd: Option<RawFd>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let filter = EnvFilter::try_from_env("DORM_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    if let Err(error) = dormouse_vm::raise_descriptor_limit() {
        tracing::warn!(%error, "the limit of open files can't be raised");
    }
    let ready = Arguments::parse().ready_fd.map(inherited);
    let home = Home::from_env()?;
    let runtime = home.runtime();
    let folder = || format!("can't use the folder {}", runtime.display());
    DirBuilder::new().recursive(true).mode(0o700).create(runtime).with_context(folder)?;
    let lock = File::create(runtime.join("dormd.lock")).with_context(folder)?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        tracing::info!("another dormd serves this home");
        return Ok(());
    }
    let table = Arc::new(Table::load(home.clone()).context("can't read the sessions")?);
    let socket = home.service_socket();
    // The lock is ours, so whoever left this socket is gone.
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).with_context(folder)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    table.listening(None).await;
    if let Some(mut ready) = ready {
        let _ = ready.write_all(b"ready\n");
    }
    let leftovers = Arc::clone(&table);
    tokio::spawn(async move { leftovers.end_leftovers().await });
    tokio::spawn(Arc::clone(&table).keep_wakes());
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => serve(stream, &table),
                Err(error) => {
                    tracing::warn!(%error, "can't accept");
                    // Who knocks still knocks, and there may be room in a moment.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    let _ = std::fs::remove_file(&socket);
    table.shut_down().await;
    Ok(())
}

fn serve(stream: UnixStream, table: &Arc<Table>) {
    // The folder is its owner's alone; this holds even if somebody opened it up.
    let own = rustix::process::geteuid().as_raw();
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0) {
        return;
    }
    let service = TowerToHyperService::new(api::router(Arc::clone(table)));
    tokio::spawn(async move {
        let builder = hyper::server::conn::http1::Builder::new();
        if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).with_upgrades().await {
            tracing::debug!(%error, "connection ended");
        }
    });
}

#[expect(unsafe_code, reason = "an inherited descriptor is known by number only")]
fn inherited(descriptor: RawFd) -> File {
    // SAFETY: who starts us with this option passes the descriptor for us alone, and it is taken once.
    unsafe { File::from_raw_fd(descriptor) }
}
