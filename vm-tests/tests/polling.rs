//! Ten minutes of an IDE's polling, and ten thousand clients of hosts that leave at once: `scripts/test-long polling`.
#![cfg(feature = "long")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dormouse_api::Phase;
use dormouse_vm_tests::client::Client;
use dormouse_vm_tests::figure;
use dormouse_vm_tests::polling::{connect_often, poll};
use dormouse_vm_tests::stage::{Stage, fall_asleep, host_of, inspect};
use rustix::process::{Signal, kill_process};

const POLLING: Duration = Duration::from_secs(600);

const LIST: &str = "/v1.45/containers/json?all=1";

/// What is wanted of a read: of half of them, of the slowest beside an echo, and of the first to a host that isn't there.
const READ_MEDIAN: Duration = Duration::from_millis(1);
const READ_P99_ECHOES: u32 = 3;
const FIRST_READ: Duration = Duration::from_millis(60);

const CONNECTS: usize = 10_000;

#[tokio::test(flavor = "multi_thread")]
async fn ten_minutes_of_polling_wake_nothing() -> Result<()> {
    let stage = Stage::new()?;
    let session = stage.create(3600).await?;
    stage.load_busybox(&session).await?;
    for name in ["one", "two"] {
        stage.succeed(&session, &["run", "--name", name, "busybox", "true"]).await?;
    }
    stage.succeed(&session, &["ps", "--all"]).await?;
    fall_asleep(&session).await?;
    let before = inspect(&session).await?.vm.start_count;
    let [read, echo] = tokio::task::block_in_place(|| poll(&session.docker_socket, LIST, POLLING))?;
    let after = inspect(&session).await?;
    ensure!(after.vm.phase == Phase::Absent, "{after:?}");
    println!("figure: wakes = {}", after.vm.start_count - before);
    ensure!(after.vm.start_count == before, "{after:?}");

    let mut took = Vec::new();
    for _ in 0..20 {
        kill_process(host_of(&session)?, Signal::KILL)?;
        let begun = Instant::now();
        let first = Client::connect(&session.docker_socket)?.ask("GET", LIST)?;
        took.push(begun.elapsed());
        ensure!(first.is_asleep(), "{first:?}");
    }
    took.sort();
    figure("first read after the host has gone, median of 20", took[10]);
    figure("first read after the host has gone, worst of 20", took[19]);
    ensure!(took[10] <= FIRST_READ, "the first read after the host has gone takes {:?}", took[10]);
    ensure!(read.median <= READ_MEDIAN, "a read takes {:?}", read.median);
    ensure!(
        read.p99 <= READ_P99_ECHOES * echo.p99,
        "the slowest reads take {:?}: {:?} echoed",
        read.p99,
        echo.p99
    );
    Ok(())
}

/// A session that never ran: what is asked here needs no VM.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_clients_are_served_by_hosts_that_leave_at_once() -> Result<()> {
    tokio::task::block_in_place(|| connect_often(CONNECTS))
}
