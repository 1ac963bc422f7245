//! A client for QEMU's machine protocol (QMP): JSON lines over a unix socket.
//!
//! [`codec`] is pure: bytes to lines to [`Message`]s, with limits. [`Client`] runs commands; one task owns the
//! socket, so that no command future holds any state of the connection: it may be dropped at any point, by a
//! deadline or a `select!`, and the late reply is thrown away by its id.
//!
//! ```text
//!             Client ── request, reply channel ──►┐
//!   (clones)  Client ── request, reply channel ──►│ owner task ◄──► socket
//!             Events ◄── bounded queue ───────────┘
//! ```
//!
//! What ends a connection is told as [`Incoming::Closed`], the last thing that [`Events`] gives: QEMU closing its
//! monitor means that QEMU exits, which is news and not an error.

pub mod codec;

mod client;
mod command;
mod event;

pub use client::{Client, Closed, ConnectError, Events, ExecuteError, Incoming};
pub use codec::{
    CodecError, CommandFailure, Greeting, LINE_BYTES_MAX, LineDecoder, Message, Version, VersionTriple,
};
pub use command::*;
pub use event::{BlockErrorAction, BlockOperation, Event, ShutdownReason};
