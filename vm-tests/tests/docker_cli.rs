//! Every command of `docker --help` that isn't swarm's, with the VM awake and with the VM asleep before each:
//! `scripts/test-long docker-cli`.
#![cfg(feature = "long")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use dormouse_api::{CreateSession, IdleTimeout, RunningContainers, SessionInfo};
use dormouse_vm_tests::registry::{Registry, give_host_an_address};
use dormouse_vm_tests::stage::{Stage, fall_asleep};
use dormouse_vm_tests::{in_network_namespace, project};

/// What a line comes to.
#[derive(Debug, Clone, Copy)]
enum Comes {
    /// It succeeds, and prints this somewhere.
    To(&'static str),
    /// It fails, with this somewhere in what it says: what this engine, or this machine, has not.
    ToGrief(&'static str),
}

use Comes::{To, ToGrief};

/// Lines for a shell, in order: later ones need earlier ones. `$R` is the registry.
const LINES: &[(&str, Comes)] = &[
    ("docker version --format '{{.Server.Version}}'", To("26.1")),
    ("docker info --format '{{.OSType}} {{.RegistryConfig.Mirrors}}'", To("linux [http://192.0.2.7:5000/]")),
    ("docker system info --format '{{.OSType}}'", To("linux")),
    // Images and the registry.
    ("docker pull --quiet busybox", To("docker.io/library/busybox:latest")),
    ("docker image pull --quiet alpine:3.10", To("docker.io/library/alpine:3.10")),
    ("docker images --format '{{.Repository}}'", To("busybox")),
    ("docker image ls --quiet busybox", To("")),
    ("docker search busybox", ToGrief("Error response from daemon")),
    ("docker login --username me --password-stdin \"$R\" < word", To("Login Succeeded")),
    ("docker tag busybox \"$R/mine/one\"", To("")),
    ("docker image tag busybox \"$R/mine/two\"", To("")),
    ("docker push --quiet \"$R/mine/one\"", To("/mine/one")),
    ("docker image push --quiet \"$R/mine/two\"", To("/mine/two")),
    ("docker logout \"$R\"", To("Removing login credentials")),
    ("docker manifest inspect --insecure \"$R/mine/one\"", To("schemaVersion")),
    ("docker manifest create --insecure \"$R/mine/list\" \"$R/mine/one\"", To("Created manifest list")),
    ("docker manifest annotate \"$R/mine/list\" \"$R/mine/one\" --arch amd64", To("")),
    ("docker manifest push --purge --insecure \"$R/mine/list\"", To("sha256:")),
    ("docker manifest create --insecure \"$R/mine/gone\" \"$R/mine/one\"", To("Created manifest list")),
    ("docker manifest rm \"$R/mine/gone\"", To("")),
    ("docker history --quiet busybox", To("")),
    ("docker image history --quiet busybox", To("")),
    ("docker image inspect --format '{{.Os}}' busybox", To("linux")),
    ("docker save --output saved.tar alpine:3.10 && tar --list --file saved.tar", To("manifest.json")),
    ("docker image save busybox | tar --list", To("manifest.json")),
    ("docker rmi alpine:3.10", To("Untagged: alpine:3.10")),
    ("docker load --quiet --input saved.tar", To("Loaded image: alpine:3.10")),
    ("docker image load < saved.tar", To("Loaded image: alpine:3.10")),
    ("docker image rm \"$R/mine/two\"", To("Untagged")),
    // Containers.
    ("docker run --rm busybox echo hello", To("hello\n")),
    ("docker container run --rm busybox sh -c 'exit 7' || echo status $?", To("status 7\n")),
    ("docker create --name made busybox echo started", To("")),
    ("docker container create --name other busybox true", To("")),
    ("docker start --attach made", To("started\n")),
    ("docker container start --attach made", To("started\n")),
    (
        "docker run --detach --name long --publish 80 busybox sh -c 'trap \"exit 0\" TERM; echo up; while :; do sleep 1; done'",
        To(""),
    ),
    ("docker ps --format '{{.Names}}'", To("long\n")),
    ("docker container ls --all --format '{{.Names}}'", To("made\n")),
    ("docker exec long echo within", To("within\n")),
    ("docker container exec long sh -c 'exit 9' || echo status $?", To("status 9\n")),
    ("docker logs long", To("up\n")),
    ("docker container logs long", To("up\n")),
    ("docker top long", To("sleep")),
    ("docker container top long -o pid,args", To("PID")),
    ("docker stats --no-stream --format '{{.Name}}' long", To("long\n")),
    ("docker container stats --no-stream --format '{{.Name}}' long", To("long\n")),
    ("docker cp word long:/word && docker cp long:/word - | tar --extract --to-stdout", To("secret")),
    ("docker container cp long:/word back && cat back", To("secret")),
    ("docker diff long", To("A /word")),
    ("docker container diff long", To("A /word")),
    ("docker commit long committed", To("sha256:")),
    ("docker container commit long committed", To("sha256:")),
    ("docker inspect --format '{{.State.Status}}' long", To("running\n")),
    ("docker container inspect --format '{{.Name}}' long", To("/long\n")),
    ("docker pause long", To("long\n")),
    ("docker unpause long", To("long\n")),
    ("docker container pause long", To("long\n")),
    ("docker container unpause long", To("long\n")),
    ("docker port long 80/tcp", To("127.0.0.1:")),
    ("docker container port long", To("80/tcp ->")),
    ("docker rename long renamed", To("")),
    ("docker container rename renamed long", To("")),
    ("docker update --memory 96m --memory-swap 96m long", To("long\n")),
    ("docker container update --cpu-shares 512 long", To("long\n")),
    ("docker restart --time 5 long", To("long\n")),
    ("docker container restart --time 5 long", To("long\n")),
    ("docker stop --time 5 long", To("long\n")),
    ("docker start long && docker container stop --time 5 long", To("long\n")),
    ("docker start long && docker kill long", To("long\n")),
    ("docker start long && docker container kill --signal KILL long", To("long\n")),
    ("docker export long | tar --list", To("bin/busybox")),
    ("docker container export --output exported.tar long && tar --list --file exported.tar", To("word")),
    ("docker import exported.tar imported", To("sha256:")),
    ("docker image import - imported < exported.tar", To("sha256:")),
    ("docker run --detach --name three busybox sh -c 'exit 3' && docker wait three", To("3\n")),
    ("docker container wait three", To("3\n")),
    ("docker run --detach --interactive --name once busybox head -n 1", To("")),
    // The pipe stays open until all was heard: the engine ends an attached stream with its input.
    (
        ": > out; (echo through; until grep -q through out; do sleep 0.1; done) | docker attach once | tee out",
        To("through\n"),
    ),
    ("docker start once", To("once\n")),
    (
        ": > out; (echo again; until grep -q again out; do sleep 0.1; done) | docker container attach once | tee out",
        To("again\n"),
    ),
    ("docker rm once three", To("once\nthree\n")),
    ("docker container rm other", To("other\n")),
    (
        "docker events --since 0 --until \"$(date +%s)\" --filter type=image --format '{{.Action}}'",
        To("pull\n"),
    ),
    (
        "docker system events --since 0 --until \"$(date +%s)\" --filter type=container --format '{{.Action}}'",
        To("die\n"),
    ),
    // Builds.
    ("docker build --quiet --tag built folder", To("sha256:")),
    ("DOCKER_BUILDKIT=0 docker image build --quiet --tag built folder", To("sha256:")),
    ("docker buildx ls", To("default")),
    ("docker buildx du", To("Total:")),
    ("docker builder prune --force", To("Total")),
    (
        "docker compose --project-name p --file folder/compose.yaml up --detach && docker compose ls --quiet",
        To("p\n"),
    ),
    ("docker compose --project-name p --file folder/compose.yaml down --timeout 1", To("")),
    // Networks and volumes.
    ("docker network create net", To("")),
    ("docker network ls --format '{{.Name}}'", To("net\n")),
    ("docker network connect net long", To("")),
    ("docker network inspect --format '{{.Name}}' net", To("net\n")),
    ("docker network disconnect net long", To("")),
    ("docker network rm net", To("net\n")),
    ("docker network create other && docker network prune --force", To("other\n")),
    ("docker volume create things", To("things\n")),
    ("docker volume ls --quiet", To("things\n")),
    ("docker volume inspect --format '{{.Driver}}' things", To("local\n")),
    ("docker volume update --availability drain things", ToGrief("cluster volumes")),
    ("docker volume rm things", To("things\n")),
    ("docker volume prune --force", To("Total reclaimed space")),
    // A plugin that does nothing: what needs one that works fails, as it does with any engine.
    ("docker plugin create \"$R/mine/plugin\" plugin", To("/mine/plugin\n")),
    ("docker plugin ls --format '{{.Name}}'", To("/mine/plugin:latest\n")),
    ("docker plugin inspect --format '{{.Enabled}}' \"$R/mine/plugin\"", To("false\n")),
    ("docker plugin set \"$R/mine/plugin\" WORD=other", To("")),
    ("docker plugin push \"$R/mine/plugin\"", To("Upload complete")),
    ("docker plugin upgrade --grant-all-permissions \"$R/mine/plugin\"", To("Upgraded plugin")),
    ("docker plugin enable --timeout 1 \"$R/mine/plugin\"", ToGrief("Error response from daemon")),
    ("docker plugin disable \"$R/mine/plugin\"", ToGrief("is already disabled")),
    ("docker plugin rm \"$R/mine/plugin\"", To("/mine/plugin")),
    ("docker plugin install --disable --grant-all-permissions \"$R/mine/plugin\"", To("Installed plugin")),
    ("docker plugin rm \"$R/mine/plugin\"", To("/mine/plugin")),
    // What only an engine with another configuration can, or Docker's own servers.
    ("docker checkpoint ls long", ToGrief("experimental")),
    ("docker trust inspect busybox", ToGrief("")),
    // Contexts are the client's own.
    ("docker context create elsewhere --docker \"host=$DOCKER_HOST\"", To("elsewhere")),
    ("docker context ls --format '{{.Name}}'", To("elsewhere\n")),
    ("docker context inspect --format '{{.Name}}' elsewhere", To("elsewhere\n")),
    ("docker context update elsewhere --description words", To("elsewhere")),
    ("env --unset=DOCKER_HOST docker --context elsewhere ps --all --format '{{.Names}}'", To("long\n")),
    ("docker context export elsewhere there.dockercontext", To("")),
    ("docker context import copy there.dockercontext", To("copy")),
    ("env --unset=DOCKER_HOST docker context use copy", To("copy")),
    ("env --unset=DOCKER_HOST docker context show", To("copy\n")),
    (
        "env --unset=DOCKER_HOST docker context use default && docker context rm copy elsewhere",
        To("elsewhere\n"),
    ),
    ("rm there.dockercontext", To("")),
    // And away with it.
    ("docker system df", To("Images")),
    ("docker container prune --force", To("Total reclaimed space")),
    ("docker image prune --all --force", To("Total reclaimed space")),
    ("docker system prune --all --force --volumes", To("Total reclaimed space")),
];

/// Commands whose subcommands are all in the table; the others have some there.
const WHOLE: &[&str] =
    &["container", "context", "image", "manifest", "network", "plugin", "system", "volume"];

#[tokio::test(flavor = "multi_thread")]
async fn every_command_of_docker_does_what_it_does_awake_and_asleep() -> Result<()> {
    if in_network_namespace("every_command_of_docker_does_what_it_does_awake_and_asleep")? {
        return Ok(());
    }
    give_host_an_address()?;
    let (registry, stage) = (Registry::start()?, Stage::with(&[("DORM_NETWORK", "passt".into())])?);
    let mut wish = CreateSession::named("default".parse()?);
    wish.idle_timeout = IdleTimeout::Never;
    wish.running = RunningContainers::Suspend;
    wish.registries.mirrors = vec![registry.mirror()];
    wish.registries.insecure = vec![registry.name()];
    let session = stage.make(&wish).await?;
    let shell =
        Shell { stage: &stage, session: &session, folder: prepare(stage.home())?, registry: registry.name() };
    shell.misses_none().await?;
    let mut failed = shell.all(false).await?;
    failed.extend(shell.all(true).await?);
    ensure!(failed.is_empty(), "{failed:#?}\n{}", stage.logs(&session));
    Ok(())
}

fn prepare(home: &Path) -> Result<PathBuf> {
    let folder = home.join("work");
    std::fs::create_dir_all(folder.join("folder"))?;
    std::fs::create_dir_all(folder.join("plugin/rootfs"))?;
    std::fs::write(folder.join("word"), "secret\n")?;
    std::fs::write(folder.join("folder/Dockerfile"), "FROM busybox\nRUN echo built > /built\n")?;
    let compose = "services: { one: { image: busybox, command: sleep 1000 } }\n";
    std::fs::write(folder.join("folder/compose.yaml"), compose)?;
    let plugin = serde_json::json!({
        "description": "nothing", "documentation": "", "entrypoint": ["/nothing"],
        "interface": { "types": ["docker.volumedriver/1.0"], "socket": "nothing.sock" },
        "env": [{ "name": "WORD", "settable": ["value"], "value": "word" }],
        "network": { "type": "none" }, "linux": { "capabilities": [] },
    });
    std::fs::write(folder.join("plugin/config.json"), plugin.to_string())?;
    Ok(folder)
}

struct Shell<'a> {
    stage: &'a Stage,
    session: &'a SessionInfo,
    folder: PathBuf,
    registry: String,
}

impl Shell<'_> {
    async fn run(&self, line: &str) -> Result<(bool, String)> {
        let docker = self.stage.docker(self.session, &[]);
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).current_dir(&self.folder).stdin(Stdio::null());
        shell.envs(docker.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let path = std::env::var("PATH").unwrap_or_default();
        shell.env("PATH", format!("{}:{path}", project().join("build/clients").display()));
        shell.env("R", &self.registry);
        let output = self.stage.finish(self.session, shell).await?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
    }

    /// Tries each line, and tells those that didn't come to what they should.
    async fn all(&self, asleep: bool) -> Result<Vec<String>> {
        let mut failed = Vec::new();
        for (line, comes) in LINES {
            if asleep {
                fall_asleep(self.session).await?;
            }
            let (succeeded, said) = self.run(line).await?;
            let is_well = match comes {
                To(words) => succeeded && said.contains(words),
                ToGrief(words) => !succeeded && said.contains(words),
            };
            let mode = if asleep { "asleep" } else { "awake" };
            let outcome = if is_well { "ok" } else { "FAILED" };
            let name = commands(line).first().map_or_else(|| "shell".to_owned(), |words| words.join("_"));
            println!("test {mode}::{name} ... {outcome}");
            if !is_well {
                println!("{line}: {said}");
                failed.push(format!("{mode}: {line}: {said}"));
            }
        }
        Ok(failed)
    }

    /// The table has every command that the client's help has, but for swarm's.
    async fn misses_none(&self) -> Result<()> {
        let known: BTreeSet<Vec<&str>> = LINES.iter().flat_map(|(line, _)| commands(line)).collect();
        let (_, help) = self.run("docker --help").await?;
        let all = listed(&help, "Swarm Commands:");
        ensure!(all.len() > 40, "{help}");
        for name in all {
            ensure!(known.iter().any(|words| words[0] == name), "no line tries docker {name}");
        }
        for group in WHOLE {
            let (_, help) = self.run(&format!("docker {group} --help")).await?;
            let subcommands = listed(&help, "Swarm Commands:");
            ensure!(subcommands.len() > 3, "{help}");
            for name in subcommands {
                let is_known = known.iter().any(|words| words.get(..2) == Some(&[*group, &name][..]));
                ensure!(is_known, "no line tries docker {group} {name}");
            }
        }
        Ok(())
    }
}

/// The commands that a help lists, outside of one of its sections.
fn listed(help: &str, without: &str) -> Vec<String> {
    let (mut names, mut section) = (Vec::new(), "");
    for line in help.lines() {
        if !line.starts_with(' ') {
            section = line;
        } else if section.ends_with("Commands:") && section != without {
            let name = line.split_whitespace().next().unwrap_or_default();
            if line.starts_with("  ") && !line.starts_with("   ") {
                names.push(name.trim_end_matches('*').to_owned());
            }
        }
    }
    names
}

/// `["container", "run"]` of `docker container run --rm ...`, for each that a line runs.
fn commands(line: &str) -> Vec<Vec<&str>> {
    let is_name = |word: &&str| word.chars().all(|letter| letter.is_ascii_lowercase());
    let each = line
        .split("docker ")
        .skip(1)
        .map(|rest| rest.split_whitespace().take_while(is_name).take(2).collect());
    each.filter(|words: &Vec<&str>| !words.is_empty()).collect()
}
