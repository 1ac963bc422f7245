//! The relay behind a session's `docker.sock`: a lease for each request, bytes passed on as they came.
//!
//! It works per request, not per connection: a client that keeps its connection open holds nothing. Heads are parsed to
//! know what is asked and where bodies end; nothing is rewritten but paths of the host that are others in the VM, there
//! and back, and ports that are published without a number or an address, or at one number of several. The engine gets a
//! connection of its own for each request, which is dropped after the answer.

mod chunked;
mod class;
mod client;
mod engine;
mod framing;
mod head;
mod mounts;
mod publish;
mod relay;
mod stream;
mod target;
mod warnings;
mod wish;

pub use chunked::{ChunkError, ChunkScanner, EXTENSION_BYTES_MAX, TRAILER_BYTES_MAX};
pub use class::{Class, path_of, started_by, tells_paths, version_of};
pub use client::refuse;
pub use engine::{Answer, Engine, Lease, Refusal};
pub use framing::{BodyFraming, BodyScanner, FramingError};
pub use head::{
    HEAD_BYTES_MAX, HEADERS_MAX, HeadError, HeadScanner, RequestHead, ResponseHead, parse_request,
    parse_response, skip_empty_lines,
};
pub use mounts::{Bind, By, Given, Mount};
pub use publish::AnyPort;
pub use relay::{QUIET_AFTER, STALLED_AFTER, serve};
pub use warnings::header_values;
