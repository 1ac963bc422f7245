//! Why a VM is awake or asleep, in words.

use dormouse_api::Why;
use dormouse_lifecycle::{Config, Grace, Hold, PhaseName, Session, Timestamp, View};

use crate::clock::to_wall;

/// Tells it, the most telling first.
pub(crate) fn why(session: &Session, config: Config, warnings: &[String]) -> Why {
    let view = session.view();
    let mut lines = vec![present(&view, config)];
    lines.extend(session.holds().iter().map(held));
    lines.extend(view.io_error.map(|error| format!("it is paused by its disk: {error}")));
    lines.extend(view.remains.map(|vm| format!("VM {vm} was killed and was never seen to exit")));
    lines.extend(latest(&view));
    let woken_by = view.woken_by.map(|claim| format!("{} ({})", claim.owner, claim.reason));
    Why { lines, woken_by, warnings: warnings.to_vec() }
}

fn at(time: Timestamp) -> String {
    format!("{:.0}", to_wall(time))
}

fn present(view: &View<'_>, config: Config) -> String {
    let since = at(view.since);
    match view.phase {
        PhaseName::Absent => match view.snapshot {
            Some(_) => format!("asleep since {since}, suspended"),
            None => format!("asleep since {since}"),
        },
        PhaseName::Starting => {
            let step = view.progress.map_or("QEMU", |step| step);
            format!("starting since {since}, at the step {step}; {} wait", view.queued)
        }
        PhaseName::Running => match (view.deadline, config.grace) {
            (Some(deadline), _) if view.io_error.is_none() => {
                format!("awake since {since}; nothing holds it, so it falls asleep at {}", at(deadline))
            }
            (None, Grace::Never) => format!("awake since {since}; it never falls asleep by itself"),
            _ => format!("awake since {since}"),
        },
        PhaseName::Counting => format!("about to fall asleep: since {since} the engine is asked what runs"),
        PhaseName::Dozing => {
            let until = view.deadline.map_or_else(String::new, |deadline| format!(" until {}", at(deadline)));
            format!("dozing since {since}{until}: it is in memory, and runs on as soon as somebody asks")
        }
        PhaseName::Committed => {
            format!("falling asleep: since {since} hooks are told; {} wait for the next VM", view.queued)
        }
        PhaseName::Stopping => {
            let how = view.sleep.map_or("end", |how| how.as_str());
            format!("falling asleep since {since} ({how}); {} wait for the next VM", view.queued)
        }
        PhaseName::Terminated => {
            let details = view.termination.map_or("", |end| &end.details);
            format!("terminated since {since}: {details}")
        }
    }
}

fn held(hold: &Hold) -> String {
    let verb = if hold.weak { "listed, holds nothing" } else { "held" };
    let until = hold.until.map_or_else(String::new, |until| format!(" until {}", at(until)));
    format!(
        "{verb}: {} of {} ({}) since {}{until}",
        hold.kind.as_str(),
        hold.owner,
        hold.reason,
        at(hold.since)
    )
}

fn latest(view: &View<'_>) -> Vec<String> {
    let latest = view.latest;
    let mut lines = Vec::new();
    if let Some((when, how, took)) = &latest.start {
        lines.push(format!("last start: {} ({}, {} ms)", at(*when), how.as_str(), took.as_millis()));
    }
    if let Some((when, how, took, trouble)) = &latest.sleep {
        let trouble = trouble.as_ref().map_or_else(String::new, |trouble| format!("; {trouble}"));
        lines.push(format!("last sleep: {} ({}, {} ms{trouble})", at(*when), how.as_str(), took.as_millis()));
    }
    let failures = [
        ("last start that failed", &latest.start_failure),
        ("last suspend that failed", &latest.sleep_failure),
        ("last crash", &latest.crash),
    ];
    for (what, failure) in failures {
        if let Some((when, reason)) = failure {
            lines.push(format!("{what}: {}: {reason}", at(*when)));
        }
    }
    lines
}
