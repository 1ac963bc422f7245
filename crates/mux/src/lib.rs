//! The agent channel: yamux streams over any byte stream, and what the host does with them.
//!
//! - [`connect`] and [`answer`] are the two sides of the preamble, by which host and guest find each other;
//! - [`Mux`] opens and accepts streams; one task owns the connection and moves it;
//! - [`Agent`] is the host's typed side of the port `agent`;
//! - [`read_json`] and [`write_json`] are the frames in front of a stream's own bytes.

mod agent;
mod copy;
mod json;
mod multiplexer;
mod preamble;
mod stream;
mod wire;

pub use agent::{Agent, AgentError, ProcessStreamError, RootProcess, Watch, read_process_frame};
pub use copy::both_ways;
pub use json::{JsonError, read_json, write_json};
pub use multiplexer::{Limits, Mux, MuxError};
pub use preamble::{HandshakeError, answer, connect};
pub use stream::Stream;
