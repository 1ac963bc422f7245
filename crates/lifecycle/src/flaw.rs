//! Bugs that can be planted, one for each hazard of `docs/lifecycle-hazards.md` that has a meaning in the core. The
//! model checker has to catch every one of them, else its silence proves nothing. Without the feature `model` the
//! macro is the constant `false`, or nothing at all.

/// Whether the named bug is planted in this session, or what it does if it is.
macro_rules! flaw {
    ($session:expr, $hazard:ident, $bug:expr) => {
        #[cfg(feature = "model")]
        if $session.flaw == Some($crate::flaw::Flaw::$hazard) {
            $bug
        }
    };
    ($session:expr, $($hazard:ident)|+) => {{
        #[cfg(feature = "model")]
        let planted = matches!($session.flaw, Some($($crate::flaw::Flaw::$hazard)|+));
        #[cfg(not(feature = "model"))]
        let planted = false;
        planted
    }};
}

pub(crate) use flaw;

#[cfg(feature = "model")]
macro_rules! flaws {
    ($($name:ident: $words:literal,)*) => {
        /// A bug that can be planted, named after its hazard.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Flaw {
            $(#[doc = $words] $name,)*
        }

        impl Flaw {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The hazard's number, as `H6`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// What the bug does.
            pub const fn words(self) -> &'static str {
                match self { $(Self::$name => $words,)* }
            }
        }
    };
}

#[cfg(feature = "model")]
flaws! {
    H1: "a lease is granted but not counted, so the VM may be put to sleep under it",
    H2: "a lease that is asked for while the engine is asked is not looked at",
    H3: "the sleep begins as soon as the last hold is gone, without the grace period",
    H4: "a lease does not call off the count that is under way",
    H5: "an Acquire request after the commit is granted on the VM that is about to go",
    H6: "a request after the commit calls the sleep off, though the hooks were told",
    H7: "who waited is granted the old VM when its stop begins",
    H8: "a hooks' answer to an earlier order is taken for the answer to this one",
    H9: "the stop waits until nobody is in the queue, while the queue waits for the stop",
    H10: "a hook's own request in the stop window waits for the stop that waits for the hook",
    H11: "a hook's request starts a VM",
    H12: "a lease from the stop window goes on counting in the next VM",
    H13: "hooks that hang call off the stop",
    H16: "a request is served after the terminate because the VM is still up",
    H17: "a request is queued after the terminate",
    H18: "the release of the last lease sets no deadline",
    H21: "the end of the last container counts as the end of the operation that waits for it",
    H23: "an operation of several requests does not hold",
    H24: "a root process does not hold",
    H25: "a request whose client is gone stays in the queue",
    H26: "a container that was only created holds",
    H27: "the late drop of a lease of a VM that is gone ends another lease",
    H28: "the late drop of a lease in the stop window makes the VM idle again",
    H31: "an ephemeral session is put to sleep",
    H32: "the exit of a VM that is being stopped is left to the stopper, and the stopper does not look",
    H33: "the exit of a VM that is being stopped is a crash as well",
    H34: "the sleep begins while the hooks are still being told",
    H35: "the exit of a VM while it is brought up ends the session",
    H36: "the exit of a VM in the commit window is not looked at",
    H38: "the ready report of an earlier VM is taken for this one's",
    H39: "the snapshot of an earlier sleep is kept after it was used",
    H40: "what a failed start left half used is tried again",
    H41: "the end is announced before the reason can be read",
    H43: "a VM that is known to be dead is told to shut down",
    H50: "a VM that is ready only after its bring-up was cancelled is announced",
    H52: "a second ready report announces the VM again",
    H53: "idle sleep and terminate both tell the hooks",
    H54: "the hooks are told of the stop of a VM that they were never told of",
    H55: "a resumed VM is not announced, but its stop is",
    H56: "a repeated terminate announces the end again",
    H57: "the end is announced while somebody still waits",
    H58: "weak holds end with the VM",
    H59: "who waited is granted the VM that was there when they asked",
    H60: "reports of containers are only taken from the first VM",
    H64: "the exit of a killed VM overwrites the reason why it was killed",
    H65: "a requested sleep does not look at what holds",
    H86: "the late answer to an earlier count is taken for the answer to this one",
    H88: "a guest that ignores the shutdown is waited for without bound",
    H98: "a terminate from a stopping hook is lost",
    H99: "a suspend that failed too late is taken for the end of its VM",
    D1: "a VM that dozes is leased, counted or put to sleep without being run on",
    D2: "what holds a VM that dozes has it doze on",
    L1: "the sleep begins under a request that only looks",
}

/// What some of the bugs do, where one line doesn't say it.
#[cfg(feature = "model")]
mod deeds {
    use alloc::vec::Vec;

    use crate::action::{Action, Record, StartHow, StopHow};
    use crate::hold::Claims;
    use crate::id::{Ask, Generation};
    use crate::phase::{Cause, Phase, Reopen, Stopping, Termination, TerminationReason, Then};
    use crate::session::{Session, Step};
    use crate::{PhaseName, SleepHow};

    impl Session {
        pub(crate) fn call_off(&mut self, step: &mut Step<'_>) {
            match self.phase.take() {
                Phase::Committed(committed) => self.settle(step, committed.vm),
                phase => self.phase = phase,
            }
        }

        pub(crate) fn drop_another(&mut self, is_late: bool) {
            if let Some(vm) = self.phase.vm_mut().filter(|_| is_late) {
                vm.leases.pop_first();
            }
        }

        pub(crate) fn crash_again(&mut self, step: &mut Step<'_>) {
            let generation = self.generation;
            self.record(step, Record::Crashed { generation, details: "again".into() });
        }

        pub(crate) fn announce_anyway(
            &mut self,
            step: &mut Step<'_>,
            generation: Generation,
            how: StartHow,
            phase: PhaseName,
        ) {
            if self.phase.generation() == Some(generation) && self.phase.name() == phase {
                step.act(Action::AnnounceStarted { generation, how });
            }
        }

        pub(crate) fn tell_anyway(&mut self, step: &mut Step<'_>, generation: Generation) {
            let ask = Ask { generation, sequence: 0 };
            let bound = self.config.limits.hooks;
            step.act(Action::RunStoppingHooks { ask, how: StopHow::Sleep(SleepHow::Stop), bound });
        }

        pub(crate) fn end_anyway(&mut self, step: &mut Step<'_>) {
            self.end(step, another_reason());
        }
    }

    pub(crate) fn grant_all(step: &mut Step<'_>, generation: Generation, queue: Claims) {
        for lease in queue.into_keys().collect::<Vec<_>>() {
            step.act(Action::Grant { lease, generation });
        }
    }

    pub(crate) fn overwritten(stopping: Stopping) -> Stopping {
        match stopping.then {
            Then::Absent => stopping,
            Then::Terminated(_) => Stopping { then: Then::Terminated(another_reason()), ..stopping },
        }
    }

    fn another_reason() -> Termination {
        Termination {
            reason: TerminationReason::Unknown,
            cause: Cause::NotAdopted,
            details: "".into(),
            reopen: Reopen::OnRequest,
        }
    }
}

#[cfg(feature = "model")]
pub(crate) use deeds::{grant_all, overwritten};
