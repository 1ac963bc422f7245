//! Programs in a session's guest, beside the engine.

use anyhow::{Context, Result, bail, ensure};
use dormouse_agent_proto::{ProcessFrame, RunProcess};
use dormouse_api::SessionInfo;
use dormouse_client::Endpoint;
use dormouse_mux::read_process_frame;

/// What a shell command in the guest's root namespace prints. It wakes the VM.
///
/// # Errors
/// When it can't be run, or fails.
pub async fn guest_output(session: &SessionInfo, command: &str) -> Result<String> {
    let process =
        RunProcess { argv: ["sh", "-c", command].map(str::to_owned).to_vec(), ..RunProcess::default() };
    let control = Endpoint::new(&session.control_socket);
    let mut stream = control.upgrade(http::Method::POST, "/v1/run", &process, "dorm-process").await?;
    let (mut buffer, mut output) = (Vec::new(), Vec::new());
    let reading = async {
        while let Some(frame) = read_process_frame(&mut stream, &mut buffer).await? {
            match frame {
                ProcessFrame::Stdout(bytes) | ProcessFrame::Stderr(bytes) => output.extend(bytes),
                ProcessFrame::Exit(status) => return Ok(status),
                other => bail!("the guest sent {other:?}"),
            }
        }
        bail!("the process's stream broke off")
    };
    let status = tokio::time::timeout(crate::stage::STATE_WITHIN, reading).await.context("it hangs")??;
    let output = String::from_utf8_lossy(&output).into_owned();
    ensure!(status == 0, "{command:?} ended with {status}: {output}");
    Ok(output)
}
