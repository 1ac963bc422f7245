//! What BuildKit and its client say to each other, as far as it is of use here. The numbers are those of BuildKit's `.proto`
//! files: `api/services/control`, `session/*`, and grpc.health.v1.

use prost::Message;

/// A moment, of the engine's clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Message)]
pub(super) struct Moment {
    #[prost(int64, tag = "1")]
    pub(super) seconds: i64,
    #[prost(int32, tag = "2")]
    pub(super) nanos: i32,
}

impl Moment {
    /// Seconds from an earlier one.
    #[expect(clippy::cast_precision_loss, reason = "builds take less than a million years")]
    pub(super) fn since(self, earlier: Self) -> f64 {
        (self.seconds - earlier.seconds) as f64 + f64::from(self.nanos - earlier.nanos) / 1e9
    }
}

/// News of a build.
#[derive(Clone, PartialEq, Message)]
pub(super) struct News {
    #[prost(message, repeated, tag = "1")]
    pub(super) steps: Vec<Step>,
    #[prost(message, repeated, tag = "2")]
    pub(super) parts: Vec<Part>,
    #[prost(message, repeated, tag = "3")]
    pub(super) logs: Vec<Log>,
    #[prost(message, repeated, tag = "4")]
    pub(super) warnings: Vec<Warning>,
}

/// A step of a build, as it is now.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Step {
    #[prost(string, tag = "1")]
    pub(super) digest: String,
    #[prost(string, tag = "3")]
    pub(super) name: String,
    #[prost(bool, tag = "4")]
    pub(super) cached: bool,
    #[prost(message, optional, tag = "5")]
    pub(super) started: Option<Moment>,
    #[prost(message, optional, tag = "6")]
    pub(super) completed: Option<Moment>,
    #[prost(string, tag = "7")]
    pub(super) error: String,
}

/// A part of a step, such as a layer that is pulled.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Part {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) step: String,
    #[prost(int64, tag = "4")]
    pub(super) current: i64,
    #[prost(int64, tag = "5")]
    pub(super) total: i64,
    #[prost(message, optional, tag = "8")]
    pub(super) completed: Option<Moment>,
}

/// What a step wrote.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Log {
    #[prost(string, tag = "1")]
    pub(super) step: String,
    #[prost(message, optional, tag = "2")]
    pub(super) at: Option<Moment>,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) bytes: Vec<u8>,
}

/// What is wrong with a Dockerfile, though it builds.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Warning {
    #[prost(bytes = "vec", tag = "3")]
    pub(super) short: Vec<u8>,
}

/// A request that names one thing: `CredentialsRequest`, `GetSecretRequest`, `CheckAgentRequest`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Named {
    #[prost(string, tag = "1")]
    pub(super) name: String,
}

/// Some bytes: `BytesMessage`, `GetSecretResponse`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Bytes {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) data: Vec<u8>,
}

/// Who one is at a registry: `CredentialsResponse`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Identity {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) secret: String,
}

/// `HealthCheckResponse`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Health {
    #[prost(int32, tag = "1")]
    pub(super) status: i32,
}

/// The status of a server that serves.
pub(super) const SERVING: i32 = 1;

/// `CheckAgentResponse`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Empty {}
