//! The owner against scripted VMs, guests and hooks, on a stopped clock. TESTING.md tells what is shown where.

mod crashing;
mod doors;
mod holding;
mod hooking;
mod idling;
mod pace;
pub(crate) mod stage;
mod starting;
mod stopping;
mod telling;
