//! Commands that change a session's state, or wait for one.

use clap::{Args, ValueEnum};
use dormouse_api::{How, Phase, SessionInfo, SessionName, SessionState, VerifyAnswer};
use dormouse_client::Endpoint;

use crate::context::Context;
use crate::error::{Done, FAILED, Failure, SUCCESS};
use crate::output::print;

/// A command that needs nothing but a session.
#[derive(Args)]
pub(crate) struct Named {
    /// Which one.
    pub(super) name: Option<SessionName>,
}

#[derive(Args)]
pub(crate) struct Remove {
    /// Which ones.
    #[arg(required = true)]
    names: Vec<SessionName>,
    /// Say nothing about those that don't exist.
    #[arg(short, long)]
    force: bool,
}

#[derive(Args)]
pub(crate) struct Wait {
    /// Which one.
    name: Option<SessionName>,
    /// The state.
    #[arg(long, value_enum)]
    r#for: Wanted,
    /// Give up after so many seconds, with status 1.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Wanted {
    Terminated,
    Absent,
    Running,
}

impl Wanted {
    /// The state's name in the API.
    fn as_str(self) -> &'static str {
        match self {
            Self::Terminated => "terminated",
            Self::Absent => "absent",
            Self::Running => "running",
        }
    }
}

/// The session's state, in the API's words.
pub(crate) fn state(info: &SessionInfo) -> &'static str {
    match info.state {
        SessionState::Running => "running",
        SessionState::Terminating => "terminating",
        SessionState::Terminated => "terminated",
    }
}

/// What the session's VM is doing, in words.
pub(crate) fn phase(info: &SessionInfo) -> &'static str {
    match info.vm.phase {
        Phase::Absent => "asleep",
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Counting => "counting",
        Phase::Dozing => "dozing",
        Phase::Committed => "committed",
        Phase::Stopping => "stopping",
    }
}

pub(crate) async fn start(context: &Context, named: Named) -> Done {
    let control = context.control(&context.pick(named.name)).await?;
    print(control.post::<SessionInfo>("/v1/session/start").await?.name.as_str())
}

/// Never makes a session: what doesn't exist can't be ended.
pub(crate) async fn terminate(context: &Context, named: Named) -> Done {
    let info = context.inspect(&context.pick(named.name)).await?;
    let control = Endpoint::new(info.control_socket);
    print(control.post::<SessionInfo>("/v1/session/terminate").await?.name.as_str())
}

pub(crate) async fn docker_host(context: &Context, named: Named) -> Done {
    let info = context.open(&context.pick(named.name)).await?;
    print(format!("unix://{}", info.docker_socket.display()))
}

/// Wakes the VM, for nothing else: its grace period begins at once.
pub(crate) async fn resume(context: &Context, named: Named) -> Done {
    let info = context.open(&context.pick(named.name)).await?;
    let held = context.hold(&info, "dorm session resume".to_owned(), false).await?;
    let info: SessionInfo = Endpoint::new(&info.control_socket).get("/v1/session").await?;
    drop(held);
    let generation = info.vm.generation;
    print(match info.vm.how {
        Some(How::Resume) => format!("VM {generation} is up, as it fell asleep"),
        Some(How::Clone) => format!("VM {generation} is up, copied from a template"),
        Some(How::Cold) | None => format!("VM {generation} is up, booted"),
    })
}

pub(crate) async fn verify(context: &Context, named: Named) -> Done {
    let name = context.pick(named.name);
    let service = context.service().await?;
    let answer = match service.verify(&name).await {
        Ok(answer) => answer,
        Err(error) => return Err(context.unknown(&service, &name, error).await),
    };
    match answer {
        VerifyAnswer::NoSnapshot => print("no snapshot: the VM is up, or will be booted"),
        VerifyAnswer::Intact => print("intact: the snapshot is what was put to sleep"),
        VerifyAnswer::SumMade => print("the snapshot had no checksum yet; now it has"),
        VerifyAnswer::Damaged { reason } => Err(Failure::new(format!("the snapshot is damaged: {reason}"))
            .hint("nothing on the disk is lost: the next request boots from it")),
    }
}

impl Remove {
    /// Goes on after one that fails, and tells of each.
    pub(crate) async fn run(self, context: &Context) -> Done {
        let service = context.service().await?;
        let mut code = SUCCESS;
        for name in &self.names {
            match service.remove(name).await {
                Ok(()) => {
                    print(name.as_str())?;
                }
                Err(error) => {
                    let unknown = matches!(&error, dormouse_client::ClientError::Api(error)
                        if error.code == dormouse_api::ErrorCode::NotFound);
                    if !(unknown && self.force) {
                        context.unknown(&service, name, error).await.report();
                        code = FAILED;
                    }
                }
            }
        }
        Ok(code)
    }
}

impl Wait {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let control = context.control(&context.pick(self.name)).await?;
        let path = format!("/v1/session/wait?for={}", self.r#for.as_str());
        let waiting = control.get::<SessionInfo>(&path);
        let info =
            match self.timeout {
                None => waiting.await?,
                Some(seconds) => tokio::time::timeout(std::time::Duration::from_secs(seconds), waiting)
                    .await
                    .map_err(|_| Failure::new(format!("not {} within {seconds} s", self.r#for.as_str())))??,
            };
        print(match self.r#for {
            Wanted::Terminated => state(&info),
            Wanted::Absent | Wanted::Running => phase(&info),
        })
    }
}
