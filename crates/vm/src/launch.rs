//! How children are started that must outlive us.

use tokio::process::Command;

use crate::config::Owner;

/// Makes the child the leader of a session of its own, which no terminal's and no group's signals reach; and one that
/// isn't ended by SIGPIPE, when what it says has no reader any more.
pub(crate) fn outliving_us(command: &mut Command) {
    let detach = || {
        rustix::process::setsid()?;
        // SAFETY: signal(2) with SIG_IGN installs no handler.
        #[expect(unsafe_code, reason = "no safe way to have a signal ignored over an exec")]
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        }
        Ok(())
    };
    // SAFETY: between fork and exec only setsid(2) and signal(2) are called, which are async-signal-safe and allocate
    // nothing.
    #[expect(unsafe_code, reason = "no safe way to have setsid(2) called in a child")]
    unsafe {
        command.pre_exec(detach);
    }
}

/// Makes the child run as `owner`. The standard library drops the supplementary groups along with root.
pub(crate) fn run_as(command: &mut Command, owner: Owner) {
    command.uid(owner.uid).gid(owner.gid);
}
