//! Lines on the serial console, which the host keeps the last of.

use std::fs::OpenOptions;
use std::io::Write;

/// Says one line. What can't be said is lost: there is nobody else to tell.
pub(crate) fn say(line: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(format!("dorm-init: {line}\n").as_bytes());
    }
}
