//! `dorm autostart`, with a systemctl that only writes down what it is asked for.
#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A program that is open for writing can't be run, and whoever starts another one beside that keeps it open for a moment.
static TURN: Mutex<()> = Mutex::new(());

/// A user with programs of their own, one at a time.
struct User {
    home: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl User {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let home = tempfile::tempdir().unwrap();
        let programs = home.path().join("programs");
        fs::create_dir(&programs).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_dorm"), programs.join("dorm")).unwrap();
        fs::write(programs.join("dormd"), "").unwrap();
        Self { home, _turn: turn }
    }

    fn unit(&self) -> PathBuf {
        self.home.path().join(".config/systemd/user/dormouse.service")
    }

    /// With a systemctl that ends so.
    fn with_systemctl(self, status: u8) -> Self {
        let folder = self.home.path().join("bin");
        fs::create_dir(&folder).unwrap();
        let log = self.home.path().join("asked");
        let script = format!("#!/bin/sh\necho \"$@\" >> {}\necho no bus >&2\nexit {status}\n", log.display());
        fs::write(folder.join("systemctl"), script).unwrap();
        fs::set_permissions(folder.join("systemctl"), fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    fn dorm(&self, what: &str) -> Output {
        let mut dorm = Command::new(self.home.path().join("programs/dorm"));
        dorm.args(["autostart", what])
            .env_clear()
            .env("HOME", self.home.path())
            .env("XDG_DATA_HOME", "/a \"b\"/100%")
            .env("DORM_IMAGES", "")
            .env("DORM_VIRTIOFSD", "/v")
            .env("DORM_NETWORK", "none");
        dorm.env("PATH", self.home.path().join("bin")).output().unwrap()
    }

    fn asked(&self) -> String {
        fs::read_to_string(self.home.path().join("asked")).unwrap_or_default()
    }
}

fn words(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_unit_is_made_and_started_and_goes_again() {
    let user = User::new().with_systemctl(0);
    let printed = format!("{}\n", user.unit().display());
    let installed = user.dorm("install");
    assert!(installed.status.success(), "{}", words(&installed.stderr));
    assert_eq!(words(&installed.stdout), printed);
    let unit = fs::read_to_string(user.unit()).unwrap();
    insta::assert_snapshot!(unit.replace(&user.home.path().display().to_string(), "/home/u"), @r#"
    # Made by `dorm autostart install`.
    [Unit]
    Description=Dormouse, container engines in VMs that sleep

    [Service]
    Type=exec
    ExecStart="/home/u/programs/dormd"
    Environment="XDG_DATA_HOME=/a \"b\"/100%%"
    Environment="DORM_NETWORK=none"
    Environment="DORM_VIRTIOFSD=/v"
    Environment="PATH=/home/u/bin"
    Restart=on-failure
    # VMs outlive a service that dies; one that is stopped puts them to sleep itself, in 65 s at most.
    KillMode=process
    TimeoutStopSec=80

    [Install]
    WantedBy=default.target
    "#);
    assert_eq!(user.asked(), "--user daemon-reload\n--user enable --now dormouse.service\n");
    fs::remove_file(user.home.path().join("asked")).unwrap();
    let removed = user.dorm("uninstall");
    assert!(removed.status.success() && !user.unit().exists(), "{}", words(&removed.stderr));
    assert_eq!(user.asked(), "--user disable --now dormouse.service\n--user daemon-reload\n");
    let again = user.dorm("uninstall");
    assert!(words(&again.stderr).starts_with("error: there is no /"), "{again:?}");
}

#[test]
fn without_systemd_it_is_told_what_to_run_at_login() {
    let user = User::new();
    let installed = user.dorm("install");
    let program = user.home.path().join("programs/dormd");
    let said =
        format!("error: there is no systemd here\nhint: have {} run at login instead\n", program.display());
    assert_eq!((installed.status.code(), words(&installed.stderr)), (Some(1), said));
    assert!(!user.unit().exists());
}

#[test]
fn what_systemctl_has_to_say_against_it_is_told() {
    let user = User::new().with_systemctl(1);
    let installed = user.dorm("install");
    let said = words(&installed.stderr);
    assert!(
        said.starts_with("error: systemctl failed: no bus\nhint: run it again from a login of your own"),
        "{said}"
    );
    assert_eq!(user.asked(), "--user daemon-reload\n");
}
