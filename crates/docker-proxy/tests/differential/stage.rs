//! An engine, reached through the relay and without it.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use dormouse_docker_proxy::{
    Answer, AnyPort, Bind, Class, Engine, Given, Lease, Mount, Refusal, RequestHead, serve,
};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// For hangs.
const WITHIN: Duration = Duration::from_secs(30);

/// What came of some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) answer: Vec<u8>,
    /// The requests that the engine saw to their end.
    pub(crate) seen: Vec<String>,
}

type Seen = Arc<Mutex<Vec<String>>>;

/// Sends bytes straight to an engine.
pub(crate) async fn direct(bytes: &[u8], cuts: &[usize]) -> Outcome {
    let (client, engine) = UnixStream::pair().expect("a pair");
    let seen = Seen::default();
    tokio::spawn(serve_engine(engine, Arc::clone(&seen)));
    let answer = exchange(client, bytes, cuts).await;
    outcome(answer, &seen)
}

/// Sends bytes to an engine behind the relay.
pub(crate) async fn relayed(bytes: &[u8], cuts: &[usize]) -> Outcome {
    let (client, ours) = UnixStream::pair().expect("a pair");
    let seen = Seen::default();
    tokio::spawn(serve(ours, Behind(Arc::clone(&seen))));
    let answer = exchange(client, bytes, cuts).await;
    outcome(answer, &seen)
}

fn outcome(answer: Vec<u8>, seen: &Seen) -> Outcome {
    Outcome { answer, seen: seen.lock().expect("no panic").clone() }
}

async fn exchange(client: UnixStream, bytes: &[u8], cuts: &[usize]) -> Vec<u8> {
    let (mut reader, mut writer) = client.into_split();
    let (mut rest, mut cuts) = (bytes.to_vec(), cuts.iter().copied().cycle());
    let sending = async move {
        while !rest.is_empty() {
            let cut = cuts.next().unwrap_or(1).min(rest.len());
            // Who is refused half-way reads no more.
            if writer.write_all(&rest[..cut]).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
            rest.drain(..cut);
        }
        let _ = writer.shutdown().await;
        writer
    };
    let mut answer = Vec::new();
    let exchanged = async {
        let (writer, _) = tokio::join!(sending, reader.read_to_end(&mut answer));
        drop(writer);
    };
    tokio::time::timeout(WITHIN, exchanged).await.expect("it hangs");
    answer
}

async fn serve_engine(stream: UnixStream, seen: Seen) {
    let service = hyper::service::service_fn(move |request| answer(request, Arc::clone(&seen)));
    let _ = hyper::server::conn::http1::Builder::new()
        .half_close(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(
    request: Request<Incoming>,
    seen: Seen,
) -> Result<Response<BoxBody<Bytes, Infallible>>, hyper::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let text = String::from_utf8_lossy(&body).into_owned();
    seen.lock().expect("no panic").push(format!("{} {} {text}", parts.method, parts.uri));
    let whole = |body: Bytes| Full::new(body).boxed();
    let pieces = |count: usize, length: usize| {
        let pieces = (0..count).map(move |number| {
            let digit = char::from(b'a' + u8::try_from(number % 26).unwrap_or_default());
            Ok(Frame::data(Bytes::from(digit.to_string().repeat(length))))
        });
        StreamBody::new(futures_util::stream::iter(pieces)).boxed()
    };
    let (status, body) = match parts.uri.path() {
        "/empty" | "/containers/a/start" => (204, whole(Bytes::new())),
        "/chunks" => (200, pieces(3, 10)),
        "/big" => (200, pieces(40, 5000)),
        "/missing" => (404, whole(Bytes::from_static(b"{\"message\":\"no\"}"))),
        _ => (200, whole(Bytes::from(format!("{} {text}", parts.method)))),
    };
    let mut response = Response::new(body);
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or_default();
    Ok(response)
}

/// The engine behind the relay. Nothing is answered without it, nothing refused, nothing chosen.
#[derive(Clone)]
struct Behind(Seen);

impl Engine for Behind {
    type Lease = Self;

    async fn answer(&self, _: &RequestHead, _: Class) -> Result<Option<Answer>, Refusal> {
        Ok(None)
    }

    async fn lease(&self, _: &RequestHead, _: Class) -> Result<Self, Refusal> {
        Ok(self.clone())
    }

    fn mount(&self, _: Bind<'_>) -> Mount {
        Mount::AsIs
    }

    async fn created(&self, _: &str, _: Vec<Given>) {}

    fn restore(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn publish_address(&self) -> Option<IpAddr> {
        None
    }

    fn free_port(&self, _: AnyPort) -> Option<u16> {
        None
    }

    async fn started(&self) {}
}

impl Lease for Behind {
    type Stream = UnixStream;

    async fn dial(&self) -> io::Result<UnixStream> {
        let (ours, engine) = UnixStream::pair()?;
        tokio::spawn(serve_engine(engine, Arc::clone(&self.0)));
        Ok(ours)
    }

    async fn exposed_ports(&self, _image: &str) -> Vec<String> {
        Vec::new()
    }

    fn ended(&self) -> impl Future<Output = String> + Send + 'static {
        std::future::pending()
    }

    async fn weaken(self) -> Option<Self> {
        Some(self)
    }

    async fn strengthen(self) -> Option<Self> {
        Some(self)
    }
}
