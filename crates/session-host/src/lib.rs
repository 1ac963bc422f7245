//! What a session's host does: feeds the lifecycle core, carries out its actions, serves its sockets.
//!
//! ```text
//!  docker.sock ──► docker ──┐
//!  control.sock ─► control ─┼─► owner task: lifecycle core ──► machine: QEMU, dorm-init
//!  service.sock ─► link ────┘        (owner)                     (one per generation)
//! ```
//!
//! The guest can be reached through a [`Lease`] only.

pub mod asleep;
mod by_container;
mod clock;
mod control;
mod docker;
mod entrance;
pub mod events;
mod fault;
mod fetch;
mod folders;
mod gate;
mod hooks;
mod host;
mod journal;
mod known;
mod lease;
mod link;
mod machine;
mod owner;
pub mod ports;
mod root_process;
pub mod state;
mod template;
mod trace;
mod view;
mod why;

pub use dormouse_vm::raise_descriptor_limit;
pub use hooks::Verdict;
pub use host::{HostError, Start, serve};
pub use lease::{Lease, Refused};
pub use link::Link;
pub use machine::{Factory, Machines, Qemus};
pub use owner::{Claimant, Facts, HeldLease, Inbox, Owner};
pub use template::{TemplateError, make_template};
