//! `dorm help`: topics, and the same help of commands that `--help` prints.

use std::io::{self, Write};

use clap::Args;

use crate::context::nearest;
use crate::error::{Done, Failure, SUCCESS};
use crate::output::print;

/// Every topic: its name, what it is about, its text.
const TOPICS: &[(&str, &str, &str)] = &[
    ("sessions", "what they are, and how to choose one", include_str!("help/sessions.txt")),
    ("sleep", "when a VM sleeps and wakes, and what keeps it awake", include_str!("help/sleep.txt")),
    ("folders", "folders of this machine in containers", include_str!("help/folders.txt")),
    ("ports", "how containers' ports are reached", include_str!("help/ports.txt")),
    ("registries", "logging in, mirrors, registries without TLS", include_str!("help/registries.txt")),
    ("build", "building images", include_str!("help/build.txt")),
    ("docker", "docker's client, compose, IDEs, libraries", include_str!("help/docker.txt")),
    ("settings", "what new sessions get", include_str!("help/settings.txt")),
    ("exit-codes", "what a status means", include_str!("help/exit-codes.txt")),
    ("troubleshooting", "when something doesn't work", include_str!("help/troubleshooting.txt")),
];

#[derive(Args)]
pub(crate) struct Help {
    /// A topic, or a command such as `session create`.
    #[arg(value_name = "TOPIC")]
    words: Vec<String>,
}

impl Help {
    pub(crate) fn run(self) -> Done {
        let mut root = crate::command();
        root.build();
        let [first, ..] = self.words.as_slice() else { return list() };
        if let ([_], Some((_, _, text))) = (&self.words[..], TOPICS.iter().find(|(name, ..)| name == first)) {
            return print(text.trim_end());
        }
        let mut command = &mut root;
        for word in &self.words {
            if command.find_subcommand(word).is_none() {
                let known: Vec<_> =
                    command.get_subcommands().map(|child| child.get_name().to_owned()).collect();
                return Err(unknown(&self.words.join(" "), word, &known));
            }
            command = match command.find_subcommand_mut(word) {
                Some(found) => found,
                None => return list(),
            };
        }
        print(command.render_long_help().to_string().trim_end())
    }
}

fn unknown(typed: &str, word: &str, commands: &[String]) -> Failure {
    let known = TOPICS.iter().map(|(name, ..)| *name).chain(commands.iter().map(String::as_str));
    let failure = Failure::new(format!("{typed:?} is neither a topic nor a command"));
    match nearest(word, known) {
        Some(near) => failure.hint(format!("did you mean {near:?}?")),
        None => failure.hint("`dorm help` lists the topics, `dorm --help` the commands"),
    }
}

fn list() -> Done {
    let mut out = io::stdout().lock();
    writeln!(out, "Topics of `dorm help TOPIC`:\n")?;
    for (name, about, _) in TOPICS {
        writeln!(out, "  {name:<16} {about}")?;
    }
    writeln!(out, "\n`dorm help COMMAND` explains a command, `dorm --help` lists them.")?;
    Ok(SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Arguments;

    /// The commands of a text: its lines that are set in, and what of them is `dorm`'s.
    fn commands(text: &str) -> impl Iterator<Item = &str> {
        text.lines().filter_map(|line| line.strip_prefix("    dorm ")).map(|line| {
            let line = line.split("  ").next().unwrap_or(line);
            line.split(" | ").next().unwrap_or(line)
        })
    }

    #[test]
    fn every_command_that_a_topic_names_is_one() {
        for (name, _, text) in TOPICS {
            assert!(commands(text).count() > 0, "{name} has no example");
            for line in commands(text) {
                let words = std::iter::once("dorm").chain(line.split(' '));
                let understood = Arguments::from_line(words);
                assert!(understood.is_ok(), "{name}: dorm {line}");
            }
        }
    }

    #[test]
    fn every_command_within_a_topics_words_is_one() {
        let mut root = crate::command();
        root.build();
        for (name, _, text) in TOPICS {
            for quoted in text.split('`').skip(1).step_by(2).filter_map(|words| words.strip_prefix("dorm ")) {
                let found = quoted
                    .split(' ')
                    .take_while(|word| word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'))
                    .filter(|word| !word.starts_with('-'))
                    .try_fold(&root, |command, word| {
                        if command.has_subcommands() { command.find_subcommand(word) } else { Some(command) }
                    });
                assert!(found.is_some(), "{name}: dorm {quoted}");
            }
        }
    }

    #[test]
    fn topics_are_narrow_and_a_slip_is_recognised() {
        for (name, about, text) in TOPICS {
            let widest = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
            assert!(widest <= 79 && about.len() < 60, "{name} is {widest} wide");
        }
        let failure = unknown("slep", "slep", &["session".to_owned()]);
        assert!(
            matches!(failure, Failure::Said(said) if said.hint.as_deref() == Some("did you mean \"sleep\"?"))
        );
    }
}
