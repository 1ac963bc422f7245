//! `dormd.sock`: see the table in `dormouse_api`.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use dormouse_api::{
    API_VERSION, ApiError, ChangeSettings, CreateSession, CreateTemplate, ErrorCode, SessionInfo,
    SessionName, TemplateInfo, VerifyAnswer, Version, Wake,
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::host::Order;
use crate::table::Table;

/// Longest request body, in bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// The service's API.
pub(crate) fn router(table: Arc<Table>) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/sessions", get(all).post(create))
        .route("/v1/sessions/{name}", get(inspect).delete(remove))
        .route("/v1/sessions/{name}/open", post(open))
        .route("/v1/templates", get(templates).post(make_template))
        .route("/v1/templates/prune", post(prune_templates))
        .route("/v1/templates/{name}", delete(remove_template))
        .route("/v1/sessions/{name}/settings", post(change))
        .route("/v1/sessions/{name}/verify", post(verify))
        .route("/v1/sessions/{name}/wakes", post(set_wake).delete(clear_wakes))
        .fallback(async || Failed(ApiError::new(ErrorCode::NotFound, "there is no such endpoint")))
        .with_state(table)
}

struct Failed(ApiError);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

fn invalid(error: impl std::fmt::Display) -> Failed {
    Failed(ApiError::new(ErrorCode::Invalid, error))
}

fn parse(name: &str) -> Result<SessionName, Failed> {
    name.parse().map_err(invalid)
}

async fn version() -> Json<Version> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    Json(Version { version, api: API_VERSION, pid: std::process::id() })
}

async fn all(State(table): State<Arc<Table>>) -> Json<Vec<SessionInfo>> {
    Json(table.all())
}

async fn inspect(
    State(table): State<Arc<Table>>,
    Path(name): Path<String>,
) -> Result<Json<SessionInfo>, Failed> {
    table.inspect(&parse(&name)?).map(Json).map_err(Failed)
}

async fn open(
    State(table): State<Arc<Table>>,
    Path(name): Path<String>,
) -> Result<Json<SessionInfo>, Failed> {
    table.open(&parse(&name)?).await.map(Json).map_err(Failed)
}

async fn change(
    State(table): State<Arc<Table>>,
    Path(name): Path<String>,
    Json(change): Json<ChangeSettings>,
) -> Result<Json<SessionInfo>, Failed> {
    table.change(&parse(&name)?, change).await.map(Json).map_err(Failed)
}

async fn verify(
    State(table): State<Arc<Table>>,
    Path(name): Path<String>,
) -> Result<Json<VerifyAnswer>, Failed> {
    table.verify(&parse(&name)?).await.map(Json).map_err(Failed)
}

async fn set_wake(
    State(table): State<Arc<Table>>,
    Path(name): Path<String>,
    Json(wake): Json<Wake>,
) -> Result<Json<SessionInfo>, Failed> {
    table.set_wake(&parse(&name)?, wake).map(Json).map_err(Failed)
}

async fn clear_wakes(
    State(table): State<Arc<Table>>,
    Path(name): Path<String>,
) -> Result<Json<SessionInfo>, Failed> {
    table.clear_wakes(&parse(&name)?).map(Json).map_err(Failed)
}

async fn remove(State(table): State<Arc<Table>>, Path(name): Path<String>) -> Result<StatusCode, Failed> {
    table.remove(&parse(&name)?, Order::Terminate).await.map(|()| StatusCode::NO_CONTENT).map_err(Failed)
}

async fn templates(State(table): State<Arc<Table>>) -> Result<Json<Vec<TemplateInfo>>, Failed> {
    table.templates().await.map(Json).map_err(Failed)
}

async fn make_template(
    State(table): State<Arc<Table>>,
    Json(wish): Json<CreateTemplate>,
) -> Result<Json<TemplateInfo>, Failed> {
    table.make_template(&wish).await.map(Json).map_err(Failed)
}

async fn prune_templates(State(table): State<Arc<Table>>) -> Result<Json<Vec<String>>, Failed> {
    table.prune_templates().await.map(Json).map_err(Failed)
}

async fn remove_template(
    State(table): State<Arc<Table>>,
    Path(name): Path<String>,
) -> Result<StatusCode, Failed> {
    table.remove_template(&name).map(|()| StatusCode::NO_CONTENT).map_err(Failed)
}

/// Read by hand, because a temporary session needs the request for its upgrade as well.
async fn create(State(table): State<Arc<Table>>, mut request: Request) -> Result<Response, Failed> {
    let body = std::mem::take(request.body_mut());
    let bytes = axum::body::to_bytes(body, BODY_BYTES_MAX).await.map_err(invalid)?;
    let wish: CreateSession = serde_json::from_slice(&bytes).map_err(invalid)?;
    if wish.temporary && !request.headers().contains_key(header::UPGRADE) {
        return Err(invalid("a temporary session needs a connection to live on: Upgrade: dorm-session"));
    }
    let info = table.create(&wish).await.map_err(Failed)?;
    if !wish.temporary {
        return Ok((StatusCode::CREATED, Json(info)).into_response());
    }
    tokio::spawn(async move {
        live_on(&mut request, &info).await;
        if let Err(error) = table.remove(&info.name, Order::CreatorGone).await {
            tracing::warn!(session = %info.name, %error, "a temporary session could not be removed");
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "dorm-session")];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Tells what was made, then waits until the creator is gone.
async fn live_on(request: &mut Request, info: &SessionInfo) {
    let Ok(upgraded) = hyper::upgrade::on(request).await else { return };
    let mut connection = TokioIo::new(upgraded);
    let mut line = serde_json::to_vec(info).unwrap_or_default();
    line.push(b'\n');
    if connection.write_all(&line).await.is_ok() {
        let mut byte = [0];
        while let Ok(1..) = connection.read(&mut byte).await {}
    }
}
