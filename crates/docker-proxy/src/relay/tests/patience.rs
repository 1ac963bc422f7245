//! Who is waited for, and for how long a VM is held meanwhile.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_nothing_is_served_on_and_holds_no_more() {
    let mut stage = stage(None);
    let mut engine = stage.ask("GET /images/get HTTP/1.1\r\n\r\n").await;
    engine.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    let begun = tokio::time::Instant::now();
    let flood = tokio::spawn(async move {
        let mut sent = 0;
        while engine.write_all(&[7; 1024]).await.is_ok() && sent < 1 << 20 {
            sent += 1024;
        }
    });
    stage.held_becomes(0).await;
    assert!(begun.elapsed() >= STALLED_AFTER, "{:?}", begun.elapsed());
    assert!(!flood.is_finished(), "the flood met back-pressure");
    let mut all = Vec::new();
    stage.client.read_to_end(&mut all).await.unwrap();
    assert!(all.len() > 1 << 20, "{}", all.len());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_sending_half_way_holds_no_more() {
    let mut stage = stage(None);
    let begun = tokio::time::Instant::now();
    let engine = stage.ask("POST /images/load HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf").await;
    stage.held_becomes(0).await;
    assert!(begun.elapsed() >= STALLED_AFTER, "{:?}", begun.elapsed());
    drop(engine);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_on_after_it_stalled_holds_again() {
    let mut giving = stage(None);
    let mut engine = giving.ask("POST /images/load HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf").await;
    for part in ["more", "!"] {
        giving.held_becomes(0).await;
        giving.client.write_all(part.as_bytes()).await.unwrap();
        expect(&mut engine, part).await;
        giving.held_becomes(1).await;
    }
    giving.leave().await;

    let mut taking = stage(None);
    let mut engine = taking.ask("GET /images/get HTTP/1.1\r\n\r\n").await;
    engine.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    let flood = tokio::spawn(async move {
        engine.write_all(&vec![7; 1 << 20]).await.unwrap();
        engine
    });
    taking.held_becomes(0).await;
    let mut most = vec![0; 1 << 20];
    taking.client.read_exact(&mut most).await.unwrap();
    taking.held_becomes(1).await;
    let _engine = flood.await.unwrap();
    taking.leave().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_followed_holds_again_from_each_line_on_and_what_never_ends_does_not() {
    let begins = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (request, held) in [("GET /containers/a/logs?follow=1", 1), ("GET /containers/a/stats", 0)] {
        let mut stage = stage(None);
        let mut engine = stage.ask(&format!("{request} HTTP/1.1\r\n\r\n")).await;
        engine.write_all(begins.as_bytes()).await.unwrap();
        expect(&mut stage.client, begins).await;
        for _ in 0..3 {
            stage.held_becomes(0).await;
            tokio::time::sleep(QUIET_AFTER).await;
            engine.write_all(b"2\r\nhi\r\n").await.unwrap();
            expect(&mut stage.client, "2\r\nhi\r\n").await;
            tokio::time::sleep(QUIET_AFTER / 2).await;
            assert_eq!(stage.held(), held, "{request}");
        }
        stage.leave().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_moves_again_when_its_vm_is_gone_ends_with_it() {
    let mut stage = stage(None);
    let mut engine = stage.ask("POST /images/load HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf").await;
    stage.held_becomes(0).await;
    stage.crashed.send_replace(true);
    let mut answer = String::new();
    stage.client.write_all(b"more").await.unwrap();
    stage.client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains(CRASHED), "{answer}");
    assert_eq!(stage.held(), 0);
    assert!(engine.write_all(b"late").await.is_err());
}

#[tokio::test(start_paused = true)]
async fn what_is_only_watched_stops_holding_and_what_is_waited_for_does_not() {
    let begins = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (request, holds_for) in [
        ("GET /containers/a/stats", Some(Duration::ZERO)),
        ("GET /containers/a/logs?follow=1", Some(QUIET_AFTER)),
        ("POST /containers/a/wait", None),
        ("POST /containers/a/start", None),
    ] {
        let mut stage = stage(None);
        let mut engine = stage.ask(&format!("{request} HTTP/1.1\r\n\r\n")).await;
        engine.write_all(begins.as_bytes()).await.unwrap();
        expect(&mut stage.client, begins).await;
        let begun = tokio::time::Instant::now();
        let weak = tokio::time::timeout(Duration::from_secs(3600), stage.held_becomes(0)).await;
        match holds_for {
            Some(least) => {
                assert!(weak.is_ok(), "{request} holds for ever");
                let took = begun.elapsed();
                assert!(took >= least && took < least + Duration::from_secs(2), "{request}: {took:?}");
            }
            None => assert!(weak.is_err() && stage.held() == 1, "{request} does not hold"),
        }
        // Weak or not, it goes on.
        engine.write_all(b"2\r\nhi\r\n0\r\n\r\n").await.unwrap();
        expect(&mut stage.client, "2\r\nhi\r\n0\r\n\r\n").await;
        stage.leave().await;
    }
}
