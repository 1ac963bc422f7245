//! What developers do in their folders, in containers that have them: git, cargo and npm. `scripts/test-long trees`.
#![cfg(feature = "long")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_vm_tests::desk::{Desk, text};
use dormouse_vm_tests::{figure, project};

/// A compiler under emulation takes its time.
const DONE_WITHIN: Duration = Duration::from_secs(1200);

/// What the crate of `scripts/install-trees` prints.
const PRINTS: &str = "true 6 Some(2)\n";

/// Docker, with far more time than usual: gives all that it printed.
async fn docker(desk: &Desk, what: &str, arguments: &[&str]) -> Result<String> {
    let mut docker = tokio::process::Command::from(desk.stage.docker(&desk.session, arguments));
    let begun = Instant::now();
    let output = tokio::time::timeout(DONE_WITHIN, docker.kill_on_drop(true).output()).await;
    let output = output.with_context(|| format!("{what} hangs\n{}", desk.stage.logs(&desk.session)))??;
    let said = text(&output.stdout) + &text(&output.stderr);
    ensure!(output.status.success(), "{what}: {said}");
    figure(what, begun.elapsed());
    Ok(said)
}

/// Runs in a container that has the user's folder `src`, as the user, as people do who want their files to be theirs.
async fn in_a_container(desk: &Desk, what: &str, script: &str) -> Result<String> {
    let user = rustix::process::geteuid().as_raw();
    let (user, bind) = (format!("{user}:{user}"), format!("{}:/src", desk.at("src")));
    let run = ["run", "--rm", "--user", &user, "--env", "HOME=/tmp", "--env", "CARGO_HOME=/tmp/cargo"];
    let rest = ["--volume", &bind, "--workdir", "/src", "toolchains", "sh", "-ec", script];
    docker(desk, what, &[&run[..], &rest].concat()).await
}

/// Runs a program of the host's, and gives what it printed.
fn on_the_host(program: &str, arguments: &[&str], folder: &str) -> Result<String> {
    let output = Command::new(program).args(arguments).current_dir(folder).output()?;
    ensure!(output.status.success(), "{program} {arguments:?}: {output:?}");
    Ok(text(&output.stdout))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_developers_do_in_their_folders_is_done_in_containers_too() -> Result<()> {
    let desk = Desk::new().await?;
    let image = project().join("build/toolchains.tar");
    let image = image.to_str().context("paths are UTF-8")?;
    let path = "ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    let import = ["import", "--change", path, image, "toolchains"];
    docker(&desk, "docker import of 700 MB", &import).await.context("run scripts/install-trees")?;
    for name in ["crate.git", "package", "cache"] {
        let from = project().join("build/trees").join(name);
        let copied = Command::new("cp").arg("-a").arg(from).arg(desk.at("src")).status()?;
        ensure!(copied.success(), "run scripts/install-trees");
    }
    a_repository_is_cloned_and_its_crate_built(&desk).await?;
    a_package_is_installed(&desk).await
}

async fn a_repository_is_cloned_and_its_crate_built(desk: &Desk) -> Result<()> {
    in_a_container(desk, "git clone", "git clone --quiet crate.git work").await?;
    let work = desk.at("src/work");
    let (files, changed) = (
        on_the_host("git", &["ls-files"], &work)?.lines().count(),
        on_the_host("git", &["status", "--porcelain"], &work)?,
    );
    ensure!(files > 100 && changed.is_empty(), "{files} files, and to the host these are changed: {changed}");
    println!("figure: files of the repository = {files}");

    let build = "cd work && cargo build --offline --locked && target/debug/tree";
    let said = in_a_container(desk, "cargo build", build).await?;
    ensure!(said.contains(PRINTS) && said.contains("Compiling memchr"), "{said}");
    println!("test a_repository_is_cloned_and_its_crate_built ... ok");

    // What the host changes is built, and nothing else is: to cargo, times say what is new.
    let main = Path::new(&work).join("src/main.rs");
    let edited = fs::read_to_string(&main)?.replace("println!(\"", "println!(\"edited ");
    fs::write(&main, edited)?;
    let said = in_a_container(desk, "cargo build of what the host changed", build).await?;
    ensure!(said.contains(&format!("edited {PRINTS}")) && !said.contains("Compiling memchr"), "{said}");
    let said = in_a_container(desk, "cargo build of nothing new", build).await?;
    ensure!(!said.contains("Compiling"), "{said}");
    let changed = in_a_container(desk, "git status", "cd work && git status --porcelain").await?;
    ensure!(changed == " M src/main.rs\n", "{changed}");
    println!("test what_the_host_changed_is_built_and_nothing_else ... ok");
    Ok(())
}

async fn a_package_is_installed(desk: &Desk) -> Result<()> {
    let install = "cd package && npm ci --offline --no-audit --no-fund --cache ../cache";
    in_a_container(desk, "npm ci", install).await?;
    let uses = "cd package && node -e \"const _ = require('lodash'); require('express')(); \
                console.log(_.chunk([1, 2, 3], 2).length)\"";
    let said = in_a_container(desk, "node with what was installed", uses).await?;
    ensure!(said == "2\n", "{said}");
    let (here, there) = (project().join("build/trees/node_modules"), desk.at("src/package/node_modules"));
    let here = here.to_str().context("paths are UTF-8")?;
    on_the_host("diff", &["--recursive", "--no-dereference", here, &there], "/")?;
    let files = on_the_host("find", &[&there, "-type", "f"], "/")?.lines().count();
    println!("figure: files of the package = {files}");
    println!("test a_package_is_installed ... ok");
    Ok(())
}
