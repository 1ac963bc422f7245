//! The monitor's screen.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState, Wrap};

use super::state::{HOURS, Seen, State};
use crate::terminal::has_colours;

/// What the keys do.
const KEYS: &str = "s sleep   w wake   p pin   t terminate   q quit";
/// Heights of a bar, from nothing to all.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// The columns and their widths, the most telling first: as many as there is room for.
const COLUMNS: [(&str, u16); 8] = [
    ("SESSION", 14),
    ("VM", 11),
    (WHY, 16),
    ("MEMORY", 8),
    ("BACK", 8),
    ("CPU", 5),
    ("PORTS", 22),
    ("WAKES, 24 h", 24),
];
/// This one has all room that is left.
const WHY: &str = "WHY";
/// Lines about the session that is selected.
const DETAILS: u16 = 6;

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame<'_>, state: &State) {
    let area = frame.area();
    let details = if area.height >= 3 * DETAILS { DETAILS } else { 0 };
    let [head, table, below, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(2),
        Constraint::Length(details),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(headline(state)).bold(), head);
    let columns = columns(area.width);
    let rows = state.seen.iter().map(|seen| row(seen, state, columns.len()));
    let header =
        Row::new(columns.iter().map(|(name, _)| *name)).style(Style::new().add_modifier(Modifier::DIM));
    let widths = columns.iter().map(|(_, width)| Constraint::Length(*width));
    let widget = Table::new(rows, widths)
        .header(header)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut selection = TableState::new().with_selected((!state.seen.is_empty()).then(|| state.selected()));
    frame.render_stateful_widget(widget, table, &mut selection);
    if let Some(seen) = state.seen.get(state.selected()) {
        frame.render_widget(Paragraph::new(details_of(seen)).wrap(Wrap { trim: true }), below);
    }
    let foot_line = match (&state.ending, state.told.is_empty()) {
        (Some(name), _) => Line::from(format!("terminate {name}? y ends it, any other key doesn't")).bold(),
        (None, false) => Line::from(format!("{KEYS}   |   {}", state.told)),
        (None, true) => Line::from(KEYS),
    };
    frame.render_widget(Paragraph::new(foot_line), foot);
}

fn headline(state: &State) -> String {
    let up = state.seen.iter().filter(|seen| seen.memory_mib.is_some()).count();
    let memory: u64 = state.seen.iter().filter_map(|seen| seen.memory_mib).sum();
    format!("{} sessions, {up} awake, {memory} MiB", state.seen.len())
}

/// Those that fit, with what is left given to one: a solver of constraints that can't all be met is no help.
fn columns(width: u16) -> Vec<(&'static str, u16)> {
    let (mut left, mut fit) = (width, Vec::new());
    for (name, wanted) in COLUMNS {
        // A blank stands between two.
        let blank = u16::from(!fit.is_empty());
        if left < wanted + blank {
            break;
        }
        left -= wanted + blank;
        fit.push((name, wanted));
    }
    if let Some((_, why)) = fit.iter_mut().find(|(name, _)| *name == WHY) {
        *why += left;
    }
    fit
}

fn row(seen: &Seen, state: &State, columns: usize) -> Row<'static> {
    let mib = |mib: Option<u64>| mib.map_or_else(String::new, |mib| format!("{mib} M"));
    let cells = [
        Cell::from(seen.info.name.to_string()),
        Cell::from(Text::from(seen.phase()).style(colour(seen.phase()))),
        Cell::from(seen.why(state.at)),
        Cell::from(mib(seen.memory_mib)),
        Cell::from(mib(seen.given_back_mib())),
        Cell::from(seen.cpu.map_or_else(String::new, |share| format!("{:.0}%", share * 100.0))),
        Cell::from(seen.ports.join(" ")),
        Cell::from(bars(&seen.wakes)),
    ];
    Row::new(cells.into_iter().take(columns))
}

fn colour(phase: &str) -> Style {
    if !has_colours(&std::io::stdout()) {
        return Style::new();
    }
    match phase {
        "running" => Style::new().fg(Color::Green),
        "starting" | "stopping" | "committed" | "counting" => Style::new().fg(Color::Yellow),
        "terminated" | "terminating" => Style::new().fg(Color::Red),
        _ => Style::new(),
    }
}

/// A bar for each hour; the highest is the most wakes of an hour.
fn bars(wakes: &[u64; HOURS]) -> String {
    let most = wakes.iter().max().copied().unwrap_or(0).max(1);
    let bar = |wakes: &u64| {
        let height = (wakes * (BARS.len() as u64 - 1)).div_ceil(most);
        BARS.get(usize::try_from(height).unwrap_or(0)).copied().unwrap_or(' ')
    };
    wakes.iter().map(bar).collect()
}

/// What has no place in the table.
fn details_of(seen: &Seen) -> Text<'static> {
    let info = &seen.info;
    let holds: Vec<_> = info
        .holds
        .iter()
        .map(|hold| {
            format!("{} ({}){}", hold.reason, hold.owner, if hold.weak { ", holds nothing" } else { "" })
        })
        .collect();
    let total: u64 = seen.wakes.iter().sum();
    let ports = if seen.ports.is_empty() { "none".to_owned() } else { seen.ports.join(" ") };
    Text::from(vec![
        Line::from(format!(
            "{}: {}, {} MiB, CPUs: {}",
            info.name,
            seen.phase(),
            info.vm.memory_mib,
            info.vm.cpus
        ))
        .bold(),
        Line::from(format!("holds: {}", if holds.is_empty() { "none".to_owned() } else { holds.join("; ") })),
        Line::from(format!("ports: {ports}")),
        Line::from(format!("wakes: {}  {total} in 24 h, {} in all", bars(&seen.wakes), info.vm.start_count)),
    ])
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::state::tests::{AT, seen};
    use super::*;

    fn drawn(state: &State, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, state)).unwrap();
        terminal.backend().to_string()
    }

    fn sessions() -> State {
        let mut busy =
            seen("work", "running", &[("container", "container web"), ("connection", "GET /events")]);
        (busy.memory_mib, busy.cpu, busy.ports) = (Some(300), Some(0.42), vec!["127.0.0.1:8080".to_owned()]);
        busy.wakes[HOURS - 1] = 8;
        busy.wakes[HOURS - 2] = 1;
        busy.wakes[0] = 4;
        let mut state = State::default();
        state.look_at(vec![seen("default", "absent", &[]), busy], AT.parse().unwrap());
        state
    }

    #[test]
    fn a_wide_screen_shows_all_of_each_session() {
        let mut state = sessions();
        state.key(ratatui::crossterm::event::KeyCode::Down);
        insta::assert_snapshot!("monitor-wide", drawn(&state, 130, 20));
    }

    #[test]
    fn a_narrow_and_low_screen_shows_what_fits() {
        insta::assert_snapshot!("monitor-narrow", drawn(&sessions(), 60, 8));
        for (width, height) in [(1, 1), (10, 3), (300, 100)] {
            drawn(&sessions(), width, height);
            drawn(&State::default(), width, height);
        }
    }

    #[test]
    fn an_end_is_asked_about_where_one_looks() {
        let mut state = sessions();
        state.key(ratatui::crossterm::event::KeyCode::Char('t'));
        assert!(drawn(&state, 80, 20).contains("terminate default? y ends it"));
        state.key(ratatui::crossterm::event::KeyCode::Char('n'));
        state.told("default is asleep".to_owned());
        assert!(drawn(&state, 120, 20).contains("default is asleep"));
    }

    #[test]
    fn columns_fit_whatever_the_width() {
        for width in 0..300 {
            let columns = columns(width);
            let blanks = columns.len().saturating_sub(1);
            let taken: usize = columns.iter().map(|(_, width)| usize::from(*width)).sum::<usize>() + blanks;
            assert!(taken <= usize::from(width), "{taken} in {width}");
        }
        assert_eq!((columns(13).len(), columns(60).len(), columns(115).len()), (0, 4, 8));
    }

    #[test]
    fn bars_are_as_high_as_their_hours() {
        let mut wakes = [0; HOURS];
        (wakes[0], wakes[1], wakes[2]) = (8, 4, 1);
        assert_eq!(bars(&wakes).chars().take(4).collect::<String>(), "█▄▁ ");
        assert_eq!(bars(&[0; HOURS]).trim(), "");
    }
}
