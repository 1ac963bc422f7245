//! Watchers in containers are told of what the host changes.
//!
//! ```text
//! the host writes ─► the keeper's inotify(7) ─► this ─► `dorm-init tell-changes` ─► chmod(2) to the mode that the file has
//!     ─► inotify(7) of the container
//! ```
//!
//! It asks for changes when the guest has taken the last ones, so that what waits, waits in the keeper, within its bounds.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use dormouse_agent_proto::{PROCESS_PAYLOAD_MAX, ProcessFrame, RunProcess};
use dormouse_folders::{Changes, GUEST_ROOT, Keeper, LinkError};
use dormouse_mux::{Agent, read_process_frame};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};

use super::Folders;

/// The guest's init, which lies on no file system of a guest that is up.
const TELLER: [&str; 2] = ["/proc/1/exe", "tell-changes"];

/// What the teller says that is kept, in bytes.
const WORDS_BYTES_MAX: usize = 1024;

/// Tells the guest what changes in what this keeper shares, until it is aborted or can't.
pub(super) async fn tell(agent: Agent, control: PathBuf, folders: Folders, generation: u64) {
    let telling = async {
        let mut keeper = Keeper::connect(&control).await.map_err(|error| error.to_string())?;
        let argv = TELLER.map(str::to_owned).to_vec();
        let process = agent.run(RunProcess { argv, ..RunProcess::default() }).await;
        let process = process.map_err(|error| error.to_string())?;
        let (reader, mut writer) = tokio::io::split(process.stream);
        tokio::select! {
            words = last_words(reader) => tracing::warn!(words, generation, "watchers in containers are told of no more changes"),
            // Most often the keeper has ended, as it should; if it has died, that is told elsewhere.
            fed = feed(&mut keeper, &mut writer, &folders, generation) => tracing::debug!(?fed, generation, "no more changes"),
        }
        Ok::<_, String>(())
    };
    if let Err(why) = telling.await {
        tracing::warn!(why, generation, "watchers in containers aren't told of changes");
    }
}

/// Asks and tells.
async fn feed(
    keeper: &mut Keeper,
    guest: &mut (impl AsyncWrite + Unpin),
    folders: &Folders,
    generation: u64,
) -> Result<(), LinkError> {
    loop {
        let changes = keeper.changes().await?;
        if let Some(why) = &changes.unwatched {
            folders.note(generation, why.clone());
        }
        let told = in_guest(&changes);
        for part in told.chunks(PROCESS_PAYLOAD_MAX) {
            guest.write_all(&ProcessFrame::Stdin(part.to_vec()).encode()).await?;
        }
        guest.flush().await?;
    }
}

/// A letter and a path each, ended by NUL: `s` is shared from now on, `c` has changed.
fn in_guest(changes: &Changes) -> Vec<u8> {
    let shared = changes.shared.iter().map(|path| (b's', path));
    let changed = changes.changed.iter().map(|path| (b'c', path));
    let mut told = Vec::new();
    for (letter, path) in shared.chain(changed) {
        told.push(letter);
        told.extend_from_slice(Path::new(GUEST_ROOT).join(path).as_os_str().as_bytes());
        told.push(0);
    }
    told
}

/// Waits until the teller has ended, and gives what it said.
async fn last_words(mut stream: impl AsyncRead + Unpin) -> String {
    let (mut buffer, mut words) = (Vec::new(), Vec::new());
    loop {
        match read_process_frame(&mut stream, &mut buffer).await {
            Ok(Some(ProcessFrame::Stderr(said))) => {
                words.extend_from_slice(&said);
                words.truncate(WORDS_BYTES_MAX);
            }
            Ok(Some(ProcessFrame::Exit(status))) => {
                return format!(
                    "the guest's init ended with {status}: {}",
                    String::from_utf8_lossy(&words).trim()
                );
            }
            Ok(Some(_)) => {}
            Ok(None) => return "the guest hung up".to_owned(),
            Err(error) => return io::Error::other(error).to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_by_its_path_in_the_guest() {
        let changes = Changes {
            shared: vec!["dormouse-rw2/home/me".into()],
            changed: vec!["dormouse-rw2/home/me/a b\n".into()],
            unwatched: None,
        };
        let told = in_guest(&changes);
        assert_eq!(told, b"s/mnt/dormouse-rw2/home/me\0c/mnt/dormouse-rw2/home/me/a b\n\0");
    }
}
