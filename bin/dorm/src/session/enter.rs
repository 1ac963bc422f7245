//! `dorm session enter`: a root shell in a VM over a store that no session has.

use std::path::PathBuf;

use clap::Args;
use dormouse_api::{CreateSession, SessionInfo, SessionName};
use dormouse_client::first_line;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::io::BufReader;

use super::process::{Place, needs_terminal};
use crate::context::Context;
use crate::error::{Done, Failure};
use crate::output::say;

#[derive(Args)]
pub(crate) struct Enter {
    /// What to call the session meanwhile; a name that nobody has when absent.
    #[arg(long)]
    name: Option<SessionName>,
    #[command(flatten)]
    place: Place,
    /// The store: the folder that was some session's --storage.
    storage: PathBuf,
}

impl Enter {
    /// Ends with the shell's status. The session goes with the shell, the store stays.
    pub(crate) async fn run(self, context: &Context) -> Done {
        needs_terminal(
            "`dorm session create NAME --storage PATH`, then `dorm --session NAME session run sh`",
        )?;
        let name = self.name.map_or_else(unused_name, Ok)?;
        let mut wish = CreateSession::named(name);
        crate::settings::read()?.apply(&mut wish);
        wish.storage = Some(std::path::absolute(&self.storage)?);
        wish.no_create = true;
        wish.temporary = true;
        let service = context.service().await?;
        // The session is its connection's: if this command dies, the service ends it.
        let mut life = BufReader::new(service.create_temporary(&wish).await?);
        let info: SessionInfo = first_line(&mut life).await?;
        say(format_args!("session {}", info.name));
        let done = self.place.shell(&Context::new(info.name.clone())).await;
        // Whoever enters it again at once finds the store free.
        service.remove(&info.name).await?;
        done
    }
}

fn unused_name() -> Result<SessionName, Failure> {
    let mut random = [0; 4];
    getrandom(&mut random, GetRandomFlags::empty()).map_err(std::io::Error::from)?;
    format!("entered-{:08x}", u32::from_ne_bytes(random)).parse().map_err(Failure::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_made_up_is_one_that_a_session_may_have_and_another_each_time() {
        let [one, other] = [unused_name().unwrap(), unused_name().unwrap()];
        assert!(one.as_str().starts_with("entered-") && one != other);
    }
}
