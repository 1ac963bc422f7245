//! Steps through a session's trace: `dorm session trace > FILE`, or the `trace.json` that a crashed host leaves.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use dormouse_lifecycle::{Action, Replayed, Session, Trace};

/// Prints each event, what was to be done, and where the session was afterwards.
pub(crate) fn replay(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("can't read {}", path.display()))?;
    let trace: Trace = serde_json::from_reader(BufReader::new(file))
        .with_context(|| format!("{} is no trace", path.display()))?;
    let mut out = BufWriter::new(io::stdout().lock());
    writeln!(out, "begins {}", place(trace.base()))?;
    for (number, Replayed { now, event, actions, session }) in (1..).zip(trace.replay()) {
        writeln!(out, "\n{number} at {} ms: {event:?}", now.as_millis())?;
        for action in actions.iter().filter(|action| !matches!(action, Action::Publish)) {
            writeln!(out, "    {action:?}")?;
        }
        writeln!(out, "  {}", place(&session))?;
        if let Err(contradiction) = session.check() {
            writeln!(out, "  CONTRADICTION: {contradiction}")?;
        }
    }
    Ok(out.flush()?)
}

fn place(session: &Session) -> String {
    let view = session.view();
    let deadline =
        session.next_deadline().map_or_else(String::new, |at| format!(", due at {}", at.as_millis()));
    format!(
        "{} (incarnation {}, generation {}, {} leases, {} wait{deadline})",
        view.phase.as_str(),
        view.incarnation,
        view.generation,
        view.leases,
        view.queued
    )
}
