//! Progress: live on a terminal, plain lines elsewhere, always on standard error.

use std::io::{self, IsTerminal};
use std::time::Duration;

use dormouse_api::{Phase, SessionInfo};
use dormouse_client::JsonLines;
use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::task::AbortOnDropHandle;

use crate::output::say;

/// One thing that takes its time.
#[derive(Debug)]
pub(crate) struct Progress {
    /// None where nobody looks.
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A spinner with a text; nothing is shown before the first one.
    pub(crate) fn spinner() -> Self {
        if !io::stderr().is_terminal() {
            return Self { bar: None };
        }
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar: Some(bar) }
    }

    /// Nothing is shown.
    pub(crate) fn none() -> Self {
        Self { bar: None }
    }

    /// A count of bytes.
    pub(crate) fn bytes(what: &str, total: Option<u64>) -> Self {
        if !io::stderr().is_terminal() {
            return Self { bar: None };
        }
        let template = match total {
            Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes}",
            None => "{spinner} {msg} {bytes}",
        };
        let bar = ProgressBar::no_length();
        if let Some(total) = total {
            bar.set_length(total);
        }
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        Self { bar: Some(bar) }
    }

    /// Says what is being done now.
    pub(crate) fn step(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => say(text),
        }
    }

    /// Counts on.
    pub(crate) fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Tells the steps of a VM's start for as long as it is kept.
pub(crate) fn tell_steps(changes: JsonLines) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(follow(changes)))
}

async fn follow(mut changes: JsonLines) {
    let mut shown: Option<(Progress, Option<String>)> = None;
    while let Ok(Some(info)) = changes.next::<SessionInfo>().await {
        if info.vm.phase != Phase::Starting {
            shown = None;
            continue;
        }
        let (progress, last) = shown.get_or_insert_with(|| (Progress::spinner(), None));
        if last.is_none() || *last != info.vm.step {
            progress.step(&format!("starting the VM: {}", info.vm.step.as_deref().unwrap_or("QEMU")));
            *last = Some(info.vm.step.unwrap_or_default());
        }
    }
}
