//! The host's typed side of the port `agent`.

use std::time::Duration;

use dormouse_agent_proto::{
    Activity, Answer, Failure, GuestEvent, Identity, ProcessFrame, ProcessFrameError, Reply, Request,
    RunProcess, Target, VERSION,
};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use crate::{JsonError, Mux, MuxError, Stream, read_json, write_json};

/// Longest wait for a reply.
const REPLY_WITHIN: Duration = Duration::from_secs(10);

/// Longest wait for file systems to reach the disk, or for the engine to stop in order.
const SLOW_REPLY_WITHIN: Duration = Duration::from_secs(60);

/// Why the guest didn't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No stream could be had.
    #[error(transparent)]
    Mux(#[from] MuxError),
    /// The stream broke, or carried nonsense.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// No reply came in time.
    #[error("the guest did not reply within {} s", .0.as_secs())]
    Late(Duration),
    /// The guest said no.
    #[error("{}", .0.message)]
    Failed(Failure),
    /// The reply doesn't fit the question.
    #[error("the guest's reply makes no sense")]
    Nonsense,
}

impl AgentError {
    /// Are there as many streams as there may be? Nothing is wrong with the guest then.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Mux(MuxError::Busy(_)))
    }
}

/// Speaks to `dorm-init`.
#[derive(Debug, Clone)]
pub struct Agent {
    mux: Mux,
    ports: Mux,
    /// Whose streams are those that [`Agent::dial`] and [`Agent::run`] open?
    share: Share,
}

/// Of the streams of the channel `agent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Share {
    Clients,
    Host,
}

impl Agent {
    /// An agent behind these channels, whose preambles are done: `agent`, and `ports` for what is forwarded. Where there
    /// is one channel only it can be both.
    #[must_use]
    pub fn new(mux: Mux, ports: Mux) -> Self {
        Self { mux, ports, share: Share::Host }
    }

    /// The same for a client of the session, which may use no stream of those that are kept for the host's own requests.
    #[must_use]
    pub fn for_client(&self) -> Self {
        Self { share: Share::Clients, ..self.clone() }
    }

    /// Waits for the end of one of the channels, and says why it ended.
    pub async fn closed(&self) -> String {
        tokio::select! {
            biased;
            reason = self.mux.closed() => reason,
            reason = self.ports.closed() => format!("for published ports, {reason}"),
        }
    }

    /// Hangs up, and waits until the connection is over.
    pub async fn close(&self) {
        tokio::join!(self.mux.close(), self.ports.close());
    }

    /// Asks who is there, and checks that it is who answered the preamble.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn hello(&self, nonce: &str) -> Result<Answer, AgentError> {
        let request = Request::Hello { version: VERSION, nonce: nonce.to_owned() };
        let (answer, _) = self.ask(request, REPLY_WITHIN).await?;
        match &answer {
            Answer::Hello { nonce: echoed, .. } if echoed == nonce => Ok(answer),
            _ => Err(AgentError::Nonsense),
        }
    }

    /// Connects to a socket in the guest.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn dial(&self, target: Target) -> Result<Stream, AgentError> {
        Ok(self.ask_for_stream(Request::Dial(target)).await?.1)
    }

    /// Connects to a socket in the guest over the channel for forwards, where no flood starves the others.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn forward(&self, target: Target) -> Result<Stream, AgentError> {
        Ok(ask(self.ports.open(), Request::Dial(target), REPLY_WITHIN).await?.1)
    }

    /// Starts a root process.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn run(&self, process: RunProcess) -> Result<RootProcess, AgentError> {
        let (answer, stream) = self.ask_for_stream(Request::Run(process)).await?;
        match answer {
            Answer::Running { pid } => Ok(RootProcess { pid, stream }),
            _ => Err(AgentError::Nonsense),
        }
    }

    /// Listens to what happens in the guest.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn watch(&self) -> Result<Watch, AgentError> {
        Ok(Watch { stream: self.ask(Request::Watch, REPLY_WITHIN).await?.1 })
    }

    /// Looks at what goes on in the guest's containers.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn activity(&self) -> Result<Activity, AgentError> {
        match self.ask(Request::Activity, REPLY_WITHIN).await?.0 {
            Answer::Activity(activity) => Ok(activity),
            _ => Err(AgentError::Nonsense),
        }
    }

    /// Flushes the guest's file systems.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn sync(&self) -> Result<(), AgentError> {
        self.ask(Request::Sync, SLOW_REPLY_WITHIN).await.map(drop)
    }

    /// Sets the guest's clock, in nanoseconds since the Unix epoch.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn set_clock(&self, unix_nanos: u64) -> Result<(), AgentError> {
        self.ask(Request::SetClock { unix_nanos }, REPLY_WITHIN).await.map(drop)
    }

    /// Has the data disk's file system flushed and kept from being written to, for a suspend.
    ///
    /// # Errors
    /// See [`AgentError`]. It may be frozen all the same, for [`dormouse_agent_proto::FROZEN_MAX`] at most.
    pub async fn freeze(&self) -> Result<(), AgentError> {
        self.ask(Request::Freeze, SLOW_REPLY_WITHIN).await.map(drop)
    }

    /// Tells the guest that it runs on, and what time it is, in nanoseconds since the Unix epoch.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn wake(&self, unix_nanos: u64, identity: Option<Identity>) -> Result<(), AgentError> {
        self.ask(Request::Wake { unix_nanos, identity }, REPLY_WITHIN).await.map(drop)
    }

    /// Has the connections ended that led out of the guest before it was suspended.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn end_connections(&self) -> Result<(), AgentError> {
        self.ask(Request::EndConnections, REPLY_WITHIN).await.map(drop)
    }

    /// Has the data disk's file system fill a disk that has grown to this size.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn grow_disk(&self, bytes: u64) -> Result<(), AgentError> {
        self.ask(Request::GrowDisk { bytes }, SLOW_REPLY_WITHIN).await.map(drop)
    }

    /// Asks the guest to stop its engine and to power off.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn power_off(&self) -> Result<(), AgentError> {
        self.ask(Request::PowerOff, SLOW_REPLY_WITHIN).await.map(drop)
    }

    async fn ask(&self, request: Request, within: Duration) -> Result<(Answer, Stream), AgentError> {
        ask(self.mux.open_reserved(), request, within).await
    }

    async fn ask_for_stream(&self, request: Request) -> Result<(Answer, Stream), AgentError> {
        match self.share {
            Share::Clients => ask(self.mux.open(), request, REPLY_WITHIN).await,
            Share::Host => self.ask(request, REPLY_WITHIN).await,
        }
    }
}

async fn ask(
    open: impl Future<Output = Result<Stream, MuxError>>,
    request: Request,
    within: Duration,
) -> Result<(Answer, Stream), AgentError> {
    let asking = async {
        let mut stream = open.await?;
        write_json(&mut stream, &request).await?;
        match read_json(&mut stream).await? {
            Reply::Ok(answer) => Ok((answer, stream)),
            Reply::Err(failure) => Err(AgentError::Failed(failure)),
        }
    };
    timeout(within, asking).await.map_err(|_| AgentError::Late(within))?
}

/// What happens in the guest, as it happens.
#[derive(Debug)]
pub struct Watch {
    stream: Stream,
}

impl Watch {
    /// The next event.
    ///
    /// # Errors
    /// When the channel ends, or carries nonsense.
    pub async fn next(&mut self) -> Result<GuestEvent, JsonError> {
        read_json(&mut self.stream).await
    }
}

/// A process in the VM's root namespace. Dropping it hangs up on the process.
#[derive(Debug)]
pub struct RootProcess {
    /// Process id in the guest.
    pub pid: u32,
    /// [`ProcessFrame`]s in both directions.
    pub stream: Stream,
}

/// Why a stream of process frames ended early.
#[derive(Debug, thiserror::Error)]
pub enum ProcessStreamError {
    /// The stream broke.
    #[error("the stream broke: {0}")]
    Io(#[from] std::io::Error),
    /// It carried nonsense.
    #[error(transparent)]
    Frame(#[from] ProcessFrameError),
}

/// Reads one process frame; `None` at the end of the stream. `buffer` keeps what came beyond it.
///
/// # Errors
/// See [`ProcessStreamError`].
pub async fn read_process_frame(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> Result<Option<ProcessFrame>, ProcessStreamError> {
    loop {
        if let Some((frame, used)) = ProcessFrame::decode(buffer)? {
            buffer.drain(..used);
            return Ok(Some(frame));
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;
    use crate::Limits;

    const FEW: Limits = Limits { streams: 2, reserved: 1 };

    /// The channels of a guest that says yes to everything, and its ends of them.
    fn guest() -> (Agent, [Mux; 2]) {
        let [(agent, guest), (ports, guest_ports)] = [(); 2].map(|()| {
            let (host, guest) = duplex(4096);
            (Mux::client(host, FEW), Mux::server(guest, FEW))
        });
        let serving = guest.clone();
        tokio::spawn(async move {
            while let Some(mut stream) = serving.accept().await {
                tokio::spawn(async move {
                    let _: Request = read_json(&mut stream).await.unwrap();
                    write_json(&mut stream, &Reply::Ok(Answer::Done)).await.unwrap();
                    let _ = stream.read(&mut [0]).await;
                });
            }
        });
        (Agent::new(agent, ports), [guest, guest_ports])
    }

    #[tokio::test(start_paused = true)]
    async fn the_hosts_own_requests_are_answered_while_clients_use_every_stream() {
        let (agent, _guest) = guest();
        let client = agent.for_client();
        let _streams =
            [client.dial(Target::Engine).await.unwrap(), client.dial(Target::Engine).await.unwrap()];
        let refused = client.dial(Target::Engine).await.unwrap_err();
        assert!(refused.is_busy(), "{refused}");
        agent.sync().await.unwrap();
        client.power_off().await.expect("it isn't for a client whose request it is");
        drop(agent.dial(Target::Engine).await.unwrap());
        agent.freeze().await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_either_channel_is_the_agents() {
        for index in [0, 1] {
            let (agent, guest) = guest();
            guest[index].close().await;
            let reason = timeout(Duration::from_secs(10), agent.closed()).await;
            assert_eq!(reason.unwrap().starts_with("for published ports"), index == 1);
        }
    }
}
