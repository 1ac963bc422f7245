//! Scripts of the guest's shell, by which it is told what its engine reads from files.

use dormouse_agent_proto::{PROCESS_PAYLOAD_MAX, ProcessFrame, RunProcess};
use dormouse_mux::{Agent, read_process_frame};
use tokio::io::AsyncWriteExt;

/// As much of a script's complaint is kept, in bytes.
const WORDS_MAX: usize = 4096;

/// Runs a script, gives it this to read, and waits for its end. How long that may take is the caller's to say.
///
/// # Errors
/// In words, when it can't be run or fails.
pub(super) async fn run(agent: &Agent, script: &str, input: &[u8]) -> Result<(), String> {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let process = agent.run(RunProcess { argv, ..RunProcess::default() }).await;
    let mut stream = process.map_err(|error| error.to_string())?.stream;
    // An empty piece at the end closes it.
    for piece in input.chunks(PROCESS_PAYLOAD_MAX).chain([&[][..]]) {
        let frame = ProcessFrame::Stdin(piece.to_vec()).encode();
        stream.write_all(&frame).await.map_err(|error| error.to_string())?;
    }
    stream.flush().await.map_err(|error| error.to_string())?;
    let (mut buffer, mut words) = (Vec::new(), Vec::new());
    while let Some(frame) =
        read_process_frame(&mut stream, &mut buffer).await.map_err(|error| error.to_string())?
    {
        match frame {
            ProcessFrame::Exit(0) => return Ok(()),
            ProcessFrame::Exit(status) => {
                return Err(format!("status {status}: {}", String::from_utf8_lossy(&words).trim_end()));
            }
            // A shell's complaint is a line; what doesn't end is no complaint.
            ProcessFrame::Stdout(bytes) | ProcessFrame::Stderr(bytes) if words.len() < WORDS_MAX => {
                words.extend(bytes)
            }
            _ => {}
        }
    }
    Err("the guest tells no more of it".to_owned())
}
