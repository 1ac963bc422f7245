//! `dorm session set`, `pin` and `unpin`: what may be changed while a session lives.

use std::time::Duration;

use clap::{Args, ValueEnum};
use dormouse_api::{ChangeSettings, CrashPolicy, IdleTimeout, Pin, SessionInfo, SessionName};
use http::Method;

use crate::context::Context;
use crate::error::{Done, Failure};
use crate::output::print;

#[derive(Args)]
pub(crate) struct Set {
    /// Which one.
    name: Option<SessionName>,
    /// Seconds from the last use to the sleep, or "never". Counts from the last use, also one that was before.
    #[arg(long, value_name = "SECONDS", required_unless_present_any = ["doze", "crash", "asleep_answers"])]
    idle_timeout: Option<IdleTimeout>,
    /// Seconds that the VM then dozes, in memory, before it is put to sleep; 0: not at all.
    #[arg(long, value_name = "SECONDS")]
    doze: Option<u64>,
    /// What follows a crash of the VM.
    #[arg(long, value_enum)]
    crash: Option<OnCrash>,
    /// Whether reads of its engine are answered while its VM sleeps, without waking it.
    #[arg(long, value_enum)]
    asleep_answers: Option<OnOff>,
}

/// A switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnOff {
    /// Yes.
    On,
    /// No.
    Off,
}

impl From<OnOff> for bool {
    fn from(switch: OnOff) -> Self {
        switch == OnOff::On
    }
}

/// What follows a crash of the VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnCrash {
    /// The next request starts a new VM.
    #[default]
    Reopen,
    /// Requests are refused until `dorm session start`.
    Terminate,
}

impl From<OnCrash> for CrashPolicy {
    fn from(policy: OnCrash) -> Self {
        match policy {
            OnCrash::Reopen => Self::Reopen,
            OnCrash::Terminate => Self::Terminate,
        }
    }
}

#[derive(Args)]
pub(crate) struct PinArguments {
    /// Which one.
    name: Option<SessionName>,
    /// For so long, e.g. 90s, 30m, 2h or 1d; else until `unpin`.
    #[arg(long, value_name = "TIME", value_parser = time)]
    r#for: Option<Duration>,
    /// Why, for `dorm why`.
    #[arg(long)]
    reason: Option<String>,
}

impl Set {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let name = context.pick(self.name);
        let change = ChangeSettings {
            idle_timeout: self.idle_timeout,
            doze_seconds: self.doze,
            crash: self.crash.map(CrashPolicy::from),
            asleep_answers: self.asleep_answers.map(bool::from),
        };
        let info = context.service().await?.change(&name, &change).await?;
        print(info.name.as_str())
    }
}

impl PinArguments {
    /// Starts no VM: a pin holds the one that is up, and those that come.
    pub(crate) async fn run(self, context: &Context) -> Done {
        let control = context.control(&context.pick(self.name)).await?;
        let until = match self.r#for {
            None => None,
            Some(time) => Some(jiff::Timestamp::now().checked_add(time).map_err(Failure::new)?),
        };
        let pin = Pin { until, reason: self.reason };
        let info: SessionInfo = control.call(Method::POST, "/v1/session/pin", &pin).await?;
        print(info.name.as_str())
    }
}

pub(crate) async fn unpin(context: &Context, name: Option<SessionName>) -> Done {
    let control = context.control(&context.pick(name)).await?;
    let info: SessionInfo = control.call(Method::DELETE, "/v1/session/pin", &()).await?;
    print(info.name.as_str())
}

/// A length of time with its unit.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no length of time: try 90s, 30m, 2h or 1d");
    let end = text.find(|letter: char| !letter.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text[..end].parse().map_err(|_| wrong())?;
    let unit = match &text[end..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(|| format!("{text:?} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_have_a_unit() {
        assert_eq!(time("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(time("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(time("1d"), Ok(Duration::from_secs(86_400)));
        for bad in
            ["", "2", "h", "-1h", "1.5h", "2 h", "2hours", "99999999999999999999d", "9999999999999999d"]
        {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
