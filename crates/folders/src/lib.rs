//! Folders of the host in a VM: which may be shared, under which names, and the process that shares them.
//!
//! ```text
//!  session host ── one JSON line each way ──► keeper, in a user and a mount namespace of its own
//!     Policy: may it be shared?                 │  tree: nothing but what is shared now, by bind mounts
//!     Share: its name in the guest              ├─ watch: what changes in it, which the host asks for
//!     Changes: told in the guest                └─ virtiofsd, whose root is that tree ◄── proxy ◄── vhost-user ── QEMU
//! ```
//!
//! docs/design/002-folders.md says why so.

mod keeper;
mod link;
mod policy;
mod proxy;
mod share;
mod tree;
mod virtiofsd;
mod watch;

pub use keeper::{Inherited, KeeperError, KeeperOptions, keep};
pub use link::{Keeper, KeeperStart, LinkError};
pub use policy::{Missing, Policy, Refused, rules};
pub use share::{Access, GUEST_ROOT, Share, restore};
pub use virtiofsd::{GET_VIRTIOFSD, find_virtiofsd, try_virtiofsd};
pub use watch::Changes;
