//! What a lease costs through the owner, against the least that any question to another task costs.

use std::time::{Duration, Instant};

use dormouse_lifecycle::{HoldKind, Policy};
use tokio::sync::{mpsc, oneshot};

use super::stage::Stage;
use crate::owner::Claimant;

/// Round trips of each kind, taken in turns.
const ROUNDS: usize = 3000;

/// A lease may take so many times a bare round trip, in the median.
const RATIO_MAX: f64 = 1.5;

/// A task that answers.
fn answering() -> mpsc::UnboundedSender<oneshot::Sender<()>> {
    let (sender, mut questions) = mpsc::unbounded_channel::<oneshot::Sender<()>>();
    tokio::spawn(async move {
        while let Some(reply) = questions.recv().await {
            let _ = reply.send(());
        }
    });
    sender
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// As in a host: several threads, so that an answer is a wake of another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_takes_hardly_longer_than_any_question_to_another_task() {
    let mut stage = Stage::new();
    let (lease, _guest) = stage.up().await;
    let claimant = Claimant {
        kind: HoldKind::Request,
        policy: Policy::Acquire,
        owner: "pid 1 (docker)".into(),
        reason: "GET /containers/json".into(),
    };
    let bare = answering();
    let (mut bare_times, mut lease_times) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let (reply, answer) = oneshot::channel();
        bare.send(reply).unwrap();
        answer.await.unwrap();
        bare_times.push(begun.elapsed());
        let begun = Instant::now();
        drop(stage.owner.lease(claimant.clone()).await.unwrap());
        lease_times.push(begun.elapsed());
    }
    drop(lease);
    let (bare, lease) = (median(&mut bare_times), median(&mut lease_times));
    let ratio = lease.as_secs_f64() / bare.as_secs_f64();
    println!("figure: bare_round_trip_us = {:.1}", bare.as_secs_f64() * 1e6);
    println!("figure: lease_round_trip_us = {:.1}", lease.as_secs_f64() * 1e6);
    println!("figure: lease_per_bare_round_trip = {ratio:.2}");
    assert!(ratio <= RATIO_MAX, "a lease takes {lease:?}, a bare round trip {bare:?}");
}
