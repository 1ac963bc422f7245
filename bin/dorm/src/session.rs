//! The commands about sessions.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use dormouse_api::{
    CreateSession, HistoryEntry, Hold, Phase, SessionInfo, SessionName, SessionState, SleepAnswer,
};
use dormouse_client::{Endpoint, Home, JsonLines, Service};

use crate::arguments::{Format, Session, Wanted};
use crate::error::Failure;

type Done = Result<ExitCode, Failure>;

async fn service() -> Result<Service, Failure> {
    Ok(Service::connect_or_start(&Home::from_env()?).await?)
}

/// The session's own service. A knock there starts its host, not its VM.
async fn control(name: &SessionName) -> Result<Endpoint, Failure> {
    Ok(Endpoint::new(service().await?.open(name).await?.control_socket))
}

fn print(text: impl AsRef<str>) -> Done {
    writeln!(io::stdout(), "{}", text.as_ref())?;
    Ok(ExitCode::SUCCESS)
}

fn print_json(value: &impl serde::Serialize) -> Done {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::Local(error.to_string()))?;
    print(text)
}

/// Runs one of the commands under `dorm session`. `default` is the session of the global option.
pub(crate) async fn run(default: SessionName, command: Session) -> Done {
    let pick = |name: Option<SessionName>| name.unwrap_or(default.clone());
    match command {
        Session::Create(create) => {
            let info = service().await?.create(&CreateSession::from(create)).await?;
            print(info.name.as_str())
        }
        Session::Ls { format } => list(format).await,
        Session::Inspect { name, format } => inspect(&pick(name), format).await,
        Session::Start { name } => {
            let info: SessionInfo = control(&pick(name)).await?.post("/v1/session/start").await?;
            print(info.name.as_str())
        }
        Session::Terminate { name } => {
            let info: SessionInfo = control(&pick(name)).await?.post("/v1/session/terminate").await?;
            print(info.name.as_str())
        }
        Session::Rm { name } => {
            service().await?.remove(&name).await?;
            print(name.as_str())
        }
        Session::Sleep { name } => sleep(&pick(name)).await,
        Session::DockerHost { name } => {
            let info = service().await?.open(&pick(name)).await?;
            print(format!("unix://{}", info.docker_socket.display()))
        }
        Session::Logs { name, follow, .. } => logs(&pick(name), follow).await,
        Session::History { name } => history(&pick(name)).await,
        Session::Wait { name, r#for } => wait(&pick(name), r#for).await,
    }
}

async fn list(format: Format) -> Done {
    let sessions = service().await?.sessions().await?;
    match format {
        Format::Json => print_json(&sessions),
        Format::Table => {
            let mut out = io::stdout().lock();
            writeln!(out, "{:<20} {:<12} {:<10} {:>6}  STORAGE", "NAME", "STATE", "VM", "STARTS")?;
            for info in sessions {
                let (name, starts) = (info.name.as_str(), info.vm.start_count);
                let storage = info.storage.path.display();
                writeln!(out, "{name:<20} {:<12} {:<10} {starts:>6}  {storage}", state(&info), phase(&info))?;
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn inspect(name: &SessionName, format: Format) -> Done {
    let info = service().await?.inspect(name).await?;
    match format {
        Format::Json => print_json(&info),
        Format::Table => {
            let holds: Vec<_> =
                info.holds.iter().map(|hold| format!("{} ({})", hold.owner, hold.reason)).collect();
            print(format!(
                "{}: {}, VM {}; held by: {}",
                info.name,
                state(&info),
                phase(&info),
                holds.join(", ")
            ))
        }
    }
}

fn state(info: &SessionInfo) -> &'static str {
    match info.state {
        SessionState::Running => "running",
        SessionState::Terminating => "terminating",
        SessionState::Terminated => "terminated",
    }
}

fn phase(info: &SessionInfo) -> &'static str {
    match info.vm.phase {
        Phase::Absent => "asleep",
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Counting => "counting",
        Phase::Committed => "committed",
        Phase::Stopping => "stopping",
    }
}

async fn sleep(name: &SessionName) -> Done {
    match control(name).await?.post("/v1/session/sleep").await? {
        SleepAnswer::NoVm => print("no VM: it was asleep already"),
        SleepAnswer::Asleep { generation } => print(format!("asleep: VM {generation} is gone")),
        SleepAnswer::Busy { holds } => {
            let holds: Vec<_> =
                holds.iter().map(|hold| format!("{} ({})", hold.owner, hold.reason)).collect();
            Err(Failure::Local(format!("held awake by {}", holds.join(", "))))
        }
        SleepAnswer::Disabled => {
            Err(Failure::Local("this session never sleeps: its data is in memory".to_owned()))
        }
        SleepAnswer::Failed { reason } => Err(Failure::Local(format!("the sleep failed: {reason}"))),
    }
}

async fn logs(name: &SessionName, follow: bool) -> Done {
    let mut lines = control(name).await?.lines(&format!("/v1/console?follow={follow}")).await?;
    while let Some(bytes) = lines.bytes().await? {
        let mut out = io::stdout().lock();
        out.write_all(&bytes)?;
        out.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn history(name: &SessionName) -> Done {
    let entries: Vec<HistoryEntry> = control(name).await?.get("/v1/history").await?;
    let mut out = io::stdout().lock();
    for entry in entries {
        let HistoryEntry { at, what, generation, how, duration_ms, reason } = entry;
        writeln!(out, "{at:.0}  {what:<12} {generation:>4}  {how:<8} {duration_ms:>7} ms  {reason}")?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn wait(name: &SessionName, wanted: Wanted) -> Done {
    let path = format!("/v1/session/wait?for={}", wanted.as_str());
    let info: SessionInfo = control(name).await?.get(&path).await?;
    print(phase(&info))
}

/// Holds the VM awake while a command runs, and ends with the command's status.
pub(crate) async fn hold(name: SessionName, reason: Option<String>, command: Vec<String>) -> Done {
    let info = service().await?.open(&name).await?;
    let progress = tokio::spawn(tell_progress(Service::watch(&info).await?));
    let hold = Hold { reason: reason.unwrap_or_else(|| command.join(" ")) };
    let held = Endpoint::new(&info.control_socket).hold(&hold).await;
    progress.abort();
    let held = held?;
    let (program, arguments) =
        command.split_first().ok_or_else(|| Failure::Local("no command".to_owned()))?;
    let status = tokio::process::Command::new(program)
        .args(arguments)
        .env("DOCKER_HOST", format!("unix://{}", info.docker_socket.display()))
        .status()
        .await
        .map_err(|error| Failure::Local(format!("can't run {program:?}: {error}")))?;
    drop(held);
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

/// Tells the steps of a start, to people only.
async fn tell_progress(mut changes: JsonLines) {
    let mut last = None;
    while let Ok(Some(info)) = changes.next::<SessionInfo>().await {
        if info.vm.phase == Phase::Starting && info.vm.step != last && io::stderr().is_terminal() {
            eprintln!("starting the VM: {}", info.vm.step.as_deref().unwrap_or("QEMU"));
            last = info.vm.step;
        }
    }
}

/// The versions of this program and of the service.
pub(crate) async fn version() -> Done {
    print(format!("dorm {}", env!("CARGO_PKG_VERSION")))?;
    let service = service().await?.version().await?;
    print(format!("dormd {} (API {}, pid {})", service.version, service.api, service.pid))
}
