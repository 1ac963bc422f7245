//! A project as Docker's documentation teaches it: a page and a program that are served from the folder in which they are
//! written, a database beside it, one `compose.yaml`. `scripts/test-long compose`.
#![cfg(feature = "long")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::{How, Phase};
use dormouse_vm_tests::desk::Desk;
use dormouse_vm_tests::stage::{STATE_WITHIN, fall_asleep, inspect};
use dormouse_vm_tests::{figure, project};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const COMPOSE: &str = r#"
services:
  web:
    build: .
    command: busybox httpd -f -p 8000 -h /code
    ports: ["8000"]
    volumes: [".:/code"]
    environment:
      DB: host=db user=postgres dbname=postgres
    depends_on:
      db:
        condition: service_healthy
  db:
    image: postgresql
    command: ["sh", "/initialize"]
    volumes:
      - data:/data
      - ./initialize:/initialize:ro
    healthcheck:
      test: ["CMD", "pg_isready", "--host=127.0.0.1", "--username=postgres"]
      interval: 2s
      timeout: 30s
      retries: 100
volumes:
  data:
"#;

const DOCKERFILE: &str = "\
FROM postgresql
COPY --from=busybox /bin/busybox /usr/bin/busybox
";

/// What the image of a database does when it is started.
const INITIALIZE: &str = r#"set -e
chown postgres /data
exec chroot --userspec=postgres:postgres / sh -c '
set -e
cd /data
[ -d pg ] || { initdb --pgdata=new --auth=trust --locale=C --encoding=UTF8; echo "host all all all trust" >> new/pg_hba.conf; mv new pg; }
exec postgres -D pg -c listen_addresses=* -c shared_buffers=16MB -c unix_socket_directories=/tmp'
"#;

/// Counts who looks.
const COUNT: &str = r#"#!/bin/sh
printf 'Content-Type: text/plain\r\n\r\n'
psql -qAt "$DB" -c "set client_min_messages to error; create table if not exists looks (at timestamptz default now());
    insert into looks default values; select count(*) from looks"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_project_of_a_page_a_database_and_a_mounted_source_works_and_goes_on_after_a_sleep() -> Result<()> {
    let desk = Desk::new().await?;
    let image = project().join("build/postgresql.tar");
    let path = "ENV PATH=/usr/lib/postgresql/17/bin:/usr/sbin:/usr/bin";
    let import = ["import", "--change", path, image.to_str().context("paths are UTF-8")?, "postgresql"];
    desk.succeed(&import).await.context("run scripts/postgresql-image build/postgresql.tar")?;
    for (name, content) in [
        ("compose.yaml", COMPOSE),
        ("Dockerfile", DOCKERFILE),
        ("initialize", INITIALIZE),
        ("index.html", "first\n"),
    ] {
        fs::write(desk.home.path().join("src").join(name), content)?;
    }
    desk.make_folder("src/cgi-bin")?;
    fs::write(desk.at("src/cgi-bin/count"), COUNT)?;
    fs::set_permissions(desk.at("src/cgi-bin/count"), fs::Permissions::from_mode(0o755))?;
    goes_on(&desk).await.with_context(|| desk.stage.logs(&desk.session))
}

/// Compose, in the project's folder.
async fn compose(desk: &Desk, arguments: &[&str]) -> Result<String> {
    let mut compose = desk.stage.docker(&desk.session, &["compose", "--ansi", "never"]);
    compose.args(arguments).current_dir(desk.at("src"));
    desk.stage.succeeds(&desk.session, compose).await
}

/// What the page at this path says, by whatever port it is published at.
async fn page(desk: &Desk, path: &str) -> Result<String> {
    let port = compose(desk, &["port", "web", "8000"]).await?;
    let port = port.trim().rsplit_once(':').context("an address and a port")?.1.to_owned();
    let asking = async {
        loop {
            let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).await?;
            stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
            let mut answer = String::new();
            // A container runs before its program listens: then the connection just ends.
            match stream.read_to_string(&mut answer).await {
                Ok(0) | Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                Ok(_) => return Ok::<_, anyhow::Error>(answer),
            }
        }
    };
    let answer = tokio::time::timeout(STATE_WITHIN, asking).await;
    let answer = answer.with_context(|| format!("{path} isn't answered"))??;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("it has no head: {answer}"))?;
    ensure!(head.starts_with("HTTP/1.0 200") || head.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(body.to_owned())
}

async fn goes_on(desk: &Desk) -> Result<()> {
    let begun = Instant::now();
    compose(desk, &["up", "--detach", "--build", "--quiet-pull"]).await?;
    figure("compose up --build of a page and a database", begun.elapsed());
    ensure!(page(desk, "/").await? == "first\n");
    ensure!(page(desk, "/cgi-bin/count").await? == "1\n");
    fs::write(desk.at("src/index.html"), "edited on the host\n")?;
    ensure!(page(desk, "/").await? == "edited on the host\n");
    println!("test what_is_edited_on_the_host_is_served ... ok");

    // What runs with a folder holds the VM; stopped it sleeps, and goes on.
    compose(desk, &["stop"]).await?;
    desk.taken_back().await?;
    fall_asleep(&desk.session).await?;
    fs::write(desk.at("src/index.html"), "edited while it slept\n")?;
    let listed = compose(desk, &["ps", "--all", "--services"]).await?;
    ensure!(listed.lines().count() == 2, "{listed}");
    ensure!(inspect(&desk.session).await?.vm.phase == Phase::Absent, "looking woke it");
    let begun = Instant::now();
    compose(desk, &["start"]).await?;
    figure("compose start of both, asleep", begun.elapsed());
    ensure!(inspect(&desk.session).await?.vm.how == Some(How::Resume));
    ensure!(page(desk, "/").await? == "edited while it slept\n");
    ensure!(page(desk, "/cgi-bin/count").await? == "2\n");
    println!("test after_a_sleep_the_project_goes_on ... ok");

    compose(desk, &["down", "--volumes"]).await?;
    desk.taken_back().await?;
    ensure!(desk.succeed(&["ps", "--all", "--quiet"]).await?.is_empty());
    ensure!(fs::read_to_string(desk.at("src/index.html"))? == "edited while it slept\n", "its folder stays");
    Ok(())
}
