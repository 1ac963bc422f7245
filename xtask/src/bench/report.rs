//! The page, the plot and the figures of a measurement.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::{Asides, Series};

/// Size of the plot, in pixels.
const WIDTH: f64 = 760.0;
const ROW: f64 = 44.0;
const LEFT: f64 = 230.0;
const RIGHT: f64 = 90.0;

/// The plot's axis, in seconds: each of these gets a line. Logarithmic, because the ways differ by more than tenfold.
const TICKS: [f64; 8] = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0];

pub(super) fn write(out: &Path, series: &[Series], asides: &Asides) -> Result<()> {
    let folder = out.parent().context("the page needs a folder")?.join("benchmarks");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("wake.svg"), plot(series))?;
    fs::write(folder.join("wake.json"), figures(series, asides)?)?;
    fs::write(out, page(series, asides))?;
    eprintln!("{}", out.display());
    Ok(())
}

/// The value below which this part of all lies: the nearest that was measured.
fn quantile(all: &[Duration], part: f64) -> Duration {
    let mut sorted = all.to_vec();
    sorted.sort_unstable();
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or_default()
}

fn seconds(took: Duration) -> String {
    format!("{:.2}", took.as_secs_f64())
}

fn page(series: &[Series], asides: &Asides) -> String {
    let mut page = String::from(
        "# Benchmarks\n\nWritten by `cargo xtask bench wake`: from asleep to the end of the answer to a Docker request that no \
         sleeping session can answer.\nEach round measures each way once, one after the other; what boots may be left out of the \
         last rounds, and is compared with\nthe rounds that it was in. A session's host is there already but in a new session. The \
         usual VM is Debian 13 with systemd\nand its `docker.io`, with as much RAM and as many vCPUs, booted from its own \
         kernel. Shared folders are\nin [benchmarks/folders.md](benchmarks/folders.md).\n\n",
    );
    for (what, value) in circumstances() {
        let _ = writeln!(page, "- {what}: {value}");
    }
    page.push_str("\n![from asleep to the first answer](benchmarks/wake.svg)\n\n");
    page.push_str("| from asleep to the first answer | rounds | median | p90 | least | beside the usual VM |\n|---|---|---|---|---|---|\n");
    let usual = series.last().map_or(&[][..], |usual| &usual.totals);
    for Series { name, totals, .. } in series {
        let median = quantile(totals, 0.5);
        let shared = &totals[..totals.len().min(usual.len())];
        let ratio = quantile(usual, 0.5).as_secs_f64() / quantile(shared, 0.5).as_secs_f64();
        let (p90, least) = (seconds(quantile(totals, 0.9)), seconds(quantile(totals, 0.0)));
        let _ = writeln!(
            page,
            "| {name} | {} | {} s | {p90} s | {least} s | {ratio:.1} times as fast |",
            totals.len(),
            seconds(median)
        );
    }
    page.push_str("\n| steps, in order | median | p90 |\n|---|---|---|\n");
    for Series { name, phases, .. } in series {
        for (step, all) in phases {
            let (median, p90) = (seconds(quantile(all, 0.5)), seconds(quantile(all, 0.9)));
            let _ = writeln!(page, "| {name}: {step} | {median} s | {p90} s |");
        }
    }
    let suspend = (quantile(&asides.suspends, 0.5), quantile(&asides.suspends, 0.9));
    let [(median, most), (compressed, compressed_most)] =
        [&asides.snapshot_bytes, &asides.compressed_bytes].map(|bytes| sizes(bytes));
    let _ = write!(
        page,
        "\n| beside | median | p90 |\n|---|---|---|\n| suspend, from the order to QEMU gone | {} s | {} s |\n\
         | first snapshot of a new session, on the disk | {median} MB | {most} MB (most) |\n\
         | the second, compressed | {compressed} MB | {compressed_most} MB (most) |\n",
        seconds(suspend.0),
        seconds(suspend.1)
    );
    page
}

/// Median and most, in MB.
fn sizes(bytes: &[u64]) -> (u64, u64) {
    let mut bytes = bytes.to_vec();
    bytes.sort_unstable();
    let at = |index: usize| bytes.get(index).copied().unwrap_or_default() / 1_000_000;
    (at(bytes.len() / 2), at(bytes.len().saturating_sub(1)))
}

/// What the figures depend on.
pub(super) fn circumstances() -> Vec<(&'static str, String)> {
    let line = |program: &str, argument: &str| {
        let output =
            Command::new(program).arg(argument).output().map(|output| output.stdout).unwrap_or_default();
        String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
    };
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let model = read("/proc/cpuinfo");
    let model = model.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    vec![
        ("day", line("date", "+%F")),
        ("programs", if cfg!(debug_assertions) { "a debug build" } else { "a release build" }.to_owned()),
        ("QEMU", line("qemu-system-x86_64", "--version")),
        (
            "host",
            format!(
                "Linux {}, {processors} x {}",
                line("uname", "-r"),
                model.trim_start_matches([':', '\t', ' '])
            ),
        ),
        ("load at the end", read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned()),
        ("guests", "emulated (TCG), 1 GiB".to_owned()),
    ]
}

fn figures(series: &[Series], asides: &Asides) -> Result<String> {
    let milliseconds = |all: &[Duration]| all.iter().map(|took| took.as_millis() as u64).collect::<Vec<_>>();
    let all: Vec<_> = series
        .iter()
        .map(|Series { name, totals, phases }| {
            let phases: serde_json::Map<_, _> =
                phases.iter().map(|(step, all)| (step.clone(), json!(milliseconds(all)))).collect();
            json!({ "name": name, "total_ms": milliseconds(totals), "phases_ms": phases })
        })
        .collect();
    let circumstances: serde_json::Map<_, _> =
        circumstances().into_iter().map(|(what, value)| (what.to_owned(), json!(value))).collect();
    let figures = json!({
        "with": circumstances,
        "wakes": all,
        "suspend_ms": milliseconds(&asides.suspends),
        "snapshot_bytes": asides.snapshot_bytes,
        "compressed_bytes": asides.compressed_bytes,
    });
    Ok(serde_json::to_string_pretty(&figures)? + "\n")
}

/// A row for each way: a dot for each round, a bar at the median.
fn plot(series: &[Series]) -> String {
    let height = ROW * series.len() as f64 + 60.0;
    let (low, high) = (TICKS[0].ln(), TICKS[TICKS.len() - 1].ln());
    let x = |seconds: f64| LEFT + (seconds.max(TICKS[0]).ln() - low) / (high - low) * (WIDTH - LEFT - RIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for tick in TICKS {
        let at = x(tick);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"10\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{tick}</text>",
            height - 40.0,
            height - 24.0
        );
    }
    for (row, Series { name, totals, .. }) in series.iter().enumerate() {
        let y = 32.0 + ROW * row as f64;
        let median = quantile(totals, 0.5).as_secs_f64();
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
            LEFT - 12.0,
            y + 4.0
        );
        for took in totals {
            let at = x(took.as_secs_f64());
            let _ = writeln!(
                svg,
                "<circle cx=\"{at:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"#2a6fb0\" fill-opacity=\"0.45\"/>"
            );
        }
        let at = x(median);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{:.1}\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"#b0382a\" stroke-width=\"3\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{median:.2} s</text>",
            y - 12.0,
            y + 12.0,
            WIDTH - RIGHT + 8.0,
            y + 4.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">seconds, logarithmic</text>\n</svg>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        height - 6.0
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_value_that_was_measured() {
        let all: Vec<_> = [5, 1, 4, 2, 3, 10, 9, 8, 7, 6].map(Duration::from_secs).to_vec();
        assert_eq!(quantile(&all, 0.5), Duration::from_secs(5));
        assert_eq!(quantile(&all, 0.9), Duration::from_secs(9));
        assert_eq!(quantile(&all, 0.0), Duration::from_secs(1));
        assert_eq!(quantile(&all[..1], 0.9), Duration::from_secs(5));
        assert_eq!(quantile(&[], 0.5), Duration::ZERO);
    }

    #[test]
    fn a_page_names_every_way_with_its_ratio() {
        let of = |name, seconds| Series {
            name,
            totals: vec![Duration::from_secs(seconds); 3],
            phases: vec![("kernel".to_owned(), vec![Duration::from_secs(1); 3])],
        };
        let series = [of("resume", 1), of("usual", 25)];
        let asides = Asides {
            suspends: vec![Duration::from_secs(1)],
            snapshot_bytes: vec![300_000_000],
            ..Asides::default()
        };
        let page = page(&series, &asides);
        assert!(page.contains("| resume | 3 | 1.00 s | 1.00 s | 1.00 s | 25.0 times as fast |"), "{page}");
        assert!(page.contains("| usual: kernel | 1.00 s | 1.00 s |"), "{page}");
        assert!(plot(&series).ends_with("</svg>\n"));
    }
}
