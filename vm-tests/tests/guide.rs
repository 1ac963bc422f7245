//! The guide's examples, run as they stand: docs/GUIDE.md. `make test` runs what a newcomer tries first,
//! `scripts/test-long guide` all of it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use dormouse_api::SessionInfo;
use dormouse_vm_tests::project;
use dormouse_vm_tests::stage::{Stage, program};

/// The section that `make test` runs.
const FIRST: &str = "Your first container";

/// A section of the guide.
#[derive(Debug, Default, PartialEq, Eq)]
struct Section {
    title: String,
    /// Files that it shows, by their names.
    files: Vec<(String, String)>,
    examples: Vec<Example>,
}

/// A command, and what it is said to print.
#[derive(Debug, Default, PartialEq, Eq)]
struct Example {
    /// Where it stands, from 1.
    line: usize,
    command: String,
    prints: Vec<String>,
}

/// Takes a guide apart. Whatever looks like an example has to be one.
fn sections(text: &str) -> Result<Vec<Section>> {
    let mut sections: Vec<Section> = Vec::new();
    let mut lines = (1..).zip(text.lines());
    while let Some((number, line)) = lines.next() {
        if let Some(title) = line.strip_prefix("## ") {
            sections.push(Section { title: title.to_owned(), ..Section::default() });
        }
        let Some(kind) = line.strip_prefix("```") else { continue };
        let section = sections.last_mut().with_context(|| format!("line {number}: no section"))?;
        let inside = lines.by_ref().take_while(|(_, line)| *line != "```");
        if kind == "console" {
            for (number, line) in inside {
                match (line.strip_prefix("$ "), section.examples.last_mut()) {
                    (Some(command), _) => {
                        let (command, prints) = (command.to_owned(), Vec::new());
                        section.examples.push(Example { line: number, command, prints });
                    }
                    (None, Some(example)) => example.prints.push(line.trim_end().to_owned()),
                    (None, None) => anyhow::bail!("line {number}: nothing prints this"),
                }
            }
        } else {
            let name = kind.split_once(" file=").map(|(_, name)| name.to_owned());
            let name =
                name.with_context(|| format!("line {number}: what isn't run is a file with a name"))?;
            let content = inside.map(|(_, line)| format!("{line}\n")).collect();
            section.files.push((name, content));
        }
    }
    Ok(sections)
}

/// Is this what is said to be printed? `...` alone is any lines, within a line any letters.
fn fits(said: &[String], printed: &[&str]) -> bool {
    match (said.split_first(), printed.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first == "..." => {
            fits(rest, printed) || (!printed.is_empty() && fits(said, &printed[1..]))
        }
        (Some((first, rest)), Some((line, printed))) => {
            line_fits(first, line.trim_end()) && fits(rest, printed)
        }
        _ => false,
    }
}

fn line_fits(said: &str, printed: &str) -> bool {
    match said.split_once("...") {
        None => said == printed,
        Some((before, after)) => printed.strip_prefix(before).is_some_and(|rest| {
            rest.char_indices().any(|(start, _)| line_fits(after, &rest[start..])) || line_fits(after, "")
        }),
    }
}

/// A home with a session that has an image, and a folder that one works in.
struct Reader {
    stage: Stage,
    session: SessionInfo,
    folder: tempfile::TempDir,
}

impl Reader {
    async fn new(stage: Stage) -> Result<Self> {
        let session: SessionInfo =
            stage.service().call(http::Method::POST, "/v1/sessions/default/open", &()).await?;
        stage.load_busybox(&session).await?;
        // Not in Dormouse's own folder: of that nothing is shared.
        let folder = tempfile::Builder::new().prefix("guide").tempdir()?;
        fs::create_dir(folder.path().join("bin"))?;
        for (name, program) in [("dorm", program("dorm")), ("docker", project().join("build/clients/docker"))]
        {
            symlink(program, folder.path().join("bin").join(name))?;
        }
        Ok(Self { stage, session, folder })
    }

    fn out(&self, what: &str, index: usize) -> PathBuf {
        self.folder.path().join(format!("{what}.{index}"))
    }

    /// One shell runs all of a section, as its reader does: what a command says goes to files of its own.
    fn script(&self, section: &Section) -> String {
        let mut script = String::new();
        for (index, example) in section.examples.iter().enumerate() {
            let [out, err, code] =
                ["out", "err", "code"].map(|what| self.out(what, index).display().to_string());
            script += &format!("exec > {out} 2> {err}\n{}\necho $? > {code}\n", example.command);
        }
        script
    }

    /// Runs a section, and tells what is not as it says.
    async fn run(&self, section: &Section) -> Result<()> {
        let work = self.folder.path().join("work");
        for (name, content) in &section.files {
            let path = work.join(name);
            fs::create_dir_all(path.parent().context("a folder")?)?;
            fs::write(path, content)?;
        }
        fs::create_dir_all(&work)?;
        let mut shell = Command::new("sh");
        let path = std::env::var("PATH").unwrap_or_default();
        shell
            .args(["-c", &self.script(section)])
            .current_dir(&work)
            .env("PATH", format!("{}:{path}", self.folder.path().join("bin").display()))
            .env("DORM_HOME", self.stage.home())
            .env("DOCKER_CONFIG", self.stage.home().join("docker-config"))
            .env_remove("DOCKER_HOST")
            .env_remove("DORM_SESSION")
            .stdin(Stdio::null());
        let begun = std::time::Instant::now();
        self.stage.finish(&self.session, shell).await?;
        println!("figure: {} = {} ms", section.title, begun.elapsed().as_millis());
        for (index, example) in section.examples.iter().enumerate() {
            let read = |what| fs::read_to_string(self.out(what, index)).unwrap_or_default();
            let (mut printed, error, code) = (read("out"), read("err"), read("code"));
            // Who fails says why, and that is what one sees.
            if code != "0\n" {
                printed += &error;
            }
            ensure!(
                fits(&example.prints, &printed.lines().collect::<Vec<_>>()),
                "docs/GUIDE.md, line {}: {}\n-- says\n{}\n-- prints, and ends with {code}{printed}-- beside it\n{error}\n{}",
                example.line,
                example.command,
                example.prints.join("\n"),
                self.stage.logs(&self.session)
            );
        }
        println!("test {} ... ok", section.title.to_lowercase().replace([' ', ','], "_"));
        Ok(())
    }
}

fn guide() -> Result<Vec<Section>> {
    sections(&fs::read_to_string(project().join("docs/GUIDE.md"))?)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_guide_tells_a_newcomer_is_so() -> Result<()> {
    let reader = Reader::new(Stage::new()?).await?;
    let sections = guide()?;
    let first = sections.iter().find(|section| section.title == FIRST);
    reader.run(first.with_context(|| format!("the guide has no section {FIRST:?}"))?).await
}

#[cfg(feature = "long")]
#[tokio::test(flavor = "multi_thread")]
async fn all_that_the_guide_tells_is_so() -> Result<()> {
    use dormouse_vm_tests::in_network_namespace;
    use dormouse_vm_tests::registry::{Registry, give_host_an_address};
    use dormouse_vm_tests::remote::{Docker, Remote};

    if in_network_namespace("all_that_the_guide_tells_is_so")? {
        return Ok(());
    }
    give_host_an_address()?;
    let certificates = tempfile::tempdir()?;
    let _registry = Registry::start_signed(certificates.path())?;
    let reader = Reader::new(Stage::with(&[("DORM_NETWORK", "passt".into())])?).await?;
    fs::create_dir_all(reader.folder.path().join("work"))?;
    let company = reader.folder.path().join("work/company.pem");
    fs::copy(certificates.path().join("authority.pem"), company)?;
    let remote = Remote::new(&reader.stage, Docker::Own)?;
    symlink(remote.programs().join("ssh"), reader.folder.path().join("bin/ssh"))?;
    for section in guide()?.iter().filter(|section| !section.examples.is_empty()) {
        reader.run(section).await?;
    }
    Ok(())
}

#[test]
fn an_example_that_prints_something_else_is_seen() {
    let text = "# Guide\n\n## One\n\n```yaml file=a/b.yaml\nx: 1\n```\n\n```console\n$ one\nfirst\n...\n$ two\n```\n";
    let found = sections(text).unwrap();
    assert_eq!(found[0].files, [("a/b.yaml".to_owned(), "x: 1\n".to_owned())]);
    let example = |line, command: &str, prints: &[&str]| Example {
        line,
        command: command.to_owned(),
        prints: prints.iter().map(|line| (*line).to_owned()).collect(),
    };
    assert_eq!(found[0].examples, [example(10, "one", &["first", "..."]), example(13, "two", &[])]);
    let said = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    for (expected, printed, is_so) in [
        (&["a"][..], &["a"][..], true),
        (&["a"], &["a  "], true),
        (&["a"], &["b"], false),
        (&["a"], &[], false),
        (&[], &["a"], false),
        (&["..."], &[], true),
        (&["...", "c"], &["a", "b", "c"], true),
        (&["...", "c"], &["a", "b"], false),
        (&["a ... c ..."], &["a b c d"], true),
        (&["a...c"], &["abcd"], false),
        (&["held: ... of x"], &["held: container of x"], true),
    ] {
        assert_eq!(fits(&said(expected), printed), is_so, "{expected:?} {printed:?}");
    }
    for bad in ["```console\n$ x\n```", "## One\n```console\nx\n```", "## One\n```text\nx\n```"] {
        assert!(sections(bad).is_err(), "{bad}");
    }
}
