use std::net::{SocketAddr, TcpListener, UdpSocket};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// An engine with one container, `web`.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    pub(crate) running: bool,
    pub(crate) policy: &'static str,
    /// What it wants published, by number.
    pub(crate) port: u16,
    pub(crate) protocol: &'static str,
    pub(crate) address: &'static str,
    /// Its own address in the guest.
    pub(crate) own_address: &'static str,
    /// It was removed.
    pub(crate) gone: bool,
}

impl Engine {
    pub(crate) fn tcp(port: u16) -> Self {
        let (policy, protocol, own_address) = ("no", "tcp", "172.17.0.2");
        Self { running: false, policy, port, protocol, address: "", own_address, gone: false }
    }

    pub(crate) fn running(mut self) -> Self {
        self.running = true;
        self
    }

    pub(crate) fn without_address(mut self) -> Self {
        self.own_address = "";
        self
    }

    fn stopped(mut self) -> Self {
        self.running = false;
        self
    }

    async fn dial(self) -> io::Result<DuplexStream> {
        let (ours, mut theirs) = duplex(4096);
        tokio::spawn(async move {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                if theirs.read_buf(&mut request).await.unwrap() == 0 {
                    return;
                }
            }
            let request = String::from_utf8(request).unwrap();
            let (status, body) = match request.split(' ').nth(1).unwrap() {
                "/containers/json" if self.running => (
                    "200 OK",
                    format!(r#"[{{"Id":"c1","Ports":[{{"PublicPort":{}}}]}},{{"Id":"c2"}}]"#, self.port),
                ),
                "/containers/json?all=1" if !self.gone => ("200 OK", r#"[{"Id":"c1"}]"#.to_owned()),
                "/containers/json" | "/containers/json?all=1" => ("200 OK", "[]".to_owned()),
                "/containers/web/json" | "/containers/c1/json" => ("200 OK", self.container()),
                _ => ("404 Not Found", "{}".to_owned()),
            };
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            theirs.write_all(answer.as_bytes()).await.unwrap();
        });
        Ok(ours)
    }

    fn container(&self) -> String {
        let Self { running, policy, port, protocol, address, own_address, gone: _ } = self;
        let bound = if *running {
            let bound = if address.is_empty() { "0.0.0.0" } else { address };
            format!(r#"{{"80/{protocol}":[{{"HostIp":"{bound}","HostPort":"{port}"}}]}}"#)
        } else {
            "{}".to_owned()
        };
        format!(
            r#"{{"Id":"c1","Name":"/web","State":{{"Running":{running}}},"HostConfig":{{
            "PortBindings":{{"80/{protocol}":[{{"HostIp":"{address}","HostPort":"{port}"}}]}},
            "RestartPolicy":{{"Name":"{policy}"}}}},"NetworkSettings":{{"Ports":{bound},
            "Networks":{{"bridge":{{"IPAddress":"{own_address}"}}}}}}}}"#
        )
    }

    async fn starts(&self, ports: &Ports) -> Result<Option<Starting>, Refusal> {
        ports.start(&mut self.clone().dial().await.unwrap(), "web").await
    }

    pub(crate) async fn compared(&self, ports: &Ports) {
        ports.compare(|| self.clone().dial()).await;
    }
}

/// No doors, and no folder to leave any in.
pub(crate) fn new() -> Ports {
    Ports::load(Path::new("/nowhere"), 1, HERE, Vec::new())
}

fn is_open(ports: &Ports) -> bool {
    !ports.duplicates().is_empty()
}

/// A number that was free a moment ago.
pub(crate) fn free() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn is_bound(address: &str, port: u16) -> bool {
    let address: SocketAddr = format!("{address}:{port}").parse().unwrap();
    matches!(TcpListener::bind(address), Err(error) if error.kind() == io::ErrorKind::AddrInUse)
}

/// What the machine's loss of power does to doors: nobody is told, and nothing is written.
pub(crate) async fn lose_power(ports: &Ports, port: u16) {
    ports.table().doors.clear();
    closes(port).await;
}

async fn closes(port: u16) {
    // The task that held the socket is told to end, and ends when it runs next.
    timeout(Duration::from_secs(20), async {
        while is_bound("127.0.0.1", port) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("a door stays open");
}

#[tokio::test]
async fn a_door_is_bound_before_its_container_starts_and_closed_when_it_stops() {
    let (ports, engine) = (new(), Engine::tcp(free()));
    let starting = engine.starts(&ports).await.unwrap().unwrap();
    assert!(is_bound("127.0.0.1", engine.port));
    engine.compared(&ports).await;
    assert!(is_bound("127.0.0.1", engine.port), "its start is under way");
    engine.clone().running().compared(&ports).await;
    drop(starting);
    engine.clone().running().compared(&ports).await;
    assert!(is_bound("127.0.0.1", engine.port) && is_open(&ports));
    engine.compared(&ports).await;
    closes(engine.port).await;
    assert!(!is_open(&ports));
}

#[tokio::test]
async fn a_start_that_fails_leaves_no_door() {
    let (ports, engine) = (new(), Engine::tcp(free()));
    drop(engine.starts(&ports).await.unwrap());
    engine.compared(&ports).await;
    closes(engine.port).await;
}

#[tokio::test]
async fn a_door_stays_while_the_next_container_with_its_number_is_started() {
    let (ports, engine) = (new(), Engine::tcp(free()));
    let other = engine.clone().running().container().replace("c1", "c9");
    ports.settle(&[Container::parse(other.as_bytes()).unwrap()]);
    let starting = engine.starts(&ports).await.unwrap();
    ports.settle(&[]);
    assert!(is_open(&ports), "the other one has ended");
    drop(starting);
    ports.settle(&[]);
    closes(engine.port).await;
}

#[tokio::test]
async fn a_number_that_is_taken_is_dockers_own_error() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (ports, engine) = (new(), Engine::tcp(taken.local_addr().unwrap().port()));
    let refusal = engine.starts(&ports).await.unwrap_err();
    assert_eq!(
        refusal.message,
        format!(
            "driver failed programming external connectivity on endpoint web: Error starting userland proxy: \
             listen tcp4 127.0.0.1:{}: bind: address already in use",
            engine.port
        )
    );
    assert_eq!(refusal.status, 500);
    assert!(!is_open(&ports));
}

#[tokio::test]
async fn an_address_that_this_host_has_not_is_dockers_own_error() {
    let engine = Engine { address: "192.0.2.1", ..Engine::tcp(free()) };
    let refusal = engine.starts(&new()).await.unwrap_err();
    assert!(refusal.message.ends_with("bind: cannot assign requested address"), "{}", refusal.message);
}

#[test]
fn a_number_that_is_roots_comes_with_a_hint() {
    let door = Door { protocol: Protocol::Tcp, address: "127.0.0.1:80".parse().unwrap() };
    let refusal = refusal("web", door, &io::ErrorKind::PermissionDenied.into());
    assert!(
        refusal.message.contains("listen tcp4 127.0.0.1:80: bind: permission denied ("),
        "{}",
        refusal.message
    );
}

#[tokio::test]
async fn a_number_is_its_containers_while_that_is_stopped_and_free_when_it_is_gone() {
    let any = || AnyPort { address: None, among: None };
    let folder = tempfile::tempdir().unwrap();
    let host = || Ports::load(folder.path(), 77, HERE, Vec::new());
    let number = host().free(any()).unwrap();
    assert_eq!(host().free(any()), Some(number), "nobody has it yet");
    host().created("c1", vec![number]);
    let stopped = Engine::tcp(number);
    for _ in 0..2 {
        let host = host();
        let other = host.free(any()).unwrap();
        assert_ne!(other, number);
        let among = AnyPort { address: None, among: Some(number..=other + 9) };
        assert!(host.free(among).is_some_and(|among| among != number), "{number} {other}");
        stopped.compared(&host).await;
    }
    let gone = Engine { gone: true, ..stopped };
    gone.compared(&host()).await;
    assert_eq!(host().free(any()), Some(number));
}

#[tokio::test]
async fn a_number_is_promised_to_who_is_being_created_until_that_fails() {
    let ports = new();
    let number = ports.free(AnyPort { address: None, among: Some(31_990..=31_999) }).unwrap();
    let only = || ports.free(AnyPort { address: None, among: Some(number..=number + 1) });
    let other = only().unwrap();
    assert_ne!(other, number);
    ports.take_back(&[number, other]);
    assert_eq!(only(), Some(number));
}

#[tokio::test]
async fn a_container_that_is_created_while_the_engine_is_asked_keeps_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let ports = Ports::load(folder.path(), 1, HERE, Vec::new());
    let engine = Engine { gone: true, ..Engine::tcp(free()) };
    ports.created("c1", vec![1]);
    let dials = std::sync::atomic::AtomicUsize::new(0);
    let dial = || {
        if dials.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1 {
            ports.created("c2", vec![2]);
        }
        engine.clone().dial()
    };
    ports.compare(dial).await;
    assert_eq!(ports.table().numbers.ids(), ["c2".to_owned()].into());
}

#[tokio::test]
async fn what_others_start_is_published_as_well_and_no_wider_than_asked() {
    let (ports, engine) = (new(), Engine::tcp(free()).running());
    engine.compared(&ports).await;
    assert!(is_bound("127.0.0.1", engine.port) && !is_bound("127.0.0.2", engine.port));
    let wide = Engine { address: "0.0.0.0", ..Engine::tcp(free()).running() };
    wide.compared(&ports).await;
    assert!(is_bound("127.0.0.2", wide.port));
    closes(engine.port).await;
    let elsewhere = "127.0.0.3".parse().unwrap();
    let ports = Ports::load(Path::new("/nowhere"), 1, elsewhere, Vec::new());
    engine.compared(&ports).await;
    assert!(is_bound("127.0.0.3", engine.port) && !is_bound("127.0.0.1", engine.port));
}

#[tokio::test]
async fn a_udp_port_is_bound_as_one() {
    let number = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (ports, engine) = (new(), Engine { protocol: "udp", ..Engine::tcp(number) });
    let _starting = engine.starts(&ports).await.unwrap().unwrap();
    assert!(UdpSocket::bind(("127.0.0.1", number)).is_err() && !is_bound("127.0.0.1", number));
}

#[tokio::test]
async fn a_door_outlives_its_vm_if_its_container_comes_back() {
    for (policy, who, stays) in [
        ("no", Stays::Everybody, true),
        ("no", Stays::WhoeverRestarts, false),
        ("always", Stays::WhoeverRestarts, true),
        ("always", Stays::Nobody, false),
    ] {
        let (ports, engine) = (new(), Engine { policy, ..Engine::tcp(free()).running() });
        engine.compared(&ports).await;
        ports.vm_gone(who);
        assert_eq!(is_open(&ports), stays, "{policy} {who:?}");
    }
}

#[tokio::test]
async fn a_container_that_is_not_there_is_the_engines_to_refuse() {
    let mut engine = Engine::tcp(free()).dial().await.unwrap();
    let starting = new().start(&mut engine, "nobody").await;
    assert!(matches!(starting, Ok(None)));
}

#[tokio::test(start_paused = true)]
async fn the_next_host_takes_over_the_sockets_and_hears_who_knocked_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let (ports, engine) = (Ports::load(folder.path(), 1, HERE, Vec::new()), Engine::tcp(free()).running());
    engine.compared(&ports).await;
    ports.vm_gone(Stays::Everybody);
    let kept = ports.duplicates();
    drop(ports);
    let mut knock = tokio::net::TcpStream::connect(("127.0.0.1", engine.port)).await.unwrap();
    let next = Ports::load(folder.path(), 1, HERE, kept);
    assert!(is_open(&next) && is_bound("127.0.0.1", engine.port));
    // Nobody comes to give it a lease: so it is heard, and in the end turned away.
    let begun = Instant::now();
    assert!(matches!(knock.read(&mut [0]).await, Ok(0) | Err(_)));
    assert!(begun.elapsed() >= OWNER_WITHIN, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_host_that_ends_without_a_word_leaves_its_doors_to_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let (ports, engine) = (Ports::load(folder.path(), 1, HERE, Vec::new()), Engine::tcp(free()).running());
    engine.compared(&ports).await;
    let next = Ports::load(folder.path(), 1, HERE, ports.duplicates());
    assert!(is_open(&next));
    // Its VM was gone as well.
    next.vm_gone(Stays::WhoeverRestarts);
    assert!(!folder.path().join("doors.json").exists(), "it doesn't start by itself");
}

#[tokio::test]
async fn a_door_is_left_once_its_container_runs_wherever_that_listens() {
    let folder = tempfile::tempdir().unwrap();
    let (ports, engine) = (Ports::load(folder.path(), 1, HERE, Vec::new()), Engine::tcp(free()));
    let is_left = || folder.path().join("doors.json").exists();
    // Nobody has told its address yet, nor does anybody when it runs.
    let engine = engine.without_address();
    let starting = engine.starts(&ports).await.unwrap();
    engine.clone().running().compared(&ports).await;
    assert!(is_left());
    drop(starting);
    engine.compared(&ports).await;
    assert!(!is_left());
}

#[tokio::test]
async fn sockets_that_nobody_kept_are_bound_again_and_what_is_not_wanted_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let (ports, engine) = (Ports::load(folder.path(), 1, HERE, Vec::new()), Engine::tcp(free()).running());
    engine.compared(&ports).await;
    ports.vm_gone(Stays::Everybody);
    lose_power(&ports, engine.port).await;
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let number = stranger.local_addr().unwrap().port();
    let next = Ports::load(folder.path(), 1, HERE, vec![stranger.into()]);
    assert!(is_bound("127.0.0.1", engine.port) && !is_bound("127.0.0.1", number));
    engine.clone().stopped().compared(&next).await;
    next.vm_gone(Stays::WhoeverRestarts);
    assert!(!folder.path().join("doors.json").exists());
}
