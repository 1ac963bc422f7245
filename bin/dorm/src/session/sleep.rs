//! `dorm session sleep`, and the two that name the means.

use clap::Args;
use dormouse_api::{HistoryEntry, IdleAction, Phase, SessionInfo, SessionName, SessionState, SleepAnswer};
use dormouse_client::{Endpoint, Service};

use super::state::Named;
use crate::context::Context;
use crate::error::{Done, Failure};
use crate::output::print;

#[derive(Args)]
pub(crate) struct Sleep {
    /// Which one.
    name: Option<SessionName>,
    /// Don't wait for the grace period: put it to sleep at once, if nothing holds it awake.
    #[arg(long)]
    now: bool,
}

impl Sleep {
    pub(crate) async fn run(self, context: &Context) -> Done {
        if self.now {
            return now(context, Named { name: self.name }, None).await;
        }
        let info = context.open(&context.pick(self.name)).await?;
        let mut changes = Service::watch(&info).await?;
        let mut waiting = Waiting::default();
        let outcome = loop {
            let Some(info) = changes.next::<SessionInfo>().await? else {
                return Err(Failure::new("the session's host is going down"));
            };
            if let Some(outcome) = waiting.look(&info) {
                break outcome;
            }
        };
        match outcome {
            Outcome::Asleep { generation } => {
                let history: Vec<HistoryEntry> =
                    Endpoint::new(info.control_socket).get("/v1/history").await?;
                let slept =
                    history.iter().rfind(|entry| entry.what == "sleep" && entry.generation == generation);
                let how = match slept.map(|entry| entry.how.as_str()) {
                    Some("suspend") => "was suspended",
                    Some("stop") => "was stopped",
                    Some(_) | None => "is gone",
                };
                print(format!("asleep: VM {generation} {how}"))
            }
            Outcome::NoVm => tell(SleepAnswer::NoVm),
            Outcome::Busy(info) => {
                tell(SleepAnswer::Busy { holds: info.holds.into_iter().filter(|hold| !hold.weak).collect() })
            }
            Outcome::Never => Err(Failure::new("this session never falls asleep by itself")
                .hint("`dorm session sleep --now` puts it to sleep, unless its data is in memory")),
            Outcome::Failed(reason) => tell(SleepAnswer::Failed { reason: reason.to_owned() }),
        }
    }
}

/// Asks for the sleep without its grace period, by the means that is named, else by that of the settings.
pub(crate) async fn now(context: &Context, named: Named, how: Option<IdleAction>) -> Done {
    let control = context.control(&context.pick(named.name)).await?;
    let path = match how {
        None => "/v1/session/sleep",
        Some(IdleAction::Suspend) => "/v1/session/sleep?how=suspend",
        Some(IdleAction::Stop) => "/v1/session/sleep?how=stop",
    };
    tell(control.post(path).await?)
}

fn tell(answer: SleepAnswer) -> Done {
    match answer {
        SleepAnswer::NoVm => print("no VM: it was asleep already"),
        SleepAnswer::Asleep { generation, how: IdleAction::Suspend } => {
            print(format!("asleep: VM {generation} was suspended"))
        }
        SleepAnswer::Asleep { generation, how: IdleAction::Stop } => {
            print(format!("asleep: VM {generation} was stopped"))
        }
        SleepAnswer::Busy { holds } => {
            let holds: Vec<_> =
                holds.iter().map(|hold| format!("{} ({})", hold.owner, hold.reason)).collect();
            Err(Failure::new(format!("held awake by {}", holds.join(", "))))
        }
        SleepAnswer::Disabled => Err(Failure::new("this session never sleeps: its data is in memory")
            .hint("`dorm session terminate` ends it")),
        SleepAnswer::Failed { reason } => Err(Failure::new(format!("the sleep failed: {reason}"))),
    }
}

/// What came of an ordinary sleep.
#[derive(Debug, PartialEq)]
enum Outcome {
    NoVm,
    Asleep {
        generation: u64,
    },
    /// Something holds the VM awake, as the session tells.
    Busy(Box<SessionInfo>),
    Never,
    Failed(&'static str),
}

/// Waits for the ordinary way to sleep, the grace period included, by what is seen of the session.
#[derive(Default)]
struct Waiting {
    /// The VM that is waited for.
    generation: Option<u64>,
    /// Its sleep had begun.
    has_begun: bool,
}

impl Waiting {
    /// What came of it, once that is certain.
    fn look(&mut self, info: &SessionInfo) -> Option<Outcome> {
        if info.state != SessionState::Running {
            return Some(Outcome::Failed("the session was terminated"));
        }
        let vm = &info.vm;
        if let Some(generation) = self.generation.filter(|generation| *generation != vm.generation) {
            // It slept, and was woken before anybody looked.
            return Some(Outcome::Asleep { generation });
        }
        match vm.phase {
            Phase::Absent => Some(match self.generation {
                Some(generation) => Outcome::Asleep { generation },
                None => Outcome::NoVm,
            }),
            Phase::Running if self.has_begun => {
                Some(Outcome::Failed("the VM runs on; `dorm session history` tells why"))
            }
            Phase::Starting | Phase::Running => {
                self.generation = Some(vm.generation);
                match vm.deadline {
                    _ if info.holds.iter().any(|hold| !hold.weak) => {
                        Some(Outcome::Busy(Box::new(info.clone())))
                    }
                    None if vm.phase == Phase::Running => Some(Outcome::Never),
                    _ => None,
                }
            }
            Phase::Counting | Phase::Dozing => {
                self.generation = Some(vm.generation);
                None
            }
            Phase::Committed | Phase::Stopping => {
                self.generation = Some(vm.generation);
                self.has_begun = true;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const AT: &str = "2026-01-01T00:00:00Z";

    /// A session in this phase; idle until a time, or held.
    fn info(generation: u64, phase: &str, deadline: Option<&str>, weak: Option<bool>) -> SessionInfo {
        let holds: Vec<_> = weak
            .map(|weak| json!({ "kind": "pin", "owner": "me", "reason": "", "since": AT, "weak": weak }))
            .into_iter()
            .collect();
        let vm = json!({
            "phase": phase, "generation": generation, "boot": null, "how": null, "start_count": 1, "boots": 1,
            "since": AT, "deadline": deadline, "step": null, "acceleration": null, "cpus": 1, "memory_mib": 512,
        });
        let info = json!({
            "name": "default", "id": "00000000000000aa", "owner": 0, "state": "running", "incarnation": 1, "vm": vm,
            "holds": holds, "idle": { "timeout_seconds": 30, "action": "suspend" },
            "network": { "kind": "none", "host_loopback": false },
            "storage": { "path": "/s", "size_bytes": 0, "used_bytes": 0 }, "termination": null,
            "docker_socket": "/d", "control_socket": "/c",
        });
        serde_json::from_value(info).expect("a session")
    }

    fn looks(seen: &[SessionInfo]) -> Vec<Option<Outcome>> {
        let mut waiting = Waiting::default();
        seen.iter().map(|info| waiting.look(info)).collect()
    }

    #[test]
    fn a_sleep_is_waited_for_over_the_grace_period_to_its_end() {
        let seen = [
            info(3, "running", Some(AT), Some(true)),
            info(3, "counting", Some(AT), None),
            info(3, "committed", Some(AT), None),
            info(3, "stopping", Some(AT), None),
            info(3, "absent", None, None),
        ];
        let asleep = || Some(Outcome::Asleep { generation: 3 });
        assert_eq!(looks(&seen), [None, None, None, None, asleep()]);
        // The end was not seen, but the next VM is.
        assert_eq!(looks(&[seen[2].clone(), info(4, "starting", None, None)]), [None, asleep()]);
    }

    #[test]
    fn what_stands_in_the_way_of_a_sleep_is_told_at_once() {
        assert_eq!(looks(&[info(3, "absent", None, None)]), [Some(Outcome::NoVm)]);
        assert_eq!(looks(&[info(3, "running", None, None)]), [Some(Outcome::Never)]);
        let held = looks(&[info(3, "running", None, Some(false))]);
        assert!(matches!(&held[..], [Some(Outcome::Busy(_))]), "{held:?}");
        let idle = info(3, "running", Some(AT), None);
        let runs_on = looks(&[info(3, "stopping", None, None), idle]);
        assert!(matches!(&runs_on[..], [None, Some(Outcome::Failed(_))]), "{runs_on:?}");
        let mut ended = info(3, "stopping", None, None);
        ended.state = SessionState::Terminating;
        assert!(matches!(&looks(&[ended])[..], [Some(Outcome::Failed(_))]));
    }
}
