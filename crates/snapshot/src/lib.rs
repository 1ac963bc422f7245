//! VMs that sleep on disk: a session's own snapshot, and templates.
//!
//! A *store* is a folder with all that a start needs, side by side:
//!
//! ```text
//!   data.raw        the data disk
//!   memory          the guest's RAM, also while the VM runs
//!   memory.state    the state of the devices
//!   snapshot.json   the seal: these three belong together, and what they fit
//!   memory.sum      the memory's checksum, made after the seal
//!   memory.compressed   in place of `memory`, in a snapshot that nobody woke for long
//! ```
//!
//! ```text
//!              suspend: seal                resume: break_seal, then the VM runs
//!   unsealed ───────────────► sealed ───────────────────────────────────────────► unsealed
//!                              │ doesn't fit, damaged: discard ──────────────────────▲
//! ```
//!
//! A seal is used once: it is broken, and the disk knows it, before the VM runs on, because from then on memory and disk
//! are no longer those that the seal tells of.
//!
//! A *template* is a store that was sealed once and that nobody wakes: it is copied, and the copy is woken.

mod compressed;
mod digest;
mod giving_up;
mod info;
mod progress;
mod seal;
mod sum;
mod template;

pub use compressed::{Beside, tidy};
pub use giving_up::{FREE_BYTES_MIN, give_up, given_up, is_given_up};
pub use info::{info, verify};
pub use progress::Progress;
pub use seal::{DISK, MEMORY, Origin, STATE, Seal, SealError, Unfit, checksum, clear, discard};
pub use template::{Template, TemplateError, TemplateStore};
