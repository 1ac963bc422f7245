//! What the relay costs: the same requests through it and over a bare dial, one after the other: `scripts/test-long relay`.
#![cfg(feature = "long")]

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_agent_proto::{EngineState, GuestEvent, Target};
use dormouse_docker_proxy::{
    Answer, AnyPort, Bind, Class, Engine, Given, Lease, Mount, Refusal, RequestHead,
};
use dormouse_mux::{Agent, Stream};
use dormouse_vm_tests::client::Client;
use dormouse_vm_tests::stage::STATE_WITHIN;
use dormouse_vm_tests::{Home, project, raw};
use tokio::net::UnixListener;

/// What is copied, in MiB, and how often each way.
const MIB: u64 = 128;
const COPIES: usize = 5;

/// Small requests each way.
const PINGS: usize = 300;

/// What is wanted of the relay, in % of a bare dial, and for a small request at most as more time.
const COPIED_PERCENT: f64 = 90.0;
const ZEROS_PERCENT: f64 = 85.0;
const REQUEST_MORE: Duration = Duration::from_millis(1);

/// Where zeros come from, in the guest.
const ZEROS: &str = "127.0.0.1:5555";

/// The relay's engine is what the guest has there, which is always up.
#[derive(Debug, Clone)]
struct Up(Agent, Target);

impl Engine for Up {
    type Lease = Self;

    async fn answer(&self, _request: &RequestHead, _class: Class) -> Result<Option<Answer>, Refusal> {
        Ok(None)
    }

    async fn lease(&self, _request: &RequestHead, _class: Class) -> Result<Self, Refusal> {
        Ok(self.clone())
    }

    fn mount(&self, _source: Bind<'_>) -> Mount {
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

impl Lease for Up {
    type Stream = Stream;

    async fn dial(&self) -> io::Result<Stream> {
        self.0.dial(self.1.clone()).await.map_err(io::Error::other)
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

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_costs_little() -> Result<()> {
    let home = Home::new()?;
    let machine = home.boot(1).await?;
    let folder = tempfile::Builder::new().prefix("dorm").tempdir()?;
    let measured = async {
        let mut watch = machine.agent.watch().await?;
        while watch.next().await? != GuestEvent::Engine(EngineState::Ready) {}
        let engine = ways(folder.path(), "engine", &machine.agent, &Target::Engine)?;
        let zeros = ways(folder.path(), "zeros", &machine.agent, &Target::Tcp(ZEROS.into()))?;
        tokio::task::block_in_place(|| {
            // Both are measured, whatever comes of one.
            let measured = measure_engine(&engine);
            measure_zeros(&engine.bare, &zeros).and(measured)
        })
    }
    .await;
    machine.end().await?;
    measured
}

/// Sockets that lead to the same place.
struct Ways {
    bare: PathBuf,
    relayed: PathBuf,
}

fn ways(folder: &Path, name: &str, agent: &Agent, target: &Target) -> Result<Ways> {
    let ways =
        Ways { bare: folder.join(format!("{name}.bare")), relayed: folder.join(format!("{name}.relayed")) };
    tokio::spawn(raw::serve(UnixListener::bind(&ways.bare)?, agent.clone(), target.clone()));
    let (listener, engine) = (UnixListener::bind(&ways.relayed)?, Up(agent.clone(), target.clone()));
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(dormouse_docker_proxy::serve(client, engine.clone()));
        }
    });
    Ok(ways)
}

/// A file of zeros that a program of a container sends from memory: nothing is slower than the channel and the relay.
fn measure_zeros(engine: &Path, ways: &Ways) -> Result<()> {
    let serve = format!("mkdir /www && truncate -s {MIB}M /www/zeros && exec httpd -f -p {ZEROS} -h /www");
    docker(engine, &["run", "--detach", "--network", "host", "busybox", "sh", "-c", &serve])?;
    let begun = Instant::now();
    // The first read fills the guest's memory, and waits for the program.
    while !read(&ways.bare, "/zeros").is_ok_and(|bytes| bytes >= MIB << 20) {
        ensure!(begun.elapsed() < STATE_WITHIN, "nobody sends zeros");
    }
    let zeros = in_turns("zeros", "/zeros", ways)?;
    ensure!(zeros >= ZEROS_PERCENT, "zeros come at {zeros:.1} %");
    Ok(())
}

/// Reads the same both ways, in turns, and gives how fast the relayed one is, in % of the bare one.
fn in_turns(what: &str, target: &str, ways: &Ways) -> Result<f64> {
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..COPIES {
        for (socket, took) in [&ways.bare, &ways.relayed].into_iter().zip(&mut took) {
            let begun = Instant::now();
            let bytes = read(socket, target)?;
            ensure!(bytes >= MIB << 20, "{what}: only {bytes} bytes came");
            took.push(begun.elapsed());
        }
    }
    let [bare, relayed] = took.map(median);
    let ratio = 100.0 * bare.as_secs_f64() / relayed.as_secs_f64();
    println!("figure: {what} of {MIB} MiB, bare = {} ms", bare.as_millis());
    println!("figure: {what} of {MIB} MiB, relayed = {} ms", relayed.as_millis());
    println!("figure: {what}, relayed against bare = {ratio:.1} %");
    Ok(ratio)
}

fn measure_engine(ways: &Ways) -> Result<()> {
    let Ways { bare, relayed } = ways;
    let image = project().join("build/busybox.tar");
    docker(bare, &["load", "--quiet", "--input", &image.display().to_string()])?;
    let count = format!("count={MIB}");
    docker(bare, &["run", "--name", "big", "busybox", "dd", "if=/dev/urandom", "of=/big", "bs=1M", &count])?;
    docker(bare, &["commit", "big", "big"])?;
    let copied = in_turns("docker cp", "/v1.45/containers/big/archive?path=/big", ways)?;
    let saved = in_turns("docker save", "/v1.45/images/big/get", ways)?;
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..PINGS {
        for (socket, took) in [bare, relayed].into_iter().zip(&mut took) {
            let begun = Instant::now();
            ensure!(Client::connect(socket)?.ask("GET", "/_ping")?.status == 200);
            took.push(begun.elapsed());
        }
    }
    let [bare, relayed] = took.map(median);
    println!("figure: a small request, bare = {} us", bare.as_micros());
    println!("figure: a small request, relayed = {} us", relayed.as_micros());
    ensure!(copied >= COPIED_PERCENT, "docker cp goes at {copied:.1} %");
    ensure!(saved >= COPIED_PERCENT, "docker save goes at {saved:.1} %");
    ensure!(relayed < bare + REQUEST_MORE, "a small request takes {:?} more", relayed.saturating_sub(bare));
    Ok(())
}

fn median(mut took: Vec<Duration>) -> Duration {
    took.sort();
    took[took.len() / 2]
}

fn docker(socket: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(project().join("build/clients/docker"));
    command.args(arguments).env("DOCKER_HOST", format!("unix://{}", socket.display()));
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Reads an answer to its end, whatever is in it.
fn read(socket: &Path, target: &str) -> Result<u64> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(STATE_WITHIN))?;
    write!(stream, "GET {target} HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")?;
    let (mut buffer, mut bytes) = (vec![0; 256 * 1024], 0);
    loop {
        match stream.read(&mut buffer).context("the answer broke off")? {
            0 => return Ok(bytes),
            count => bytes += count as u64,
        }
    }
}
