//! The last events of a session, so that what happened can be stepped through again.
//!
//! A trace holds the session as it was before the oldest event that is kept. When the ring is full the oldest event
//! is not thrown away but handled there, so that a replay always begins in a state that was real.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::action::{Action, Actions};
use crate::event::Event;
use crate::session::Session;
use crate::time::Timestamp;

/// A ring of the events that a session has handled. With the feature `serde` it can be written and read.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Trace {
    base: Session,
    events: VecDeque<(Timestamp, Event)>,
    limit: usize,
}

/// One event of a trace, handled again.
#[derive(Debug)]
pub struct Replayed<'a> {
    /// When it happened.
    pub now: Timestamp,
    /// What happened.
    pub event: &'a Event,
    /// What was to be done.
    pub actions: Vec<Action>,
    /// The session afterwards.
    pub session: Session,
}

impl Trace {
    /// Events that a driver keeps of each session.
    pub const EVENTS: usize = 10_000;

    /// An empty trace of a session that is about to handle its next event; keeps the last `limit` ones.
    pub fn new(session: &Session, limit: usize) -> Self {
        Self { base: session.clone(), events: VecDeque::new(), limit }
    }

    /// Notes an event that the session is about to handle, or has just handled.
    pub fn note(&mut self, now: Timestamp, event: &Event) {
        self.events.push_back((now, event.clone()));
        while self.events.len() > self.limit {
            let Some((now, event)) = self.events.pop_front() else { return };
            self.base.handle(now, event, &mut Actions::new());
        }
    }

    /// The session before the oldest event.
    pub fn base(&self) -> &Session {
        &self.base
    }

    /// Handles all events again, oldest first.
    pub fn replay(&self) -> impl Iterator<Item = Replayed<'_>> {
        let mut session = self.base.clone();
        self.events.iter().map(move |(now, event)| {
            let mut actions = Actions::new();
            session.handle(*now, event.clone(), &mut actions);
            Replayed { now: *now, event, actions: actions.drain().collect(), session: session.clone() }
        })
    }
}
