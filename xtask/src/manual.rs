//! What is made of the tree of `dorm`'s commands: the manual pages, and docs/CLI.md.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::{Arg, Command};

/// Every command of `wslc` with its options, by their long names.
const WSLC: &[(&str, &[&str])] = &[
    ("attach", &[]),
    ("container attach", &[]),
    ("container cp", &["archive"]),
    ("cp", &["archive"]),
    ("container create", CREATE),
    ("create", CREATE),
    ("container exec", EXEC),
    ("exec", EXEC),
    ("container export", &["output"]),
    ("export", &["output"]),
    ("container inspect", &["format"]),
    ("container kill", &["signal"]),
    ("kill", &["signal"]),
    ("container list", LIST),
    ("container ls", LIST),
    ("container ps", LIST),
    ("ps", LIST),
    ("container logs", LOGS),
    ("logs", LOGS),
    ("container prune", &[]),
    ("container remove", &["force", "volumes"]),
    ("container delete", &["force", "volumes"]),
    ("container rm", &["force", "volumes"]),
    ("rm", &["force", "volumes"]),
    ("container run", RUN),
    ("run", RUN),
    ("container start", &["attach", "interactive"]),
    ("start", &["attach", "interactive"]),
    ("container stats", &["all", "format", "no-trunc"]),
    ("stats", &["all", "format", "no-trunc"]),
    ("container stop", &["signal", "time"]),
    ("stop", &["signal", "time"]),
    ("image build", BUILD),
    ("build", BUILD),
    ("image import", &["no-trunc"]),
    ("import", &["no-trunc"]),
    ("image inspect", &["format"]),
    ("image list", IMAGES),
    ("image ls", IMAGES),
    ("images", IMAGES),
    ("image load", &["input"]),
    ("load", &["input"]),
    ("image prune", &["all", "filter"]),
    ("image pull", &["quiet"]),
    ("pull", &["quiet"]),
    ("image push", &[]),
    ("push", &[]),
    ("image remove", &["force", "no-prune"]),
    ("image delete", &["force", "no-prune"]),
    ("image rm", &["force", "no-prune"]),
    ("rmi", &["force", "no-prune"]),
    ("image save", &["output"]),
    ("save", &["output"]),
    ("image tag", &[]),
    ("tag", &[]),
    ("network create", &["driver", "opt", "label", "gateway", "internal", "ip-range", "subnet"]),
    ("network remove", &["force"]),
    ("network delete", &["force"]),
    ("network rm", &["force"]),
    ("network inspect", &["format"]),
    ("network list", &["format", "quiet"]),
    ("network ls", &["format", "quiet"]),
    ("network prune", &["filter"]),
    ("network connect", &["driver-opt", "ip", "link", "link-local-ip", "network-alias"]),
    ("network disconnect", &[]),
    ("volume create", &["driver", "opt", "label"]),
    ("volume remove", &["force"]),
    ("volume delete", &["force"]),
    ("volume rm", &["force"]),
    ("volume inspect", &["format"]),
    ("volume list", &["format", "quiet"]),
    ("volume ls", &["format", "quiet"]),
    ("volume prune", &["all", "filter"]),
    ("registry login", &["username", "password", "password-stdin"]),
    ("login", &["username", "password", "password-stdin"]),
    ("registry logout", &[]),
    ("logout", &[]),
    ("inspect", &["type", "format"]),
    ("settings", &[]),
    ("settings reset", &[]),
    ("system session list", &["verbose"]),
    ("system session enter", &["name"]),
    ("system session run", &[]),
    ("system session shell", &[]),
    ("system session terminate", &[]),
    ("version", &["format"]),
];

const RUN: &[&str] = &[
    "detach",
    "cidfile",
    "cpus",
    "dns",
    "dns-option",
    "dns-search",
    "domainname",
    "hostname",
    "entrypoint",
    "env",
    "env-file",
    "gpus",
    "health-cmd",
    "health-interval",
    "health-timeout",
    "health-start-period",
    "health-retries",
    "no-healthcheck",
    "interactive",
    "tty",
    "label",
    "memory",
    "shm-size",
    "name",
    "network",
    "network-alias",
    "publish",
    "publish-all",
    "rm",
    "stop-signal",
    "stop-timeout",
    "tmpfs",
    "ulimit",
    "user",
    "volume",
    "workdir",
];
/// All of `run`'s but the first, which says how it runs.
const CREATE: &[&str] = match RUN {
    [_detach, options @ ..] => options,
    [] => &[],
};
const EXEC: &[&str] = &["detach", "env", "env-file", "interactive", "tty", "user", "workdir"];
const LIST: &[&str] = &["all", "filter", "format", "last", "latest", "no-trunc", "quiet"];
const LOGS: &[&str] = &["follow", "tail", "timestamps", "since", "until"];
const IMAGES: &[&str] = &["filter", "format", "no-trunc", "quiet", "verbose"];
const BUILD: &[&str] = &[
    "build-arg",
    "pull",
    "target",
    "file",
    "iidfile",
    "label",
    "no-cache",
    "output",
    "secret",
    "tag",
    "verbose",
];

/// Every command of docker's client that is not about swarms, plugins or trust.
const DOCKER: &[&str] = &[
    "attach",
    "build",
    "builder build",
    "builder prune",
    "commit",
    "container attach",
    "container commit",
    "container cp",
    "container create",
    "container diff",
    "container exec",
    "container export",
    "container inspect",
    "container kill",
    "container logs",
    "container ls",
    "container pause",
    "container port",
    "container prune",
    "container rename",
    "container restart",
    "container rm",
    "container run",
    "container start",
    "container stats",
    "container stop",
    "container top",
    "container unpause",
    "container update",
    "container wait",
    "context ls",
    "cp",
    "create",
    "diff",
    "events",
    "exec",
    "export",
    "history",
    "image build",
    "image history",
    "image import",
    "image inspect",
    "image load",
    "image ls",
    "image prune",
    "image pull",
    "image push",
    "image rm",
    "image save",
    "image tag",
    "images",
    "import",
    "info",
    "inspect",
    "kill",
    "load",
    "login",
    "logout",
    "logs",
    "manifest inspect",
    "network connect",
    "network create",
    "network disconnect",
    "network inspect",
    "network ls",
    "network prune",
    "network rm",
    "pause",
    "port",
    "ps",
    "pull",
    "push",
    "rename",
    "restart",
    "rm",
    "rmi",
    "run",
    "save",
    "search",
    "start",
    "stats",
    "stop",
    "system df",
    "system dial-stdio",
    "system events",
    "system info",
    "system prune",
    "tag",
    "top",
    "unpause",
    "update",
    "version",
    "volume create",
    "volume inspect",
    "volume ls",
    "volume prune",
    "volume rm",
    "wait",
];

/// Where docs/CLI.md lies.
pub(crate) const REFERENCE: &str = "docs/CLI.md";

/// Writes docs/CLI.md, or with `check` fails if it isn't what would be written.
pub(crate) fn reference(check: bool) -> Result<()> {
    let text = text();
    if !check {
        return fs::write(REFERENCE, text).with_context(|| format!("can't write {REFERENCE}"));
    }
    let written = fs::read_to_string(REFERENCE).unwrap_or_default();
    if written != text {
        bail!("{REFERENCE} is not current: `cargo xtask cli-reference` makes it anew");
    }
    Ok(())
}

/// Writes a manual page for each command.
pub(crate) fn pages(out: &Path) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("can't make {}", out.display()))?;
    clap_mangen::generate_to(dorm::command(), out).context("can't write the manual pages")
}

/// The command at a path such as `container ls`, by its name or an alias.
fn find<'a>(root: &'a Command, path: &str) -> Option<&'a Command> {
    path.split(' ').try_fold(root, |command, name| command.find_subcommand(name))
}

fn has_option(command: &Command, long: &str) -> bool {
    command.get_arguments().any(|argument| {
        let aliases = argument.get_all_aliases().unwrap_or_default();
        argument.get_long() == Some(long) || aliases.contains(&long)
    })
}

fn text() -> String {
    let mut root = dorm::command();
    root.build();
    let mut out = String::from(
        "# The command line\n\nMade by `cargo xtask cli-reference` from the tree of commands; a test sees that it is current.\n\n## What there is\n\n",
    );
    describe(&root, "dorm", &mut out);
    out.push_str("## Beside wslc\n\nEach command and option of wslc, and whether dorm has it.\n\n| command | there | not there |\n|---|---|---|\n");
    let (mut all, mut there) = (0, 0);
    for (path, options) in WSLC {
        let command = find(&root, path);
        let (have, lack): (Vec<&str>, Vec<&str>) =
            options.iter().partition(|option| command.is_some_and(|command| has_option(command, option)));
        all += options.len() + 1;
        there += have.len() + usize::from(command.is_some());
        let name = if command.is_some() { format!("`{path}`") } else { format!("`{path}`: **no**") };
        let _ = writeln!(out, "| {name} | {} | {} |", options_text(&have), options_text(&lack));
    }
    let _ = writeln!(
        out,
        "\n{there} of {all} are there.\n\n## Beside docker\n\nEach command of docker's client that is not about swarms, plugins or trust.\n"
    );
    let (have, lack): (Vec<&str>, Vec<&str>) = DOCKER.iter().partition(|path| find(&root, path).is_some());
    let _ = writeln!(
        out,
        "There ({}): {}.\n\nNot there ({}): {}.",
        have.len(),
        names(&have),
        lack.len(),
        names(&lack)
    );
    out
}

fn options_text(options: &[&str]) -> String {
    options.iter().map(|option| format!("`--{option}`")).collect::<Vec<_>>().join(" ")
}

fn names(paths: &[&str]) -> String {
    paths.iter().map(|path| format!("`{path}`")).collect::<Vec<_>>().join(", ")
}

/// A line for each command, with its options.
fn describe(command: &Command, path: &str, out: &mut String) {
    let mut seen = BTreeSet::new();
    for child in command.get_subcommands() {
        if child.is_hide_set() || !seen.insert(child.get_name().to_owned()) {
            continue;
        }
        let name = format!("{path} {}", child.get_name());
        if child.has_subcommands() {
            describe(child, &name, out);
            continue;
        }
        let aliases: Vec<_> = child.get_visible_aliases().collect();
        let also = if aliases.is_empty() { String::new() } else { format!(" (also {})", aliases.join(", ")) };
        let about = child.get_about().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(out, "**`{name}`**{also}: {about}\n");
        let values: Vec<_> =
            child.get_arguments().filter(|argument| !argument.is_hide_set()).filter_map(shown).collect();
        if !values.is_empty() {
            let _ = writeln!(out, "{}\n", values.join(" · "));
        }
    }
}

/// An option or a value, in short.
fn shown(argument: &Arg) -> Option<String> {
    if matches!(argument.get_id().as_str(), "help" | "session" | "version") {
        return None;
    }
    let names = argument
        .get_value_names()
        .unwrap_or_default()
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" ");
    let value = if argument.get_action().takes_values() { format!(" {names}") } else { String::new() };
    let long = argument.get_long().map(|long| format!("--{long}"));
    let short = argument.get_short().map(|short| format!("-{short}"));
    Some(match (short, long) {
        (Some(short), Some(long)) => format!("`{short}, {long}{value}`"),
        (Some(only), None) | (None, Some(only)) => format!("`{only}{value}`"),
        (None, None) => format!("`{names}`"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(REFERENCE);
        let written = fs::read_to_string(path).unwrap_or_default();
        assert!(written == text(), "`cargo xtask cli-reference` makes {REFERENCE} anew");
    }

    #[test]
    fn every_command_can_be_found_by_its_path() {
        let mut root = dorm::command();
        root.build();
        assert!(find(&root, "container ls").is_some_and(|command| has_option(command, "no-trunc")));
        assert!(find(&root, "container nothing").is_none());
    }

    #[test]
    fn each_command_has_a_manual_page() {
        let folder = tempfile::tempdir().unwrap();
        pages(folder.path()).unwrap();
        assert!(folder.path().join("dorm-container-run.1").exists());
    }
}
