//! The Docker socket over TCP.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use dormouse_api::SessionInfo;
use dormouse_vm_tests::stage::{Stage, program};
use tokio::io::{AsyncBufReadExt, BufReader};

/// A certificate and its key, `NAME.pem` and `NAME-key.pem`, signed by `ca`, or by itself without one.
fn certificate(folder: &Path, name: &str, ca: Option<&str>) -> Result<()> {
    let file = |name: &str| folder.join(format!("{name}.pem"));
    let mut openssl = Command::new("openssl");
    openssl.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]);
    openssl.args(["-subj", &format!("/CN={name}"), "-addext", "subjectAltName=IP:127.0.0.1"]);
    openssl.arg("-out").arg(file(name)).arg("-keyout").arg(file(&format!("{name}-key")));
    if let Some(ca) = ca {
        openssl.args(["-addext", "basicConstraints=critical,CA:FALSE", "-CA"]).arg(file(ca));
        openssl.arg("-CAkey").arg(file(&format!("{ca}-key")));
    }
    let output = openssl.output().context("can't run openssl")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

pub(crate) async fn only_clients_with_a_certificate_are_served(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    let folder = stage.home().join("tls");
    std::fs::create_dir(&folder)?;
    for (name, ca) in [
        ("ca", None),
        ("server", Some("ca")),
        ("client", Some("ca")),
        ("other", None),
        ("stranger", Some("other")),
    ] {
        certificate(&folder, name, ca)?;
    }
    let file = |name: &str| folder.join(format!("{name}.pem"));
    let mut listen = Command::new(program("dorm"));
    listen.args(["docker-listen", "127.0.0.1:0", "--tlscacert"]).arg(file("ca"));
    listen.arg("--tlscert").arg(file("server")).arg("--tlskey").arg(file("server-key"));
    listen.env("DORM_HOME", stage.home()).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut listening = tokio::process::Command::from(listen).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(listening.stdout.take().context("a pipe")?).lines();
    let host = lines.next_line().await?.context("it says where it listens")?;
    let docker = |name: Option<&str>, arguments: &[&str]| {
        let mut docker = stage.docker(session, &["--tlsverify", "--tlscacert"]);
        docker.arg(file("ca")).env("DOCKER_HOST", &host).env("DOCKER_CERT_PATH", &folder);
        if let Some(name) = name {
            docker.arg("--tlscert").arg(file(name)).arg("--tlskey").arg(file(&format!("{name}-key")));
        }
        docker.args(arguments);
        docker
    };
    // Its end of the input is seen at the other side, and what comes back after that is whole.
    let mut copying =
        docker(Some("client"), &["run", "--rm", "-i", "busybox", "sh", "-c", "md5sum; echo end"]);
    let mut copying = copying.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = copying.stdin.take().context("a pipe")?;
    tokio::task::block_in_place(|| input.write_all(&vec![b'x'; 1 << 20]))?;
    drop(input);
    let output = tokio::task::spawn_blocking(move || copying.wait_with_output()).await??;
    let said = String::from_utf8(output.stdout)?;
    ensure!(output.status.success() && said == "b561f87202d04959e37588ee05cf5b10  -\nend\n", "{said}");
    for stranger in [Some("stranger"), None] {
        let refused = stage.finish(session, docker(stranger, &["ps"])).await?;
        ensure!(!refused.status.success() && refused.stdout.is_empty(), "{stranger:?}: {refused:?}");
    }
    listening.kill().await?;
    Ok(())
}
