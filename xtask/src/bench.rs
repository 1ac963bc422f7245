//! `cargo xtask bench wake`: how long it takes from asleep to the first answer, beside the usual VM.
//!
//! Every round measures each way to wake once, one after the other, so that what else the machine does falls on all alike.
//! A Docker request is *uncached* when no sleeping session can answer it: each names a number that was never asked for.

mod folders;
mod http;
mod ours;
mod report;
mod usual;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

pub(crate) use self::folders::Folders;
use self::ours::Home;
use self::usual::Usual;

/// Longest wait for one answer: a loaded machine takes a multiple of what a quiet one does.
const ANSWER_WITHIN: Duration = Duration::from_secs(300);

#[derive(Args)]
pub(crate) struct Wake {
    /// How often each way is measured.
    #[arg(long, default_value_t = 10)]
    rounds: u32,
    /// In how many of these rounds the two ways that boot a kernel are measured, which take most of the time; in all when
    /// absent.
    #[arg(long)]
    boots: Option<u32>,
    /// The page that is written; the plot and the figures lie beside it.
    #[arg(long, default_value = "docs/BENCHMARKS.md")]
    out: PathBuf,
    /// Where the usual VM is built, and kept for the next time.
    #[arg(long, default_value = "build/usual")]
    usual: PathBuf,
    /// The store of guest images.
    #[arg(long, default_value = "build/images")]
    images: PathBuf,
}

/// One way to wake, as it was measured.
#[derive(Debug, Default)]
struct Series {
    name: &'static str,
    /// From the request to the end of its answer.
    totals: Vec<Duration>,
    /// Steps in order, each with how long it took in every round.
    phases: Vec<(String, Vec<Duration>)>,
}

/// One measurement.
#[derive(Debug)]
struct Measured {
    total: Duration,
    phases: Vec<(String, Duration)>,
}

impl Series {
    fn named(name: &'static str) -> Self {
        Self { name, ..Self::default() }
    }

    fn add(&mut self, measured: Measured) {
        eprintln!("{}: {:.2} s", self.name, measured.total.as_secs_f64());
        self.totals.push(measured.total);
        for (step, took) in measured.phases {
            match self.phases.iter_mut().find(|(known, _)| *known == step) {
                Some((_, all)) => all.push(took),
                None => self.phases.push((step, vec![took])),
            }
        }
    }
}

/// What is measured beside the wakes.
#[derive(Debug, Default)]
struct Asides {
    /// From the order to suspend a new session to its answer: QEMU is gone, the seal is on the disk. That of the other
    /// session would have more and more answers to capture: it has never been asked the same twice.
    suspends: Vec<Duration>,
    /// What the first snapshot of each new session took on the disk, in bytes.
    snapshot_bytes: Vec<u64>,
    /// The same, compressed.
    compressed_bytes: Vec<u64>,
}

impl Wake {
    pub(crate) fn run(self) -> Result<()> {
        ensure!(self.rounds > 0 && self.boots != Some(0), "nothing is measured in no rounds");
        let usual = Usual::prepare(&self.usual)?;
        let home = Home::start(&self.images)?;
        eprintln!("making the template");
        home.make_template()?;
        home.compress_after("never")?;
        let session = home.create("bench")?;
        // Copied from the template; from then on its disk is its own.
        session.ask()?;

        let mut cold = Series::named("own cold boot");
        let mut clone = Series::named("new session, from a template");
        let mut resume = Series::named("resume of a snapshot");
        let mut compressed = Series::named("resume of a compressed snapshot");
        let mut debian = Series::named("the usual VM");
        let mut asides = Asides::default();
        for round in 1..=self.rounds {
            eprintln!("round {round} of {}", self.rounds);
            let boots = self.boots.is_none_or(|boots| round <= boots);
            if boots {
                session.sleep("stop")?;
                cold.add(session.wake("cold")?);
            }
            session.sleep("suspend")?;
            resume.add(session.wake("resume")?);
            let fresh = home.create(&format!("fresh-{round}"))?;
            clone.add(fresh.wake("clone")?);
            asides.suspends.push(fresh.sleep("suspend")?);
            asides.snapshot_bytes.push(fresh.snapshot_bytes()?);
            home.compress_after("0")?;
            // A sleep is what has the service look at its snapshots.
            fresh.ask()?;
            fresh.sleep("suspend")?;
            asides.compressed_bytes.push(fresh.until_compressed()?);
            home.compress_after("never")?;
            compressed.add(fresh.wake("resume")?);
            fresh.remove()?;
            if boots {
                // Nothing of ours runs while the other is measured.
                session.sleep("suspend")?;
                debian.add(usual.wake(home.qemu(), round)?);
                session.ask()?;
            }
        }
        session.remove()?;
        report::write(&self.out, &[resume, compressed, clone, cold, debian], &asides)
    }
}
