//! Variables and labels, from options and files.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Longest file of variables or labels, in bytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// The variables of files, then those of options. One without a value takes ours; one that we don't have is left out.
pub(crate) fn environment(files: &[PathBuf], options: &[String]) -> Result<Vec<String>, String> {
    let mut variables = Vec::new();
    for file in files {
        for line in lines(file)? {
            if line.split('=').next().is_none_or(|name| name.is_empty() || name.contains(char::is_whitespace))
            {
                return Err(format!("{}: {line:?} names no variable", file.display()));
            }
            variables.extend(with_value(&line));
        }
    }
    for option in options {
        if option.is_empty() || option.starts_with('=') {
            return Err(format!("{option:?} names no variable"));
        }
        // One without a value that we don't have removes the image's.
        variables.push(with_value(option).unwrap_or_else(|| option.clone()));
    }
    Ok(variables)
}

fn with_value(text: &str) -> Option<String> {
    if text.contains('=') {
        return Some(text.to_owned());
    }
    std::env::var(text).ok().map(|value| format!("{text}={value}"))
}

/// The labels of files, then those of options.
pub(crate) fn labels(files: &[PathBuf], options: &[String]) -> Result<Map<String, Value>, String> {
    let mut labels = Map::new();
    for file in files {
        labels.extend(pairs(&lines(file)?));
    }
    labels.extend(pairs(options));
    if labels.contains_key("") { Err("a label has a name".to_owned()) } else { Ok(labels) }
}

/// `NAME=VALUE`, each; without a value it is empty.
pub(crate) fn pairs(texts: &[String]) -> Map<String, Value> {
    let pair = |text: &String| {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        (name.to_owned(), value.into())
    };
    texts.iter().map(pair).collect()
}

/// The lines of a file that are neither empty nor comments.
fn lines(path: &Path) -> Result<Vec<String>, String> {
    let failed = |error: std::io::Error| format!("can't read {}: {error}", path.display());
    if fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
        return Err(format!("{} is too long", path.display()));
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim_start);
    Ok(lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_first_and_comments_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("env");
        fs::write(&file, "# comment\n\n  A=1\nB=x y\nNOT_SET_ANYWHERE\n").unwrap();
        let variables = environment(&[file], &["A=2".into(), "NOT_SET_EITHER".into()]).unwrap();
        assert_eq!(variables, ["A=1", "B=x y", "A=2", "NOT_SET_EITHER"]);
    }

    #[test]
    fn what_names_no_variable_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("env");
        fs::write(&file, "A B=1\n").unwrap();
        assert!(environment(&[file], &[]).is_err());
        assert!(environment(&[], &["=1".into()]).is_err());
        assert!(environment(&[folder.path().join("none")], &[]).is_err());
        assert!(labels(&[], &["=x".into()]).is_err());
    }
}
