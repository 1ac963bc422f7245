//! How many files a process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// More than a session's host needs for all clients that it lets in, and few enough for programs that walk through all
/// numbers there may be.
const DESCRIPTORS: u64 = 16 * 1024;

/// Allows this process, and those that it starts, as many open files as a host or a service with very many clients needs, if
/// the system lets it. A login's usual limit of 1024 is for programs that use `select(2)`, and none of these does.
///
/// # Errors
/// When the system refuses, though its own limit is higher.
pub fn raise_descriptor_limit() -> std::io::Result<()> {
    match raised(getrlimit(Resource::Nofile)) {
        Some(limit) => Ok(setrlimit(Resource::Nofile, limit)?),
        None => Ok(()),
    }
}

/// `None`: it is high enough, or can't be higher. In both places none is no limit.
fn raised(limit: Rlimit) -> Option<Rlimit> {
    let wanted = limit.maximum.unwrap_or(DESCRIPTORS).min(DESCRIPTORS);
    let is_lower = limit.current.is_some_and(|current| current < wanted);
    is_lower.then_some(Rlimit { current: Some(wanted), maximum: limit.maximum })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_is_raised_within_the_systems_and_never_lowered() {
        for (current, maximum, expected) in [
            (Some(1024), Some(1 << 20), Some(DESCRIPTORS)),
            (Some(1024), None, Some(DESCRIPTORS)),
            (Some(1024), Some(4096), Some(4096)),
            (Some(1024), Some(1024), None),
            (Some(1 << 20), Some(1 << 20), None),
            (None, None, None),
        ] {
            let raised = raised(Rlimit { current, maximum });
            assert_eq!(raised.as_ref().and_then(|limit| limit.current), expected);
            assert!(raised.is_none_or(|limit| limit.maximum == maximum));
        }
    }

    #[test]
    fn a_process_that_was_started_with_few_open_files_may_have_many() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let few = Some(maximum.unwrap_or(1000).min(1000));
        setrlimit(Resource::Nofile, Rlimit { current: few, maximum }).unwrap();
        raise_descriptor_limit().unwrap();
        let expected = maximum.unwrap_or(DESCRIPTORS).min(DESCRIPTORS);
        assert_eq!(getrlimit(Resource::Nofile).current, Some(expected));
    }
}
