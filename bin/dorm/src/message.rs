//! What the engine tells while it works: lines of JSON with a status, a progress, or an error.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};

use dormouse_client::JsonLines;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::Value;

use crate::error::Failure;

/// Most things that are shown at once, each with a line of its own.
const BARS_MAX: usize = 200;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    stream: Option<String>,
    status: Option<String>,
    id: Option<String>,
    error: Option<String>,
    #[serde(rename = "progressDetail")]
    progress: Option<Amount>,
    aux: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Amount {
    current: Option<u64>,
    total: Option<u64>,
}

/// Where it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// As a result.
    Out,
    /// Beside the result.
    Err,
    /// Nowhere.
    Quiet,
}

/// Shows all of it, and gives what came beside: an image's id, a digest. An error in it is the end.
pub(crate) async fn show(mut lines: JsonLines, shown: Shown) -> Result<Vec<Value>, Failure> {
    let mut bars = Bars::new(shown);
    let mut aside = Vec::new();
    loop {
        let next = lines.next::<Message>().await;
        let Some(message) = next.map_err(|error| Failure::lost("the engine's answer broke off", error))?
        else {
            return Ok(aside);
        };
        if let Some(error) = message.error {
            return Err(Failure::new(error.trim()));
        }
        aside.extend(message.aux.clone());
        if shown != Shown::Quiet && message.aux.is_none() {
            bars.show(message, shown)?;
        }
    }
}

/// The things that are under way, on a terminal.
struct Bars {
    all: Option<MultiProgress>,
    each: BTreeMap<String, ProgressBar>,
}

impl Bars {
    fn new(shown: Shown) -> Self {
        let live = shown != Shown::Quiet && io::stderr().is_terminal() && io::stdout().is_terminal();
        Self { all: live.then(MultiProgress::new), each: BTreeMap::new() }
    }

    fn show(&mut self, message: Message, shown: Shown) -> Result<(), Failure> {
        let amount = message.progress.filter(|amount| amount.current.is_some());
        if let (Some(all), Some(id)) = (&self.all, &message.id) {
            if !self.each.contains_key(id) && self.each.len() < BARS_MAX {
                let style = ProgressStyle::with_template("{prefix}: {msg} {bytes}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                let bar = all.add(ProgressBar::no_length().with_style(style).with_prefix(id.clone()));
                self.each.insert(id.clone(), bar);
            }
            if let Some(bar) = self.each.get(id) {
                let amount = amount.unwrap_or_default();
                if let Some(total) = amount.total {
                    bar.set_length(total);
                }
                bar.set_position(amount.current.unwrap_or(0));
                bar.set_message(message.status.unwrap_or_default());
            }
            return Ok(());
        }
        // What only moves is not for files.
        if amount.is_some() {
            return Ok(());
        }
        let text = match (message.stream, message.status, message.id) {
            (Some(stream), _, _) => stream,
            (None, Some(status), Some(id)) => format!("{id}: {status}\n"),
            (None, Some(status), None) => format!("{status}\n"),
            (None, None, _) => return Ok(()),
        };
        let write = || match shown {
            Shown::Out => io::stdout().write_all(text.as_bytes()),
            Shown::Err | Shown::Quiet => io::stderr().write_all(text.as_bytes()),
        };
        match &self.all {
            Some(all) => all.suspend(write)?,
            None => write()?,
        }
        Ok(())
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        for bar in self.each.values() {
            bar.abandon();
        }
    }
}
