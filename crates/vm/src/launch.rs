//! How children are started that must outlive us.

use tokio::process::Command;

use crate::config::Owner;

/// Makes the child the leader of a session of its own, which no terminal's and no group's signals reach; one that isn't
/// ended by SIGPIPE, when what it says has no reader any more; and one that inherits no descriptor, not even one that
/// we were given by mistake. Descriptors that it is to have are mapped after this.
pub(crate) fn outliving_us(command: &mut Command) {
    let detach = || {
        rustix::process::setsid()?;
        #[expect(
            unsafe_code,
            reason = "no safe way to have a signal ignored, or descriptors closed, over an exec"
        )]
        // SAFETY: SIG_IGN installs no handler, and marking descriptors close-on-exec closes none of them here.
        let marked = unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int)
        };
        if marked == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec only setsid(2), signal(2) and close_range(2) are called, which are
    // async-signal-safe and allocate nothing.
    #[expect(unsafe_code, reason = "no safe way to have setsid(2) called in a child")]
    unsafe {
        command.pre_exec(detach);
    }
}

/// Makes the child run as `owner`. The standard library drops the supplementary groups along with root.
pub(crate) fn run_as(command: &mut Command, owner: Owner) {
    command.uid(owner.uid).gid(owner.gid);
}

/// Makes the child, and all of its threads, yield to others: see nice(2).
pub(crate) fn yielding(command: &mut Command, niceness: i32) {
    if niceness == 0 {
        return;
    }
    let yield_to_others = move || rustix::process::nice(niceness).map(drop).map_err(std::io::Error::from);
    // SAFETY: between fork and exec only nice(2) is called, which is async-signal-safe and allocates nothing.
    #[expect(unsafe_code, reason = "no safe way to have nice(2) called in a child")]
    unsafe {
        command.pre_exec(yield_to_others);
    }
}
