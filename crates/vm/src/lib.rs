//! QEMU: its command line, its processes, its monitor, its snapshots; and the VM factory's part that makes VMs.
//!
//! ```text
//!   Qemu::probe ─► spawn(VmConfig) ─► VmRecord ─► Vm::connect ─► Vm, VmEvents
//!     (dormd)         (dormd)        (a file)    (session host)
//! ```
//!
//! A VM belongs to no process: its sockets listen in the session's runtime directory, its record says how to find it,
//! and whoever needs it connects, or [`adopt()`]s it after its former keeper is gone. A VM that was just made doesn't
//! run: its host connects to the console and the ports, then says [`Vm::cont`].

pub mod address;
mod adopt;
mod config;
mod console;
mod descriptors;
mod device;
mod disk;
mod exit;
mod folders;
pub mod frames;
mod kernel;
mod key;
mod launch;
mod network;
mod probe;
mod process;
mod record;
mod socket;
mod sparse;
mod spawn;
mod state;
mod stderr;
mod vm;

pub use adopt::{Adopted, Adoption, Monitor, adopt};
pub use config::{CPUS_MAX, ConfigError, GuestFiles, MEMORY_MIB_MIN, NetworkKind, Owner, Start, VmConfig};
pub use console::{CONSOLE_BYTES_MAX, CONSOLE_LINE_BYTES_MAX, Console, ConsoleLine, ConsoleReader};
pub use descriptors::raise_descriptor_limit;
pub use device::{DEVICE_LIST_VERSION, SPARE_PORTS};
pub use disk::{allocated_bytes, create_data_disk, free_bytes, grow_data_disk, size_bytes};
pub use dormouse_qmp::{ExecuteError, RunState, Status};
pub use exit::{ExitCause, VmExit};
pub use folders::{UnplugError, folders_tag};
pub use kernel::kernel_command_line;
pub use key::{KeyMismatch, SnapshotKey};
pub use probe::{
    Acceleration, Features, KVM_PROBE_WITHIN, KvmPolicy, ProbeError, ProbeOptions, QEMU_MIN, Qemu,
};
pub use process::{Process, ProcessIdentity};
pub use record::{RecordError, VmRecord, discard_record};
pub use socket::{SOCKET_PATH_BYTES_MAX, SocketError, Sockets};
pub use sparse::{CopyMethod, copy_sparse};
pub use spawn::{ANSWER_WITHIN, FREE_BYTES_MIN, SpawnError, Spawned, spawn};
pub use state::{STATE_WITHIN, StateError};
pub use stderr::StderrTail;
pub use vm::{Vm, VmEvent, VmEvents};
