//! A running VM as its session host holds it.
//!
//! ```text
//!   Vm::connect ─► prelaunch ── start ──► running ◄── cont ── stopped
//!                  inmigrate ── load_state ──► stopped          ▲
//!                                         running ── stop ──────┤── save_state ── quit ──► exited
//!                                         running ── disk full ─┘
//! ```
//!
//! Every state may end in `exited` at any time; [`VmEvents`] tells it once, with the reason, and as its last word.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dormouse_qmp::{
    AnnounceSelf, Balloon, BlockErrorAction, BlockResize, Client, Closed, Command, Cont, Event, Events,
    ExecuteError, Incoming, QueryBalloon, QueryStatus, Quit, RunState, ShutdownReason, Status, Stop,
    SystemPowerdown,
};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::adopt::{Adopted, Adoption, Monitor, adopt};
use crate::console::Console;
use crate::device::{AGENT_PORT, DATA_NODE, PORTS_PORT};
use crate::exit::VmExit;
use crate::process::Process;
use crate::record::VmRecord;

/// How long QEMU may take to carry out an ordinary command.
pub(crate) const COMMAND_WITHIN: Duration = Duration::from_secs(10);
/// How long QEMU may take to go after it closed its monitor.
const EXIT_WITHIN: Duration = Duration::from_secs(5);

/// A VM that answers.
#[derive(Debug)]
pub struct Vm {
    record: VmRecord,
    runtime_dir: PathBuf,
    client: Client,
    process: std::sync::Arc<Process>,
    found: RunState,
}

/// What happens to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// The vCPUs stopped.
    Stopped,
    /// The vCPUs run.
    Resumed,
    /// A disk request failed and the vCPUs are stopped; [`Vm::cont`] tries it again.
    PausedByDisk {
        /// Because the host's disk is full.
        no_space: bool,
        /// In words.
        reason: String,
    },
    /// The guest opened (or closed) the port of the agent.
    AgentPort {
        /// Is it open?
        open: bool,
    },
    /// The guest opened (or closed) the port for forwards.
    PortsPort {
        /// Is it open?
        open: bool,
    },
    /// QEMU is gone. The last event, and repeated for who asks again.
    Exited(VmExit),
}

/// The events of a VM, in order.
#[derive(Debug)]
pub struct VmEvents {
    events: Events,
    process: std::sync::Arc<Process>,
    last_word: Option<ShutdownReason>,
    panicked: bool,
    end: End,
}

/// How far a VM's end has come.
#[derive(Debug)]
enum End {
    /// Not begun: QEMU talks to us.
    NotYet,
    /// The monitor is closed, so that QEMU is on its way out. By `killed_at` it is helped.
    Closed { closed: Closed, killed_at: Instant },
    /// QEMU is gone.
    Gone(VmExit),
}

impl Vm {
    /// Connects to the VM of `record` as its session host; `None` when it is gone, see [`adopt`].
    ///
    /// # Errors
    /// When the host refuses to tell about its processes.
    pub async fn connect(record: VmRecord, runtime_dir: &Path) -> io::Result<Option<(Self, VmEvents)>> {
        let adopted = match adopt(&record, runtime_dir, Monitor::Host).await? {
            Adoption::Adopted(adopted) => *adopted,
            Adoption::Gone => return Ok(None),
        };
        let Adopted { process, client, events, state } = adopted;
        let process = std::sync::Arc::new(process);
        let vm = Self {
            record,
            runtime_dir: runtime_dir.to_owned(),
            client,
            process: std::sync::Arc::clone(&process),
            found: state,
        };
        let events = VmEvents { events, process, last_word: None, panicked: false, end: End::NotYet };
        Ok(Some((vm, events)))
    }

    /// What is written down about it.
    #[must_use]
    pub const fn record(&self) -> &VmRecord {
        &self.record
    }

    /// The session's runtime directory.
    #[must_use]
    pub fn runtime_dir(&self) -> &Path {
        &self.runtime_dir
    }

    /// In which state it was when we connected.
    #[must_use]
    pub const fn found(&self) -> RunState {
        self.found
    }

    /// In which state it is.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    pub async fn status(&self) -> Result<Status, ExecuteError> {
        self.execute(QueryStatus {}).await
    }

    /// Lets the vCPUs run: for the first time, after [`Vm::stop`], or after a pause by a disk.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    pub async fn cont(&self) -> Result<(), ExecuteError> {
        self.execute(Cont {}).await.map(drop)
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    pub async fn stop(&self) -> Result<(), ExecuteError> {
        self.execute(Stop {}).await.map(drop)
    }

    /// Presses the power button. What the guest does about it is told as [`VmEvent::Exited`], if it does.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    pub async fn power_down(&self) -> Result<(), ExecuteError> {
        self.execute(SystemPowerdown {}).await.map(drop)
    }

    /// Ends QEMU at once, as by pulling the plug: what the guest did not sync is lost.
    ///
    /// # Errors
    /// See [`ExecuteError`]; [`Vm::kill`] needs no answer.
    pub async fn quit(&self) -> Result<(), ExecuteError> {
        match self.execute(Quit {}).await {
            // QEMU may be gone before its reply is out.
            Ok(_) | Err(ExecuteError::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Kills QEMU.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Waits until QEMU is gone.
    pub async fn ended(&self) {
        self.process.ended().await;
    }

    /// Waits until QEMU is gone, then removes what it leaves: sockets and record. The memory file stays.
    pub async fn remove(self) {
        self.discard().await;
    }

    /// [`Vm::remove`] for a VM that others still hold, and whose calls fail from now on.
    pub async fn discard(&self) {
        self.process.ended().await;
        self.record.remove(&self.runtime_dir);
    }

    /// Tells the guest that its data disk has grown, see [`crate::grow_data_disk`].
    ///
    /// # Errors
    /// See [`ExecuteError`].
    pub async fn resize_data_disk(&self, bytes: u64) -> Result<(), ExecuteError> {
        self.execute(BlockResize { node_name: DATA_NODE.to_owned(), size: bytes }).await.map(drop)
    }

    /// Asks the guest's balloon to leave it so much RAM. Never below what the guest needs: it would spin in reclaim.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    pub async fn set_balloon(&self, bytes: u64) -> Result<(), ExecuteError> {
        self.execute(Balloon { value: bytes }).await.map(drop)
    }

    /// How much RAM the balloon leaves the guest.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    pub async fn balloon(&self) -> Result<u64, ExecuteError> {
        self.execute(QueryBalloon {}).await.map(|info| info.actual)
    }

    /// Has the network card tell its peer where it is, after a resume.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    pub async fn announce(&self) -> Result<(), ExecuteError> {
        self.execute(AnnounceSelf { initial: 50, max: 200, rounds: 2, step: 50 }).await.map(drop)
    }

    /// Connects to the agent's port. One connection is served at a time.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub async fn agent(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.record.sockets.agent).await
    }

    /// Connects to the port for forwards. One connection is served at a time.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub async fn ports(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.record.sockets.ports).await
    }

    /// Connects to the console and drains it. Once for each VM.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub async fn console(&self) -> io::Result<Console> {
        Console::connect(&self.record.sockets.console).await
    }

    pub(crate) const fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) async fn execute<C: Command>(&self, command: C) -> Result<C::Answer, ExecuteError> {
        self.client.execute(command, COMMAND_WITHIN).await
    }
}

impl VmEvents {
    /// The next event. Cancel-safe.
    pub async fn next(&mut self) -> VmEvent {
        loop {
            match &self.end {
                End::Gone(exit) => return VmEvent::Exited(exit.clone()),
                End::Closed { closed, killed_at } => {
                    self.until_gone(*killed_at).await;
                    let exit = VmExit::classify(self.last_word, self.panicked, &closed.to_string());
                    self.end = End::Gone(exit);
                }
                End::NotYet => match self.events.next().await {
                    Incoming::Closed(closed) => {
                        self.end = End::Closed { closed, killed_at: Instant::now() + EXIT_WITHIN };
                    }
                    Incoming::Event(event) => {
                        if let Some(event) = self.translate(event) {
                            return event;
                        }
                    }
                },
            }
        }
    }

    /// A QEMU that lives on without a monitor can't be talked to any more: it is killed.
    async fn until_gone(&self, killed_at: Instant) {
        if tokio::time::timeout_at(killed_at, self.process.ended()).await.is_err() {
            tracing::warn!(pid = self.process.identity().pid, "QEMU closed its monitor and lives on, killed");
            self.process.kill();
            if tokio::time::timeout(EXIT_WITHIN, self.process.ended()).await.is_err() {
                tracing::error!(pid = self.process.identity().pid, "QEMU does not die of SIGKILL");
            }
        }
    }

    fn translate(&mut self, event: Event) -> Option<VmEvent> {
        match event {
            Event::Shutdown { reason, .. } => {
                self.last_word = Some(reason);
                None
            }
            Event::GuestPanicked => {
                self.panicked = true;
                None
            }
            Event::Stop => Some(VmEvent::Stopped),
            Event::Resume => Some(VmEvent::Resumed),
            Event::BlockIoError { action: BlockErrorAction::Stop, no_space, reason, node, .. } => {
                tracing::warn!(node, no_space, reason, "a disk stopped the VM");
                Some(VmEvent::PausedByDisk { no_space, reason })
            }
            Event::VserportChange { id, open } => match id.as_str() {
                AGENT_PORT => Some(VmEvent::AgentPort { open }),
                PORTS_PORT => Some(VmEvent::PortsPort { open }),
                _ => None,
            },
            Event::Lost(count) => {
                tracing::warn!(count, "QMP events were lost");
                None
            }
            Event::BlockIoError { .. }
            | Event::Powerdown
            | Event::Migration { .. }
            | Event::BalloonChange { .. }
            | Event::DeviceDeleted { .. }
            | Event::Other { .. } => None,
        }
    }
}
