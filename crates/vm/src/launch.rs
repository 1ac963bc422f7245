//! How children are started that must outlive us.

use tokio::process::Command;

use crate::config::Owner;

/// Makes the child the leader of a session of its own: no terminal's signals, no group of ours reach it.
pub(crate) fn in_own_session(command: &mut Command) {
    let setsid = || {
        rustix::process::setsid()?;
        Ok(())
    };
    // SAFETY: between fork and exec only setsid(2) is called, which is async-signal-safe and allocates nothing.
    #[expect(unsafe_code, reason = "no safe way to have setsid(2) called in a child")]
    unsafe {
        command.pre_exec(setsid);
    }
}

/// Makes the child run as `owner`. The standard library drops the supplementary groups along with root.
pub(crate) fn run_as(command: &mut Command, owner: Owner) {
    command.uid(owner.uid).gid(owner.gid);
}
