//! Published ports of a session whose VM is scripted: who knocks wakes it, and gets through.

use std::time::Duration;

use dormouse_api::Phase;
use dormouse_lifecycle::Exit;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::stage::{Call, PAUSED, Stage};
use crate::ports::Ports;
use crate::ports::tests::{Engine, free, lose_power, new};

/// For hangs only: this runs on the real clock, because sockets do.
const WITHIN: Duration = Duration::from_secs(30);

async fn published(stage: &Stage, engine: &Engine) -> Ports {
    let ports = new();
    ports.set_owner(stage.owner.clone());
    engine.compared(&ports).await;
    ports
}

async fn wakes(stage: &mut Stage) -> super::stage::Guest {
    let Call::Start(generation) = timeout(WITHIN, stage.call()).await.expect("a knock wakes") else {
        panic!("a knock starts the VM")
    };
    stage.ready(generation)
}

#[tokio::test]
async fn a_connection_wakes_the_vm_and_reaches_the_container_with_its_half_close() {
    let (mut stage, engine) = (Stage::new(), Engine::tcp(free()).running());
    let _ports = published(&stage, &engine).await;
    let mut client = TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let _guest = wakes(&mut stage).await;
    let mut answer = String::new();
    timeout(WITHIN, client.read_to_string(&mut answer)).await.expect("no answer").unwrap();
    // The scripted guest says what was dialled, and gives back what it is sent.
    assert_eq!(answer, "172.17.0.2:80 question");
}

#[tokio::test]
async fn a_connection_is_a_hold_with_its_source_and_its_door_in_words() {
    let (mut stage, engine) = (Stage::new(), Engine::tcp(free()).running());
    let _ports = published(&stage, &engine).await;
    let mut client = TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
    let _guest = wakes(&mut stage).await;
    let mut greeting = [0; 14];
    timeout(WITHIN, client.read_exact(&mut greeting)).await.expect("no answer").unwrap();
    let source = client.local_addr().unwrap().to_string();
    let holds = stage.owner.present().await.holds;
    let hold = holds.iter().find(|hold| hold.owner == source).expect("it holds");
    assert!(!hold.weak && hold.reason.ends_with(&format!("127.0.0.1:{} of web", engine.port)), "{hold:?}");
    drop(client);
    let mut info = stage.owner.info();
    let let_go = info.wait_for(|info| info.holds.iter().all(|hold| hold.owner != source));
    timeout(WITHIN, let_go).await.expect("a client that is gone holds").unwrap();
}

#[tokio::test]
async fn datagrams_wake_the_vm_and_keep_their_borders() {
    let number = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let engine = Engine { protocol: "udp", ..Engine::tcp(number).running() };
    let mut stage = Stage::new();
    let _ports = published(&stage, &engine).await;
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(("127.0.0.1", number)).await.unwrap();
    client.send(b"one").await.unwrap();
    client.send(b"").await.unwrap();
    client.send(b"three").await.unwrap();
    let _guest = wakes(&mut stage).await;
    let mut buffer = [0; 64];
    for expected in ["one", "", "three"] {
        let count = timeout(WITHIN, client.recv(&mut buffer)).await.expect("no answer").unwrap();
        assert_eq!(String::from_utf8_lossy(&buffer[..count]), expected);
    }
}

#[tokio::test]
async fn a_source_that_knocks_again_and_again_wakes_the_vm_only_so_often() {
    let (mut stage, engine) = (Stage::new(), Engine::tcp(free()).running());
    let _ports = published(&stage, &engine).await;
    let mut woken = 0;
    loop {
        let mut client = TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
        // Either the VM is woken, or the door is closed in the client's face.
        let mut nothing = [0; 1];
        tokio::select! {
            call = stage.call() => {
                let Call::Start(generation) = call else { panic!("{call:?}") };
                stage.start_fails(generation, "it is only a test");
                woken += 1;
                assert!(woken < 100, "nothing stops it");
                let mut info = stage.owner.info();
                let absent = info.wait_for(|info| info.vm.phase == dormouse_api::Phase::Absent);
                timeout(WITHIN, absent).await.expect("it failed").unwrap();
            }
            closed = client.read(&mut nothing) => {
                assert!(matches!(closed, Ok(0) | Err(_)));
                if woken > 0 {
                    break;
                }
            }
        }
    }
    assert!((1..20).contains(&woken), "{woken}");
}

#[tokio::test]
async fn a_pool_of_connections_that_is_opened_at_once_is_served_whole() {
    let (mut stage, engine) = (Stage::new(), Engine::tcp(free()).running());
    let _ports = published(&stage, &engine).await;
    let mut clients = Vec::new();
    // Nobody hears of the first before the last is there.
    for _ in 0..50 {
        let client = std::net::TcpStream::connect(("127.0.0.1", engine.port)).unwrap();
        client.set_nonblocking(true).unwrap();
        clients.push(TcpStream::from_std(client).unwrap());
    }
    let _guest = wakes(&mut stage).await;
    for (number, client) in clients.iter_mut().enumerate() {
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = String::new();
        timeout(WITHIN, client.read_to_string(&mut answer)).await.expect("no answer").unwrap();
        assert_eq!(answer, "172.17.0.2:80 question", "{number}");
    }
}

#[tokio::test]
async fn who_waits_for_a_container_that_takes_nobody_holds_up_no_other_door() {
    let (mut stage, engine) = (Stage::new(), Engine::tcp(free()).running());
    let paused = Engine { own_address: PAUSED, ..Engine::tcp(free()).running() };
    let _ports = (published(&stage, &engine).await, published(&stage, &paused).await);
    let mut waiting = Vec::new();
    for _ in 0..300 {
        waiting.push(TcpStream::connect(("127.0.0.1", paused.port)).await.unwrap());
    }
    let _guest = wakes(&mut stage).await;
    // Each of them has its lease, and so its turn before whoever comes now.
    let mut info = stage.owner.info();
    let all = info.wait_for(|info| info.holds.iter().filter(|hold| !hold.weak).count() >= waiting.len());
    timeout(WITHIN, all).await.expect("some hold nothing").unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
    let mut greeting = [0; 14];
    // Sooner than the host gives a guest up that doesn't answer.
    timeout(Duration::from_secs(5), client.read_exact(&mut greeting)).await.expect("it waits too").unwrap();
}

#[tokio::test]
async fn who_comes_while_the_vm_starts_waits_for_the_container_as_whoever_woke_it() {
    let (mut stage, engine) = (Stage::new(), Engine::tcp(free()).running());
    let ports = published(&stage, &engine).await;
    let mut first = TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
    let call = timeout(WITHIN, stage.call()).await.expect("a knock wakes");
    let Call::Start(generation) = call else { panic!("{call:?}") };
    let mut info = stage.owner.info();
    let starting = info.wait_for(|info| info.vm.phase == dormouse_api::Phase::Starting);
    timeout(WITHIN, starting).await.expect("it starts").unwrap();
    let mut second = TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
    // The VM is up before the container has an address.
    engine.clone().without_address().compared(&ports).await;
    let _guest = stage.ready(generation);
    let lease = timeout(WITHIN, stage.ask(dormouse_lifecycle::Policy::Acquire)).await.expect("it is up");
    let lease = lease.unwrap().unwrap();
    let mut third = TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
    let mut nothing = [0; 1];
    for client in [&mut first, &mut second, &mut third] {
        let closed = timeout(Duration::from_millis(100), client.read(&mut nothing)).await;
        assert!(closed.is_err(), "it is closed before its container listens");
    }
    engine.compared(&ports).await;
    for client in [&mut first, &mut second, &mut third] {
        let mut greeting = [0; 14];
        timeout(WITHIN, client.read_exact(&mut greeting)).await.expect("no answer").unwrap();
    }
    drop(lease);
}

#[tokio::test]
async fn a_connection_that_was_quiet_holds_again_as_soon_as_it_speaks() {
    let (mut stage, engine) = (Stage::new(), Engine::tcp(free()).running());
    let _ports = published(&stage, &engine).await;
    let mut client = TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
    let _guest = wakes(&mut stage).await;
    let mut greeting = [0; 14];
    timeout(WITHIN, client.read_exact(&mut greeting)).await.expect("no answer").unwrap();
    let source = client.local_addr().unwrap().to_string();
    let mut info = stage.owner.info();
    tokio::time::pause();
    for _ in 0..2 {
        // Minutes go by.
        let quiet =
            info.wait_for(|info| info.holds.iter().all(|hold| hold.owner != source)).await.unwrap().clone();
        assert!(quiet.holds.iter().any(|hold| hold.weak), "{quiet:?}");
        tokio::time::resume();
        client.write_all(b"question").await.unwrap();
        let mut answer = [0; 8];
        timeout(WITHIN, client.read_exact(&mut answer)).await.expect("no answer").unwrap();
        let held = info.wait_for(|info| info.holds.iter().any(|hold| hold.owner == source && !hold.weak));
        timeout(WITHIN, held).await.expect("it holds nothing").unwrap();
        tokio::time::pause();
    }
}

#[tokio::test]
async fn a_port_of_a_running_container_that_cant_be_had_is_told_of_once() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let engine = Engine::tcp(taken.local_addr().unwrap().port()).running();
    let stage = Stage::new();
    let ports = published(&stage, &engine).await;
    engine.compared(&ports).await;
    let warnings = |history: Vec<String>| history.iter().filter(|entry| entry.starts_with("warning")).count();
    assert_eq!(warnings(stage.history().await), 1);
    drop(taken);
    engine.compared(&ports).await;
    assert_eq!(ports.duplicates().len(), 1);
}

#[tokio::test]
async fn both_protocols_pass_through_doors_of_an_ipv6_address() {
    let free = || std::net::TcpListener::bind("[::1]:0").expect("this machine has ::1").local_addr();
    let number = free().unwrap().port();
    for protocol in ["tcp", "udp"] {
        let engine = Engine { address: "::1", protocol, ..Engine::tcp(number).running() };
        let mut stage = Stage::new();
        let _ports = published(&stage, &engine).await;
        if protocol == "tcp" {
            let mut client = TcpStream::connect(("::1", number)).await.unwrap();
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let _guest = wakes(&mut stage).await;
            let mut answer = String::new();
            timeout(WITHIN, client.read_to_string(&mut answer)).await.expect("no answer").unwrap();
            assert_eq!(answer, "172.17.0.2:80 question");
        } else {
            let client = UdpSocket::bind("[::1]:0").await.unwrap();
            client.connect(("::1", number)).await.unwrap();
            client.send(b"question").await.unwrap();
            let _guest = wakes(&mut stage).await;
            let mut buffer = [0; 64];
            let count = timeout(WITHIN, client.recv(&mut buffer)).await.expect("no answer").unwrap();
            assert_eq!(&buffer[..count], b"question");
        }
    }
}

#[tokio::test]
async fn who_knocks_before_the_host_has_begun_is_served() {
    let (mut stage, engine) = (Stage::new(), Engine::tcp(free()).running());
    let ports = new();
    engine.compared(&ports).await;
    let mut client = TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
    client.shutdown().await.unwrap();
    tokio::task::yield_now().await;
    ports.set_owner(stage.owner.clone());
    let _guest = wakes(&mut stage).await;
    let mut answer = String::new();
    timeout(WITHIN, client.read_to_string(&mut answer)).await.expect("no answer").unwrap();
    assert_eq!(answer, "172.17.0.2:80 ");
}

#[tokio::test]
async fn after_a_loss_of_power_only_doors_of_who_starts_again_stay() {
    for (policy, stay) in [("no", 0), ("always", 1)] {
        let mut stage = Stage::new();
        let (lease, _guest) = stage.up().await;
        let engine = Engine { policy, ..Engine::tcp(free()).running() };
        engine.compared(&stage.face.ports).await;
        lose_power(&stage.face.ports, engine.port).await;
        let mut stage = stage.host_dies().await;
        drop(lease);
        assert_eq!(stage.call().await, Call::Adopt(1));
        assert_eq!(stage.face.ports.duplicates().len(), 1, "nobody knows yet what became of the VM");
        stage.exits(1, Exit::Unknown("it was gone".into()));
        stage.becomes(Phase::Absent).await;
        assert_eq!(stage.face.ports.duplicates().len(), stay, "{policy}");
        assert_eq!(stage.folder.path().join("doors.json").exists(), stay > 0, "{policy}");
    }
}
