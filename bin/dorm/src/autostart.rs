//! `dorm autostart`: has systemd start the per-user service at login. Without it the first command starts it, and until then
//! nobody listens for docker's clients and at published ports.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use clap::Subcommand;
use dormouse_client::{Home, program_beside_this_one};

use crate::error::{Done, Failure};
use crate::output::print;

/// What systemd calls it.
const UNIT: &str = "dormouse.service";

/// Variables that say where everything lies and what VMs are made with, and where programs are found. A user's systemd needn't
/// know them, and gives a short `PATH`; the runtime directory comes from it.
const VARIABLES: &[&str] = &[
    "DORM_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_CACHE_HOME",
    "DORM_IMAGES",
    "DORM_TEMPLATES",
    "DORM_NETWORK",
    "DORM_VIRTIOFSD",
    "PATH",
];

/// `dorm autostart`.
#[derive(Subcommand)]
pub(crate) enum Autostart {
    /// Make a systemd unit of your own that starts the service at login, and print where it lies.
    Install,
    /// Stop the service, which puts VMs to sleep, and remove the unit.
    Uninstall,
}

impl Autostart {
    pub(crate) fn run(self) -> Done {
        // A home that can't be would only be told at the next login.
        Home::from_env()?;
        match self {
            Self::Install => install(),
            Self::Uninstall => uninstall(),
        }
    }
}

fn install() -> Done {
    let program = program_beside_this_one("dormd")?;
    if !program.exists() {
        return Err(
            Failure::new(format!("{} is missing", program.display())).hint("install it beside `dorm`")
        );
    }
    let path = path()?;
    let failed = |error: io::Error| Failure::new(format!("can't write to {}: {error}", path.display()));
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).map_err(failed)?;
    let variables: Vec<_> = VARIABLES
        .iter()
        .filter_map(|name| Some((*name, std::env::var(name).ok().filter(|value| !value.is_empty())?)))
        .collect();
    std::fs::write(&path, unit(&program, &variables)).map_err(failed)?;
    match systemctl(&["daemon-reload"]) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            std::fs::remove_file(&path).map_err(failed)?;
            return Err(Failure::new("there is no systemd here")
                .hint(format!("have {} run at login instead", program.display())));
        }
        done => succeeded(done)?,
    }
    succeeded(systemctl(&["enable", "--now", UNIT]))?;
    print(path.display().to_string())
}

fn uninstall() -> Done {
    let path = path()?;
    if !path.exists() {
        return Err(
            Failure::new(format!("there is no {}", path.display())).hint("`dorm autostart install` makes it")
        );
    }
    let disabled = systemctl(&["disable", "--now", UNIT]);
    std::fs::remove_file(&path)
        .map_err(|error| Failure::new(format!("can't remove {}: {error}", path.display())))?;
    match disabled {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        disabled => {
            succeeded(disabled)?;
            succeeded(systemctl(&["daemon-reload"]))?;
        }
    }
    print(path.display().to_string())
}

/// Where systemd looks for a user's own units.
fn path() -> Result<PathBuf, Failure> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = folder("XDG_CONFIG_HOME").or_else(|| Some(folder("HOME")?.join(".config")));
    let config = config.ok_or_else(|| Failure::new("can't tell where units lie: set HOME"))?;
    Ok(config.join("systemd/user").join(UNIT))
}

/// A second service ends at once without a failure, so one that `dorm` has started is left alone.
fn unit(program: &Path, variables: &[(&str, String)]) -> String {
    let variables: String = variables
        .iter()
        .map(|(name, value)| format!("Environment={}\n", quoted(&format!("{name}={value}"))))
        .collect();
    format!(
        "# Made by `dorm autostart install`.\n\
         [Unit]\n\
         Description=Dormouse, container engines in VMs that sleep\n\
         \n\
         [Service]\n\
         Type=exec\n\
         ExecStart={program}\n\
         {variables}\
         Restart=on-failure\n\
         # VMs outlive a service that dies; one that is stopped puts them to sleep itself, in 65 s at most.\n\
         KillMode=process\n\
         TimeoutStopSec=80\n\
         \n\
         [Install]\n\
         WantedBy=default.target\n",
        program = quoted(&program.display().to_string()),
    )
}

/// As one word of a unit, see systemd.syntax(7): `%` begins a specifier, and a line would end at a newline.
fn quoted(text: &str) -> String {
    let escaped = [("\\", "\\\\"), ("\"", "\\\""), ("\n", "\\n"), ("%", "%%")]
        .iter()
        .fold(text.to_owned(), |text, (plain, escaped)| text.replace(plain, escaped));
    format!("\"{escaped}\"")
}

fn systemctl(arguments: &[&str]) -> io::Result<Output> {
    Command::new("systemctl").arg("--user").args(arguments).output()
}

fn succeeded(done: io::Result<Output>) -> Result<(), Failure> {
    let output = done.map_err(|error| Failure::new(format!("can't run systemctl: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
    Err(Failure::new(format!("systemctl failed: {said}")).hint(
        "run it again from a login of your own; until then the first `dorm` command starts the service",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_one_word_of_a_unit_whatever_it_holds() {
        let path = "/a b:/100%:/\"c\":/d\\e:/f\ng:/$h";
        let unit =
            unit(Path::new("/bin/dormd"), &[("DORM_HOME", "/d".to_owned()), ("PATH", path.to_owned())]);
        let lines: Vec<_> = unit.lines().filter(|line| line.starts_with("Environment=")).collect();
        let escaped = r#"Environment="PATH=/a b:/100%%:/\"c\":/d\\e:/f\ng:/$h""#;
        assert_eq!(lines, [r#"Environment="DORM_HOME=/d""#, escaped]);
    }
}
