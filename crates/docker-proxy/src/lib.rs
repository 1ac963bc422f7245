//! The relay behind a session's `docker.sock`: a lease for each request, bytes passed on as they came.
//!
//! It works per request, not per connection: a client that keeps its connection open holds nothing. Heads are parsed to
//! know what is asked and where bodies end; nothing is rewritten. The engine gets a connection of its own for each
//! request, which is dropped after the answer.

mod chunked;
mod class;
mod framing;
mod head;
mod relay;

pub use chunked::{ChunkError, ChunkScanner, EXTENSION_BYTES_MAX, TRAILER_BYTES_MAX};
pub use class::Class;
pub use framing::{BodyFraming, BodyScanner, FramingError};
pub use head::{
    HEAD_BYTES_MAX, HEADERS_MAX, HeadError, HeadScanner, RequestHead, ResponseHead, parse_request,
    parse_response, skip_empty_lines,
};
pub use relay::{Engine, Lease, Refusal, serve};
