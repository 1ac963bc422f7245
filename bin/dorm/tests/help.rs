//! What each command says of itself, and of a line that it doesn't understand.

use std::fmt::Write as _;
use std::process::Command;

/// Width at which help is broken into lines.
const WIDTH: usize = 100;

/// Every command that does something, by its path, with its tree.
fn commands() -> Vec<(Vec<String>, clap::Command)> {
    fn walk(command: &clap::Command, path: &[String], found: &mut Vec<(Vec<String>, clap::Command)>) {
        for child in
            command.get_subcommands().filter(|child| !child.is_hide_set() && child.get_name() != "help")
        {
            let path = [path, &[child.get_name().to_owned()]].concat();
            if child.has_subcommands() {
                walk(child, &path, found);
            } else {
                found.push((path, child.clone()));
            }
        }
    }
    let mut root = dorm::command().term_width(WIDTH);
    root.build();
    let mut found = Vec::new();
    walk(&root, &[], &mut found);
    found
}

/// Groups repeat what is at the root: their help is the same but for its name.
fn is_repeated(path: &[String]) -> bool {
    path.first().is_some_and(|first| first == "system")
        && path.get(1).is_some_and(|second| second == "session")
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_dorm"))
        .args(arguments)
        // A line that was understood after all must find nothing to work on.
        .env("DORM_HOME", "relative")
        .env_remove("DORM_SESSION")
        .output()
        .expect("the program runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn each_command_says_what_it_does() {
    let mut texts: Vec<(String, String)> = Vec::new();
    for (path, mut command) in commands().into_iter().filter(|(path, _)| !is_repeated(path)) {
        let group = if path.len() > 1 { path[0].clone() } else { "root".to_owned() };
        if !texts.iter().any(|(name, _)| *name == group) {
            texts.push((group.clone(), String::new()));
        }
        if let Some((_, text)) = texts.iter_mut().find(|(name, _)| *name == group) {
            let _ = writeln!(text, "$ dorm {} --help\n{}", path.join(" "), command.render_long_help());
        }
    }
    for (group, text) in texts {
        insta::assert_snapshot!(format!("help-{group}"), text);
    }
}

#[test]
fn each_command_refuses_an_option_that_it_does_not_have() {
    let mut text = String::new();
    for (path, _) in commands() {
        let mut line: Vec<&str> = path.iter().map(String::as_str).collect();
        line.push("--bogus");
        let (code, out, error) = run(&line);
        assert_eq!(out, "", "{line:?}: results only are on standard output");
        let _ =
            writeln!(text, "dorm {}: {code:?} {}", line.join(" "), error.lines().next().unwrap_or_default());
    }
    insta::assert_snapshot!("bad-options", text);
}

#[test]
fn each_command_says_what_it_misses() {
    let mut text = String::new();
    for (path, command) in commands() {
        if !command.get_positionals().any(clap::Arg::is_required_set) {
            continue;
        }
        let line: Vec<&str> = path.iter().map(String::as_str).collect();
        let (code, out, error) = run(&line);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{line:?}: {error}");
        let missing: Vec<_> = error.lines().filter(|line| line.starts_with("  ")).map(str::trim).collect();
        let _ = writeln!(text, "dorm {}: {}", line.join(" "), missing.join(" "));
    }
    insta::assert_snapshot!("missing-values", text);
}

#[test]
fn what_went_wrong_is_one_line_on_standard_error() {
    let (code, out, error) = run(&["ps"]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert_eq!(error, "error: DORM_HOME is a relative path: give an absolute one\n");
    let (code, _, error) = run(&["run", "-v", "~/a:/x", "busybox"]);
    assert_eq!(code, Some(125));
    assert!(error.starts_with("error: \"~/a\" is no name of a volume and no path"), "{error}");
    let (code, _, error) = run(&["session", "create", &"n".repeat(256)]);
    assert_eq!(code, Some(1));
    assert!(error.contains("at most 255 bytes"), "{error}");
}

#[test]
fn the_version_is_told_without_a_service() {
    let (code, out, _) = run(&["--version"]);
    assert_eq!((code, out.as_str()), (Some(0), concat!("dorm ", env!("CARGO_PKG_VERSION"), "\n")));
}
