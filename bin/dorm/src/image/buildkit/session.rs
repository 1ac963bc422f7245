//! The session of a build: what BuildKit asks of its client meanwhile, over HTTP/2 on the connection that `/session` became.
//!
//! Who asks is the guest's engine, so each message has a bound, and nothing is given that wasn't named on the command line
//! or in docker's configuration.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use dormouse_client::Upgraded;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

use super::wire::{self, Empty, Health, Identity, Named, SERVING};
use crate::registry;

/// Longest message that is taken, in bytes; gRPC's.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes of an agent that are sent at once.
const CHUNK: usize = 16 * 1024;
/// Calls that are served at once.
const CALLS_MAX: u32 = 64;

/// The calls that are served, as the engine has to be told them.
pub(super) const METHODS: &[&str] = &[HEALTH, CREDENTIALS, SECRET, CHECK_AGENT, FORWARD_AGENT, FILES];
const HEALTH: &str = "/grpc.health.v1.Health/Check";
const CREDENTIALS: &str = "/moby.filesync.v1.Auth/Credentials";
const SECRET: &str = "/moby.buildkit.secrets.v1.Secrets/GetSecret";
const CHECK_AGENT: &str = "/moby.sshforward.v1.SSH/CheckAgent";
const FORWARD_AGENT: &str = "/moby.sshforward.v1.SSH/ForwardAgent";
const FILES: &str = "/moby.filesync.v1.FileSend/DiffCopy";

/// Names the agent of a call.
const AGENT_HEADER: &str = "buildkit.ssh.id";
/// Docker Hub, as its clients' passwords are kept, and as BuildKit asks for it.
const HUB_HOSTS: &[&str] = &["registry-1.docker.io", "docker.io"];

/// What a build may ask for.
#[derive(Default)]
pub(super) struct Given {
    /// Secrets by their ids.
    pub(super) secrets: BTreeMap<String, Vec<u8>>,
    /// Sockets of SSH agents by their ids.
    pub(super) agents: BTreeMap<String, PathBuf>,
    /// Where the archive goes that the build comes to.
    pub(super) archive: Option<Mutex<Box<dyn Write + Send>>>,
}

/// Why a call fails, by gRPC's codes.
#[derive(Debug)]
struct Refused {
    code: u8,
    message: String,
}

const NOT_FOUND: u8 = 5;
const UNIMPLEMENTED: u8 = 12;
const INTERNAL: u8 = 13;

fn refused(code: u8, message: impl ToString) -> Refused {
    Refused { code, message: message.to_string() }
}

impl From<h2::Error> for Refused {
    fn from(error: h2::Error) -> Self {
        refused(INTERNAL, error)
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        refused(INTERNAL, error)
    }
}

/// Serves one build's session until its connection ends.
async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, given: Given) -> Result<(), h2::Error> {
    let given = Arc::new(given);
    let mut connection =
        h2::server::Builder::new().max_concurrent_streams(CALLS_MAX).handshake(stream).await?;
    // They end with the session: nobody waits for them then.
    let mut calls = tokio::task::JoinSet::new();
    while let Some(call) = connection.accept().await {
        let (request, respond) = call?;
        calls.spawn(answer(Arc::clone(&given), request, respond));
        while calls.try_join_next().is_some() {}
    }
    Ok(())
}

async fn answer(
    given: Arc<Given>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Result<(), h2::Error> {
    let (head, body) = request.into_parts();
    let mut asked = Asked { body, bytes: BytesMut::new() };
    let mut response = Response::new(());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    let mut reply = respond.send_response(response, false)?;
    let done = given.serve(head.uri.path(), &head.headers, &mut asked, &mut reply).await;
    let Refused { code, message } = done.err().unwrap_or_else(|| refused(0, ""));
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(u16::from(code)));
    // A message of other bytes would have to be encoded; what is said here is plain.
    if let Ok(message) = HeaderValue::from_str(&message) {
        trailers.insert("grpc-message", message);
    }
    reply.send_trailers(trailers)
}

impl Given {
    async fn serve(
        &self,
        path: &str,
        headers: &HeaderMap,
        asked: &mut Asked,
        reply: &mut SendStream<Bytes>,
    ) -> Result<(), Refused> {
        match path {
            HEALTH => send(reply, &Health { status: SERVING }).await,
            CREDENTIALS => {
                let host = asked.message::<Named>().await?.name;
                send(reply, &identity(&host)?).await
            }
            SECRET => {
                let id = asked.message::<Named>().await?.name;
                let data = self.secrets.get(&id).cloned();
                let data = data.ok_or_else(|| refused(NOT_FOUND, format!("no secret {id} was given")))?;
                send(reply, &wire::Bytes { data }).await
            }
            CHECK_AGENT => {
                self.agent(&asked.message::<Named>().await?.name)?;
                send(reply, &Empty {}).await
            }
            FORWARD_AGENT => {
                let id = headers.get(AGENT_HEADER).and_then(|id| id.to_str().ok()).unwrap_or_default();
                let agent = UnixStream::connect(self.agent(id)?).await?;
                forward(agent, asked, reply).await
            }
            FILES => self.take(asked).await,
            other => Err(refused(UNIMPLEMENTED, format!("{other} is not served"))),
        }
    }

    fn agent(&self, id: &str) -> Result<&PathBuf, Refused> {
        let id = if id.is_empty() { "default" } else { id };
        self.agents.get(id).ok_or_else(|| refused(NOT_FOUND, format!("no SSH agent {id} was given")))
    }

    /// Takes the archive.
    async fn take(&self, asked: &mut Asked) -> Result<(), Refused> {
        let Some(archive) = &self.archive else {
            return Err(refused(UNIMPLEMENTED, "no files were asked for"));
        };
        while let Some(bytes) = asked.next::<wire::Bytes>().await? {
            // Nobody else writes to it, and a terminal or a disk takes it at once.
            archive.lock().unwrap_or_else(PoisonError::into_inner).write_all(&bytes.data)?;
        }
        Ok(archive.lock().unwrap_or_else(PoisonError::into_inner).flush()?)
    }
}

/// Who one is at a registry; nobody where nothing is known.
fn identity(host: &str) -> Result<Identity, Refused> {
    let server = if HUB_HOSTS.contains(&host) { crate::image::reference::HUB } else { host };
    let known = registry::identity(server).map_err(|failure| refused(INTERNAL, failure.message()))?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Ok(known.map_or_else(Identity::default, |known| match known["identitytoken"].as_str() {
        // By an empty name BuildKit knows that the secret is a token.
        Some(token) => Identity { name: String::new(), secret: token.to_owned() },
        None => Identity { name: text(&known["username"]), secret: text(&known["password"]) },
    }))
}

/// Joins a call with an SSH agent.
async fn forward(agent: UnixStream, asked: &mut Asked, reply: &mut SendStream<Bytes>) -> Result<(), Refused> {
    let (mut from, mut to) = agent.into_split();
    let asking = async {
        while let Some(bytes) = asked.next::<wire::Bytes>().await? {
            to.write_all(&bytes.data).await?;
        }
        Ok::<(), Refused>(to.shutdown().await?)
    };
    let answering = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            let length = from.read(&mut buffer).await?;
            if length == 0 {
                return Ok::<(), Refused>(());
            }
            send(reply, &wire::Bytes { data: buffer[..length].to_vec() }).await?;
        }
    };
    tokio::try_join!(asking, answering).map(|_| ())
}

/// The messages of a call.
struct Asked {
    body: RecvStream,
    bytes: BytesMut,
}

impl Asked {
    /// The only message.
    async fn message<T: Message + Default>(&mut self) -> Result<T, Refused> {
        Ok(self.next().await?.unwrap_or_default())
    }

    /// The next message: a byte that tells whether it is compressed, four of length, then so many bytes.
    async fn next<T: Message + Default>(&mut self) -> Result<Option<T>, Refused> {
        loop {
            if let Some(message) = take(&mut self.bytes)? {
                return T::decode(message).map(Some).map_err(|error| refused(INTERNAL, error));
            }
            let Some(bytes) = self.body.data().await else {
                return if self.bytes.is_empty() {
                    Ok(None)
                } else {
                    Err(refused(INTERNAL, "a call broke off"))
                };
            };
            let bytes = bytes?;
            self.body.flow_control().release_capacity(bytes.len())?;
            self.bytes.extend_from_slice(&bytes);
        }
    }
}

fn take(bytes: &mut BytesMut) -> Result<Option<BytesMut>, Refused> {
    let Some((&[compressed, a, b, c, d], rest)) = bytes.split_first_chunk::<5>() else { return Ok(None) };
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if compressed != 0 || length > MESSAGE_BYTES_MAX {
        return Err(refused(INTERNAL, "a message is compressed or too long"));
    }
    if rest.len() < length {
        return Ok(None);
    }
    bytes.advance(5);
    Ok(Some(bytes.split_to(length)))
}

async fn send(reply: &mut SendStream<Bytes>, message: &impl Message) -> Result<(), Refused> {
    let mut bytes = BytesMut::with_capacity(5 + message.encoded_len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    message.encode(&mut bytes).map_err(|error| refused(INTERNAL, error))?;
    let mut bytes = bytes.freeze();
    while !bytes.is_empty() {
        reply.reserve_capacity(bytes.len());
        match std::future::poll_fn(|context| reply.poll_capacity(context)).await {
            Some(room) => reply.send_data(bytes.split_to(room?.min(bytes.len())), false)?,
            None => return Err(refused(INTERNAL, "the call is over")),
        }
    }
    Ok(())
}

/// Serves a session for as long as this is kept.
pub(super) fn spawn(stream: Upgraded, given: Given) -> AbortOnDropHandle<Result<(), h2::Error>> {
    AbortOnDropHandle::new(tokio::spawn(serve(stream, given)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart_wherever_reads_are_cut_and_long_ones_are_refused() {
        let message = wire::Bytes { data: b"hello".to_vec() }.encode_to_vec();
        let length = u8::try_from(message.len()).unwrap();
        let framed = [&[0, 0, 0, 0, length][..], &message, &[0, 0, 0, 0, 0]].concat();
        for cut in 0..framed.len() {
            let mut bytes = BytesMut::from(&framed[..cut]);
            let mut taken = Vec::new();
            while let Some(message) = take(&mut bytes).unwrap() {
                taken.push(message);
            }
            bytes.extend_from_slice(&framed[cut..]);
            while let Some(message) = take(&mut bytes).unwrap() {
                taken.push(message);
            }
            assert!(
                matches!(&taken[..], [one, two] if *one == message[..] && two.is_empty()),
                "cut at {cut}"
            );
        }
        assert!(take(&mut BytesMut::from(&[0, 0xff, 0, 0, 0][..])).is_err());
        assert!(take(&mut BytesMut::from(&[1, 0, 0, 0, 0][..])).is_err());
    }

    /// A call of a session, as BuildKit makes it: what it answers, and its status.
    async fn call(
        given: Given,
        path: &str,
        headers: &[(&str, &str)],
        asked: &[Vec<u8>],
    ) -> (Vec<u8>, String) {
        let (client, server) = tokio::io::duplex(64 * 1024);
        let _serving = AbortOnDropHandle::new(tokio::spawn(serve(server, given)));
        let (mut client, connection) = h2::client::handshake(client).await.unwrap();
        let _driving = AbortOnDropHandle::new(tokio::spawn(connection));
        let mut request = Request::builder().method("POST").uri(format!("http://localhost{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (response, mut body) = client.send_request(request.body(()).unwrap(), false).unwrap();
        for data in asked {
            let message = wire::Bytes { data: data.clone() }.encode_to_vec();
            let length = u32::try_from(message.len()).unwrap().to_be_bytes();
            body.send_data([&[0], &length[..], &message].concat().into(), false).unwrap();
        }
        body.send_data(Bytes::new(), true).unwrap();
        let mut answer = response.await.unwrap().into_body();
        let mut asked = BytesMut::new();
        while let Some(bytes) = answer.data().await {
            asked.extend_from_slice(&bytes.unwrap());
        }
        let trailers = answer.trailers().await.unwrap().unwrap();
        let data =
            take(&mut asked).unwrap().map(|message| wire::Bytes::decode(message).unwrap_or_default().data);
        (data.unwrap_or_default(), trailers["grpc-status"].to_str().unwrap().to_owned())
    }

    #[tokio::test]
    async fn what_was_given_is_given_on_and_nothing_else() {
        let given = || Given { secrets: [("word".to_owned(), b"hush".to_vec())].into(), ..Given::default() };
        let ok = (b"hush".to_vec(), "0".to_owned());
        assert_eq!(call(given(), SECRET, &[], &[b"word".to_vec()]).await, ok);
        assert_eq!(call(given(), SECRET, &[], &[b"other".to_vec()]).await.1, "5");
        assert_eq!(call(given(), CHECK_AGENT, &[], &[b"default".to_vec()]).await.1, "5");
        assert_eq!(call(given(), FILES, &[], &[b"data".to_vec()]).await.1, "12");
        assert_eq!(call(given(), "/moby.filesync.v1.FileSync/DiffCopy", &[], &[]).await.1, "12");
        assert_eq!(call(given(), HEALTH, &[], &[]).await.1, "0");
    }

    #[tokio::test]
    async fn an_agent_is_forwarded_and_an_archive_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let _agent = AbortOnDropHandle::new(tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            stream.read_to_end(&mut asked).await.unwrap();
            asked.reverse();
            stream.write_all(&asked).await.unwrap();
        }));
        let given = Given { agents: [("mine".to_owned(), path)].into(), ..Given::default() };
        let said =
            call(given, FORWARD_AGENT, &[(AGENT_HEADER, "mine")], &[b"ab".to_vec(), b"c".to_vec()]).await;
        assert_eq!(said, (b"cba".to_vec(), "0".to_owned()));

        let path = folder.path().join("archive");
        let file = std::fs::File::create(&path).unwrap();
        let given = Given { archive: Some(Mutex::new(Box::new(file))), ..Given::default() };
        assert_eq!(call(given, FILES, &[], &[vec![1; 9000], vec![2; 9000]]).await.1, "0");
        assert_eq!(std::fs::read(&path).unwrap(), [vec![1; 9000], vec![2; 9000]].concat());
    }
}
