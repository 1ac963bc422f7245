//! Compose, with a project that stops, sleeps and starts again.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use dormouse_api::SessionInfo;
use dormouse_vm_tests::fetch;
use dormouse_vm_tests::stage::{Stage, fall_asleep};

use crate::Following;

const PROJECT: &str = "
services:
  web:
    image: busybox
    command: sh -c 'echo hello from web; mkdir -p /data; echo served > /data/index.html; exec httpd -f -p 80 -h /data'
    ports: ['80']
    networks: [inner]
    volumes: ['pages:/data']
    stop_grace_period: 1s
  other:
    image: busybox
    command: sh -c 'until wget -q -O - http://web/; do sleep 1; done; exec sleep 100000'
    depends_on: [web]
    networks: [inner]
    stop_grace_period: 1s
networks:
  inner: {}
volumes:
  pages: {}
";

fn compose(stage: &Stage, session: &SessionInfo, arguments: &[&str]) -> Result<Command> {
    let folder = stage.home().join("project");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("compose.yaml"), PROJECT)?;
    let mut command = stage.docker(session, &["compose", "--ansi", "never"]);
    command.args(arguments).current_dir(folder);
    Ok(command)
}

async fn composed(stage: &Stage, session: &SessionInfo, arguments: &[&str]) -> Result<String> {
    stage.succeeds(session, compose(stage, session, arguments)?).await
}

/// To the other service by the project's network, and to the host by a port that it published.
async fn is_served(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let asking = ["exec", "-T", "other", "wget", "-q", "-O", "-", "http://web/"];
    let page = composed(stage, session, &asking).await?;
    ensure!(page == "served\n", "{page}");
    let address = composed(stage, session, &["port", "web", "80"]).await?.trim().to_owned();
    ensure!(address.starts_with("127.0.0.1:"), "{address}");
    let page = tokio::task::spawn_blocking(move || fetch(&address)).await?;
    ensure!(page.as_ref().is_ok_and(|page| page.ends_with("served\n")), "{page:?}");
    Ok(())
}

pub(crate) async fn a_project_works_over_a_sleep(stage: &Stage, session: &SessionInfo) -> Result<()> {
    composed(stage, session, &["up", "--detach"]).await?;
    let follow = compose(stage, session, &["logs", "--follow", "--no-color", "web"])?;
    let mut logs = Following::of(follow).context("compose follows no logs")?;
    logs.heard("hello from web").await?;
    is_served(stage, session).await?;
    composed(stage, session, &["stop"]).await?;
    logs.ends().await?;
    fall_asleep(session).await?;
    composed(stage, session, &["start"]).await?;
    is_served(stage, session).await?;
    composed(stage, session, &["down", "--volumes"]).await?;
    for kind in ["volume", "network"] {
        let left = stage.succeed(session, &[kind, "ls", "--format", "{{.Name}}"]).await?;
        ensure!(!left.contains("pages") && !left.contains("inner"), "{left}");
    }
    Ok(())
}
