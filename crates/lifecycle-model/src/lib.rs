//! The model of the lifecycle core: everything that can happen to a session, walked to the end.
//!
//! A [`scope::Scope`] says how many clients there are and what the world may do to the session. [`checker::walk`]
//! exhausts it: every state that can be reached, every event in it. The world repeats, delays and reorders its
//! reports, answers twice or never, and VMs and host processes die in it. What is right is decided by a monitor that
//! sees only the events and the actions; each state is also left alone, to see that everybody who waits gets an
//! answer although nothing but time passes, and from each a well-meaning world must be able to bring the session to
//! rest.
//!
//! That this proves something is shown by planted bugs ([`dormouse_lifecycle::Flaw`]): each is caught in one of the
//! quick scopes.

pub mod checker;
pub mod coverage;
mod monitor;
pub mod report;
pub mod scope;
pub mod world;
