//! Results go to standard output, everything else to standard error.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

use crate::error::{Done, Failure, SUCCESS};

/// Prints one line of a result.
pub(crate) fn print(text: impl AsRef<str>) -> Done {
    writeln!(io::stdout(), "{}", text.as_ref())?;
    Ok(SUCCESS)
}

/// Says something beside the result. Nobody need listen: a standard error that is closed is no reason to stop.
pub(crate) fn say(words: impl Display) {
    let _ = writeln!(io::stderr(), "{words}");
}

/// Says what is not as it should be.
pub(crate) fn warn(words: &str) {
    say(format_args!("warning: {words}"));
}

/// Prints a result as indented JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Done {
    print(serde_json::to_string_pretty(value).map_err(Failure::new)?)
}
