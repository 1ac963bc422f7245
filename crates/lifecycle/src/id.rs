//! Numbers that tell one thing from another.

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        pub struct $name(pub $inner);

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// One QEMU process of a session: 1, 2, 3 ...; 0 stands for none. Given by the core, never twice.
    Generation(u64)
}
number! {
    /// One guest kernel of a session. A resume is a new generation of the same boot. Given by the core.
    Boot(u64)
}
number! {
    /// A session's life from its creation, or from the first request after a crash, to its termination.
    Incarnation(u64)
}
number! {
    /// A lease, or the request for one. Given by the driver in ascending order, never twice.
    LeaseId(u64)
}
number! {
    /// A weak hold. Given by the driver.
    WeakId(u64)
}
number! {
    /// A pin. Given by the driver; setting the same one again replaces it.
    PinId(u64)
}
number! {
    /// Somebody's request that the session go to sleep, answered by one [`crate::Action::AnswerSleep`].
    RequestId(u64)
}

/// The number of a question or an order about one VM. Its answer carries the same number, so that the answer
/// to an earlier one (late, or given twice) is never taken for the answer to this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Ask {
    /// The VM it is about.
    pub generation: Generation,
    /// Counts up within the generation.
    pub sequence: u32,
}
