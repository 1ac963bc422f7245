//! The service itself: what it makes of requests, and of what earlier services left. Guests are of a few bytes and never
//! say hello, so their VMs stay in the phase `starting`.

use std::fs;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dormouse_api::link::{ToHost, ToService};
use dormouse_api::{
    CreateSession, IdleTimeout, Phase, SessionInfo, SessionState, TerminationReason, Version, Wake,
};
use dormouse_client::Endpoint;
use dormouse_vm::VmRecord;
use dormouse_vm_tests::client::Client;
use dormouse_vm_tests::fake;
use dormouse_vm_tests::stage::{STATE_WITHIN, Stage, host_of, program, qemu_of, runtime, until};
use http::Method;
use jiff::Timestamp;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};

/// How often a service is ended, each time a moment later after a host's last client.
const ENDS: u32 = 250;

/// How long one may take whose sessions have no VM.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

fn stage(images: &Path) -> Result<Stage> {
    fake::publish(images)?;
    Stage::with(&[("DORM_IMAGES", images.into())])
}

fn wish() -> Result<CreateSession> {
    let mut wish = CreateSession::named("a".parse()?);
    wish.memory_mib = Some(64);
    wish.cpus = Some(1);
    wish.idle_timeout = IdleTimeout::Seconds(1);
    Ok(wish)
}

/// Waits for a state that nothing announces.
async fn eventually(what: &str, mut reached: impl FnMut() -> Result<bool>) -> Result<()> {
    let wait = async {
        while !reached()? {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    tokio::time::timeout(STATE_WITHIN, wait).await.with_context(|| format!("never: {what}"))?
}

/// Knocks, and waits until there is a VM.
async fn starting(stage: &Stage, session: &SessionInfo) -> Result<Child> {
    let client = stage.docker(session, &["ps"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    until(session, |info| info.vm.phase == Phase::Starting && info.vm.step.is_some()).await?;
    Ok(client)
}

fn is_alive(pid: Pid) -> bool {
    // One that nobody has reaped yet is gone all the same.
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, fields)| !fields.trim_start().starts_with('Z'))
}

fn folders(stage: &Stage, folder: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(stage.home().join(folder))?;
    let entries = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(entries.into_iter().filter(|path| path.is_dir()).collect())
}

/// A session's host that says what it likes.
struct ForgedHost {
    lines: BufReader<UnixStream>,
    _sockets: [UnixListener; 2],
}

impl ForgedHost {
    /// Takes the place of a session's host while there is no service, and waits for the next one.
    fn attach(stage: &mut Stage, session: &SessionInfo) -> Result<Self> {
        stage.stop_service()?;
        let bind = |name: &str| {
            let path = runtime(stage, session).join(name);
            let _ = fs::remove_file(&path);
            UnixListener::bind(path)
        };
        let (service, sockets) = (bind("service.sock")?, [bind("docker.sock")?, bind("control.sock")?]);
        stage.start_service()?;
        let (stream, _) = service.accept()?;
        stream.set_read_timeout(Some(STATE_WITHIN))?;
        let mut host = Self { lines: BufReader::new(stream), _sockets: sockets };
        let ToHost::Attach { listeners: true, .. } = host.hear()? else { bail!("the service didn't attach") };
        let attached = ToService::Attached { version: "forged".to_owned(), info: Box::new(session.clone()) };
        let line = serde_json::to_string(&attached)? + "\n";
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = host._sockets.each_ref().map(AsFd::as_fd);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let sent = sendmsg(
            host.lines.get_ref(),
            &[IoSlice::new(line.as_bytes())],
            &mut control,
            SendFlags::empty(),
        )?;
        ensure!(sent == line.len());
        Ok(host)
    }

    fn say(&mut self, line: &str) -> Result<ToHost> {
        self.lines.get_mut().write_all(format!("{line}\n").as_bytes())?;
        self.hear()
    }

    fn hear(&mut self) -> Result<ToHost> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("the service said {line:?}"))
    }
}

/// It is that of whoever names none; any other waits for `dorm session start`.
#[tokio::test]
async fn the_default_session_is_opened_again_by_the_next_command_that_wants_its_engine() -> Result<()> {
    let images = tempfile::tempdir()?;
    let stage = stage(images.path())?;
    for (name, opens) in [("default", true), ("other", false)] {
        let mut wish = wish()?;
        wish.name = name.parse()?;
        let session = stage.make(&wish).await?;
        Endpoint::new(&session.control_socket).post::<SessionInfo>("/v1/session/terminate").await?;
        until(&session, |info| info.state == SessionState::Terminated).await?;
        let mut hold = tokio::process::Command::new(program("dorm"));
        hold.args(["--session", name, "hold", "--", "true"])
            .env("DORM_HOME", stage.home())
            .kill_on_drop(true);
        if opens {
            let _holds = hold.spawn()?;
            until(&session, |info| info.state == SessionState::Running && info.incarnation == 2).await?;
        } else {
            let refused = tokio::time::timeout(STATE_WITHIN, hold.output()).await??;
            let words = String::from_utf8_lossy(&refused.stderr).into_owned();
            ensure!(!refused.status.success() && words.contains("dorm session start"), "{words}");
        }
        stage.remove(name).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_forged_request_for_a_vm_changes_nothing_about_it() -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut stage = stage(images.path())?;
    let session = stage.make(&wish()?).await?;
    let mut host = ForgedHost::attach(&mut stage, &session)?;
    let id = session.id.as_str();

    let made = host.say(
        &format!(
            r#"{{"make_vm": {{"session": "{id}", "generation": 1, "owner": 0, "memory_mib": 4096, "cpus": 64,
            "storage": "/etc", "data_disk": "/etc/passwd", "network": "user", "runtime_dir": "/tmp"}}}}"#
        )
        .replace('\n', " "),
    )?;
    ensure!(matches!(made, ToHost::Made { generation: 1, .. }), "{made:?}");
    let record = VmRecord::read(&runtime(&stage, &session))?.context("there is no VM")?;
    let line = fs::read(format!("/proc/{}/cmdline", qemu_of(&stage, &session)?.as_raw_nonzero()))?;
    let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let after = |option: &str| {
        let at = words.iter().position(|word| word == option)?;
        words.get(at + 1).map(ToString::to_string)
    };
    ensure!(after("-m").as_deref() == Some("64M") && after("-smp").as_deref() == Some("1"), "{words:?}");
    let disk = session.storage.path.join("data.raw");
    ensure!(words.iter().any(|word| word.contains(&*disk.to_string_lossy())), "{words:?}");
    ensure!(!words.iter().any(|word| word.contains("passwd") || word.contains("user,")), "{words:?}");

    // Neither another session's VM, nor one more, nor this one again.
    for (session, generation, words) in [
        ("00000000000000aa", 2, "of its own session only"),
        (id, 2, "has a VM that is up, generation 1"),
        (id, 1, "has a VM that is up, generation 1"),
    ] {
        let line = format!(r#"{{"make_vm": {{"session": "{session}", "generation": {generation}}}}}"#);
        match host.say(&line)? {
            ToHost::NotMade { generation: answered, reason } => {
                ensure!(answered == generation && reason.contains(words), "{reason}");
            }
            other => bail!("{line} was answered {other:?}"),
        }
    }
    ensure!(VmRecord::read(&runtime(&stage, &session))?.as_ref() == Some(&record));
    ensure!(record.memory_file.exists() && record.is_up()?);

    // What is no message ends the link, and nothing else.
    ensure!(host.say("make me root").is_err());
    let version: Version = stage.service().get("/v1/version").await?;
    ensure!(version.pid == u32::try_from(stage.service_pid().as_raw_nonzero().get())?);
    Ok(())
}

/// Makes a temporary session; it lives as long as the connection.
#[tokio::test]
async fn a_host_that_was_let_go_and_stays_all_the_same_is_told_what_was_ordered_meanwhile() -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut stage = stage(images.path())?;
    let session = stage.make(&wish()?).await?;
    let mut host = ForgedHost::attach(&mut stage, &session)?;
    ensure!(host.say("\"leave\"")? == ToHost::Go);
    kill_process(stage.service_pid(), Signal::TERM)?;
    let socket = stage.home().join("run/dormd.sock");
    eventually("the service ends", || Ok(!socket.exists())).await?;
    ensure!(host.say("\"stays\"")? == ToHost::Shutdown);
    drop(host);
    stage.stop_service()
}

async fn temporary(stage: &Stage) -> Result<(SessionInfo, dormouse_client::Upgraded)> {
    use tokio::io::AsyncReadExt;
    let mut wish = wish()?;
    wish.temporary = true;
    let service = stage.service();
    let mut connection = service.upgrade(http::Method::POST, "/v1/sessions", &wish, "dorm-session").await?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.push(connection.read_u8().await?);
    }
    Ok((serde_json::from_slice(&line)?, connection))
}

#[tokio::test]
async fn a_temporary_session_ends_with_the_connection_that_made_it_and_leaves_nothing() -> Result<()> {
    let images = tempfile::tempdir()?;
    let stage = stage(images.path())?;
    let (session, connection) = temporary(&stage).await?;
    let mut client = starting(&stage, &session).await?;
    let qemu = qemu_of(&stage, &session)?;
    let ended = until(&session, |info| info.termination.is_some() && info.vm.phase == Phase::Absent);
    let close = async {
        drop(connection);
        Ok(())
    };
    let (ended, ()) = tokio::try_join!(ended, close)?;
    let end = ended.termination.context("there is no reason")?;
    ensure!(end.reason == TerminationReason::Shutdown, "{end:?}");
    ensure!(end.details.contains("connection that made the session"), "{end:?}");
    ensure!(!client.wait()?.success());
    eventually("the session is gone", || {
        Ok(folders(&stage, "data/sessions")?.is_empty() && folders(&stage, "run")?.is_empty())
    })
    .await?;
    ensure!(!is_alive(qemu));
    let sessions: Vec<SessionInfo> = stage.service().get("/v1/sessions").await?;
    ensure!(sessions.is_empty(), "{sessions:?}");
    Ok(())
}

#[tokio::test]
async fn what_a_killed_service_leaves_half_done_is_finished_by_the_next() -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut stage = stage(images.path())?;
    let (_, connection) = temporary(&stage).await?;
    let mut lasting = wish()?;
    lasting.name = "going".parse()?;
    let going = stage.make(&lasting).await?;
    lasting.name = "staying".parse()?;
    let staying = stage.make(&lasting).await?;
    let mut client = starting(&stage, &going).await?;
    let (qemu, host) = (qemu_of(&stage, &going)?, host_of(&going)?);

    stage.kill_service()?;
    kill_process(host, Signal::KILL)?;
    client.wait()?;
    drop(connection);
    let sessions = stage.home().join("data/sessions");
    // As if it had been killed while it removed one session, made another, and after it had removed a third.
    fs::rename(sessions.join(going.id.as_str()), sessions.join(format!("{}.removed", going.id)))?;
    fs::create_dir(sessions.join("00000000000000aa.new"))?;
    fs::create_dir(stage.home().join("run/00000000000000bb"))?;
    ensure!(is_alive(qemu), "a VM outlives service and host");

    stage.start_service()?;
    eventually("everything half-done is gone", || {
        let run = folders(&stage, "run")?;
        Ok(folders(&stage, "data/sessions")? == [sessions.join(staying.id.as_str())]
            && run == [runtime(&stage, &staying)]
            && !is_alive(qemu))
    })
    .await?;
    let left: Vec<SessionInfo> = stage.service().get("/v1/sessions").await?;
    ensure!(left.len() == 1 && left[0].name == staying.name, "{left:?}");
    ensure!(staying.storage.path.join("data.raw").exists());
    Ok(())
}

#[tokio::test]
async fn a_start_whose_host_or_service_is_killed_leaves_no_vm() -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut stage = stage(images.path())?;
    let mut wish = wish()?;
    wish.boot_timeout_seconds = Some(3);
    for kill_service in [false, true] {
        wish.name = if kill_service { "both" } else { "host" }.parse()?;
        let session = stage.make(&wish).await?;
        let mut client = starting(&stage, &session).await?;
        let (qemu, host) = (qemu_of(&stage, &session)?, host_of(&session)?);
        if kill_service {
            stage.kill_service()?;
        }
        kill_process(host, Signal::KILL)?;
        client.wait()?;
        if kill_service {
            stage.start_service()?;
        }
        // Whoever looks at the session next finds what is left; that needs no client.
        eventually("the VM is gone", || Ok(!is_alive(qemu))).await?;
        let asleep = until(&session, |info| info.vm.phase == Phase::Absent).await?;
        ensure!(asleep.vm.start_count == 0, "{asleep:?}");
        let left = fs::read_dir(runtime(&stage, &session))?;
        let left: Vec<_> =
            left.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?;
        ensure!(!left.iter().any(|name| name.to_string_lossy().starts_with("vm")), "{left:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_removed_session_leaves_nothing_and_its_sockets_are_gone() -> Result<()> {
    let images = tempfile::tempdir()?;
    let stage = stage(images.path())?;
    let session = stage.make(&wish()?).await?;
    let mut client = starting(&stage, &session).await?;
    let qemu = qemu_of(&stage, &session)?;
    stage.service().call::<_, ()>(http::Method::DELETE, "/v1/sessions/a", &()).await?;
    ensure!(!client.wait()?.success());
    ensure!(folders(&stage, "data/sessions")?.is_empty() && folders(&stage, "run")?.is_empty());
    ensure!(!is_alive(qemu));
    ensure!(Endpoint::new(&session.control_socket).get::<SessionInfo>("/v1/session").await.is_err());
    // The service alone.
    eventually("the host is gone", || Ok(stage.processes()?.len() == 1)).await
}

#[tokio::test]
async fn an_ephemeral_sessions_vm_has_its_disk_and_its_memory_in_memory_without_a_name() -> Result<()> {
    let images = tempfile::tempdir()?;
    let stage = stage(images.path())?;
    let mut wish = wish()?;
    wish.ephemeral = true;
    wish.boot_timeout_seconds = Some(60);
    wish.storage = Some(stage.home().join("store"));
    let refusal = stage.make(&wish).await.err().context("it has a use for storage")?;
    ensure!(refusal.to_string().contains("has no use for storage"), "{refusal}");
    wish.storage = None;
    let session = stage.make(&wish).await?;
    let mut client = starting(&stage, &session).await?;
    let qemu = qemu_of(&stage, &session)?.as_raw_nonzero();

    // The names that QEMU's files have now, or had.
    let mut names = Vec::new();
    for entry in fs::read_dir(format!("/proc/{qemu}/fd"))? {
        names.push(fs::read_link(entry?.path())?.to_string_lossy().into_owned());
    }
    ensure!(names.iter().any(|name| name.contains("memfd:dormouse-data")), "{names:?}");
    let maps = fs::read_to_string(format!("/proc/{qemu}/maps"))?;
    let memory: Vec<_> = maps.lines().filter(|line| line.contains(session.id.as_str())).collect();
    ensure!(!memory.is_empty(), "the guest's memory is nowhere: {maps}");
    ensure!(
        memory.iter().all(|line| line.contains("/dev/shm/") && line.ends_with("(deleted)")),
        "{memory:?}"
    );
    let stored = fs::read_dir(&session.storage.path)?.map(|entry| Ok(entry?.file_name()));
    let stored = stored.collect::<Result<Vec<_>>>()?;
    ensure!(!stored.iter().any(|name| name == "data.raw" || name == "memory"), "{stored:?}");

    stage.service().call::<_, ()>(http::Method::DELETE, "/v1/sessions/a", &()).await?;
    ensure!(!client.wait()?.success());
    let left = fs::read_dir("/dev/shm")?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let left = left.collect::<Result<Vec<_>>>()?;
    ensure!(!left.iter().any(|name| name.contains(session.id.as_str())), "{left:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wake_that_was_set_is_made_up_for_when_its_time_passed_without_a_service() -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut stage = stage(images.path())?;
    let session = stage.make(&wish()?).await?;
    let at = Timestamp::now().checked_add(Duration::from_secs(1))?;
    for every_seconds in [None, Some(3600)] {
        let wake = Wake { at, every_seconds };
        let set = stage.service().call::<_, SessionInfo>(Method::POST, "/v1/sessions/a/wakes", &wake).await?;
        ensure!(set.wakes.contains(&wake), "{:?}", set.wakes);
    }
    stage.stop_service()?;
    eventually("the time has come", || Ok(Timestamp::now() > at)).await?;
    stage.start_service()?;
    until(&session, |info| info.vm.phase == Phase::Starting).await?;
    let now: SessionInfo = stage.service().get("/v1/sessions/a").await?;
    let next = Wake { at: at.checked_add(Duration::from_secs(3600))?, every_seconds: Some(3600) };
    ensure!(now.wakes == [next], "{:?}", now.wakes);
    let cleared: SessionInfo = stage.service().call(Method::DELETE, "/v1/sessions/a/wakes", &()).await?;
    ensure!(cleared.wakes.is_empty(), "{:?}", cleared.wakes);
    let hectic = Wake { at, every_seconds: Some(1) };
    let refused = stage.service().call::<_, SessionInfo>(Method::POST, "/v1/sessions/a/wakes", &hectic).await;
    ensure!(refused.is_err_and(|error| error.to_string().contains("60 s is the least")));
    // It was being made.
    let asked = Instant::now();
    stage.stop_service()?;
    ensure!(asked.elapsed() < ENDS_WITHIN, "it took {:?} to end", asked.elapsed());
    ensure!(stage.processes()?.is_empty(), "{:?} are left", stage.processes()?);
    Ok(())
}

/// Whatever a session's host is doing at that moment: starting, serving, asking to leave, ending.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_whose_hosts_come_and_go_ends_as_soon_as_it_is_asked_to() -> Result<()> {
    let images = tempfile::tempdir()?;
    fake::publish(images.path())?;
    let mut stage = Stage::with(&[("DORM_IMAGES", images.path().into()), ("DORM_LINGER", "0".into())])?;
    let session = stage.make(&wish()?).await?;
    for round in 0..ENDS {
        ensure!(Client::connect(&session.docker_socket)?.ask("GET", "/_ping")?.status == 200);
        // A host has asked to leave, and is gone, a few milliseconds after its client.
        std::thread::park_timeout(Duration::from_micros(20) * (round % 250));
        let asked = Instant::now();
        stage.stop_service()?;
        let took = asked.elapsed();
        ensure!(took < ENDS_WITHIN, "round {round}: it took {took:?} to end\n{}", stage.logs(&session));
        eventually("its hosts are gone too", || Ok(stage.processes()?.is_empty())).await?;
        stage.start_service()?;
    }
    Ok(())
}
