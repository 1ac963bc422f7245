//! Sessions to be measured: a service in a home of its own.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::http::{ask, lines};
use super::{ANSWER_WITHIN, Measured};

/// How often a sleep is asked for that something stands in the way of.
const TRIES: usize = 100;

/// How often it is asked whether a snapshot is compressed.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A service. It ends with this.
pub(super) struct Home {
    folder: tempfile::TempDir,
    service: Child,
    qemu: PathBuf,
}

/// A session of it.
pub(super) struct Session {
    name: String,
    service: PathBuf,
    docker: PathBuf,
    control: PathBuf,
}

impl Home {
    /// Starts the `dormd` beside this program.
    pub(super) fn start(images: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dorm").tempdir()?;
        let program = std::env::current_exe()?.with_file_name("dormd");
        let log = File::create(folder.path().join("dormd.log"))?;
        let (mut ready, writer) = std::io::pipe()?;
        inherit(&writer)?;
        let service = Command::new(&program)
            .args(["--ready-fd", &writer.as_raw_fd().to_string()])
            .env("DORM_HOME", folder.path())
            .env("DORM_IMAGES", images.canonicalize().context("there is no guest image")?)
            .env("DORM_NETWORK", "none")
            .env("DORM_VIRTIOFSD", std::env::current_dir()?.join("build/virtiofsd/bin/virtiofsd"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("can't run {}: build the workspace first", program.display()))?;
        drop(writer);
        let home = Self { folder, service, qemu: PathBuf::from("qemu-system-x86_64") };
        ready.read_exact(&mut [0; 6]).context("dormd did not start")?;
        Ok(home)
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("run/dormd.sock")
    }

    /// The program that VMs are made with.
    pub(super) fn qemu(&self) -> &Path {
        &self.qemu
    }

    pub(super) fn make_template(&self) -> Result<()> {
        ask(&self.socket(), "POST", "/v1/templates", "{}").map(drop)
    }

    /// Sets when snapshots are compressed.
    pub(super) fn compress_after(&self, seconds: &str) -> Result<()> {
        let settings = format!("[snapshots]\ncompress-after = \"{seconds}\"\n");
        Ok(std::fs::write(self.folder.path().join("settings.toml"), settings)?)
    }

    /// A session that never sleeps by itself.
    pub(super) fn create(&self, name: &str) -> Result<Session> {
        let wish = json!({ "name": name, "idle_timeout": null }).to_string();
        let info = ask(&self.socket(), "POST", "/v1/sessions", &wish)?;
        let socket = |field: &str| info[field].as_str().map(PathBuf::from).context("a session has sockets");
        Ok(Session {
            name: name.to_owned(),
            service: self.socket(),
            docker: socket("docker_socket")?,
            control: socket("control_socket")?,
        })
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.service.id().cast_signed()) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.service.wait();
    }
}

/// Has a program that is started next inherit this, under its number here.
pub(super) fn inherit(descriptor: impl AsFd) -> Result<()> {
    fcntl_setfd(descriptor, FdFlags::empty()).context("a descriptor can't be passed on")
}

/// A path that no sleeping session has an answer to.
pub(super) fn uncached() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1001);
    format!("/containers/json?limit={}", NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Session {
    /// An uncached request.
    pub(super) fn ask(&self) -> Result<()> {
        ask(&self.docker, "GET", &uncached(), "").map(drop)
    }

    /// Debian's docker client, run to its end.
    pub(super) fn docker(&self, arguments: &[&str]) -> Result<Output> {
        let mut docker = Command::new("build/clients/docker");
        docker.args(arguments).env("DOCKER_HOST", format!("unix://{}", self.docker.display()));
        docker.stdin(Stdio::null()).output().context("can't run docker's client: scripts/install-clients")
    }

    /// The same, measured, with the steps that the session tells of. It must have been started in this way.
    pub(super) fn wake(&self, how: &str) -> Result<Measured> {
        let told = lines(&self.control, "/v1/session/watch")?;
        let (sender, changes) = mpsc::channel();
        std::thread::spawn(move || {
            for info in told {
                let vm = &info["vm"];
                let is_up = vm["phase"] == "running";
                let step = if is_up { Some("up".to_owned()) } else { vm["step"].as_str().map(str::to_owned) };
                if let Some(step) = step {
                    let _ = sender.send((Instant::now(), step));
                }
                if is_up {
                    return;
                }
            }
        });
        let begun = Instant::now();
        self.ask()?;
        let total = begun.elapsed();
        let info = ask(&self.control, "GET", "/v1/session", "")?;
        if info["vm"]["how"] != how {
            let history = ask(&self.control, "GET", "/v1/history", "")?;
            bail!("wanted a start by {how}: {}, {history}", info["vm"]);
        }
        let (mut phases, mut since, mut last) = (Vec::new(), begun, "told to start".to_owned());
        while let Ok((at, step)) = changes.recv_timeout(ANSWER_WITHIN) {
            if step != last {
                phases.push((last, at.saturating_duration_since(since)));
                (since, last) = (at, step);
            }
        }
        phases.push(("request".to_owned(), (begun + total).saturating_duration_since(since)));
        Ok(Measured { total, phases })
    }

    /// Puts it to sleep as soon as nothing holds it. Gives how long that took.
    pub(super) fn sleep(&self, how: &str) -> Result<Duration> {
        for _ in 0..TRIES {
            let begun = Instant::now();
            let answer = ask(&self.control, "POST", &format!("/v1/session/sleep?how={how}"), "")?;
            match answer["result"].as_str() {
                Some("asleep") if answer["how"] == how => return Ok(begun.elapsed()),
                // What the last request held ends a moment after its answer.
                Some("busy") => self.until_nothing_holds()?,
                _ => bail!("the {how} came to this: {answer}"),
            }
        }
        bail!("something always holds the VM")
    }

    fn until_nothing_holds(&self) -> Result<()> {
        let is_free = |info: &Value| {
            info["holds"].as_array().is_some_and(|holds| holds.iter().all(|hold| hold["weak"] == true))
        };
        let mut told = lines(&self.control, "/v1/session/watch")?;
        told.find(is_free).map(drop).context("something holds the VM for long")
    }

    pub(super) fn snapshot_bytes(&self) -> Result<u64> {
        let info: Value = ask(&self.control, "GET", "/v1/session", "")?;
        info["snapshot"]["used_bytes"].as_u64().context("there is no snapshot")
    }

    /// Waits until its snapshot is compressed. Gives what that takes on the disk, in bytes.
    pub(super) fn until_compressed(&self) -> Result<u64> {
        let begun = Instant::now();
        loop {
            let read = || ask(&self.service, "GET", &format!("/v1/sessions/{}", self.name), "");
            let info = read()?;
            let snapshot = &info["snapshot"];
            // It is told of a moment before the memory that it replaces is removed.
            let store = Path::new(info["storage"]["path"].as_str().context("a session has storage")?);
            if snapshot["memory"] == "compressed" && !store.join("memory").exists() {
                let info = read()?;
                let snapshot = &info["snapshot"];
                return snapshot["used_bytes"].as_u64().context("a snapshot has a size");
            }
            ensure!(begun.elapsed() < ANSWER_WITHIN, "it is never compressed: {snapshot}");
            std::thread::park_timeout(LOOK_EVERY);
        }
    }

    pub(super) fn remove(self) -> Result<()> {
        ask(&self.service, "DELETE", &format!("/v1/sessions/{}", self.name), "").map(drop)
    }
}
