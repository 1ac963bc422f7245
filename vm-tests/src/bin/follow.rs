//! Prints what inotify(7) tells of a folder, an event a line: `attribute NAME` where attributes changed, else `other NAME`.
//! For containers, with the libraries of the host that built it.

use std::io::Write as _;
use std::mem::MaybeUninit;

use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).ok_or(std::io::ErrorKind::InvalidInput)?;
    let inotify = init(CreateFlags::CLOEXEC)?;
    add_watch(&inotify, &folder, WatchFlags::ALL_EVENTS)?;
    let mut out = std::io::stdout();
    writeln!(out, "watching")?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = Reader::new(inotify, &mut buffer);
    loop {
        let event = events.next()?;
        let kind = if event.events().contains(ReadFlags::ATTRIB) { "attribute" } else { "other" };
        let name = event.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        writeln!(out, "{kind} {name}")?;
        out.flush()?;
    }
}
