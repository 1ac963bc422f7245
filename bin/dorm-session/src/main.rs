//! The session host: does one session's work, as the session's user. Started by `dormd`, which passes three listening
//! sockets as descriptors 3 to 5 (docker, control, service), behind them those of published ports, their number in
//! `DORM_DOORS`, and the settings in `DORM_SETTINGS`. A host starts this program once more to share folders.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use dormouse_api::link::DOORS_VARIABLE;
use dormouse_folders::{Inherited, KeeperOptions, keep};
use dormouse_session_host::{Start, make_template, raise_descriptor_limit, serve};
use tracing_subscriber::EnvFilter;

const DOCKER: RawFd = 3;
const CONTROL: RawFd = 4;
const SERVICE: RawFd = 5;

#[derive(Parser)]
#[command(about = "Does one session's work; started by dormd")]
enum Arguments {
    /// Serve a session.
    Serve {
        /// The session's own folder.
        #[arg(long)]
        session_dir: PathBuf,
        /// The folder of its sockets.
        #[arg(long)]
        runtime_dir: PathBuf,
        /// For how many seconds to stay with neither a client nor a VM.
        #[arg(long, env = "DORM_LINGER", default_value_t = 60, value_name = "SECONDS")]
        linger: u64,
    },
    /// Make a template of a VM that was made for it.
    MakeTemplate {
        /// The template's folder.
        #[arg(long)]
        store: PathBuf,
        /// The folder of the VM's sockets.
        #[arg(long)]
        runtime_dir: PathBuf,
    },
    /// Share folders with the VM whose process, and whose listening sockets, are descriptors 3 to 5.
    KeepFolders {
        /// Where they are gathered.
        #[arg(long)]
        folder: PathBuf,
        /// The program that serves them.
        #[arg(long)]
        virtiofsd: PathBuf,
        /// Where the session's host asks for them.
        #[arg(long)]
        control: PathBuf,
        /// Where the VM finds them.
        #[arg(long)]
        device: PathBuf,
    },
}

fn main() -> Result<()> {
    let filter = EnvFilter::try_from_env("DORM_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    if let Err(error) = raise_descriptor_limit() {
        tracing::warn!(%error, "the limit of open files can't be raised");
    }
    // Before there are threads: a process with several can't enter a user namespace.
    if let Arguments::KeepFolders { folder, virtiofsd, control, device } = arguments {
        keep(&KeeperOptions { folder, virtiofsd, control, device }, Inherited::take());
        return Ok(());
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(arguments))
}

async fn run(arguments: Arguments) -> Result<()> {
    match arguments {
        Arguments::Serve { session_dir, runtime_dir, linger } => {
            let settings = std::env::var("DORM_SETTINGS")
                .context("DORM_SETTINGS isn't set: dormd starts this program")?;
            let settings = serde_json::from_str(&settings).context("DORM_SETTINGS makes no sense")?;
            let [docker, control, service] = [DOCKER, CONTROL, SERVICE].map(inherited);
            let doors = std::env::var(DOORS_VARIABLE).ok().and_then(|count| count.parse::<RawFd>().ok());
            let doors = (0..doors.unwrap_or(0)).map(|number| inherited(SERVICE + 1 + number)).collect();
            let linger = Duration::from_secs(linger);
            let start = Start { settings, session_dir, runtime_dir, docker, control, service, doors, linger };
            serve(start).await?;
        }
        Arguments::MakeTemplate { store, runtime_dir } => make_template(&store, &runtime_dir).await?,
        Arguments::KeepFolders { .. } => {}
    }
    Ok(())
}

#[expect(unsafe_code, reason = "inherited descriptors are known by number only")]
fn inherited(descriptor: RawFd) -> OwnedFd {
    // SAFETY: dormd passes these descriptors, and nothing in this process has opened or taken them before: the runtime's
    // own were opened later and got other numbers.
    let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
    // Hooks and other children get none of them.
    let _ = rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC);
    descriptor
}
