//! Connections that lead out of a guest, over a suspend: what carried them outside is gone then. In the shard `registries`,
//! because it is registries that engines keep connections to.
#![cfg(feature = "long")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dormouse_api::{CreateSession, How, IdleTimeout, RunningContainers, SessionInfo};
use dormouse_vm_tests::registry::{HOST_V4, give_host_an_address};
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, fall_asleep, inspect};
use dormouse_vm_tests::{figure, in_network_namespace};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// Far less than programs wait by themselves for what doesn't come.
const ENDED_WITHIN: Duration = Duration::from_secs(60);

/// Reads from the host until the connection ends. Its own input stays open.
const READS: &str = "nc $AT";

/// Sends back what it reads, and one that says so.
const SERVES: &str = "nc -l -p 7 -e cat";
const ASKS: &str = "n=0; while :; do n=$((n + 1)); echo $n; sleep 0.2; done | nc $AT > /answers";

#[test]
fn a_connection_from_before_a_sleep_ends_at_once_and_one_within_the_guest_goes_on() -> Result<()> {
    if in_network_namespace("a_connection_from_before_a_sleep_ends_at_once_and_one_within_the_guest_goes_on")?
    {
        return Ok(());
    }
    give_host_an_address()?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let stage = Stage::with(&[("DORM_NETWORK", "passt".into())])?;
        let mut wish = CreateSession::named("default".parse()?);
        wish.idle_timeout = IdleTimeout::Never;
        wish.running = RunningContainers::Suspend;
        let session = stage.make(&wish).await?;
        stage.load_busybox(&session).await?;
        let guest = Guest { stage: &stage, session: &session };
        guest.over_a_sleep().await.with_context(|| stage.logs(&session))
    })
}

struct Guest<'a> {
    stage: &'a Stage,
    session: &'a SessionInfo,
}

impl Guest<'_> {
    async fn succeed(&self, arguments: &[&str]) -> Result<String> {
        self.stage.succeed(self.session, arguments).await
    }

    async fn run(&self, name: &str, network: &str, at: &str, script: &str) -> Result<()> {
        let at = format!("AT={at}");
        let run = ["run", "--detach", "--interactive", "--init", "--name", name];
        let network = ["--network", network, "--env", &at, "busybox", "sh", "-c", script];
        self.succeed(&[&run[..], &network].concat()).await?;
        Ok(())
    }

    /// The last number that came back from within the guest.
    async fn answered(&self) -> Result<u64> {
        let number = self.succeed(&["exec", "asks", "tail", "-n", "1", "/answers"]).await?;
        Ok(number.trim().parse().unwrap_or(0))
    }

    async fn is_answered_beyond(&self, last: u64) -> Result<u64> {
        let begun = Instant::now();
        loop {
            let number = self.answered().await?;
            if number > last {
                return Ok(number);
            }
            ensure!(begun.elapsed() < STATE_WITHIN, "after {last} comes nothing");
        }
    }

    async fn over_a_sleep(&self) -> Result<()> {
        let listener = TcpListener::bind((HOST_V4, 0)).await?;
        let at = format!("{HOST_V4} {}", listener.local_addr()?.port());
        // From a network of the container's own, and from the guest's.
        let mut held: Vec<TcpStream> = Vec::new();
        for (name, network) in [("bridged", "bridge"), ("rooted", "host")] {
            self.run(name, network, &at, READS).await?;
            let accepted = timeout(STATE_WITHIN, listener.accept()).await.context("nobody connects")?;
            let (mut stream, _) = accepted?;
            // passt of Debian 12 resets a connection over which nothing has come back within half a minute.
            stream.write_all(b"hello\n").await?;
            held.push(stream);
        }
        self.run("serves", "bridge", "", SERVES).await?;
        let listens = "until grep -q ':0007 ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done";
        self.succeed(&["exec", "serves", "sh", "-c", listens]).await?;
        let address = ["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "serves"];
        let address = self.succeed(&address).await?;
        self.run("asks", "bridge", &format!("{} 7", address.trim()), ASKS).await?;
        let last = self.is_answered_beyond(0).await?;

        for name in ["bridged", "rooted"] {
            let state = self.succeed(&["inspect", "--format", "{{.State.Status}}", name]).await?;
            if state != "running\n" {
                let said = self.stage.run(self.session, &["logs", name]).await?;
                let state = self.succeed(&["inspect", "--format", "{{json .State}}", name]).await?;
                bail!("{name} ended before the sleep: {state} {said:?}");
            }
        }
        fall_asleep(self.session).await?;
        let begun = Instant::now();
        let last = self.is_answered_beyond(last).await?;
        let info = inspect(self.session).await?;
        ensure!(info.vm.how == Some(How::Resume), "{info:?}");
        for name in ["bridged", "rooted"] {
            let ended = timeout(ENDED_WITHIN, self.succeed(&["wait", name])).await;
            ended.with_context(|| format!("{name} waits on for whom it was connected to"))??;
        }
        figure("connections to outside have ended, from the request that wakes", begun.elapsed());
        self.is_answered_beyond(last).await?;
        Ok(())
    }
}
