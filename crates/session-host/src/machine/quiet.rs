//! Containers that may be suspended, and whether they are quiet enough for it.
//!
//! ```text
//! quiet ── one is busy: it holds, with the reason ──► busy ── none is any more: the hold goes, the grace counts ──► quiet
//! ```
//!
//! With `running = suspend` containers don't hold by running; one that does something holds by that. Clients and
//! connections to published ports have holds of their own.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use dormouse_agent_proto::{Activity, CONTAINERS_MAX, ContainerActivity};
use dormouse_api::{IdleAction, IdleTimeout, RunningContainers, SessionInfo};
use dormouse_lifecycle::{HoldKind, Policy};
use dormouse_mux::Agent;
use tokio::sync::watch;
use tokio::time::sleep;

use super::census::{Listed, running};
use crate::owner::{Claimant, HeldLease};
use crate::ports::Ports;

/// Looks from which the use of CPU is judged. One that is busy in more than three quarters of them is busy; a health
/// check or a job that runs now and then is not.
const LOOKS: usize = 8;

/// So much of one CPU is no work: programs that wait for something by looking now and then.
const IDLE_LOAD: f64 = 0.1;

/// Time between two looks, at most and at least. Within it, as many as are needed fit into the grace period.
const LOOK_EVERY_MAX: Duration = Duration::from_secs(2);
const LOOK_EVERY_MIN: Duration = Duration::from_millis(200);

/// The label, and its value, of a container that may be suspended whatever it does.
const IGNORED: (&str, &str) = ("dormouse.idle", "ignore");

/// Why a container isn't quiet.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Busy {
    Cpu {
        container: String,
    },
    /// Somebody may be waiting for it to be healthy, who would wait for ever while it sleeps.
    Checked {
        container: String,
    },
    Connection {
        container: String,
        far: String,
    },
    Mark(String),
    /// There are more than a guest tells of.
    Untold,
}

impl Busy {
    fn claimant(&self) -> Claimant {
        let (owner, reason) = match self {
            Self::Cpu { container } => (format!("container {container}"), "it uses the CPU".to_owned()),
            Self::Checked { container } => {
                (format!("container {container}"), "its health isn't known yet".to_owned())
            }
            Self::Connection { container, far } => {
                (format!("container {container}"), format!("it is connected to {far}"))
            }
            Self::Mark(name) => ("a container".to_owned(), format!("it left the mark {name:?}")),
            Self::Untold => (
                "containers".to_owned(),
                format!("there are {CONTAINERS_MAX} and more: not all are looked at"),
            ),
        };
        Claimant { kind: HoldKind::Activity, policy: Policy::ExistingOnly, owner, reason }
    }
}

/// What was seen at the last looks.
#[derive(Debug, Default)]
struct Judge {
    last: Option<Activity>,
    /// The use of CPU between two looks, as a part of one CPU, newest last.
    loads: BTreeMap<String, VecDeque<f64>>,
    /// By its id.
    known: BTreeMap<String, Known>,
}

/// What the engine says of a container.
#[derive(Debug)]
struct Known {
    name: String,
    is_ignored: bool,
    /// Its health check has not said yet how it is.
    is_checked: bool,
}

/// What the engine puts into the status of such a container.
const CHECKED: &str = "(health: starting)";

impl Judge {
    /// Is there a container that nothing is known of, or of which more is to be known soon?
    fn has_strangers(&self, activity: &Activity) -> bool {
        let is_known = |id| self.known.get(id).is_some_and(|known| !known.is_checked);
        !activity.containers.iter().all(|container| is_known(&container.id))
    }

    /// Containers have come and gone, or have been started again, with a health that nobody knows: all are strangers.
    fn forget(&mut self) {
        self.known.clear();
    }

    /// Takes in what the engine lists. A container is looked at before that, when it is being started.
    fn learn(&mut self, listed: Vec<Listed>) {
        let listed = listed.into_iter().map(|Listed { id, names, labels, status }| {
            let name =
                names.first().map_or_else(|| short(&id), |name| name.trim_start_matches('/').to_owned());
            let is_ignored =
                labels.unwrap_or_default().get(IGNORED.0).is_some_and(|value| value == IGNORED.1);
            (id, Known { name, is_ignored, is_checked: status.contains(CHECKED) })
        });
        self.known = listed.collect();
    }

    /// Takes a look into account. `None` when all are quiet.
    fn look(&mut self, activity: Activity) -> Option<Busy> {
        let last = self.last.replace(activity);
        let activity = self.last.as_ref()?;
        let mut loads = std::mem::take(&mut self.loads);
        for container in &activity.containers {
            let mut seen = loads.remove(&container.id).unwrap_or_default();
            if let Some(load) = last.as_ref().and_then(|last| load(last, activity, container)) {
                if seen.len() == LOOKS {
                    seen.pop_front();
                }
                seen.push_back(load);
            }
            self.loads.insert(container.id.clone(), seen);
        }
        let by_container = activity.containers.iter().find_map(|container| {
            let name = match self.known.get(&container.id) {
                Some(Known { is_ignored: true, .. }) => return None,
                Some(Known { is_checked: true, name, .. }) => {
                    return Some(Busy::Checked { container: name.clone() });
                }
                Some(known) => known.name.clone(),
                None => short(&container.id),
            };
            match &container.connection {
                Some(far) => Some(Busy::Connection { container: name, far: far.clone() }),
                None => is_working(&self.loads[&container.id]).then_some(Busy::Cpu { container: name }),
            }
        });
        let untold = (activity.containers.len() >= CONTAINERS_MAX).then_some(Busy::Untold);
        by_container.or(untold).or_else(|| activity.mark.clone().map(Busy::Mark))
    }
}

/// The part of one CPU that a container used between two looks.
fn load(before: &Activity, now: &Activity, container: &ContainerActivity) -> Option<f64> {
    let known = before.containers.iter().find(|known| known.id == container.id)?;
    let nanos = now.uptime_nanos.checked_sub(before.uptime_nanos).filter(|nanos| *nanos > 0)?;
    // One that was started again counts from zero.
    let micros = container.cpu_micros.checked_sub(known.cpu_micros)?;
    Some(Duration::from_micros(micros).div_duration_f64(Duration::from_nanos(nanos)))
}

/// By the lower quartile. Too few looks say nothing: what has just begun is no reason to stay awake by itself.
fn is_working(loads: &VecDeque<f64>) -> bool {
    if loads.len() < LOOKS / 2 {
        return false;
    }
    let mut sorted: Vec<_> = loads.iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 4] > IDLE_LOAD
}

fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// Holds the VM awake whenever one of its containers isn't quiet, until it is aborted.
pub(super) async fn watch(agent: Agent, ports: Ports, mut changes: watch::Receiver<u64>) {
    let owner = match ports.owner().await {
        Ok(owner) => owner,
        Err(error) => return tracing::warn!(error, "nobody looks whether containers are quiet"),
    };
    let mut info = owner.info();
    let mut judge = Judge::default();
    let mut held: Option<(Busy, HeldLease)> = None;
    while info.wait_for(may_suspend_containers).await.is_ok() {
        let every = look_every(info.borrow().idle.timeout_seconds);
        // A guest that doesn't say is not known to be quiet: what holds goes on to hold.
        if let Ok(activity) = agent.activity().await {
            if changes.has_changed().unwrap_or(false) {
                changes.mark_unchanged();
                judge.forget();
            }
            if judge.has_strangers(&activity)
                && let Ok(listed) = running(&agent).await
            {
                judge.learn(listed);
            }
            let busy = judge.look(activity);
            if held.as_ref().map(|(busy, _)| busy) != busy.as_ref() {
                held = match busy {
                    Some(busy) => owner.lease(busy.claimant()).await.ok().map(|lease| (busy, lease)),
                    None => None,
                };
            }
        }
        sleep(every).await;
    }
}

/// Whether containers that run don't hold by that.
fn may_suspend_containers(info: &SessionInfo) -> bool {
    info.idle.running == RunningContainers::Suspend && info.idle.action == IdleAction::Suspend
}

/// So that within a grace period there are enough looks to judge by.
fn look_every(grace: IdleTimeout) -> Duration {
    match grace {
        IdleTimeout::Seconds(seconds) => {
            let looks = u32::try_from(LOOKS).unwrap_or(u32::MAX);
            (Duration::from_secs(seconds) / looks).clamp(LOOK_EVERY_MIN, LOOK_EVERY_MAX)
        }
        IdleTimeout::Never => LOOK_EVERY_MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Containers of a second each, by what they used of a CPU in it.
    fn verdicts(judge: &mut Judge, loads: &[f64]) -> Vec<bool> {
        let mut used = 0.0;
        let looks = loads.iter().zip(1..).map(|(load, second)| {
            used += load * 1e6;
            Activity {
                uptime_nanos: second * SECOND,
                containers: vec![container("c1", used as u64, None)],
                mark: None,
            }
        });
        looks.map(|look| judge.look(look).is_some()).collect()
    }

    fn container(id: &str, cpu_micros: u64, connection: Option<&str>) -> ContainerActivity {
        ContainerActivity { id: id.to_owned(), cpu_micros, connection: connection.map(str::to_owned) }
    }

    fn listed(labels: &[(&str, &str)], status: &str) -> Vec<Listed> {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (names, labels, status) = (vec!["/web".to_owned()], Some(labels), status.to_owned());
        vec![Listed { id: "c1".to_owned(), names, labels, status }]
    }

    fn judge(labels: &[(&str, &str)]) -> Judge {
        let mut judge = Judge::default();
        judge.learn(listed(labels, "Up 2 minutes"));
        judge
    }

    #[test]
    fn a_container_holds_until_its_health_is_known() {
        let mut judge = Judge::default();
        let look = |judge: &mut Judge| {
            let containers = vec![container("c1", 0, None)];
            let activity = Activity { uptime_nanos: SECOND, containers, mark: None };
            (judge.has_strangers(&activity), judge.look(activity))
        };
        judge.learn(listed(&[], "Up 2 seconds (health: starting)"));
        assert_eq!(look(&mut judge), (true, Some(Busy::Checked { container: "web".to_owned() })));
        judge.learn(listed(&[], "Up 9 seconds (unhealthy)"));
        assert_eq!(look(&mut judge), (false, None));
        judge.learn(listed(&[("dormouse.idle", "ignore")], "Up 2 seconds (health: starting)"));
        assert_eq!(look(&mut judge).1, None);
    }

    #[test]
    fn a_container_that_was_started_again_is_asked_about_again() {
        let mut judge = judge(&[]);
        let containers = vec![container("c1", 0, None)];
        let activity = Activity { uptime_nanos: SECOND, containers, mark: None };
        assert!(!judge.has_strangers(&activity));
        judge.forget();
        assert!(judge.has_strangers(&activity));
    }

    #[test]
    fn more_containers_than_are_told_of_are_busy() {
        let many = |count| {
            let containers = (0..count).map(|number| container(&number.to_string(), 0, None)).collect();
            Judge::default().look(Activity { uptime_nanos: SECOND, containers, mark: None })
        };
        assert_eq!((many(CONTAINERS_MAX - 1), many(CONTAINERS_MAX)), (None, Some(Busy::Untold)));
    }

    #[test]
    fn work_holds_and_a_check_now_and_then_does_not() {
        let steady = verdicts(&mut judge(&[]), &[0.5; 9]);
        assert!(!steady[3] && steady[4..].iter().all(|busy| *busy), "{steady:?}");
        let check = verdicts(&mut judge(&[]), &[0.0, 0.0, 0.9, 0.0, 0.0, 0.8, 0.0, 0.0, 0.9, 0.0, 0.0, 0.9]);
        assert!(check.iter().all(|busy| !busy), "{check:?}");
        let looking = verdicts(&mut judge(&[]), &[0.03; 20]);
        assert!(looking.iter().all(|busy| !busy), "{looking:?}");
        // What ended is forgotten once the looks before it are.
        let done = verdicts(&mut judge(&[]), &[[0.9; 10], [0.0; 10]].concat());
        assert!(done[9] && !done[13], "{done:?}");
    }

    #[test]
    fn a_connection_holds_and_so_does_a_mark_but_not_of_whoever_is_to_be_ignored() {
        let look = |connection, mark: Option<&str>| Activity {
            uptime_nanos: SECOND,
            containers: vec![container("c1", 0, connection)],
            mark: mark.map(str::to_owned),
        };
        let far = Some("192.0.2.1:443");
        let connected = Busy::Connection { container: "web".to_owned(), far: "192.0.2.1:443".to_owned() };
        assert_eq!(judge(&[]).look(look(far, None)), Some(connected.clone()));
        assert_eq!(connected.claimant().reason, "it is connected to 192.0.2.1:443");
        assert_eq!(judge(&[("dormouse.idle", "ignore")]).look(look(far, None)), None);
        assert_eq!(judge(&[("dormouse.idle", "no")]).look(look(far, None)), Some(connected));
        assert_eq!(judge(&[]).look(look(None, Some("build"))), Some(Busy::Mark("build".to_owned())));
        assert_eq!(judge(&[]).look(look(None, None)), None);
    }

    #[test]
    fn a_container_that_began_anew_is_not_judged_by_what_it_was() {
        let mut judge = judge(&[]);
        assert!(verdicts(&mut judge, &[1.0; 9]).last().is_some_and(|busy| *busy));
        let again =
            Activity { uptime_nanos: 10 * SECOND, containers: vec![container("c1", 5, None)], mark: None };
        judge.look(again);
        let nobody = Activity { uptime_nanos: 11 * SECOND, ..Activity::default() };
        assert_eq!(judge.look(nobody), None);
        assert!(judge.loads.is_empty());
    }

    #[test]
    fn a_short_grace_period_is_looked_at_more_often() {
        for (grace, every) in [
            (IdleTimeout::Never, 2000),
            (IdleTimeout::Seconds(30), 2000),
            (IdleTimeout::Seconds(4), 500),
            (IdleTimeout::Seconds(0), 200),
        ] {
            assert_eq!(look_every(grace), Duration::from_millis(every), "{grace}");
        }
    }
}
