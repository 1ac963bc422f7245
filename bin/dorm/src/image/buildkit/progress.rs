//! How a build goes: a live view on a terminal, plain lines elsewhere.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write as _;
use std::time::Instant;

use super::wire::{Log, News, Part, Step};

/// Most steps that are known of one build, and parts of a step.
const STEPS_MAX: usize = 2000;
const PARTS_MAX: usize = 200;
/// Of a step's output this many bytes at most are kept, for the case that it fails.
const KEPT_BYTES_MAX: usize = 256 * 1024;
/// Lines of output under each step that is at work, in the live view.
const TAIL_LINES: usize = 4;
/// Lines of the live view, its head included.
pub(super) const VIEW_LINES: usize = 16;

/// Everything that is known of a build.
#[derive(Debug, Default)]
pub(super) struct Progress {
    steps: Vec<Known>,
    /// Where each step stands among them, by its digest.
    index: HashMap<String, usize>,
}

#[derive(Debug)]
struct Known {
    name: String,
    state: State,
    parts: Vec<Part>,
    kept: VecDeque<u8>,
    /// Output that no line's end has followed yet.
    line: Vec<u8>,
}

#[derive(Debug)]
enum State {
    Waiting,
    /// Since then, by our clock.
    Working(Instant),
    Cached,
    /// After so many seconds.
    Done(f64),
    Failed,
}

impl Progress {
    /// Takes news in, and gives them in plain lines.
    pub(super) fn take(&mut self, news: News) -> Vec<String> {
        let mut lines = Vec::new();
        for step in news.steps {
            self.step(step, &mut lines);
        }
        for part in news.parts {
            self.part(part);
        }
        for log in news.logs {
            self.log(&log, &mut lines);
        }
        lines.extend(news.warnings.iter().map(|warning| format!("warning: {}", text(&warning.short))));
        lines
    }

    fn step(&mut self, step: Step, lines: &mut Vec<String>) {
        let index = match self.index.get(&step.digest) {
            Some(index) => *index,
            None if self.steps.len() < STEPS_MAX => {
                let index = self.steps.len();
                let name = step.name.replace(|letter: char| letter.is_control(), " ");
                let (parts, kept, line) = (Vec::new(), VecDeque::new(), Vec::new());
                self.steps.push(Known { name, state: State::Waiting, parts, kept, line });
                self.index.insert(step.digest, index);
                index
            }
            None => return,
        };
        let (number, known) = (index + 1, &mut self.steps[index]);
        if matches!(known.state, State::Cached | State::Done(_) | State::Failed) {
            return;
        }
        if matches!(known.state, State::Waiting) && step.started.is_some() {
            lines.push(format!("#{number} {}", known.name));
            known.state = State::Working(Instant::now());
        }
        let took = match (step.started, step.completed) {
            (Some(started), Some(completed)) => completed.since(started),
            _ if step.cached || !step.error.is_empty() => 0.0,
            _ => return,
        };
        known.end_line(number, lines);
        known.state = if !step.error.is_empty() {
            lines.push(format!("#{number} ERROR: {}", step.error.trim()));
            State::Failed
        } else if step.cached {
            lines.push(format!("#{number} CACHED"));
            State::Cached
        } else {
            lines.push(format!("#{number} DONE {took:.1}s"));
            State::Done(took)
        };
    }

    fn part(&mut self, part: Part) {
        let Some(known) = self.index.get(&part.step).map(|index| &mut self.steps[*index]) else { return };
        match known.parts.iter().position(|known| known.id == part.id) {
            Some(index) => known.parts[index] = part,
            None if known.parts.len() < PARTS_MAX => known.parts.push(part),
            None => {}
        }
    }

    fn log(&mut self, log: &Log, lines: &mut Vec<String>) {
        let Some(index) = self.index.get(&log.step).copied() else { return };
        let (number, known) = (index + 1, &mut self.steps[index]);
        known.kept.extend(&log.bytes);
        let over = known.kept.len().saturating_sub(KEPT_BYTES_MAX);
        known.kept.drain(..over);
        for piece in log.bytes.split_inclusive(|byte| *byte == b'\n') {
            known.line.extend_from_slice(piece);
            // One that never ends is told in pieces.
            if piece.ends_with(b"\n") || known.line.len() > 64 * 1024 {
                known.end_line(number, lines);
            }
        }
    }

    /// The output of the steps that failed, for those who saw a live view of it.
    pub(super) fn of_failed(&self) -> String {
        let mut out = String::new();
        for known in self.steps.iter().filter(|known| matches!(known.state, State::Failed)) {
            let kept: Vec<u8> = known.kept.iter().copied().collect();
            let _ = writeln!(out, "------\n > {}:\n{}\n------", known.name, text(&kept).trim_end());
        }
        out
    }

    /// What to look at while it works: at most [`VIEW_LINES`] lines of at most `width` characters.
    pub(super) fn view(&self, width: usize, since: Instant) -> String {
        let total = self.steps.len();
        let over =
            self.steps.iter().filter(|known| !matches!(known.state, State::Waiting | State::Working(_)));
        let mut lines = vec![format!(
            "building: {} of {total} steps, {:.1}s",
            over.count(),
            since.elapsed().as_secs_f64()
        )];
        let working: Vec<_> = self.steps.iter().enumerate().filter(|(_, known)| known.is_working()).collect();
        // The last ones that are over fill what room those at work leave.
        let wanted: usize = working.iter().map(|(_, known)| 1 + known.tail().len()).sum();
        let room = (VIEW_LINES - 1).saturating_sub(wanted);
        let past: Vec<_> = self.steps.iter().filter(|known| !known.is_working()).collect();
        let past = past.iter().filter_map(|known| known.in_short()).collect::<Vec<_>>();
        lines.extend(past.iter().skip(past.len().saturating_sub(room)).cloned());
        for (_, known) in working {
            if let State::Working(begun) = known.state {
                lines.push(format!(
                    " => {} {:.1}s{}",
                    known.name,
                    begun.elapsed().as_secs_f64(),
                    known.bytes()
                ));
            }
            lines.extend(known.tail().into_iter().map(|line| format!("    {line}")));
        }
        lines.truncate(VIEW_LINES);
        let cut = |line: String| line.chars().take(width).collect::<String>();
        lines.into_iter().map(cut).collect::<Vec<_>>().join("\n")
    }
}

impl Known {
    fn is_working(&self) -> bool {
        matches!(self.state, State::Working(_))
    }

    fn end_line(&mut self, number: usize, lines: &mut Vec<String>) {
        let line = std::mem::take(&mut self.line);
        if !line.is_empty() {
            lines.push(format!("#{number} {}", text(&line).trim_end()));
        }
    }

    /// The last lines of its output.
    fn tail(&self) -> Vec<String> {
        let kept: Vec<u8> = self.kept.iter().rev().take(4096).rev().copied().collect();
        let kept = text(&kept);
        let lines: Vec<_> = kept.lines().filter(|line| !line.trim().is_empty()).collect();
        lines.iter().skip(lines.len().saturating_sub(TAIL_LINES)).map(|line| (*line).to_owned()).collect()
    }

    /// A line about a step that is over.
    fn in_short(&self) -> Option<String> {
        match &self.state {
            State::Waiting | State::Working(_) => None,
            State::Cached => Some(format!(" => {} CACHED", self.name)),
            State::Done(took) => Some(format!(" => {} {took:.1}s", self.name)),
            State::Failed => Some(format!(" => {} ERROR", self.name)),
        }
    }

    /// How much of its parts has come.
    fn bytes(&self) -> String {
        let parts = self.parts.iter().filter(|part| part.total > 0 && part.completed.is_none());
        let (current, total) =
            parts.fold((0, 0), |(current, total), part| (current + part.current, total + part.total));
        if total == 0 {
            String::new()
        } else {
            format!("  {} of {} MB", current / 1_000_000, total / 1_000_000)
        }
    }
}

/// What a step wrote, without what would move a terminal's cursor.
fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    // What a line was overwritten with is what is left of it.
    let lines =
        text.split('\n').map(|line| line.trim_end_matches('\r').rsplit('\r').next().unwrap_or_default());
    let lines: Vec<String> =
        lines.map(|line| line.replace(|letter: char| letter.is_control() && letter != '\t', "")).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::wire::Moment;
    use super::*;

    fn at(seconds: i64) -> Option<Moment> {
        Some(Moment { seconds, nanos: 500_000_000 })
    }

    fn step(digest: &str, started: Option<Moment>, completed: Option<Moment>) -> Step {
        let (digest, name) = (digest.to_owned(), format!("RUN {digest}"));
        Step { digest, name, started, completed, ..Step::default() }
    }

    fn log(step: &str, text: &str) -> Log {
        Log { step: step.to_owned(), at: at(1), bytes: text.as_bytes().to_vec() }
    }

    #[test]
    fn plain_lines_tell_each_step_once_and_its_output_by_lines() {
        let mut progress = Progress::default();
        let first = News { steps: vec![step("a", None, None), step("b", at(1), None)], ..News::default() };
        assert_eq!(progress.take(first.clone()), ["#2 RUN b"]);
        assert_eq!(progress.take(first), [""; 0]);
        let output =
            News { logs: vec![log("b", "one\ntw"), log("b", "o\r\n\x1b[2Jthree")], ..News::default() };
        assert_eq!(progress.take(output), ["#2 one", "#2 two"]);
        let cached = Step { cached: true, ..step("a", at(2), at(2)) };
        let failed = Step { error: "exit code: 1".to_owned(), ..step("b", at(1), at(3)) };
        let end = News { steps: vec![cached, failed, step("c", at(3), at(5))], ..News::default() };
        assert_eq!(
            progress.take(end),
            ["#1 RUN a", "#1 CACHED", "#2 [2Jthree", "#2 ERROR: exit code: 1", "#3 RUN c", "#3 DONE 2.0s"]
        );
        assert_eq!(progress.of_failed(), "------\n > RUN b:\none\ntwo\n[2Jthree\n------\n");
    }

    #[test]
    fn the_view_has_a_bound_in_lines_and_width_and_shows_what_is_at_work() {
        let mut progress = Progress::default();
        let done = (0..40).map(|number| step(&format!("done-{number}"), at(1), at(2))).collect();
        progress.take(News { steps: done, ..News::default() });
        let working = vec![step("working", at(2), None)];
        let logs = vec![log("working", &(0..50).map(|line| format!("line {line}\n")).collect::<String>())];
        progress.take(News { steps: working, logs, ..News::default() });
        let view = progress.view(30, Instant::now());
        let lines: Vec<_> = view.lines().collect();
        assert!(lines.len() == VIEW_LINES && lines.iter().all(|line| line.chars().count() <= 30), "{view}");
        assert!(lines[0].starts_with("building: 40 of 41 steps"), "{view}");
        assert!(view.contains(" => RUN done-39 1.0s") && !view.contains("done-2 "), "{view}");
        assert!(view.contains(" => RUN working") && view.ends_with("    line 49"), "{view}");
    }

    #[test]
    fn what_a_guest_writes_is_kept_within_bounds() {
        let mut progress = Progress::default();
        progress.take(News { steps: vec![step("a", at(1), None)], ..News::default() });
        for _ in 0..100 {
            progress.take(News { logs: vec![log("a", &"x".repeat(10_000))], ..News::default() });
        }
        assert!(progress.steps[0].kept.len() <= KEPT_BYTES_MAX && progress.steps[0].line.len() <= 64 * 1024);
        let many = (0..5000).map(|number| step(&number.to_string(), None, None)).collect();
        progress.take(News { steps: many, ..News::default() });
        assert_eq!(progress.steps.len(), STEPS_MAX);
    }
}
