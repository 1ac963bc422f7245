//! The hold of a root process: it lasts as long as the process, or as a client that is connected to it.
//!
//! ```text
//! client ══ frames ══ process     the client goes: a detached process runs on, any other one is hung up on
//!            drain ◄─ process     until it ends; the lease is dropped then
//! ```

use std::time::Duration;

use dormouse_agent_proto::ProcessFrame;
use dormouse_mux::{RootProcess, Stream};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, sink};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::owner::HeldLease;

/// How long a process whose client is gone has between SIGHUP and SIGKILL.
const HANG_UP_WITHIN: Duration = Duration::from_secs(10);

/// How long a killed process may take to be gone.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

const SIGHUP: i32 = 1;
const SIGKILL: i32 = 9;

/// Passes frames on, and keeps the lease until the process and its client are gone, or the VM is.
pub(crate) async fn attend(
    client: impl AsyncRead + AsyncWrite + Unpin,
    process: RootProcess,
    detach: bool,
    lease: HeldLease,
    end: CancellationToken,
) {
    let RootProcess { pid, stream } = process;
    tokio::select! {
        () = accompany(client, stream, detach, end) => {}
        reason = lease.ended() => tracing::debug!(pid, reason, "a root process ends with its VM"),
    }
}

async fn accompany(
    client: impl AsyncRead + AsyncWrite + Unpin,
    stream: Stream,
    detach: bool,
    end: CancellationToken,
) {
    let (mut reader, mut writer) = tokio::io::split(client);
    let (mut output, mut input) = tokio::io::split(stream);
    let gone = tokio::select! {
        // A client says that there is no more input with a frame, so the end of what it sends is its own end.
        _ = copy(&mut reader, &mut input) => Gone::Client,
        sent = copy(&mut output, &mut writer) => match sent {
            Ok(_) => Gone::Process,
            Err(_) => Gone::Client,
        },
        () = end.cancelled() => Gone::Client,
    };
    match (gone, detach) {
        (Gone::Process, _) => {
            let _ = writer.shutdown().await;
            let mut nothing = sink();
            // The client holds the VM as long as it stays.
            tokio::select! {
                _ = copy(&mut reader, &mut nothing) => {}
                () = end.cancelled() => {}
            }
        }
        (Gone::Client, true) => drop(copy(&mut output, &mut sink()).await),
        (Gone::Client, false) => {
            for (signal, within) in [(SIGHUP, HANG_UP_WITHIN), (SIGKILL, KILLED_WITHIN)] {
                let _ = input.write_all(&ProcessFrame::Signal(signal).encode()).await;
                let _ = input.flush().await;
                if timeout(within, copy(&mut output, &mut sink())).await.is_ok() {
                    return;
                }
            }
        }
    }
}

/// Who went first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gone {
    Client,
    Process,
}
