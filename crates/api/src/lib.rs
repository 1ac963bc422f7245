//! The control plane's types: what `dorm`, `dormd` and `dorm-session` say to each other. Data only, no I/O.
//!
//! Two HTTP/1.1 + JSON services speak them, both on unix sockets. Errors are an [`ApiError`] with a fitting status.
//!
//! `dormd.sock`, the service's table of sessions:
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/version` | [`Version`] |
//! | `GET /v1/sessions` | `[SessionInfo]`, without waking anything |
//! | `POST /v1/sessions` with [`CreateSession`] | 201 [`SessionInfo`]; a temporary session: 101, `Upgrade: dorm-session`, the [`SessionInfo`] as one JSON line, then the connection is the session's life |
//! | `GET /v1/sessions/{name}` | [`SessionInfo`], without waking anything |
//! | `POST /v1/sessions/{name}/open` | [`SessionInfo`]; makes the session `default` on its first use |
//! | `POST /v1/sessions/{name}/settings` with [`ChangeSettings`] | [`SessionInfo`]; also while it sleeps |
//! | `POST /v1/sessions/{name}/wakes` with [`Wake`], `DELETE` | [`SessionInfo`]; sets one more, takes all back |
//! | `POST /v1/sessions/{name}/verify` | [`VerifyAnswer`], once the whole snapshot was read; wakes nothing |
//! | `DELETE /v1/sessions/{name}` | 204; terminates it, then removes the session and its storage |
//! | `GET /v1/templates` | `[TemplateInfo]` |
//! | `POST /v1/templates` with [`CreateTemplate`] | [`TemplateInfo`], once it is made; one that is there is taken |
//! | `POST /v1/templates/prune` | names of the templates that no new session would be made from, and that are gone now |
//! | `DELETE /v1/templates/{name}` | 204 |
//!
//! `control.sock`, one per session, served by its host (a knock starts the host):
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/session` | [`SessionInfo`] |
//! | `GET /v1/session/watch` | [`SessionInfo`] as JSON lines: now, then at each change |
//! | `POST /v1/session/start` | [`SessionInfo`] of the new incarnation; 200 also when it is running already |
//! | `POST /v1/session/terminate` | [`SessionInfo`], once terminated |
//! | `GET /v1/session/wait?for=terminated\|absent\|running` | [`SessionInfo`], once it is so |
//! | `POST /v1/session/sleep?how=suspend\|stop` | [`SleepAnswer`]; as the settings say without `how` |
//! | `POST /v1/session/created` | [`SessionInfo`], or what a hook has against the session's creation |
//! | `POST /v1/session/pin` with [`Pin`], `DELETE /v1/session/pin` | [`SessionInfo`] |
//! | `POST /v1/hold` with [`Hold`], `Upgrade: dorm-hold` | 101 once the VM is up: held until the connection ends |
//! | `POST /v1/run` with a `RunProcess`, `Upgrade: dorm-process` | 101, then the process frames of `dormouse-agent-proto` |
//! | `GET /v1/console?follow=true` | the serial console's text |
//! | `GET /v1/history` | `[HistoryEntry]` |
//! | `GET /v1/events?follow=true` | [`SessionEvent`]s as JSON lines: those that are remembered, then each as it comes |
//! | `GET /v1/why` | [`Why`] |
//! | `GET /v1/trace` | the last events of the lifecycle core, to be stepped through again |

mod error;
mod event;
pub mod link;
mod name;
mod registries;
mod session;
mod template;
mod wake;

/// The header with which an answer tells, to the client whose request woke the VM and to nobody else, what was not as it
/// should be then. There may be several.
pub const WARNING_HEADER: &str = "Dormouse-Warning";

pub use error::{ApiError, ErrorCode};
pub use event::{Fact, SessionEvent, VmEnd, Why};
pub use name::{DEFAULT_SESSION, NAME_BYTES_MAX, NameError, SessionId, SessionName};
pub use registries::{Registries, check_authority, check_insecure, check_mirror, network};
pub use session::{
    ChangeSettings, Checksum, CrashPolicy, CreateSession, HistoryEntry, Hold, HoldInfo, HoldKind, How,
    IdleAction, IdleInfo, IdleTimeout, ImageChoice, MemoryForm, NetworkInfo, NetworkKind, Phase, Pin,
    RunningContainers, SessionInfo, SessionState, SleepAnswer, SnapshotInfo, StorageInfo, TerminationInfo,
    TerminationReason, VerifyAnswer, Version, VmInfo, WaitFor, this_host_only,
};
pub use template::{CreateTemplate, TemplateInfo};
pub use wake::{WAKE_EVERY_SECONDS_MIN, WAKES_MAX, Wake};

/// Version of the control API: the `v1` in its paths.
pub const API_VERSION: u32 = 1;
