//! Templates: frozen VMs that new sessions are copied from.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::NetworkKind;

/// A template to be made. What isn't asked for is as in a session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateTemplate {
    /// Virtual CPUs.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// RAM in MiB.
    #[serde(default)]
    pub memory_mib: Option<u64>,
}

/// A template that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateInfo {
    /// Its name: a hash of all that a VM must have in common with it.
    pub name: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// How guests reach the network.
    pub network: NetworkKind,
    /// Hash of the guest image.
    pub guest_image: String,
    /// When it was frozen.
    pub made_at: Timestamp,
    /// What it takes on the disk.
    pub used_bytes: u64,
}
