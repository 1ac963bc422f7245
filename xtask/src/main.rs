//! What the project makes beside its programs. Run as `cargo xtask COMMAND`.

mod bench;
mod busybox_image;
mod debian;
mod guest_image;
mod manual;
mod replay;
mod shell;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use rustix::fs::Mode;
use rustix::process::umask;

#[derive(Parser)]
#[command(about = "What the project makes beside its programs")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make the guest image from Debian 13 packages, and publish it in a store of images.
    GuestImage {
        /// The store.
        #[arg(long, default_value = "build/images")]
        out: PathBuf,
        /// Where packages and intermediate files are kept between builds.
        #[arg(long, default_value = "build/guest")]
        work: PathBuf,
        /// Ask Debian's archive again, even if packages were fetched before.
        #[arg(long)]
        update: bool,
        /// Put this `dorm-init` into the image, a static program, instead of building it.
        #[arg(long, value_name = "PROGRAM")]
        dorm_init: Option<PathBuf>,
    },
    /// Measure, and write down what was seen.
    #[command(subcommand)]
    Bench(Bench),
    /// Step through a session's trace.
    Replay {
        /// The trace.
        file: PathBuf,
    },
    /// Make a small container image, `busybox:latest`, from Debian's busybox, to be read by `docker load`.
    BusyboxImage {
        /// The archive.
        #[arg(long, default_value = "build/busybox.tar")]
        out: PathBuf,
    },
    /// Make docs/CLI.md from the tree of dorm's commands.
    CliReference {
        /// Only see whether it is current.
        #[arg(long)]
        check: bool,
    },
    /// Make manual pages from the tree of dorm's commands.
    ManualPages {
        /// Their folder.
        #[arg(long, default_value = "build/man")]
        out: PathBuf,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// From asleep to the first answer, beside a VM with systemd and docker. Needs root, to build that.
    Wake(bench::Wake),
    /// How fast shared folders are, beside volumes and the host's own.
    Folders(bench::Folders),
}

fn main() -> Result<()> {
    // Files' modes are a part of what is made.
    umask(Mode::from_raw_mode(0o022));
    match Arguments::parse().command {
        Command::GuestImage { out, work, update, dorm_init } => {
            guest_image::build(&out, &work, update, dorm_init)
        }
        Command::Bench(Bench::Wake(wake)) => wake.run(),
        Command::Bench(Bench::Folders(folders)) => folders.run(),
        Command::Replay { file } => replay::replay(&file),
        Command::BusyboxImage { out } => busybox_image::build(&out),
        Command::CliReference { check } => manual::reference(check),
        Command::ManualPages { out } => manual::pages(&out),
    }
}
