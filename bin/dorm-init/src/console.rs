//! Lines on the serial console, which the host keeps the last of.

use std::fs::OpenOptions;
use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

/// Says one line. What can't be said is lost: there is nobody else to tell.
pub(crate) fn say(line: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(format!("dorm-init: {line}\n").as_bytes());
    }
}

/// What libraries complain of goes to the console too.
pub(crate) fn hear_libraries() {
    if log::set_logger(&Libraries).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

struct Libraries;

impl Log for Libraries {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= LevelFilter::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            say(&format!("{}: {}", record.target(), record.args()));
        }
    }

    fn flush(&self) {}
}
