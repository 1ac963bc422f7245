//! `.dockerignore`: what of a folder is not sent to a build.

use std::path::Path;

/// The patterns of a file, in order. The last that fits decides.
#[derive(Debug, Default)]
pub(crate) struct Ignored {
    patterns: Vec<Pattern>,
}

#[derive(Debug)]
struct Pattern {
    parts: Vec<String>,
    /// `!`: what fits is sent after all.
    but: bool,
}

impl Ignored {
    /// Reads patterns, one a line.
    pub(crate) fn parse(text: &str) -> Self {
        let mut patterns = Vec::new();
        for line in text.trim_start_matches('\u{feff}').lines() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (but, pattern) = match line.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, line),
            };
            let mut parts: Vec<String> = Vec::new();
            for part in pattern.split('/') {
                match part {
                    "" | "." => {}
                    ".." => {
                        parts.pop();
                    }
                    part => parts.push(part.to_owned()),
                }
            }
            if !parts.is_empty() {
                patterns.push(Pattern { parts, but });
            }
        }
        Self { patterns }
    }

    /// Is this path, relative to the folder, left out?
    pub(crate) fn leaves_out(&self, path: &Path) -> bool {
        let parts: Vec<String> =
            path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
        let mut out = false;
        for pattern in &self.patterns {
            // A pattern that fits a folder fits all that is in it.
            if pattern.but == out && (1..=parts.len()).any(|length| fits(&pattern.parts, &parts[..length])) {
                out = !pattern.but;
            }
        }
        out
    }

    /// May something below a folder that is left out be sent after all?
    pub(crate) fn has_exceptions(&self) -> bool {
        self.patterns.iter().any(|pattern| pattern.but)
    }
}

fn fits(pattern: &[String], path: &[String]) -> bool {
    match pattern.split_first() {
        None => path.is_empty(),
        Some((first, rest)) if first == "**" => (0..=path.len()).any(|skipped| fits(rest, &path[skipped..])),
        Some((first, rest)) => match path.split_first() {
            Some((name, below)) => {
                let (first, name): (Vec<char>, Vec<char>) = (first.chars().collect(), name.chars().collect());
                part_fits(&first, &name) && fits(rest, below)
            }
            None => false,
        },
    }
}

/// `*`, `?`, `[a-z]`, `[^a]`, `\x`.
fn part_fits(pattern: &[char], name: &[char]) -> bool {
    match pattern {
        [] => name.is_empty(),
        ['*', rest @ ..] => (0..=name.len()).any(|skipped| part_fits(rest, &name[skipped..])),
        ['?', rest @ ..] => name.split_first().is_some_and(|(_, name)| part_fits(rest, name)),
        ['\\', letter, rest @ ..] => {
            name.split_first().is_some_and(|(first, name)| first == letter && part_fits(rest, name))
        }
        ['[', rest @ ..] => {
            let Some(end) = rest.iter().skip(1).position(|letter| *letter == ']').map(|end| end + 1) else {
                return false;
            };
            let Some((first, name)) = name.split_first() else { return false };
            let (not, set) = match &rest[..end] {
                ['^', set @ ..] => (true, set),
                set => (false, set),
            };
            let mut found = false;
            let mut index = 0;
            while index < set.len() {
                if let [from, '-', to, ..] = &set[index..] {
                    found |= (from..=to).contains(&first);
                    index += 3;
                } else {
                    found |= set[index] == *first;
                    index += 1;
                }
            }
            found != not && part_fits(&rest[end + 1..], name)
        }
        [letter, rest @ ..] => {
            name.split_first().is_some_and(|(first, name)| first == letter && part_fits(rest, name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pattern_that_fits_decides() {
        let ignored =
            Ignored::parse("# comment\n*.md\n!README.md\n/target\n**/cache\ndocs/*.[ch]\na?c\n./x/../y\n");
        let out = |path: &str| ignored.leaves_out(Path::new(path));
        for path in ["NOTES.md", "target", "target/debug/x", "cache", "a/b/cache/c", "docs/x.c", "abc", "y"] {
            assert!(out(path), "{path}");
        }
        for path in ["README.md", "sub/NOTES.md", "docs/x.d", "src/target", "ac", "x"] {
            assert!(!out(path), "{path}");
        }
        assert!(ignored.has_exceptions());
        assert!(!Ignored::parse("").leaves_out(Path::new("x")));
    }
}
