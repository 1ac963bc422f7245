//! An engine, reached through the relay and without it.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use dormouse_docker_proxy::{Answer, AnyPort, Bind, Class, Given, Lease, Mount, Refusal, RequestHead, serve};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

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

/// One engine's connections.
#[derive(Clone)]
struct Served {
    engine: Engine,
    seen: Seen,
    connections: Arc<Mutex<JoinSet<()>>>,
}

impl Served {
    fn by(engine: Engine) -> Self {
        Self { engine, seen: Seen::default(), connections: Arc::default() }
    }

    fn serve(&self, stream: UnixStream) {
        let serving = self.engine.serve(stream, Arc::clone(&self.seen));
        self.connections.lock().expect("no panic").spawn(serving);
    }

    /// When all connections have ended.
    async fn outcome(self, answer: Vec<u8>) -> Outcome {
        let connections = std::mem::take(&mut *self.connections.lock().expect("no panic"));
        tokio::time::timeout(WITHIN, connections.join_all()).await.expect("an engine hangs");
        Outcome { answer, seen: self.seen.lock().expect("no panic").clone() }
    }
}

/// Who is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Engine {
    Hyper,
    /// Answers its one request with this status, and then is a stream that says so much of what it hears.
    Hijacked {
        status: &'static str,
        /// It hears no more than so many bytes before it ends its own direction.
        hangs_up_after: Option<usize>,
    },
}

/// Sends bytes straight to an engine.
pub(crate) async fn direct(engine: Engine, bytes: &[u8], cuts: &[usize]) -> Outcome {
    let (client, theirs) = UnixStream::pair().expect("a pair");
    let served = Served::by(engine);
    served.serve(theirs);
    let answer = exchange(client, bytes, cuts).await;
    served.outcome(answer).await
}

/// Sends bytes to an engine behind the relay.
pub(crate) async fn relayed(engine: Engine, bytes: &[u8], cuts: &[usize]) -> Outcome {
    let (client, ours) = UnixStream::pair().expect("a pair");
    let served = Served::by(engine);
    let relay = tokio::spawn(serve(ours, Behind(served.clone())));
    let answer = exchange(client, bytes, cuts).await;
    tokio::time::timeout(WITHIN, relay).await.expect("the relay hangs").expect("no panic");
    served.outcome(answer).await
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

impl Engine {
    async fn serve(self, stream: UnixStream, seen: Seen) {
        match self {
            Self::Hyper => {
                let service = hyper::service::service_fn(move |request| answer(request, Arc::clone(&seen)));
                let _ = hyper::server::conn::http1::Builder::new()
                    .half_close(true)
                    .auto_date_header(false)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            }
            Self::Hijacked { status, hangs_up_after } => {
                let _ = hijacked(stream, status, hangs_up_after, &seen).await;
            }
        }
    }
}

/// Hears everything after the request, whether or not it has ended its own direction before.
async fn hijacked(
    mut stream: UnixStream,
    status: &str,
    hangs_up_after: Option<usize>,
    seen: &Seen,
) -> io::Result<()> {
    let mut heard = Vec::new();
    while !heard.ends_with(b"\r\n\r\n") {
        heard.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&heard).into_owned();
    let body = ["Content-Length: 2", "Transfer-Encoding"].map(|framing| head.contains(framing));
    let length = match body {
        [true, _] => "{}".len(),
        [_, true] => "2\r\n{}\r\n0\r\n\r\n".len(),
        _ => 0,
    };
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    stream.write_all(format!("HTTP/1.1 {status}\r\n\r\nwelcome").as_bytes()).await?;
    let mut input = Vec::new();
    if let Some(limit) = hangs_up_after {
        (&mut stream).take(limit as u64).read_to_end(&mut input).await?;
        stream.write_all(&input).await?;
        stream.shutdown().await?;
        stream.read_to_end(&mut input).await?;
    } else {
        stream.read_to_end(&mut input).await?;
        stream.write_all(&input).await?;
    }
    seen.lock().expect("no panic").push(format!("{head}{body:?}{input:?}"));
    Ok(())
}

async fn answer(
    request: Request<Incoming>,
    seen: Seen,
) -> Result<Response<BoxBody<Bytes, Infallible>>, hyper::Error> {
    let (parts, body) = request.into_parts();
    if parts.uri.path() == "/early" {
        seen.lock().expect("no panic").push(format!("{} {}", parts.method, parts.uri));
        return Ok(Response::new(Full::new(Bytes::from_static(b"no")).boxed()));
    }
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
struct Behind(Served);

impl dormouse_docker_proxy::Engine for Behind {
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

    async fn created(&self, _: &str, _: Vec<Given>, _: Vec<u16>) {}

    fn take_back(&self, _: &[u16]) {}

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
        self.0.serve(engine);
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
