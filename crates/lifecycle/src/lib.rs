//! The life of a session: when its VM is started, kept up and put to sleep.
//!
//! A pure state machine: no I/O, no clock, no threads. One task per session, the *driver*, owns a [`Session`],
//! feeds it [`Event`]s in order and carries out its [`Action`]s. Time is an argument, timers are deadlines in the
//! state that are read with [`Session::next_deadline`]. Being pure, all its interleavings can be walked by a
//! checker (`dormouse-lifecycle-model`), and any of them replayed.
//!
//! ```text
//!                first Acquire            ready
//!      ┌─► Absent ───────────► Starting ─────────► Running ◄──────────────┐
//!      │     ▲                    │  │  failed        │ ▲                 │
//!      │     └────────────────────┼──┘          idle, │ │ something holds │ a suspend failed
//!      │                cancelled │               due ▼ │                 │ in time
//!      │                          │               Counting ◄──► Dozing    │
//!      │                          │   nothing holds │                     │
//!      │                          ▼                 ▼     hooks told      │
//!      └──────────────────────  Stopping ◄──────  Committed ──► Stopping ─┘
//!            VM gone               │
//!                                  ▼
//!                              Terminated: asked for, or after a crash (from any phase with a VM)
//! ```
//!
//! | phase | means |
//! |---|---|
//! | Absent | no VM; maybe a snapshot |
//! | Starting | a VM is being made, or one that an earlier host left is being looked for; leases queue |
//! | Running | leases are granted. *Busy*, *looked at* while the grace period runs on, *idle* with a deadline, or *paused* by an I/O error |
//! | Counting | nothing else holds, and the engine is asked what runs; a lease calls it off |
//! | Dozing | between two counts, where it is set: the VM's vCPUs are stopped; a lease has it run on at once |
//! | Committed | a sleep that will happen: hooks are told, `Acquire` waits for the next VM, `ExistingOnly` is served |
//! | Stopping | suspend, shut-down or kill under way, each with a bound |
//! | Terminated | the incarnation is over |
//!
//! What a driver has to do:
//! - call [`Session::handle`] for each event, in order, and carry out the actions in order, the ones before an
//!   [`Action::Persist`]'s end included: what it names must be on disk before the actions that follow are begun;
//! - call it with [`Event::DeadlineReached`] when [`Session::next_deadline`] has come;
//! - answer every order and question that carries an [`Ask`] with the same `Ask`, and every VM with its generation;
//! - run hooks one after the other, in the order of their actions.
#![no_std]

extern crate alloc;

mod action;
mod check;
mod config;
mod durable;
mod end;
mod event;
mod flaw;
mod hold;
mod id;
mod idle;
mod lease;
#[cfg(feature = "model")]
pub mod model;
mod phase;
mod session;
mod sleep;
mod start;
mod time;
mod trace;
mod view;

pub use action::{
    Action, Actions, EndReason, Record, Refusal, SleepHow, SleepOutcome, StartFrom, StartHow, StopHow,
};
pub use config::{Config, CrashPolicy, Grace, Lifetime, Limits, RunningContainers, Storage};
pub use durable::{Crash, Durable, LastVm};
pub use event::{AfterFailure, Event, Exit, SnapshotFate};
#[cfg(feature = "model")]
pub use flaw::Flaw;
pub use hold::{Census, Claim, ContainerState, HoldKind, Pin, Policy, Text, WeakHold};
pub use id::{Ask, Boot, Generation, Incarnation, LeaseId, PinId, RequestId, WeakId};
pub use phase::{Cause, Reopen, Termination, TerminationReason, Then};
pub use session::Session;
pub use time::Timestamp;
pub use trace::{Replayed, Trace};
pub use view::{Hold, Latest, PhaseName, State, View};
