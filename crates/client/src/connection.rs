//! HTTP/1.1 + JSON over a unix socket: one connection per request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dormouse_api::{ApiError, ErrorCode, Hold, WARNING_HEADER};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Longest wait for a connection, in seconds. Only a service whose backlog is full makes anyone wait.
pub const CONNECT_SECONDS_MAX: u64 = 10;

/// Longest answer or JSON line that is read into memory.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A connection that left HTTP.
pub type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// Where a service listens.
#[derive(Debug, Clone)]
pub struct Endpoint {
    socket: PathBuf,
    warn: Warn,
}

/// Takes what was not as it should be when a call woke the VM.
pub type Warn = fn(&str);

/// Tells what an answer warns of.
pub(crate) fn tell_warnings<B>(response: &Response<B>, warn: Warn) {
    for value in response.headers().get_all(WARNING_HEADER) {
        warn(&String::from_utf8_lossy(value.as_bytes()));
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("nobody answers on {0:?}")]
    Connect(PathBuf, #[source] io::Error),
    /// The connection broke, or what came was no HTTP.
    #[error("the connection broke")]
    Http(#[from] hyper::Error),
    /// What was to be sent couldn't be had, in the words of whoever made it.
    #[error(transparent)]
    Body(io::Error),
    /// The answer is not what the API promises.
    #[error("the answer makes no sense: {0}")]
    Answer(String),
    /// The service said no.
    #[error(transparent)]
    Api(#[from] ApiError),
}

impl ClientError {
    /// The service's own words, or what stands for them.
    #[must_use]
    pub fn into_api(self) -> ApiError {
        match self {
            Self::Api(error) => error,
            other => ApiError::new(ErrorCode::Internal, other),
        }
    }
}

impl Endpoint {
    /// The service that listens on this socket.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), warn: |_| {} }
    }

    /// The same, which tells what answers warn of.
    #[must_use]
    pub fn warning(self, warn: Warn) -> Self {
        Self { warn, ..self }
    }

    /// Sends a request without a body and reads the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, &()).await
    }

    /// Sends a POST without a body and reads the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::POST, path, &()).await
    }

    /// Takes an operation token, which starts the VM if need be. It is gone when the connection is dropped.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn hold(&self, hold: &Hold) -> Result<Upgraded, ClientError> {
        self.upgrade(Method::POST, "/v1/hold", hold, "dorm-hold").await
    }

    /// Sends `body` (none for `&()`) and reads the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let response = self.send(method, path, body, None).await?;
        let bytes = collect(response.into_body(), Unsent::never()).await?;
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(text).map_err(|error| ClientError::Answer(error.to_string()))
    }

    /// Sends a request whose answer is a stream of JSON lines.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn lines(&self, path: &str) -> Result<JsonLines, ClientError> {
        Ok(JsonLines::new(self.send(Method::GET, path, &(), None).await?.into_body(), Unsent::never()))
    }

    /// Sends a request that turns its connection into a byte stream of `protocol`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn upgrade<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: &B,
        protocol: &str,
    ) -> Result<Upgraded, ClientError> {
        let response = self.send(method, path, body, Some(protocol)).await?;
        Ok(TokioIo::new(hyper::upgrade::on(response).await?))
    }

    async fn send<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: &B,
        protocol: Option<&str>,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut sender = connect(&self.socket).await?;
        let response = sender.send_request(request(method, path, body, protocol)?).await?;
        tell_warnings(&response, self.warn);
        match (response.status(), protocol) {
            (StatusCode::SWITCHING_PROTOCOLS, Some(_)) => Ok(response),
            (status, None) if status.is_success() => Ok(response),
            (status, _) => Err(refusal(status, response).await),
        }
    }
}

/// A connection for one request, which lives as long as its answer is read.
pub(crate) async fn connect<B>(socket: &Path) -> Result<SendRequest<B>, ClientError>
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let refused = |error| ClientError::Connect(socket.to_owned(), error);
    let connecting = timeout(Duration::from_secs(CONNECT_SECONDS_MAX), UnixStream::connect(socket));
    let stream = connecting.await.map_err(|late| refused(late.into()))?.map_err(refused)?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Its end is seen where its answer is read.
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

fn request<B: Serialize>(
    method: Method,
    path: &str,
    body: &B,
    protocol: Option<&str>,
) -> Result<Request<Full<Bytes>>, ClientError> {
    let nonsense = |error: &dyn std::fmt::Display| ClientError::Answer(error.to_string());
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, "dormouse");
    if let Some(protocol) = protocol {
        request = request.header(header::CONNECTION, "upgrade").header(header::UPGRADE, protocol);
    }
    let body = serde_json::to_vec(body).map_err(|error| nonsense(&error))?;
    let body = if body == b"null" {
        Full::default()
    } else {
        request = request.header(header::CONTENT_TYPE, "application/json");
        Full::from(body)
    };
    request.body(body).map_err(|error| nonsense(&error))
}

async fn refusal(status: StatusCode, response: Response<Incoming>) -> ClientError {
    match collect(response.into_body(), Unsent::never()).await {
        Ok(bytes) => match serde_json::from_slice::<ApiError>(&bytes) {
            Ok(error) => error.into(),
            Err(_) => ClientError::Answer(format!("status {status}: {}", String::from_utf8_lossy(&bytes))),
        },
        Err(error) => error,
    }
}

/// Why what is sent broke off, if it did. Hyper itself tells whoever waits for an answer, but nobody who reads one.
#[derive(Debug)]
pub(crate) struct Unsent(oneshot::Receiver<io::Error>);

impl Unsent {
    /// Of what can't break off.
    pub(crate) fn never() -> Self {
        Self(oneshot::channel().1)
    }

    /// Of a body; the one that comes back is to be sent in its stead.
    pub(crate) fn of(body: UnsyncBoxBody<Bytes, io::Error>) -> (Self, UnsyncBoxBody<Bytes, io::Error>) {
        let (tell, told) = oneshot::channel();
        let mut tell = Some(tell);
        let telling = body.map_err(move |error| {
            let kind = error.kind();
            if let Some(tell) = tell.take() {
                // Whoever sends it may have gone.
                let _ = tell.send(error);
            }
            io::Error::from(kind)
        });
        (Self(told), telling.boxed_unsync())
    }

    /// What a broken connection comes from.
    pub(crate) fn why(&mut self, broken: hyper::Error) -> ClientError {
        self.0.try_recv().map_or_else(|_| broken.into(), ClientError::Body)
    }
}

pub(crate) async fn collect(body: Incoming, mut unsent: Unsent) -> Result<Bytes, ClientError> {
    let collected = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
    let collected = collected.map_err(|error| match error.downcast::<hyper::Error>() {
        Ok(error) => unsent.why(*error),
        Err(error) if error.is::<LengthLimitError>() => ClientError::Answer("it is too long".to_owned()),
        Err(error) => ClientError::Answer(error.to_string()),
    })?;
    Ok(collected.to_bytes())
}

/// An answer that goes on: one JSON value a line, or plain bytes.
#[derive(Debug)]
pub struct JsonLines {
    body: Incoming,
    buffer: Vec<u8>,
    unsent: Unsent,
}

impl JsonLines {
    pub(crate) fn new(body: Incoming, unsent: Unsent) -> Self {
        Self { body, buffer: Vec::new(), unsent }
    }

    /// The next value; `None` once the other side has ended the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| ClientError::Answer(error.to_string()));
            }
            if self.buffer.len() > ANSWER_BYTES_MAX {
                return Err(ClientError::Answer("a line is too long".to_owned()));
            }
            match self.bytes().await? {
                Some(bytes) => self.buffer.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
    }

    /// The next bytes as they come; `None` once the other side has ended the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn bytes(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.body.frame().await {
            if let Ok(bytes) = frame.map_err(|error| self.unsent.why(error))?.into_data() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }
}

/// Reads the one JSON line with which an upgraded connection begins.
///
/// # Errors
/// See [`ClientError`].
pub async fn first_line<T: DeserializeOwned>(stream: &mut BufReader<Upgraded>) -> Result<T, ClientError> {
    let mut line = String::new();
    stream.read_line(&mut line).await.map_err(|error| ClientError::Answer(error.to_string()))?;
    serde_json::from_str(&line).map_err(|error| ClientError::Answer(error.to_string()))
}
