//! A stage for the owner: scripted VMs, guests and hooks, under tokio's stopped clock.
//!
//! Whatever the owner has done comes out as a [`Call`], with what was on disk at that moment; whatever happens to a VM is
//! told by the test. Nothing happens by itself but the passing of time.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use dormouse_agent_proto::{Answer, ProcessFrame, Reply as AgentReply, Request, RunningProcess, Target};
use dormouse_api::link::HostSettings;
use dormouse_api::{CrashPolicy, HistoryEntry, IdleAction, IdleTimeout, Phase, SessionId, SessionInfo};
use dormouse_lifecycle::{
    Ask, Census, Config, Durable, Event, Exit, Generation, HoldKind, Policy, SleepHow, SnapshotFate,
    StartFrom, StartHow,
};
use dormouse_mux::{Agent, Limits, Mux, read_json, read_process_frame, write_json};
use dormouse_vm::Console;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::control;
use crate::docker::{Face, SessionEngine};
use crate::hooks::{self, Job, Jobs, Verdict};
use crate::host::Served;
use crate::lease::Refused;
use crate::machine::Machines;
use crate::owner::{Claimant, Facts, HeldLease, Inbox, Message, Owner, Ready, Started};
use crate::state;

/// Nothing that is waited for takes longer, on the stopped clock.
const LONG: Duration = Duration::from_secs(3 * 3600);

/// What the owner has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// Made anew.
    Start(u64),
    /// Made from the session's snapshot.
    Wake(u64),
    Adopt(u64),
    Cancel(u64),
    ShutDown(Ask),
    Suspend(Ask),
    Kill(u64),
    Resume(u64),
    Doze(u64),
    /// With the order's number.
    Rouse(u64, u64),
    Count(Ask),
}

/// VMs that do nothing by themselves.
#[derive(Debug)]
struct Script {
    folder: std::path::PathBuf,
    calls: mpsc::UnboundedSender<(Call, Durable)>,
    console: watch::Sender<Option<Arc<Console>>>,
}

impl Script {
    fn call(&self, call: Call) {
        let on_disk = state::read(&self.folder).expect("the state can be read");
        let _ = self.calls.send((call, on_disk));
    }
}

impl Machines for Script {
    fn start(&mut self, generation: Generation, from: StartFrom, _: Duration) {
        self.call(match from {
            StartFrom::Fresh => Call::Start(generation.0),
            StartFrom::Snapshot(_) => Call::Wake(generation.0),
        });
    }

    fn adopt(&mut self, generation: Generation, _: Duration) {
        self.call(Call::Adopt(generation.0));
    }

    fn cancel(&mut self, generation: Generation) {
        self.call(Call::Cancel(generation.0));
    }

    fn sleep(&mut self, ask: Ask, how: SleepHow) {
        self.call(match how {
            SleepHow::Stop => Call::ShutDown(ask),
            SleepHow::Suspend => Call::Suspend(ask),
        });
    }

    fn kill(&mut self, generation: Generation) {
        self.call(Call::Kill(generation.0));
    }

    fn resume(&mut self, generation: Generation) {
        self.call(Call::Resume(generation.0));
    }

    fn doze(&mut self, generation: Generation) {
        self.call(Call::Doze(generation.0));
    }

    fn rouse(&mut self, generation: Generation, order: u64) {
        self.call(Call::Rouse(generation.0, order));
    }

    fn count(&mut self, ask: Ask, _: Duration) {
        self.call(Call::Count(ask));
    }

    fn console(&self) -> watch::Receiver<Option<Arc<Console>>> {
        self.console.subscribe()
    }
}

/// What the hooks do when they are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hooked {
    /// They are done at once.
    Fine,
    /// They hang, until they are told to do something else.
    Hang,
    /// They have something against it.
    Veto(&'static str),
}

pub(super) struct Stage {
    pub(super) owner: Owner,
    /// What its host tells and opens beside the engine.
    pub(super) face: Face,
    pub(super) folder: Arc<tempfile::TempDir>,
    calls: mpsc::UnboundedReceiver<(Call, Durable)>,
    /// What was on disk when the latest call was made.
    pub(super) on_disk: Durable,
    pub(super) hooked: watch::Sender<Hooked>,
    /// What the hooks were told, in order.
    told: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
    config: Config,
}

impl Stage {
    /// A session that never had a host.
    pub(super) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(super) fn with(config: Config) -> Self {
        Self::on(Arc::new(tempfile::tempdir().expect("a folder")), config)
    }

    fn on(folder: Arc<tempfile::TempDir>, config: Config) -> Self {
        let path = folder.path().to_owned();
        let (sender, calls) = mpsc::unbounded_channel();
        let facts = facts(&path);
        let face = facts.face.clone();
        let console = watch::channel(None).0;
        let script = Script { folder: path, calls: sender, console };
        let Started { owner, jobs, task } = Owner::start(facts, config, |_| script).expect("an owner");
        let (hooked, told) = (watch::channel(Hooked::Fine).0, Arc::default());
        tokio::spawn(run_hooks(jobs, owner.inbox.clone(), hooked.subscribe(), Arc::clone(&told)));
        Self { owner, face, folder, calls, on_disk: Durable::default(), hooked, told, task, config }
    }

    /// The host dies, and another one takes over from what is on disk.
    pub(super) async fn host_dies(self) -> Self {
        self.task.abort();
        let _ = self.task.await;
        Self::on(self.folder, self.config)
    }

    /// The next thing that the owner has done.
    pub(super) async fn call(&mut self) -> Call {
        let (call, on_disk) = timeout(LONG, self.calls.recv())
            .await
            .expect("the owner does nothing")
            .expect("the owner is gone");
        self.on_disk = on_disk;
        call
    }

    /// Nothing is done for so long.
    pub(super) async fn is_quiet_for(&mut self, time: Duration) {
        if let Ok(call) = timeout(time, self.calls.recv()).await {
            panic!("nothing was to be done for {time:?}, but {call:?}");
        }
    }

    pub(super) fn send(&self, event: Event) {
        self.owner.tell(event);
    }

    pub(super) fn inbox(&self) -> &Inbox {
        &self.owner.inbox
    }

    /// A lease is asked for in a task of its own.
    pub(super) fn ask(&self, policy: Policy) -> JoinHandle<Result<HeldLease, Refused>> {
        self.ask_as(HoldKind::Request, policy)
    }

    pub(super) fn ask_as(&self, kind: HoldKind, policy: Policy) -> JoinHandle<Result<HeldLease, Refused>> {
        let owner = self.owner.clone();
        let claimant = Claimant { kind, policy, owner: "a test".into(), reason: "to see".into() };
        tokio::spawn(async move { owner.lease(claimant).await })
    }

    /// The VM that was ordered comes up, with nothing in it.
    pub(super) fn ready(&self, generation: u64) -> Guest {
        self.ready_as(generation, StartHow::Cold)
    }

    pub(super) fn ready_as(&self, generation: u64, how: StartHow) -> Guest {
        let guest = Guest::new();
        self.comes_up(generation, how, &guest, Vec::new());
        guest
    }

    /// A VM comes up with this guest, in which these processes of an earlier host run.
    pub(super) fn comes_up(
        &self,
        generation: u64,
        how: StartHow,
        guest: &Guest,
        processes: Vec<RunningProcess>,
    ) {
        let (generation, agent) = (Generation(generation), guest.agent());
        let _counted = CancellationToken::new().drop_guard();
        self.inbox().send(Message::Ready(Ready { generation, how, agent, processes, _counted }));
    }

    /// A session whose first VM is up, and the lease that it was started for.
    pub(super) async fn up(&mut self) -> (HeldLease, Guest) {
        let asked = self.ask(Policy::Acquire);
        let Call::Start(generation) = self.call().await else { panic!("a lease starts a VM") };
        let guest = self.ready(generation);
        (granted(asked).await, guest)
    }

    pub(super) fn exits(&self, generation: u64, exit: Exit) {
        self.send(Event::VmExited { generation: Generation(generation), exit });
    }

    pub(super) fn start_fails(&self, generation: u64, reason: &str) {
        let (generation, snapshot) = (Generation(generation), SnapshotFate::Void);
        self.send(Event::StartFailed { generation, reason: reason.into(), snapshot });
    }

    /// The engine answers the question of the call.
    pub(super) fn counted(&self, call: Call, census: Census) {
        let Call::Count(ask) = call else { panic!("{call:?} is no question") };
        self.send(Event::ContainersCounted { ask, census: Some(census) });
    }

    /// An idle VM is put to sleep up to the order to shut it down.
    pub(super) async fn falls_asleep(&mut self) -> Ask {
        let count = self.call().await;
        self.counted(count, Census::default());
        match self.call().await {
            Call::ShutDown(ask) => ask,
            other => panic!("{other:?} puts no VM to sleep"),
        }
    }

    pub(super) async fn becomes(&self, phase: Phase) -> SessionInfo {
        let mut info = self.owner.info();
        let reached = timeout(LONG, info.wait_for(|info| info.vm.phase == phase)).await;
        reached.unwrap_or_else(|_| panic!("it never becomes {phase:?}")).expect("the owner lives").clone()
    }

    pub(super) async fn phase(&self) -> Phase {
        self.owner.present().await.vm.phase
    }

    /// The history's entries, as words.
    pub(super) async fn history(&self) -> Vec<String> {
        let word = |HistoryEntry { what, generation, .. }: HistoryEntry| format!("{what} {generation}");
        self.owner.history().await.into_iter().map(word).collect()
    }

    /// What the hooks were told so far.
    pub(super) async fn told(&self) -> Vec<String> {
        timeout(LONG, self.owner.hooks_done()).await.expect("hooks hang");
        self.told.lock().expect("no panic").clone()
    }

    /// What connections are served with.
    pub(super) fn served(&self) -> Served {
        Served {
            owner: self.owner.clone(),
            face: facts(self.folder.path()).face,
            console: watch::channel(None).1,
            client: "pid 1 (test)".into(),
            policy: Policy::Acquire,
            end: CancellationToken::new(),
        }
    }

    /// The engine as a client of this kind sees it.
    pub(super) fn engine(&self, policy: Policy) -> SessionEngine {
        let Served { owner, face, client, .. } = self.served();
        SessionEngine { owner, face, client, policy }
    }

    /// A connection to the control socket.
    pub(super) fn connect(&self) -> DuplexStream {
        let (client, server) = duplex(64 * 1024);
        let service = TowerToHyperService::new(control::router(self.served()));
        tokio::spawn(async move {
            let builder = hyper::server::conn::http1::Builder::new();
            let _ = builder.serve_connection(TokioIo::new(server), service).with_upgrades().await;
        });
        client
    }
}

/// A session with all that it has in one folder.
pub(crate) fn facts(folder: &std::path::Path) -> Facts {
    let settings = HostSettings {
        id: SessionId::from_random(1),
        name: "default".parse().expect("a name"),
        owner: 0,
        storage: folder.to_owned(),
        ephemeral: false,
        temporary: false,
        idle_timeout: IdleTimeout::default(),
        doze_seconds: 0,
        idle_action: IdleAction::Stop,
        hostname: "default".to_owned(),
        machine_hooks: folder.join("machine"),
        folder_rules: folder.join("rules"),
        own_folders: Vec::new(),
        crash: CrashPolicy::Reopen,
        boot_timeout_seconds: 300,
        running: dormouse_api::RunningContainers::Hold,
        asleep_answers: true,
        registries: dormouse_api::Registries::default(),
        publish_address: std::net::Ipv4Addr::LOCALHOST.into(),
        engine: None,
        cpus: 1,
        memory_mib: 512,
        storage_bytes: 1 << 30,
        network: dormouse_api::NetworkKind::None,
    };
    let face = Face::load(folder, &settings, Vec::new());
    Facts { settings, session_dir: folder.to_owned(), runtime_dir: folder.to_owned(), face }
}

async fn run_hooks(
    mut jobs: Jobs,
    inbox: Inbox,
    mut hooked: watch::Receiver<Hooked>,
    told: Arc<Mutex<Vec<String>>>,
) {
    while let Some(Job { event, reply }) = jobs.next().await {
        let name = match event.fact.generation() {
            Some(generation) => format!("{} {generation}", event.fact.name()),
            None => event.fact.name().to_owned(),
        };
        told.lock().expect("no panic").push(name);
        let verdict = match hooked.wait_for(|hooked| *hooked != Hooked::Hang).await.as_deref() {
            Ok(Hooked::Veto(words)) => Verdict::Veto((*words).to_owned()),
            Ok(Hooked::Fine | Hooked::Hang) | Err(_) => Verdict::Fine,
        };
        hooks::answer(&inbox, reply, verdict);
        jobs.done();
    }
}

/// The lease that was asked for.
pub(super) async fn granted(asked: JoinHandle<Result<HeldLease, Refused>>) -> HeldLease {
    timeout(LONG, asked).await.expect("nobody answers").expect("no panic").expect("it is granted")
}

/// Why it was refused.
pub(super) async fn refused(asked: JoinHandle<Result<HeldLease, Refused>>) -> Refused {
    timeout(LONG, asked).await.expect("nobody answers").expect("no panic").expect_err("it is refused")
}

/// Sends an HTTP request and reads the answer's head and, where it has a length, its body.
pub(super) async fn request(connection: &mut DuplexStream, line: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    let text = format!(
        "{line} HTTP/1.1\r\nHost: session\r\n{headers}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    connection.write_all(text.as_bytes()).await.expect("it is there");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(timeout(LONG, connection.read_u8()).await.expect("no answer").expect("an answer"));
    }
    let head = String::from_utf8(answer).expect("text").to_ascii_lowercase();
    let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next()?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    connection.read_exact(&mut body).await.expect("a body");
    head + &String::from_utf8(body).expect("text")
}

/// Lets so much time pass.
pub(super) async fn pass(time: Duration) {
    sleep(time).await;
}

pub(super) async fn took<T>(what: impl Future<Output = T>) -> (T, Duration) {
    let start = Instant::now();
    (what.await, start.elapsed())
}

pub(super) fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A guest behind a channel in memory: it lists what it is told to, and runs one process at a time.
pub(super) struct Guest {
    agent: Agent,
    /// States of its containers.
    pub(super) containers: Arc<Mutex<Vec<&'static str>>>,
    /// Whether each exec in its first container runs.
    pub(super) execs: Arc<Mutex<Vec<bool>>>,
    /// What its process does.
    pub(super) process: watch::Sender<Process>,
    /// Signals that its process got.
    pub(super) signals: Arc<Mutex<Vec<i32>>>,
}

/// A process in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Process {
    /// It runs until it gets SIGHUP.
    Obeys,
    /// It runs until it gets SIGKILL.
    Stubborn,
    /// It has ended by itself.
    Ended,
}

impl Guest {
    fn new() -> Self {
        Self::with(&[])
    }

    /// A guest with containers in these states.
    pub(super) fn with(states: &[&'static str]) -> Self {
        let (host, guest) = duplex(1024 * 1024);
        let guest = Mux::server(guest, Limits::AGENT);
        let containers = Arc::new(Mutex::new(states.to_vec()));
        let execs = Arc::default();
        let process = watch::channel(Process::Obeys).0;
        let signals = Arc::new(Mutex::new(Vec::new()));
        let engine = Engine { containers: Arc::clone(&containers), execs: Arc::clone(&execs) };
        let stage = (engine, process.clone(), Arc::clone(&signals));
        tokio::spawn(async move {
            while let Some(stream) = guest.accept().await {
                let (engine, process, signals) = stage.clone();
                tokio::spawn(serve(stream, engine, process.subscribe(), signals));
            }
        });
        let mux = Mux::client(host, Limits::AGENT);
        Self { agent: Agent::new(mux.clone(), mux), containers, execs, process, signals }
    }

    pub(super) fn agent(&self) -> Agent {
        self.agent.clone()
    }
}

/// The address of a container that takes no connection.
pub(super) const PAUSED: &str = "172.17.0.9";

/// What the guest's engine tells.
#[derive(Clone)]
struct Engine {
    containers: Arc<Mutex<Vec<&'static str>>>,
    execs: Arc<Mutex<Vec<bool>>>,
}

impl Engine {
    fn answer(&self, path: &str) -> serde_json::Value {
        let execs = self.execs.lock().expect("no panic");
        let number = |prefix: &str| path.strip_prefix(prefix)?.strip_suffix("/json")?.parse::<usize>().ok();
        if let Some(exec) = number("/exec/") {
            return serde_json::json!({ "Running": execs.get(exec) });
        }
        if let Some(container) = number("/containers/") {
            let of_it = if container == 0 { execs.len() } else { 0 };
            let ids: Vec<_> = (0..of_it).map(|exec| exec.to_string()).collect();
            return serde_json::json!({ "ExecIDs": ids });
        }
        let containers = self.containers.lock().expect("no panic");
        let entry = |(id, state): (usize, &&str)| serde_json::json!({ "Id": id.to_string(), "State": state });
        containers.iter().enumerate().map(entry).collect()
    }
}

async fn serve(
    mut stream: dormouse_mux::Stream,
    engine: Engine,
    process: watch::Receiver<Process>,
    signals: Arc<Mutex<Vec<i32>>>,
) {
    let Ok(asked) = read_json::<Request>(&mut stream).await else { return };
    match asked {
        // As long as the host waits for it.
        Request::Dial(Target::Tcp(address)) if address.starts_with(PAUSED) => stream_ends(stream).await,
        Request::Dial(Target::Tcp(address)) => {
            let _ = write_json(&mut stream, &AgentReply::Ok(Answer::Done)).await;
            let _ = stream.write_all(format!("{address} ").as_bytes()).await;
            echo(stream).await;
        }
        Request::Dial(Target::Udp(_)) => {
            let _ = write_json(&mut stream, &AgentReply::Ok(Answer::Done)).await;
            echo(stream).await;
        }
        Request::Dial(_) => {
            let _ = write_json(&mut stream, &AgentReply::Ok(Answer::Done)).await;
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else { return };
                head.push(byte);
            }
            let head = String::from_utf8_lossy(&head).into_owned();
            let body = engine.answer(head.split(' ').nth(1).unwrap_or_default());
            let _ = stream.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{body}").as_bytes()).await;
            let _ = stream.shutdown().await;
        }
        Request::Run(_) => {
            let _ = write_json(&mut stream, &AgentReply::Ok(Answer::Running { pid: 7 })).await;
            run(stream, process, signals).await;
        }
        _ => drop(write_json(&mut stream, &AgentReply::Ok(Answer::Done)).await),
    }
}

/// Says nothing until the host gives up.
async fn stream_ends(mut stream: dormouse_mux::Stream) {
    let mut nothing = [0; 1];
    let _ = stream.read(&mut nothing).await;
}

/// Gives back what it is sent.
async fn echo(stream: dormouse_mux::Stream) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let _ = tokio::io::copy(&mut reader, &mut writer).await;
    let _ = writer.shutdown().await;
}

async fn run(stream: dormouse_mux::Stream, process: watch::Receiver<Process>, signals: Arc<Mutex<Vec<i32>>>) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut buffer = Vec::new();
    let mut ended = process.clone();
    let status = loop {
        let frame = tokio::select! {
            frame = read_process_frame(&mut reader, &mut buffer) => frame,
            _ = ended.wait_for(|process| *process == Process::Ended) => break 0,
        };
        match frame {
            Ok(Some(ProcessFrame::Signal(signal))) => {
                signals.lock().expect("no panic").push(signal);
                if signal == 9 || *process.borrow() == Process::Obeys {
                    break 128 + signal;
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                let _ = ended.wait_for(|process| *process == Process::Ended).await;
                break 0;
            }
        }
    };
    let _ = writer.write_all(&ProcessFrame::Exit(status).encode()).await;
    let _ = writer.shutdown().await;
}
