//! What the relay needs of whoever serves a session.

use std::future::{Future, ready};
use std::io;
use std::net::IpAddr;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::class::Class;
use crate::head::RequestHead;
use crate::mounts::{Bind, Given, Mount};
use crate::publish::AnyPort;

/// Where answers and leases come from.
pub trait Engine: Clone + Send + Sync + 'static {
    /// What it gives.
    type Lease: Lease;

    /// An answer for which the engine isn't needed, if there is one. Asked for requests without a body only.
    fn answer(
        &self,
        request: &RequestHead,
        class: Class,
    ) -> impl Future<Output = Result<Option<Answer>, Refusal>> + Send;

    /// Waits until the engine serves. Dropping the future takes the wish back.
    fn lease(
        &self,
        request: &RequestHead,
        class: Class,
    ) -> impl Future<Output = Result<Self::Lease, Refusal>> + Send;

    /// What becomes of a bind mount of a path of the host.
    fn mount(&self, bind: Bind<'_>) -> Mount;

    /// A container was created, by its id, and given these paths of the host, and these numbers of [`Engine::free_port`]; the
    /// client hears of it after this.
    fn created(
        &self,
        container: &str,
        given: Vec<Given>,
        numbers: Vec<u16>,
    ) -> impl Future<Output = ()> + Send;

    /// An answer of the engine with the host's paths in place of those that [`Mount::From`] gave. `None`: as it is.
    fn restore(&self, answer: &[u8]) -> Option<Vec<u8>>;

    /// Where a port is published whose client names no address. `None`: the engine may choose.
    fn publish_address(&self) -> Option<IpAddr>;

    /// A number of the host for a port that is to be published, whatever its number. `None`: the engine may choose.
    fn free_port(&self, wanted: AnyPort) -> Option<u16>;

    /// The container was not created for which [`Engine::free_port`] gave these, as far as it is known.
    fn take_back(&self, numbers: &[u16]);

    /// A request of the class [`Class::Starts`] was answered; the client hears of it after this.
    fn started(&self) -> impl Future<Output = ()> + Send;
}

/// The engine, for one request; gone when dropped.
pub trait Lease: Send + Sync + Sized + 'static {
    /// A connection to the engine.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin;

    /// Connects to the engine. An error of the kind `ResourceBusy` is no loss of it: there are as many connections as there
    /// may be.
    fn dial(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;

    /// The ports that an image names, such as `80/tcp`. None if there is no such image.
    fn exposed_ports(&self, image: &str) -> impl Future<Output = Vec<String>> + Send;

    /// The paths of the host that [`Engine::created`] was told of for a container, by any name of it. None if there is no such
    /// container.
    ///
    /// # Errors
    /// It can't be asked which container that is.
    fn given_to(&self, _container: &str) -> impl Future<Output = Result<Vec<Given>, Refusal>> + Send {
        ready(Ok(Vec::new()))
    }

    /// What was not as it should be when the engine was woken for this request. Told to its client alone, in the header
    /// `Dormouse-Warning`.
    fn warnings(&self) -> &[String] {
        &[]
    }

    /// Waits until the engine is lost although this is held, and says why.
    fn ended(&self) -> impl Future<Output = String> + Send + 'static;

    /// Goes on being listed, and keeps nothing awake any more. `None`: it isn't even listed.
    fn weaken(self) -> impl Future<Output = Option<Self>> + Send;

    /// Keeps the same engine awake again. `None`: that one is going.
    fn strengthen(self) -> impl Future<Output = Option<Self>> + Send;
}

/// An answer that doesn't come from the engine.
#[derive(Debug)]
pub enum Answer {
    /// Head and body.
    Whole(Bytes),
    /// A head that announces chunks, and what goes into them. It ends with its sender.
    Stream(Bytes, mpsc::Receiver<Bytes>),
}

/// A refusal instead of the engine's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP's.
    pub status: u16,
    /// What Docker clients print.
    pub message: String,
}

impl Refusal {
    /// The whole response, after which the connection is over.
    #[must_use]
    pub fn to_response(&self) -> Vec<u8> {
        let body = serde_json::json!({ "message": self.message }).to_string();
        let reason = match self.status {
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            409 => "Conflict",
            413 => "Content Too Large",
            500 => "Internal Server Error",
            502 => "Bad Gateway",
            503 => "Service Unavailable",
            _ => "Error",
        };
        let (status, length) = (self.status, body.len());
        format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\
             Connection: close\r\n\r\n{body}"
        )
        .into_bytes()
    }
}
