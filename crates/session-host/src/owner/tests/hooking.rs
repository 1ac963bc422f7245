//! Real hooks, on a real clock.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dormouse_api::{Fact, SessionEvent};
use dormouse_lifecycle::Generation;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::stage::{Stage, facts, seconds};
use crate::hooks::{Hooks, Job, Reply, Runner, Verdict};

struct Hooked {
    stage: Stage,
    hooks: Hooks,
}

/// A session with hooks of its own and of the machine, which have so much time.
fn hooked(within: Duration) -> Hooked {
    let stage = Stage::new();
    let (hooks, jobs) = Hooks::new();
    for folder in ["hooks.d", "machine"] {
        fs::create_dir(stage.folder.path().join(folder)).unwrap();
    }
    let runner = Runner::new(&facts(stage.folder.path()), stage.served()).within(within);
    tokio::spawn(runner.run(jobs));
    Hooked { stage, hooks }
}

impl Hooked {
    fn path(&self, name: &str) -> PathBuf {
        self.stage.folder.path().join(name)
    }

    /// A hook in `sh`, which starts in the session's folder.
    fn hook(&self, name: &str, script: &str) -> PathBuf {
        let path = self.path(name);
        let folder = self.stage.folder.path().display();
        fs::write(&path, format!("#!/bin/sh\ncd {folder}\n{script}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        path
    }

    async fn tell(&self, fact: Fact) -> Verdict {
        let (reply, verdict) = oneshot::channel();
        let session = "default".parse().unwrap();
        let event = SessionEvent { sequence: 1, at: jiff::Timestamp::UNIX_EPOCH, session, fact };
        self.hooks.tell(Job { event, reply: Reply::Verdict(reply) }).unwrap();
        timeout(seconds(60), verdict).await.expect("a verdict").expect("a runner")
    }

    fn said(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }
}

fn started(generation: u64) -> Fact {
    Fact::VmStarted { generation, how: dormouse_api::How::Cold }
}

fn starting(container: &str) -> Fact {
    Fact::ContainerStarting { generation: 1, container: container.to_owned() }
}

#[tokio::test]
async fn the_machines_hooks_come_first_then_the_sessions_by_name_and_each_gets_the_event() {
    let hooked = hooked(seconds(30));
    hooked.hook("hooks.d/20-second", "echo second $1 >> order");
    hooked.hook("hooks.d/10-first", "echo first $1 $DORM_SESSION >> order; cat > stdin");
    hooked.hook("machine/50-admin", "echo admin $1 >> order");
    fs::set_permissions(hooked.hook("hooks.d/30-off", "echo off >> order"), Permissions::from_mode(0o644))
        .unwrap();
    assert_eq!(hooked.tell(started(3)).await, Verdict::Fine);
    assert_eq!(hooked.said("order"), "admin vm-started\nfirst vm-started default\nsecond vm-started\n");
    let event: SessionEvent = serde_json::from_str(&hooked.said("stdin")).unwrap();
    assert_eq!(event.fact, started(3));
}

#[tokio::test]
async fn a_hook_that_fails_forbids_what_may_be_forbidden_and_is_only_noted_elsewhere() {
    let hooked = hooked(seconds(30));
    hooked.hook("hooks.d/10-no", "echo looked at it >&2; echo not on Sundays >&2; exit 3");
    hooked.hook("hooks.d/20-next", "echo $1 >> next");
    assert_eq!(hooked.tell(starting("web")).await, Verdict::Veto("not on Sundays".to_owned()));
    assert_eq!(hooked.said("next"), "", "who comes later isn't asked any more");
    assert_eq!(hooked.tell(started(1)).await, Verdict::Fine);
    assert_eq!(hooked.said("next"), "vm-started\n");
    let entry = hooked.stage.owner.history().await.pop().unwrap();
    assert_eq!(
        (entry.what.as_str(), entry.reason.as_str()),
        ("hook_failed", "vm-started: the hook 10-no failed: not on Sundays")
    );
}

#[tokio::test]
async fn a_hook_that_hangs_is_killed_with_its_children_and_the_history_names_it() {
    let hooked = hooked(seconds(2));
    hooked.hook("hooks.d/10-hang", "echo $$ > pid; sleep 1000 & echo $! > child; wait");
    hooked.hook("hooks.d/20-late", "echo late >> late");
    assert_eq!(hooked.tell(started(1)).await, Verdict::Fine);
    let entry = hooked.stage.owner.history().await.swap_remove(0);
    assert_eq!(entry.reason, "vm-started: the hook 10-hang hung and was killed after 2 s");
    for file in ["pid", "child"] {
        let pid = hooked.said(file).trim().to_owned();
        assert!(!pid.is_empty(), "it ran");
        let gone = async {
            // A killed child of a killed parent is a zombie until somebody reaps it.
            while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z")) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(seconds(20), gone).await.unwrap_or_else(|_| panic!("{file} lives on"));
    }
    // The next event has its own time.
    assert_eq!(hooked.tell(starting("web")).await, Verdict::Veto("hung and was killed after 2 s".to_owned()));
}

#[tokio::test]
async fn a_hooks_sockets_serve_a_vm_that_is_up_or_nobody_and_die_with_it() {
    let hooked = hooked(seconds(60));
    hooked.hook(
        "hooks.d/10-wait",
        "echo $DORM_SOCKET > socket.new; mv socket.new socket; until [ -e go ]; do sleep 0.05; done",
    );
    let (reply, verdict) = oneshot::channel();
    let session = "default".parse().unwrap();
    let event = SessionEvent { sequence: 1, at: jiff::Timestamp::UNIX_EPOCH, session, fact: started(1) };
    hooked.hooks.tell(Job { event, reply: Reply::Verdict(reply) }).unwrap();
    let socket = async {
        while hooked.said("socket").is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
        PathBuf::from(hooked.said("socket").trim())
    };
    let socket = timeout(seconds(30), socket).await.expect("it runs");
    assert!(socket.with_file_name("docker.sock").exists());
    let mut connection = UnixStream::connect(&socket).await.unwrap();
    let body = r#"{"reason":"from a hook"}"#;
    let text = format!(
        "POST /v1/hold HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: dorm-hold\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(text.as_bytes()).await.unwrap();
    let mut answer = vec![0; 12];
    connection.read_exact(&mut answer).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 503", "there is no VM, and none is started");
    fs::write(hooked.path("go"), "").unwrap();
    assert_eq!(timeout(seconds(30), verdict).await.unwrap().unwrap(), Verdict::Fine);
    assert!(!socket.exists(), "the sockets are gone");
    let mut rest = Vec::new();
    timeout(seconds(30), connection.read_to_end(&mut rest)).await.expect("the connection ends").ok();
    assert_eq!(hooked.stage.owner.present().await.vm.generation, Generation(0).0);
}

#[tokio::test]
async fn hooks_of_the_machine_that_others_than_root_can_write_are_not_run() {
    let hooked = hooked(seconds(30));
    let open = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
    open(&hooked.hook("machine/10-open", "echo open >> ran"));
    hooked.hook("machine/20-fine", "echo fine >> ran");
    assert_eq!(hooked.tell(started(1)).await, Verdict::Fine);
    let as_root = if rustix::process::geteuid().is_root() { "fine\n" } else { "" };
    assert_eq!(hooked.said("ran"), as_root);
    open(&hooked.path("machine"));
    assert_eq!(hooked.tell(started(1)).await, Verdict::Fine);
    assert_eq!(hooked.said("ran"), as_root, "a folder that anybody can write holds nothing of the machine's");
}
