//! `docker.sock`: the relay's engine is the session's.

use std::io;
use std::sync::Arc;

use dormouse_agent_proto::Target;
use dormouse_docker_proxy::{Class, Engine, Refusal, RequestHead};
use dormouse_lifecycle::{HoldKind, Policy};
use dormouse_mux::Stream;

use crate::owner::{Claimant, HeldLease, Owner};

/// The session's engine as one client sees it.
#[derive(Debug, Clone)]
pub(crate) struct SessionEngine {
    pub(crate) owner: Owner,
    /// Who the client is, in words.
    pub(crate) client: Arc<str>,
}

impl Engine for SessionEngine {
    type Lease = HeldLease;

    async fn lease(&self, request: &RequestHead, class: Class) -> Result<HeldLease, Refusal> {
        let kind = match class {
            Class::Holds | Class::Hijacks => HoldKind::Request,
            Class::Weak => HoldKind::Events,
        };
        let path = request.target.split('?').next().unwrap_or_default();
        let claimant = Claimant {
            kind,
            policy: Policy::Acquire,
            owner: self.client.to_string(),
            reason: format!("{} {path}", request.method),
        };
        self.owner.lease(claimant).await.map_err(|refused| {
            let error = refused.to_api();
            Refusal { status: error.code.status(), message: error.message }
        })
    }
}

impl dormouse_docker_proxy::Lease for HeldLease {
    type Stream = Stream;

    async fn dial(&self) -> io::Result<Stream> {
        (**self).dial(Target::Engine).await.map_err(io::Error::other)
    }

    async fn ended(&self) -> String {
        (**self).ended().await
    }
}
