//! What a terminal gets to see and gets back, and what becomes of a command that nobody listens to. No service is needed.

use std::process::{Command, Stdio};
use std::time::Duration;

use expectrl::session::OsSession;
use expectrl::{Expect, Session as Terminal};

/// Longest wait for what a command prints. It is for hangs.
const PRINTED_WITHIN: Duration = Duration::from_secs(120);

const DORM: &str = env!("CARGO_BIN_EXE_dorm");

/// A line of shell on a terminal, in a home in which nothing is.
fn on_terminal(line: &str, variables: &[(&str, &str)]) -> (OsSession, tempfile::TempDir) {
    let home = tempfile::tempdir().expect("a folder");
    let mut command = Command::new("sh");
    command
        // A terminal gets its size from the test a moment after the shell has begun.
        .args(["-c", &format!("read go; {line}")])
        .env("DORM", DORM)
        .env("DORM_HOME", home.path())
        .env("DOCKER_CONFIG", home.path())
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .envs(variables.iter().copied());
    let mut terminal = Terminal::spawn(command).expect("a terminal");
    terminal.set_expect_timeout(Some(PRINTED_WITHIN));
    terminal.send_line("").expect("it reads");
    (terminal, home)
}

/// All that a line of shell prints on a terminal.
fn printed(line: &str, variables: &[(&str, &str)]) -> String {
    let (mut terminal, _home) = on_terminal(line, variables);
    let all = terminal.expect(expectrl::Eof).expect("it ends");
    String::from_utf8_lossy(all.as_bytes()).into_owned()
}

#[test]
fn colours_are_for_terminals_whose_user_wants_them() {
    for line in ["$DORM --help", "$DORM doctor", "$DORM nonsense"] {
        assert!(printed(line, &[]).contains("\x1b["), "{line} has colours");
        assert!(printed(line, &[("NO_COLOR", "")]).contains("\x1b["), "{line}: an empty value says nothing");
        let plain = printed(line, &[("NO_COLOR", "1")]);
        assert!(!plain.contains('\x1b') && !plain.is_empty(), "{line}: {plain:?}");
        let piped = printed(&format!("{line} 2>&1 | cat"), &[]);
        assert!(!piped.contains('\x1b') && !piped.is_empty(), "{line}: {piped:?}");
    }
}

#[test]
fn help_fits_a_narrow_terminal() {
    let plain = [("NO_COLOR", "1")];
    for line in ["$DORM --help", "$DORM ps --help", "$DORM session create --help"] {
        let text = printed(&format!("stty cols 60; {line}"), &plain);
        let widest = text.lines().map(|line| line.trim_end().chars().count()).max().unwrap_or(0);
        assert!((30..=60).contains(&widest), "{line} is {widest} wide");
        for columns in [1, 10] {
            assert!(printed(&format!("stty cols {columns}; {line}"), &plain).contains("Usage"), "{line}");
        }
    }
}

#[test]
fn a_password_is_not_shown_and_whoever_gives_up_gets_the_terminal_back() {
    // The shell is in the same group, and gets the signal as well.
    let line = "trap : INT; stty echo; $DORM login 192.0.2.7:5000 -u me; echo ended $?; stty -a";
    let (mut terminal, _home) = on_terminal(line, &[]);
    terminal.expect("Password: ").expect("it asks");
    terminal.send("secret\x03").expect("it reads");
    let said = terminal.expect("ended 130").expect("its status");
    assert!(!String::from_utf8_lossy(said.as_bytes()).contains("secret"), "it was shown");
    terminal.expect(" echo ").expect("what is typed is shown again");
    terminal.expect(expectrl::Eof).expect("the end");
}

/// A writer into a pipe that nobody reads.
fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

#[test]
fn a_command_that_nobody_listens_to_ends_in_order() {
    let dorm = |arguments: &[&str]| {
        let mut command = Command::new(DORM);
        command.args(arguments).env("DORM_HOME", "relative").stdin(Stdio::null());
        command
    };
    for arguments in [&["--help"][..], &["--version"], &["help", "sleep"], &["completion", "bash"]] {
        let output = dorm(arguments).stdout(unread()).stderr(Stdio::piped()).output().expect("it runs");
        assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
    // What went wrong is in the status, also for who has closed its standard error.
    for (arguments, code) in [(&["ps"][..], 1), (&["ps", "--bogus"], 125), (&["nonsense"], 1)] {
        let output = dorm(arguments).stderr(unread()).output().expect("it runs");
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        let closed = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" <&- >&- 2>&-", DORM])
            .args(arguments)
            .env("DORM_HOME", "relative")
            .status();
        assert_eq!(closed.expect("it runs").code(), Some(code), "{arguments:?}");
    }
}
