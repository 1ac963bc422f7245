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

/// How each key of a registry with TLS is made.
const KEY: &str = "-newkey rsa:2048 -nodes";

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
        sign_itself(folder)?;
        Self::with_tls(folder)
    }

    /// The same, with a certificate of an authority whose own is `authority.pem` in the folder then.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_signed(folder: &Path) -> Result<Self> {
        have_signed(folder)?;
        Self::with_tls(folder)
    }

    fn with_tls(folder: &Path) -> Result<Self> {
        let [key, certificate, users] = ["key.pem", "certificate.pem", "users"].map(|name| folder.join(name));
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

/// A key and a certificate that nobody signed.
fn sign_itself(folder: &Path) -> Result<()> {
    let name = format!("subjectAltName=IP:{HOST_V4}");
    let files = "-keyout key.pem -out certificate.pem";
    openssl(folder, &format!("req -x509 {KEY} {files} -subj /CN=registry -addext {name}"))
}

/// The same, signed by an authority that is made for it.
fn have_signed(folder: &Path) -> Result<()> {
    let name = format!("subjectAltName=IP:{HOST_V4}");
    openssl(
        folder,
        &format!("req -x509 {KEY} -keyout authority.key -out authority.pem -subj /CN=authority"),
    )?;
    openssl(
        folder,
        &format!("req {KEY} -keyout key.pem -out request.pem -subj /CN=registry -addext {name}"),
    )?;
    let signs = "-CA authority.pem -CAkey authority.key -CAcreateserial -days 2 -copy_extensions copy";
    openssl(folder, &format!("x509 -req -in request.pem -out certificate.pem {signs}"))
}

fn openssl(folder: &Path, line: &str) -> Result<()> {
    let mut command = Command::new("openssl");
    command.args(line.split_whitespace()).current_dir(folder).stdin(Stdio::null());
    let output = command.output().context("can't run openssl")?;
    ensure!(output.status.success(), "openssl {line}: {output:?}");
    Ok(())
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
