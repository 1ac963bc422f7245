//! Ten minutes of an IDE's polling, and ten thousand clients of hosts that leave at once: `scripts/test-long polling`.
#![cfg(feature = "long")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::{CreateSession, Phase};
use dormouse_vm_tests::client::Client;
use dormouse_vm_tests::figure;
use dormouse_vm_tests::polling::poll;
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, fall_asleep, host_of, inspect};
use rustix::process::{Signal, kill_process};

const POLLING: Duration = Duration::from_secs(600);

const LIST: &str = "/v1.45/containers/json?all=1";

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
    tokio::task::block_in_place(|| poll(&session.docker_socket, LIST, POLLING))?;
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
    Ok(())
}

/// A session that never ran: what is asked here needs no VM.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_clients_are_served_by_hosts_that_leave_at_once() -> Result<()> {
    let stage = Stage::with(&[("DORM_LINGER", "0".into())])?;
    let session = stage.make(&CreateSession::named("default".parse()?)).await?;
    let (mut hosts, mut last) = (0, None);
    let begun = Instant::now();
    for number in 0..CONNECTS {
        let response = Client::connect(&session.docker_socket)
            .and_then(|mut client| client.ask("GET", "/_ping"))
            .with_context(|| format!("client {number} was not served\n{}", stage.logs(&session)))?;
        ensure!(response.status == 200 && response.is_asleep(), "client {number}: {response:?}");
        // Every other one comes while the host is leaving, or just has.
        if number % 2 == 0 {
            continue;
        }
        let host = host_of(&session).ok();
        if host.is_some() && host != last {
            hosts += 1;
            last = host;
        }
    }
    figure("10,000 clients of hosts that leave at once", begun.elapsed());
    println!("figure: hosts that were seen = {hosts}");
    ensure!(hosts > CONNECTS / 100, "only {hosts} hosts: nobody left");
    let left = async {
        while host_of(&session).is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(STATE_WITHIN, left).await.context("the last host never leaves")?;
    Ok(())
}
