//! `dorm session wake`: now, or at times that are set beforehand.

use std::time::Duration;

use clap::Args;
use dormouse_api::{SessionName, Wake};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned, civil};

use super::settings::time;
use super::state::{self, Named};
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};
use crate::output::print;

/// Without options it wakes the VM now, as `resume` does.
#[derive(Args)]
pub(crate) struct WakeArguments {
    /// Which one.
    name: Option<SessionName>,
    /// Then: 07:30, 2026-12-24T07:30 (here) or 2026-12-24T07:30:00Z. A time that passes while the service doesn't run is made
    /// up for when it does.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    at: Option<Timestamp>,
    /// Again and again, so long after each other, e.g. 30m, 1h or 1d; first at --at, or after so long.
    #[arg(long, value_name = "TIME", value_parser = time)]
    every: Option<Duration>,
    /// Take back all that were set.
    #[arg(long, conflicts_with_all = ["at", "every"])]
    clear: bool,
}

impl WakeArguments {
    pub(crate) async fn run(self, context: &Context) -> Done {
        let name = context.pick(self.name);
        let at = match (self.at, self.every) {
            (None, None) if !self.clear => return state::resume(context, Named { name: Some(name) }).await,
            (None, None) => {
                context.service().await?.clear_wakes(&name).await?;
                return Ok(SUCCESS);
            }
            (Some(at), _) => at,
            (None, Some(every)) => Timestamp::now().checked_add(every).map_err(Failure::new)?,
        };
        let wake = Wake { at, every_seconds: self.every.map(|every| every.as_secs()) };
        context.open(&name).await?;
        let info = context.service().await?.set_wake(&name, &wake).await?;
        for Wake { at, every_seconds } in info.wakes {
            print(match every_seconds {
                None => format!("{at:.0}"),
                Some(seconds) => format!("{at:.0}, then every {seconds} s"),
            })?;
        }
        Ok(SUCCESS)
    }
}

/// A point in time; without a zone the host's, without a date the next time that the clock shows it.
fn moment(text: &str) -> Result<Timestamp, String> {
    moment_after(text, &Zoned::now())
}

fn moment_after(text: &str, now: &Zoned) -> Result<Timestamp, String> {
    let here = |time: civil::DateTime, zone: &TimeZone| {
        time.to_zoned(zone.clone()).map(|time| time.timestamp()).map_err(|error| error.to_string())
    };
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    if let Ok(time) = text.parse::<civil::DateTime>() {
        return here(time, now.time_zone());
    }
    let clock: civil::Time = text.parse().map_err(|_| {
        format!("{text:?} is no point in time: try 07:30, 2026-12-24T07:30 or 2026-12-24T07:30:00Z")
    })?;
    let today = here(now.date().to_datetime(clock), now.time_zone())?;
    if today > now.timestamp() {
        return Ok(today);
    }
    let tomorrow = now.date().tomorrow().map_err(|error| error.to_string())?;
    here(tomorrow.to_datetime(clock), now.time_zone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_in_time_is_the_hosts_and_a_time_of_day_the_next_one() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let now = civil::date(2026, 11, 26).at(9, 0, 0, 0).to_zoned(zone).unwrap();
        for (text, is) in [
            ("2026-12-24T07:30:00Z", "2026-12-24T07:30:00Z"),
            ("2026-12-24T07:30:00+02:00", "2026-12-24T05:30:00Z"),
            ("2026-12-24T07:30", "2026-12-24T05:30:00Z"),
            ("2026-12-24 07:30:15", "2026-12-24T05:30:15Z"),
            ("09:30", "2026-11-26T07:30:00Z"),
            ("09:00", "2026-11-27T07:00:00Z"),
            ("00:15:30", "2026-11-26T22:15:30Z"),
        ] {
            assert_eq!(moment_after(text, &now), Ok(is.parse().unwrap()), "{text}");
        }
        for bad in ["", "now", "25:00", "7.30", "2026-13-01T00:00", "1h"] {
            assert!(moment_after(bad, &now).is_err(), "{bad}");
        }
    }
}
