//! `control.sock`: see the table in `dormouse_api`.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use dormouse_agent_proto::RunProcess;
use dormouse_api::{
    ApiError, ErrorCode, HistoryEntry, Hold, IdleAction, Phase, Pin, SessionInfo, SessionState, SleepAnswer,
    WARNING_HEADER, WaitFor, Why,
};
use dormouse_lifecycle::{Event, HoldKind, PinId};
use dormouse_vm::ConsoleLine;
use futures_util::stream::{self, StreamExt};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;

use crate::clock::from_wall;
use crate::hooks::Verdict;
use crate::host::Served;
use crate::lease::Refused;
use crate::owner::Claimant;
use crate::{root_process, view};

/// The pin that the control API sets: a session has one.
const PIN: PinId = PinId(1);

/// Longest wait of `terminate`: stop, kill, and what leads there.
const TERMINATED_WITHIN: Duration = Duration::from_secs(150);

/// The control API of one session, for the caller known by its process id.
pub(crate) fn router(served: Served) -> Router {
    Router::new()
        .route("/v1/session", get(inspect))
        .route("/v1/session/watch", get(watch))
        .route("/v1/session/start", post(start))
        .route("/v1/session/terminate", post(terminate))
        .route("/v1/session/wait", get(wait))
        .route("/v1/session/sleep", post(sleep))
        .route("/v1/session/created", post(created))
        .route("/v1/session/pin", post(pin).delete(unpin))
        .route("/v1/hold", post(hold))
        .route("/v1/run", post(run))
        .route("/v1/console", get(console))
        .route("/v1/history", get(history))
        .route("/v1/events", get(events))
        .route("/v1/why", get(why))
        .route("/v1/trace", get(trace))
        .fallback(async || Failed(ApiError::new(ErrorCode::NotFound, "there is no such endpoint")))
        .with_state(served)
}

/// An error as an answer.
struct Failed(ApiError);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

impl From<Refused> for Failed {
    fn from(refused: Refused) -> Self {
        Self(refused.to_api())
    }
}

type Answer<T> = Result<Json<T>, Failed>;

async fn inspect(State(served): State<Served>) -> Json<SessionInfo> {
    Json(served.owner.present().await)
}

async fn watch(State(served): State<Served>) -> Body {
    let mut info = served.owner.info();
    info.mark_changed();
    Body::from_stream(stream::unfold(info, async |mut info| {
        info.changed().await.ok()?;
        let mut line = serde_json::to_vec(&*info.borrow_and_update()).ok()?;
        line.push(b'\n');
        Some((Ok::<_, Infallible>(line), info))
    }))
}

async fn start(State(served): State<Served>) -> Answer<SessionInfo> {
    served.owner.tell(Event::StartRequested);
    until(&served, Duration::from_secs(10), |info| info.state == SessionState::Running).await
}

async fn terminate(State(served): State<Served>) -> Answer<SessionInfo> {
    served.owner.tell(Event::Terminate { reason: format!("asked for by {}", served.client).into() });
    until(&served, TERMINATED_WITHIN, |info| info.state == SessionState::Terminated).await
}

#[derive(serde::Deserialize)]
struct WaitQuery {
    r#for: WaitFor,
}

async fn wait(State(served): State<Served>, Query(query): Query<WaitQuery>) -> Answer<SessionInfo> {
    // As long as the client: it closes its connection when it has waited enough.
    until(&served, Duration::MAX, |info| match query.r#for {
        WaitFor::Terminated => info.state == SessionState::Terminated,
        WaitFor::Absent => info.vm.phase == Phase::Absent,
        WaitFor::Running => info.vm.phase == Phase::Running,
    })
    .await
}

async fn until(
    served: &Served,
    within: Duration,
    wanted: impl FnMut(&SessionInfo) -> bool,
) -> Answer<SessionInfo> {
    let mut info = served.owner.info();
    let found = tokio::time::timeout(within, info.wait_for(wanted)).await;
    match found {
        Ok(Ok(info)) => Ok(Json(info.clone())),
        Ok(Err(_)) => Err(Failed(ApiError::new(ErrorCode::Busy, "the session's host is going down"))),
        Err(_) => Err(Failed(ApiError::new(ErrorCode::Busy, "it did not happen in time"))),
    }
}

#[derive(serde::Deserialize)]
struct SleepQuery {
    how: Option<IdleAction>,
}

async fn sleep(State(served): State<Served>, Query(query): Query<SleepQuery>) -> Json<SleepAnswer> {
    Json(served.owner.sleep(query.how.map(view::sleep_how)).await)
}

/// What the hooks say to the session's creation. Only the service asks, before anybody knows of the session.
async fn created(State(served): State<Served>) -> Answer<SessionInfo> {
    match served.owner.created().await {
        Verdict::Fine => Ok(Json(served.owner.present().await)),
        Verdict::Veto(words) => {
            Err(Failed(ApiError::new(ErrorCode::Forbidden, format!("a hook refused the session: {words}"))))
        }
    }
}

async fn pin(State(served): State<Served>, Json(pin): Json<Pin>) -> Json<SessionInfo> {
    served.owner.tell(Event::PinSet {
        pin: PIN,
        owner: served.client.as_ref().into(),
        reason: pin.reason.unwrap_or_default().into(),
        until: pin.until.map(from_wall),
    });
    Json(served.owner.present().await)
}

async fn unpin(State(served): State<Served>) -> Json<SessionInfo> {
    served.owner.tell(Event::PinRemoved { pin: PIN });
    Json(served.owner.present().await)
}

async fn history(State(served): State<Served>) -> Json<Vec<HistoryEntry>> {
    Json(served.owner.history().await)
}

async fn why(State(served): State<Served>) -> Answer<Why> {
    served.owner.why().await.map(Json).ok_or_else(going_down)
}

fn going_down() -> Failed {
    Failed(ApiError::new(ErrorCode::Busy, "the session's host is going down"))
}

#[derive(serde::Deserialize)]
struct TraceQuery {
    #[serde(default)]
    crash: bool,
}

async fn trace(State(served): State<Served>, Query(query): Query<TraceQuery>) -> Result<Response, Failed> {
    if !query.crash {
        return Ok(Json(served.owner.trace()).into_response());
    }
    let left = served.owner.crash_trace();
    left.map(IntoResponse::into_response)
        .map_err(|_| Failed(ApiError::new(ErrorCode::NotFound, "no host of this session has left a trace")))
}

async fn events(State(served): State<Served>, Query(query): Query<FollowQuery>) -> Result<Body, Failed> {
    let (told, coming) = served.owner.events().await.ok_or_else(going_down)?;
    let told = stream::iter(told);
    let coming = stream::unfold((coming, query.follow), async |(mut coming, follow)| {
        // A follower that is too far behind is cut off: what it misses can be had by asking again.
        let event = if follow { coming.recv().await.ok()? } else { return None };
        Some((event, (coming, follow)))
    });
    let lines = told.chain(coming).map(|event| {
        let mut line = serde_json::to_vec(&event)?;
        line.push(b'\n');
        Ok::<_, serde_json::Error>(line)
    });
    Ok(Body::from_stream(lines))
}

/// Reads a JSON body by hand, because the request is needed for its upgrade as well.
async fn body<T: serde::de::DeserializeOwned>(request: &mut Request) -> Result<T, Failed> {
    const BODY_BYTES_MAX: usize = 256 * 1024;
    let invalid = |error: &dyn std::fmt::Display| Failed(ApiError::new(ErrorCode::Invalid, error));
    let body = std::mem::take(request.body_mut());
    let bytes: Bytes = axum::body::to_bytes(body, BODY_BYTES_MAX).await.map_err(|error| invalid(&error))?;
    serde_json::from_slice(&bytes).map_err(|error| invalid(&error))
}

/// Another protocol from here on, and what is to be told to whoever woke the VM.
fn switching(protocol: &'static str, warnings: &[String]) -> Response {
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, protocol)];
    let mut response = (StatusCode::SWITCHING_PROTOCOLS, headers).into_response();
    for value in dormouse_docker_proxy::header_values(warnings) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(WARNING_HEADER), HeaderValue::try_from(value)) {
            response.headers_mut().append(name, value);
        }
    }
    response
}

async fn hold(State(served): State<Served>, mut request: Request) -> Result<Response, Failed> {
    let Hold { reason } = body(&mut request).await?;
    let claimant = Claimant {
        kind: HoldKind::Operation,
        policy: served.policy,
        owner: served.client.to_string(),
        reason,
    };
    let lease = served.owner.lease(claimant).await?;
    let answer = switching("dorm-hold", lease.warnings());
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(&mut request).await else { return };
        let mut connection = TokioIo::new(upgraded);
        let mut byte = [0];
        // Until the client closes it or dies; a VM that is lost ends it from this side.
        tokio::select! {
            _ = async { while let Ok(1..) = connection.read(&mut byte).await {} } => {}
            _ = lease.ended() => {}
            () = served.end.cancelled() => {}
        }
    });
    Ok(answer)
}

async fn run(State(served): State<Served>, mut request: Request) -> Result<Response, Failed> {
    let process: RunProcess = body(&mut request).await?;
    let claimant = Claimant {
        kind: HoldKind::RootProcess,
        policy: served.policy,
        owner: served.client.to_string(),
        reason: process.argv.join(" "),
    };
    let lease = served.owner.lease(claimant).await?;
    let failed = |error: dormouse_mux::AgentError| {
        let code = if error.is_busy() { ErrorCode::Busy } else { ErrorCode::Invalid };
        Failed(ApiError::new(code, error))
    };
    let detach = process.detach;
    let process = lease.run(process).await.map_err(failed)?;
    let answer = switching("dorm-process", lease.warnings());
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(&mut request).await else { return };
        root_process::attend(TokioIo::new(upgraded), process, detach, lease, served.end).await;
    });
    Ok(answer)
}

#[derive(serde::Deserialize)]
struct FollowQuery {
    #[serde(default)]
    follow: bool,
}

async fn console(State(served): State<Served>, Query(query): Query<FollowQuery>) -> Body {
    let Some(console) = served.console.borrow().clone() else { return Body::empty() };
    let reader = console.follow();
    Body::from_stream(stream::unfold((reader, query.follow), async |(mut reader, follow)| {
        let next = if follow { reader.next().await? } else { reader.ready()? };
        let text = match next {
            ConsoleLine::Line(line) => format!("{line}\n"),
            ConsoleLine::Lost(count) => format!("[{count} lines were lost]\n"),
        };
        Some((Ok::<_, Infallible>(text), (reader, follow)))
    }))
}
