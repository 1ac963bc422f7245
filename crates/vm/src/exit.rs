//! Why a VM ended.

use dormouse_qmp::ShutdownReason;

/// The end of a VM. Whether it was expected is for the lifecycle to decide: it knows what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmExit {
    /// What ended it.
    pub cause: ExitCause,
    /// In words.
    pub details: String,
}

/// What ended a VM. Decided by QMP's last word: QEMU's exit status is 0 for a guest's triple fault too, and only its
/// parent knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCause {
    /// The guest powered off.
    GuestShutdown,
    /// Somebody on the host said `quit`.
    HostQuit,
    /// QEMU got a signal that it could answer: SIGTERM, SIGINT, SIGHUP.
    HostSignal,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest reset itself, which ours do only by a triple fault.
    GuestReset,
    /// QEMU is gone without a word: killed, or broken down.
    Unknown,
}

impl VmExit {
    /// `last_word` is the reason of the SHUTDOWN event, if one came; `panicked` whether pvpanic told of a panic;
    /// `closed` what ended the monitor's connection.
    pub(crate) fn classify(last_word: Option<ShutdownReason>, panicked: bool, closed: &str) -> Self {
        let (cause, details) = match last_word {
            _ if panicked => (ExitCause::GuestPanic, "the guest's kernel panicked"),
            Some(ShutdownReason::GuestShutdown) => (ExitCause::GuestShutdown, "the guest powered off"),
            Some(ShutdownReason::HostQmpQuit) => (ExitCause::HostQuit, "QEMU was told to quit"),
            Some(ShutdownReason::HostSignal) => (ExitCause::HostSignal, "QEMU got a signal to end"),
            Some(ShutdownReason::GuestPanic) => (ExitCause::GuestPanic, "the guest's kernel panicked"),
            Some(ShutdownReason::GuestReset) => {
                (ExitCause::GuestReset, "the guest reset itself (a kernel panic or a triple fault)")
            }
            Some(ShutdownReason::HostError) => (ExitCause::Unknown, "QEMU met an error"),
            Some(ShutdownReason::HostQmpSystemReset) => {
                (ExitCause::Unknown, "QEMU was told to reset the guest")
            }
            Some(ShutdownReason::Other) => {
                (ExitCause::Unknown, "QEMU ended for a reason that is not known here")
            }
            None => (ExitCause::Unknown, "QEMU is gone without a word: killed, or broken down"),
        };
        let details = match last_word {
            None => format!("{details} ({closed})"),
            Some(_) => details.to_owned(),
        };
        Self { cause, details }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_that_was_told_of_is_a_panic_whatever_came_after_it() {
        let exit = VmExit::classify(Some(ShutdownReason::GuestReset), true, "QEMU closed its monitor");
        assert_eq!(exit.cause, ExitCause::GuestPanic);
    }

    #[test]
    fn silence_is_unknown_and_says_how_the_connection_ended() {
        let exit = VmExit::classify(None, false, "QEMU closed its monitor");
        assert_eq!(exit.cause, ExitCause::Unknown);
        assert!(exit.details.ends_with("(QEMU closed its monitor)"));
    }
}
