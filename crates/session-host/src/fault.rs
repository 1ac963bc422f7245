//! Points at which tests stop a suspend or a resume, to see what becomes of it when somebody dies just there. In release
//! builds there are none.
//!
//! A test writes the name of a point into the file `fault` in the session's runtime directory. Who reaches that point
//! renames the file to `fault.reached`, and waits until that one is gone.

use std::path::Path;
use std::time::Duration;

/// Longest wait at a point: a test that died takes no session along.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// How often the file is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Here a test may want this thread to panic.
pub(crate) fn fall(runtime_dir: &Path, name: &str) {
    let wanted = runtime_dir.join("fault");
    if cfg!(debug_assertions) && std::fs::read_to_string(&wanted).is_ok_and(|point| point == name) {
        let _ = std::fs::remove_file(&wanted);
        panic!("a test wants a fault here: {name}");
    }
}

/// Here is a point.
pub(crate) async fn point(runtime_dir: &Path, name: &str) {
    if !cfg!(debug_assertions) {
        return;
    }
    let (wanted, reached) = (runtime_dir.join("fault"), runtime_dir.join("fault.reached"));
    if !std::fs::read_to_string(&wanted).is_ok_and(|point| point == name) {
        return;
    }
    if std::fs::rename(&wanted, &reached).is_err() {
        return;
    }
    tracing::info!(name, "a test stops here");
    let left = async {
        let mut look = tokio::time::interval(LOOK_EVERY);
        while reached.exists() {
            look.tick().await;
        }
    };
    let _ = tokio::time::timeout(WAIT_MAX, left).await;
}
