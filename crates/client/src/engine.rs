//! The engine of a session, behind its Docker socket, in Docker's own words.
//!
//! Answers stay as they came: what the engine says of a container is printed as it was said, and streams of terminals
//! are bytes.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use futures_util::Stream;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::connection::{Unsent, collect, connect, tell_warnings};
use crate::{ClientError, JsonLines, Upgraded, Warn};

/// The version of Docker's API that is spoken, as paths begin with it: that of the engine in the guest image.
pub const DOCKER_API: &str = "/v1.45";

/// A session's engine. Each call has a connection of its own, so one that is dropped is over.
#[derive(Debug, Clone)]
pub struct Engine {
    socket: PathBuf,
    /// Of the API, as paths begin with it.
    version: &'static str,
    warn: Warn,
}

/// Why a call of the engine failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine, or Dormouse in its place, said no.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What it said.
        message: String,
    },
    /// The engine can't be reached, or went away; or what it was to be sent couldn't be had.
    #[error(transparent)]
    Lost(#[from] ClientError),
}

impl EngineError {
    /// Is what was asked for unknown to the engine?
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }
}

/// The body of a request.
#[derive(Debug)]
pub enum Payload {
    /// None.
    Nothing,
    /// A JSON document.
    Json(Value),
    /// A tar archive, as it is made.
    Archive(UnsyncBoxBody<Bytes, io::Error>),
}

impl Payload {
    /// An archive from its pieces.
    pub fn archive(pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Self {
        use futures_util::StreamExt as _;
        Self::Archive(BodyExt::boxed_unsync(StreamBody::new(pieces.map(|piece| piece.map(Frame::data)))))
    }
}

/// One request.
#[derive(Debug)]
pub struct Call {
    method: Method,
    path: String,
    headers: Vec<(HeaderName, HeaderValue)>,
    payload: Payload,
}

impl Call {
    /// A request without a body. `path` is what comes after the version, and is encoded already.
    #[must_use]
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        Self { method, path: path.into(), headers: Vec::new(), payload: Payload::Nothing }
    }

    /// Gives it a body.
    #[must_use]
    pub fn payload(mut self, payload: Payload) -> Self {
        self.payload = payload;
        self
    }

    /// Gives it one more header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}

/// An answer whose body is still to be read.
#[derive(Debug)]
pub struct Reply {
    response: Response<Incoming>,
    unsent: Unsent,
}

impl Reply {
    /// The value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// The whole body, within bounds.
    ///
    /// # Errors
    /// When the connection breaks, or the body is too long.
    pub async fn bytes(self) -> Result<Bytes, EngineError> {
        Ok(collect(self.response.into_body(), self.unsent).await?)
    }

    /// The whole body as JSON; nothing is `null`.
    ///
    /// # Errors
    /// As [`Self::bytes`], or when it isn't what is expected.
    pub async fn json<T: DeserializeOwned>(self) -> Result<T, EngineError> {
        let bytes = self.bytes().await?;
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(text).map_err(|error| ClientError::Answer(error.to_string()).into())
    }

    /// The body as it comes: JSON lines, or bytes.
    #[must_use]
    pub fn lines(self) -> JsonLines {
        JsonLines::new(self.response.into_body(), self.unsent)
    }
}

impl Engine {
    /// The engine behind this socket.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), version: DOCKER_API, warn: |_| {} }
    }

    /// An engine of unknown age behind this socket: it speaks the newest version that it knows.
    #[must_use]
    pub fn unversioned(socket: impl Into<PathBuf>) -> Self {
        Self { version: "", ..Self::new(socket) }
    }

    /// The same, which tells what answers warn of.
    #[must_use]
    pub fn warning(self, warn: Warn) -> Self {
        Self { warn, ..self }
    }

    /// Asks for a JSON document.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, EngineError> {
        self.send(Call::new(Method::GET, path)).await?.json().await
    }

    /// Sends a POST without a body.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, EngineError> {
        self.send(Call::new(Method::POST, path)).await?.json().await
    }

    /// Sends a POST with a JSON document.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn post_json<T: DeserializeOwned>(&self, path: &str, body: Value) -> Result<T, EngineError> {
        self.send(Call::new(Method::POST, path).payload(Payload::Json(body))).await?.json().await
    }

    /// Sends a DELETE.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, EngineError> {
        self.send(Call::new(Method::DELETE, path)).await?.json().await
    }

    /// Sends a request and reads the head of its answer.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn send(&self, call: Call) -> Result<Reply, EngineError> {
        let reply = self.exchange(call).await?;
        let status = reply.response.status();
        if status.is_success() || status == StatusCode::NOT_MODIFIED {
            return Ok(reply);
        }
        Err(refusal(reply).await)
    }

    /// Sends a request that turns its connection into a byte stream. The stream may be half-closed.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn hijack(&self, path: &str, body: Value) -> Result<Upgraded, EngineError> {
        self.upgrade(Call::new(Method::POST, path).payload(Payload::Json(body)), "tcp").await
    }

    /// Sends a request that turns its connection into one of another protocol.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn upgrade(&self, call: Call, protocol: &'static str) -> Result<Upgraded, EngineError> {
        let call = call
            .header(header::CONNECTION, HeaderValue::from_static("Upgrade"))
            .header(header::UPGRADE, HeaderValue::from_static(protocol));
        let reply = self.exchange(call).await?;
        if reply.response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(reply).await);
        }
        Ok(TokioIo::new(hyper::upgrade::on(reply.response).await.map_err(ClientError::from)?))
    }

    async fn exchange(&self, call: Call) -> Result<Reply, EngineError> {
        let mut request = Request::builder()
            .method(call.method)
            .uri(format!("{}{}", self.version, call.path))
            .header(header::HOST, "docker")
            .header(header::USER_AGENT, concat!("dorm/", env!("CARGO_PKG_VERSION")));
        for (name, value) in call.headers {
            request = request.header(name, value);
        }
        let body = match call.payload {
            Payload::Nothing => whole(Bytes::new()),
            Payload::Json(Value::Null) => whole(Bytes::new()),
            Payload::Json(value) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                whole(value.to_string().into())
            }
            Payload::Archive(body) => {
                request = request.header(header::CONTENT_TYPE, "application/x-tar");
                body
            }
        };
        let (mut unsent, body) = Unsent::of(body);
        let request = request.body(body).map_err(|error| ClientError::Answer(error.to_string()))?;
        let mut sender = connect(&self.socket).await?;
        let response = sender.send_request(request).await.map_err(|error| unsent.why(error))?;
        tell_warnings(&response, self.warn);
        Ok(Reply { response, unsent })
    }
}

fn whole(bytes: Bytes) -> UnsyncBoxBody<Bytes, io::Error> {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// Docker's errors, and those that Dormouse gives in its place, are an object with a message.
async fn refusal(reply: Reply) -> EngineError {
    #[derive(Deserialize)]
    struct Message {
        message: String,
    }
    let status = reply.response.status().as_u16();
    match reply.bytes().await {
        Ok(bytes) => {
            let message = serde_json::from_slice::<Message>(&bytes)
                .map_or_else(|_| String::from_utf8_lossy(&bytes).trim().to_owned(), |said| said.message);
            let message = if message.is_empty() { format!("the engine answers {status}") } else { message };
            EngineError::Refused { status, message }
        }
        Err(error) => error,
    }
}

/// A path and its query, encoded as Docker's own client does it: an answer kept for one fits the other.
#[derive(Debug)]
pub struct Target {
    path: String,
    query: Vec<(&'static str, String)>,
}

impl Target {
    /// A path that is made of literal text and nothing that somebody typed.
    #[must_use]
    pub fn new(path: &str) -> Self {
        Self { path: path.to_owned(), query: Vec::new() }
    }

    /// `/containers/NAME/json` from `containers`, a name that somebody typed, and `/json`.
    #[must_use]
    pub fn of(kind: &str, name: &str, rest: &str) -> Self {
        let mut path = format!("/{kind}/");
        encode(&mut path, name, |byte| byte.is_ascii_alphanumeric() || b"-_.~$&+,/:;=@".contains(&byte));
        path.push_str(rest);
        Self { path, query: Vec::new() }
    }

    /// One more parameter.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.query.push((key, value.into()));
        self
    }

    /// One more parameter, if there is a value.
    #[must_use]
    pub fn maybe(self, key: &'static str, value: Option<impl Into<String>>) -> Self {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }

    /// One more parameter, `1`, if it is so.
    #[must_use]
    pub fn when(self, key: &'static str, so: bool) -> Self {
        if so { self.with(key, "1") } else { self }
    }

    /// As it is sent.
    #[must_use]
    pub fn text(mut self) -> String {
        let mut text = self.path;
        self.query.sort_by_key(|(key, _)| *key);
        for (index, (key, value)) in self.query.iter().enumerate() {
            text.push(if index == 0 { '?' } else { '&' });
            text.push_str(key);
            text.push('=');
            encode(&mut text, value, |byte| byte.is_ascii_alphanumeric() || b"-_.~ ".contains(&byte));
        }
        text.replace(' ', "+")
    }
}

fn encode(text: &mut String, raw: &str, plain: impl Fn(u8) -> bool) {
    for byte in raw.bytes() {
        if plain(byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn targets_are_encoded_as_docker_does() {
        let target =
            Target::new("/containers/json").with("size", "1").with("all", "1").maybe("limit", None::<&str>);
        assert_eq!(target.text(), "/containers/json?all=1&size=1");
        let target = Target::of("containers", "a b?/../x", "/json").with("filters", r#"{"a b":{"ü":true}}"#);
        let encoded = "%7B%22a+b%22%3A%7B%22%C3%BC%22%3Atrue%7D%7D";
        assert_eq!(target.text(), format!("/containers/a%20b%3F/../x/json?filters={encoded}"));
    }

    /// Gives a client that has asked this answer.
    async fn answer(client: &mut UnixStream, answer: &str) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        client.write_all(answer.as_bytes()).await.unwrap();
    }

    /// Gives every client that connects this answer.
    fn answering(folder: &std::path::Path, words: &'static str) -> PathBuf {
        let path = folder.join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                answer(&mut client, words).await;
            }
        });
        path
    }

    /// An archive that can't be read any more once this is over.
    fn breaking_off(after: impl Future<Output = ()> + Send + 'static) -> Payload {
        Payload::archive(futures_util::stream::once(async move {
            after.await;
            Err::<Bytes, _>(io::Error::other("can't read it"))
        }))
    }

    #[tokio::test]
    async fn why_what_is_sent_breaks_off_is_told_before_an_answer_and_in_the_middle_of_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let engine = Engine::new(&path);
        let call = |payload| Call::new(Method::POST, "/images/load").payload(payload);
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let (reply, _client) =
            tokio::join!(engine.send(call(breaking_off(async move { wait.await.unwrap() }))), async {
                let (mut client, _) = listener.accept().await.unwrap();
                let words = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n1\n\r\n";
                answer(&mut client, words).await;
                client
            });
        let mut lines = reply.unwrap().lines();
        assert_eq!(lines.next::<u64>().await.unwrap(), Some(1));
        go.send(()).unwrap();
        let broken = lines.next::<u64>().await.unwrap_err();
        assert!(matches!(&broken, ClientError::Body(error) if error.to_string() == "can't read it"));
        // Nobody answers the second.
        let broken = engine.send(call(breaking_off(std::future::ready(())))).await.unwrap_err();
        assert!(matches!(&broken, EngineError::Lost(ClientError::Body(_))), "{broken}");
    }

    #[tokio::test]
    async fn what_an_answer_warns_of_is_told_by_whoever_asks_to_hear_it() {
        static HEARD: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());
        let hear: Warn = |words| HEARD.lock().unwrap().push(words.to_owned());
        let folder = tempfile::tempdir().unwrap();
        let answer = "HTTP/1.1 200 OK\r\nDormouse-Warning: one\r\nContent-Length: 2\r\ndormouse-warning: two\r\n\r\n[]";
        let socket = answering(folder.path(), answer);
        let quiet: Value = Engine::new(&socket).get("/containers/json").await.unwrap();
        assert!(quiet == serde_json::json!([]) && HEARD.lock().unwrap().is_empty());
        let _: Value = Engine::new(&socket).warning(hear).get("/containers/json").await.unwrap();
        let _: Value = crate::Endpoint::new(&socket).warning(hear).get("/v1/session").await.unwrap();
        assert_eq!(*HEARD.lock().unwrap(), ["one", "two", "one", "two"]);
    }
}
