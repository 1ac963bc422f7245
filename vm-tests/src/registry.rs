//! A network of a test's own with a registry in it, which guests reach as they reach any host of their owner's.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::project;

/// The host on its only network, which is no loopback: a guest may reach it, as its owner can.
pub const HOST_V4: &str = "192.0.2.7";

/// Whom a private registry serves.
pub const USER: &str = "me";

/// With this.
pub const PASSWORD: &str = "secret";

/// The same by bcrypt, the only way that the registry takes.
const PASSWORD_HASH: &str = "$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a";

/// Longest start of a registry.
const LISTENS_WITHIN: Duration = Duration::from_secs(60);

/// Runs `ip`.
///
/// # Errors
/// When it fails.
pub fn ip(arguments: &[&str]) -> Result<()> {
    ensure!(Command::new("ip").args(arguments).status()?.success(), "ip {arguments:?} failed");
    Ok(())
}

/// Gives the host an address in a network namespace that nothing was done to yet.
///
/// # Errors
/// When that can't be done.
pub fn give_host_an_address() -> Result<()> {
    ip(&["link", "set", "lo", "up"])?;
    // Every kernel has this interface; what makes an address a loopback's is the address.
    ip(&["addr", "add", HOST_V4, "dev", "lo"])
}

/// Debian's `docker-registry`, with the images of `scripts/registry-images`. Gone when dropped.
#[derive(Debug)]
pub struct Registry {
    process: Child,
    _folder: tempfile::TempDir,
    address: SocketAddr,
}

impl Registry {
    /// Starts one at the host's address.
    ///
    /// # Errors
    /// When `scripts/install-registry` wasn't run, or it doesn't listen.
    pub fn start() -> Result<Self> {
        Self::with("")
    }

    /// Starts one that speaks TLS, with a certificate that nobody signed, and serves [`USER`] with [`PASSWORD`] only.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_private(folder: &Path) -> Result<Self> {
        let [key, certificate, users] = ["key.pem", "certificate.pem", "users"].map(|name| folder.join(name));
        let subject = ["-subj", "/CN=registry", "-addext", &format!("subjectAltName=IP:{HOST_V4}")];
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&certificate)
            .args(subject)
            .stderr(Stdio::null())
            .status()
            .context("can't run openssl")?;
        ensure!(made.success(), "openssl ended with {made}");
        std::fs::write(&users, format!("{USER}:{PASSWORD_HASH}\n"))?;
        let (key, certificate, users) = (key.display(), certificate.display(), users.display());
        Self::with(&format!(
            "  tls: {{ certificate: '{certificate}', key: '{key}' }}\n\
             auth:\n  htpasswd: {{ realm: tests, path: '{users}' }}\n"
        ))
    }

    /// Starts one; `more` goes on where its configuration tells of HTTP.
    fn with(more: &str) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dorm-registry").tempdir()?;
        let (installed, images) = (project().join("build/registry"), folder.path().join("images"));
        // A copy: what tests push is gone with it.
        let copied = Command::new("cp").arg("-a").arg(installed.join("images")).arg(&images).status()?;
        ensure!(copied.success(), "there are no images: run scripts/install-registry");
        let address: SocketAddr = format!("{HOST_V4}:5000").parse()?;
        let config = folder.path().join("config.yml");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{ level: error }}\nhttp:\n  addr: '{address}'\n{more}\
                 storage:\n  filesystem: {{ rootdirectory: '{}' }}\n  delete: {{ enabled: true }}\n",
                images.display()
            ),
        )?;
        let mut command = Command::new(installed.join("docker-registry"));
        command.arg("serve").arg(&config).stdin(Stdio::null()).stdout(Stdio::null());
        let log = folder.path().join("log");
        command.stderr(std::fs::File::create(&log)?);
        let process = command.spawn().context("can't start docker-registry")?;
        let mut registry = Self { process, _folder: folder, address };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = registry.process.try_wait()? {
                bail!("docker-registry ended with {status}: {}", std::fs::read_to_string(&log)?);
            }
            ensure!(begun.elapsed() < LISTENS_WITHIN, "docker-registry doesn't listen");
            std::thread::park_timeout(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// `HOST:PORT`.
    #[must_use]
    pub fn name(&self) -> String {
        self.address.to_string()
    }

    /// What an engine calls it as a mirror.
    #[must_use]
    pub fn mirror(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
