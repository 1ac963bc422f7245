//! The guest's side: short scripts in its root namespace.

use std::time::Duration;

use dormouse_agent_proto::{ProcessFrame, RunProcess};
use dormouse_folders::GUEST_ROOT;
use dormouse_mux::{Agent, read_process_frame};
use tokio::time::timeout;

/// Tells whether the file system with the tag `$0` is mounted at `$1`.
const MOUNTED: &str = r#"
mounted() {
    while read -r _ _ _ _ point rest; do
        [ "$point" = "$1" ] || continue
        case "$rest" in *" - virtiofs $0 "*) return 0 ;; esac
    done < /proc/self/mountinfo
    return 1
}
tries=0"#;

/// A guest sees a new device some 0.1 s after it was plugged in.
const MOUNT: &str = r#"
until mounted "$1"; do
    mount -t virtiofs -o nodev "$0" "$1" && continue
    tries=$((tries + 1)); [ $tries -lt 200 ] || exit 1
    sleep 0.1
done"#;

const UNMOUNT: &str = r#"
while mounted "$1"; do
    umount "$1" && continue
    tries=$((tries + 1)); [ $tries -lt 50 ] || exit 1
    sleep 0.1
done"#;

/// Longest script.
const RUN_WITHIN: Duration = Duration::from_secs(60);

/// How much of what a script says is kept, in bytes.
const WORDS_BYTES_MAX: usize = 4096;

/// Mounts the folders' tree, which has this tag.
pub(super) async fn mount(agent: &Agent, tag: &str) -> Result<(), String> {
    run(agent, MOUNT, &[tag, GUEST_ROOT])
        .await
        .map_err(|error| format!("can't be mounted in the VM: {error}"))
}

/// Unmounts it, if it is what was mounted last.
pub(super) async fn unmount(agent: &Agent, tag: &str) -> Result<(), String> {
    run(agent, UNMOUNT, &[tag, GUEST_ROOT]).await
}

async fn run(agent: &Agent, script: &str, arguments: &[&str]) -> Result<(), String> {
    let running = async {
        let script = format!("{MOUNTED}{script}");
        let argv = ["sh", "-c", &script].iter().chain(arguments).map(|word| (*word).to_owned()).collect();
        let process = RunProcess { argv, ..RunProcess::default() };
        let mut process = agent.run(process).await.map_err(|error| error.to_string())?;
        let (mut buffer, mut words) = (Vec::new(), Vec::new());
        loop {
            let frame = read_process_frame(&mut process.stream, &mut buffer).await;
            match frame.map_err(|error| error.to_string())? {
                Some(ProcessFrame::Exit(0)) => return Ok(()),
                Some(ProcessFrame::Exit(_)) => {
                    let words = String::from_utf8_lossy(&words);
                    return Err(words.lines().last().unwrap_or("it does not say why").to_owned());
                }
                Some(ProcessFrame::Stderr(said)) => {
                    words.extend_from_slice(&said);
                    let surplus = words.len().saturating_sub(WORDS_BYTES_MAX);
                    words.drain(..surplus);
                }
                Some(_) => {}
                None => return Err("the guest hung up".to_owned()),
            }
        }
    };
    timeout(RUN_WITHIN, running).await.unwrap_or_else(|_| Err("the guest takes too long".to_owned()))
}
