//! What runs in a guest, as its engine counts it.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use dormouse_agent_proto::Target;
use dormouse_lifecycle::{Census, ContainerState, Event, Generation};
use dormouse_mux::Agent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use super::engine_events::{EventReader, command_line};
use crate::owner::{Inbox, Message};

/// How much of an answer of the engine is read: a list of very many containers.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// How long the engine may take to say which execs run.
const EXECS_WITHIN: Duration = Duration::from_secs(15);

/// How often it is asked that, while some do or nobody knows, whatever else happens: health checks may never be quiet for so
/// long.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How long to wait before an engine whose events can't be heard is asked for them again.
const AGAIN_AFTER: Duration = Duration::from_millis(200);

/// How long the engine may take to describe a container.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// How long the engine may take to stop a container.
const STOPPED_WITHIN: Duration = Duration::from_secs(15);

/// One of all containers.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Counted {
    id: String,
    state: String,
}

impl Counted {
    fn state(&self) -> ContainerState {
        match self.state.as_str() {
            "created" => ContainerState::Created,
            "paused" => ContainerState::Paused,
            "restarting" => ContainerState::Restarting,
            "removing" => ContainerState::Removing,
            "exited" => ContainerState::Exited,
            "dead" => ContainerState::Dead,
            // A state that isn't known here may be one that works.
            _ => ContainerState::Running,
        }
    }
}

async fn counted(agent: &Agent) -> Result<Vec<Counted>, String> {
    ask(agent, "/containers/json?all=1").await
}

/// Asks the engine for all containers and counts them.
pub(crate) async fn census(agent: &Agent) -> Result<Census, String> {
    Ok(Census::of(counted(agent).await?.iter().map(Counted::state)))
}

/// The same, and the processes started by `exec` that run: those that an earlier host had heard of.
pub(crate) async fn first_census(agent: &Agent) -> Result<Census, String> {
    let containers = counted(agent).await?;
    let census = Census::of(containers.iter().map(Counted::state));
    let running = containers.into_iter().filter(|one| one.state().holds()).map(|one| one.id);
    let execs = match timeout(EXECS_WITHIN, running_execs(agent, running)).await {
        Ok(Ok(execs)) => u32::try_from(execs.len()).unwrap_or(u32::MAX),
        Ok(Err(_)) | Err(_) => 0,
    };
    Ok(Census { execs, ..census })
}

/// Asks the engine for the processes started by `exec` that run in these containers, but for health checks: the container
/// and the exec of each.
async fn running_execs(
    agent: &Agent,
    containers: impl IntoIterator<Item = String>,
) -> Result<Vec<(String, String)>, String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Exec {
        running: bool,
        #[serde(default)]
        process_config: Process,
    }
    #[derive(Default, serde::Deserialize)]
    struct Process {
        #[serde(default)]
        entrypoint: String,
        #[serde(default)]
        arguments: Vec<String>,
    }
    let mut found = Vec::new();
    // What was there a moment ago and is gone has no execs; of what can't be told now nobody knows that it has none.
    for id in containers {
        let Some(container) = ask_of::<Container>(agent, &format!("/containers/{id}/json")).await? else {
            continue;
        };
        let check = container.config.check();
        for exec in container.exec_ids.unwrap_or_default() {
            let Some(Exec { running: true, process_config: Process { entrypoint, arguments } }) =
                ask_of(agent, &format!("/exec/{exec}/json")).await?
            else {
                continue;
            };
            if check.as_ref() != Some(&line([vec![entrypoint], arguments].concat())) {
                found.push((id.clone(), exec));
            }
        }
    }
    Ok(found)
}

async fn all_running_execs(agent: &Agent) -> Result<Vec<(String, String)>, String> {
    let containers = running(agent).await?;
    running_execs(agent, containers.into_iter().map(|container| container.id)).await
}

/// What of a container says which execs are its health check.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    #[serde(rename = "ExecIDs")]
    exec_ids: Option<Vec<String>>,
    #[serde(default)]
    config: ContainerConfig,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ContainerConfig {
    #[serde(default)]
    healthcheck: Option<Check>,
    #[serde(default)]
    shell: Option<Vec<String>>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    #[serde(default)]
    test: Option<Vec<String>>,
}

impl ContainerConfig {
    /// The health check's program and arguments in one line, as the engine's events have it.
    fn check(self) -> Option<String> {
        let test = self.healthcheck?.test?;
        let (kind, words) = test.split_first()?;
        match kind.as_str() {
            "CMD" => Some(line(words.to_vec())),
            "CMD-SHELL" => {
                let shell = self.shell.filter(|shell| !shell.is_empty());
                let shell = shell.unwrap_or_else(|| ["/bin/sh", "-c"].map(str::to_owned).to_vec());
                Some(line([shell, words.to_vec()].concat()))
            }
            _ => None,
        }
    }
}

/// As events have it.
fn line(words: Vec<String>) -> String {
    command_line(&words.join(" "))
}

/// Asks the engine for a container's health check, in one line; of one that is gone there is none.
async fn health_check(agent: &Agent, container: &str) -> Result<Option<String>, String> {
    let path = format!("/containers/{container}/json");
    let asked = timeout(ANSWER_WITHIN, ask_of::<Container>(agent, &path)).await;
    let container = asked.map_err(|_| "the engine did not answer in time".to_owned())??;
    Ok(container.and_then(|container| container.config.check()))
}

/// A container that runs.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Listed {
    pub(super) id: String,
    #[serde(default)]
    pub(super) names: Vec<String>,
    #[serde(default)]
    pub(super) labels: Option<BTreeMap<String, String>>,
    /// As `docker ps` prints it.
    #[serde(default)]
    pub(super) status: String,
}

/// Asks the engine for the containers that run.
pub(super) async fn running(agent: &Agent) -> Result<Vec<Listed>, String> {
    ask(agent, "/containers/json").await
}

pub(super) async fn ask<T: serde::de::DeserializeOwned>(agent: &Agent, path: &str) -> Result<T, String> {
    ask_of(agent, path).await?.ok_or_else(|| refused(path))
}

/// Asks of something that may be gone: then it is `None`.
async fn ask_of<T: serde::de::DeserializeOwned>(agent: &Agent, path: &str) -> Result<Option<T>, String> {
    let Some(answer) = answer_of(agent, path).await? else { return Ok(None) };
    let read = serde_json::from_slice(&answer);
    read.map(Some).map_err(|error| format!("the engine's answer makes no sense: {error}"))
}

fn refused(path: &str) -> String {
    format!("the engine refused to answer {path}")
}

/// What the engine answers to a read, if it answers with 200.
pub(crate) async fn engine_answer(agent: &Agent, path: &str) -> Result<Vec<u8>, String> {
    answer_of(agent, path).await?.ok_or_else(|| refused(path))
}

/// The same; `None` if it answers with 404.
async fn answer_of(agent: &Agent, path: &str) -> Result<Option<Vec<u8>>, String> {
    let mut stream = agent.dial(Target::Engine).await.map_err(|error| error.to_string())?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await.map_err(|error| error.to_string())?;
    let head =
        answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or("the engine's answer broke off")?;
    match answer.get(..12) {
        Some(b"HTTP/1.0 200") => Ok(Some(answer.split_off(head + 4))),
        Some(b"HTTP/1.0 404") => Ok(None),
        _ => Err(refused(path)),
    }
}

/// Recounts whenever the engine says that something happened to a container, and tells what it says, until it is aborted.
pub(super) async fn follow_containers(agent: Agent, inbox: Inbox, generation: Generation) {
    loop {
        if let Err(error) = listen(&agent, &inbox, generation).await {
            tracing::debug!(%error, "the engine's events can't be heard now");
        }
        // It was restarted, which may take it seconds, or there was no stream to be had.
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

/// Does so as long as the engine's stream of events lasts.
async fn listen(agent: &Agent, inbox: &Inbox, generation: Generation) -> io::Result<()> {
    let request = format!("GET /events?filters={} HTTP/1.0\r\nHost: docker\r\n\r\n", EventReader::FILTERS);
    let mut stream = agent.dial(Target::Engine).await.map_err(io::Error::other)?;
    stream.write_all(request.as_bytes()).await?;
    let mut reader = EventReader::default();
    let mut buffer = vec![0; 16 * 1024];
    let (mut is_heard, mut execs_are_known) = (false, false);
    let mut look = tokio::time::interval_at(Instant::now() + LOOK_EVERY, LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let events = tokio::select! {
            // The first bytes are the answer's head: what is asked then makes up for what happened before the subscription.
            count = stream.read(&mut buffer) => match count? {
                0 => return Ok(()),
                count => {
                    is_heard = true;
                    reader.read(&buffer[..count])
                }
            },
            _ = look.tick(), if is_heard && (!execs_are_known || reader.running_execs() > 0) => {
                if execs_are_known
                    && let Ok(Ok(execs)) = timeout(EXECS_WITHIN, all_running_execs(agent)).await
                {
                    reader.looked(execs);
                }
                Vec::new()
            }
        };
        // One that the engine can't tell of now may be told of after the next event, and must not keep the others waiting.
        for container in reader.unasked() {
            if let Ok(check) = health_check(agent, &container).await {
                reader.learn(container, check);
            }
        }
        if !execs_are_known && let Ok(Ok(execs)) = timeout(EXECS_WITHIN, all_running_execs(agent)).await {
            execs_are_known = true;
            reader.found(execs);
        }
        let (taken, is_taken) = oneshot::channel();
        inbox.send(Message::Engine { generation, events, execs: reader.running_execs(), taken });
        let _ = is_taken.await;
        if let Ok(census) = census(agent).await {
            inbox.send(Message::Event(Event::ContainersChanged { generation, census }));
        }
    }
}

/// Has the engine stop a container.
pub(crate) async fn stop_container(agent: &Agent, id: &str) -> Result<(), String> {
    let mut stream = agent.dial(Target::Engine).await.map_err(|error| error.to_string())?;
    let request =
        format!("POST /containers/{id}/stop?t=2 HTTP/1.0\r\nHost: docker\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    let mut answer = [0; 12];
    let stopped = timeout(STOPPED_WITHIN, stream.read_exact(&mut answer)).await;
    match stopped {
        Ok(Ok(_)) if answer.ends_with(b" 204") || answer.ends_with(b" 304") => Ok(()),
        Ok(Ok(_)) => Err("the engine refused".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer in time".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use dormouse_agent_proto::{Answer, Reply, Request};
    use dormouse_mux::{Limits, Mux, Stream, read_json, write_json};
    use tokio::io::duplex;
    use tokio::sync::mpsc;

    use super::*;

    /// What an engine answers, by path. Of anything else it knows nothing.
    type Answers = Arc<Mutex<BTreeMap<&'static str, (u16, &'static str)>>>;

    /// A guest whose engine answers so. The streams on which it is listened to come out.
    fn telling(answers: &Answers) -> (Agent, mpsc::UnboundedReceiver<Stream>) {
        let (host, guest) = duplex(64 * 1024);
        let guest = Mux::server(guest, Limits::AGENT);
        let (listeners, listened) = mpsc::unbounded_channel();
        let answers = Arc::clone(answers);
        tokio::spawn(async move {
            while let Some(mut stream) = guest.accept().await {
                let _: Request = read_json(&mut stream).await.unwrap();
                write_json(&mut stream, &Reply::Ok(Answer::Done)).await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                let path = head.split(' ').nth(1).unwrap();
                if path.starts_with("/events") {
                    let _ = listeners.send(stream);
                    continue;
                }
                let (status, body) = answers.lock().unwrap().get(path).copied().unwrap_or((404, "{}"));
                let answer = format!("HTTP/1.0 {status} so\r\n\r\n{body}");
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            }
        });
        let mux = Mux::client(host, Limits::AGENT);
        (Agent::new(mux.clone(), mux), listened)
    }

    /// How many execs hold, as it is told next.
    async fn execs(told: &mut mpsc::UnboundedReceiver<Message>) -> u32 {
        loop {
            let message = timeout(Duration::from_secs(30), told.recv()).await.expect("nothing is told");
            if let Message::Engine { execs, taken, .. } = message.expect("it is listened to") {
                let _ = taken.send(());
                return execs;
            }
        }
    }

    #[tokio::test]
    async fn a_health_check_that_the_engine_could_not_tell_is_asked_for_again_and_keeps_no_other_waiting() {
        const CHECKED: &str = r#"{"Config":{"Healthcheck":{"Test":["CMD","ask"]}}}"#;
        let answers = Answers::default();
        let answer = |path, status, body| answers.lock().unwrap().insert(path, (status, body));
        answer("/containers/json", 200, "[]");
        answer("/containers/json?all=1", 200, "[]");
        answer("/containers/c1/json", 500, "{}");
        answer("/containers/c2/json", 200, CHECKED);
        let (agent, mut listened) = telling(&answers);
        let (sender, mut told) = mpsc::unbounded_channel();
        let listening = tokio::spawn(async move { listen(&agent, &Inbox(sender), Generation(1)).await });
        let mut stream = listened.recv().await.unwrap();
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(execs(&mut told).await, 0);
        let event = |container: &str, action: &str, exec: &str| {
            let attributes = format!(r#"{{"execID":"{exec}"}}"#);
            let actor = format!(r#"{{"ID":"{container}","Attributes":{attributes}}}"#);
            format!(r#"{{"Type":"container","Action":"{action}","Actor":{actor}}}"#) + "\n"
        };
        let begun = event("c1", "exec_start: ask", "a") + &event("c2", "exec_start: ask", "b");
        stream.write_all(begun.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(execs(&mut told).await, 1, "what isn't known to be a check holds");
        answer("/containers/c1/json", 200, CHECKED);
        stream.write_all(event("c3", "exec_die", "c").as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(execs(&mut told).await, 0);
        listening.abort();
    }

    #[tokio::test]
    async fn what_the_engine_cant_tell_now_is_not_taken_for_none() {
        let answers = Answers::default();
        let (agent, _listened) = telling(&answers);
        assert_eq!(running_execs(&agent, ["c1".to_owned()]).await, Ok(Vec::new()));
        assert_eq!(health_check(&agent, "c1").await, Ok(None));
        answers.lock().unwrap().insert("/containers/c1/json", (500, "{}"));
        running_execs(&agent, ["c1".to_owned()]).await.unwrap_err();
        health_check(&agent, "c1").await.unwrap_err();
    }

    #[test]
    fn a_health_check_is_told_as_the_engines_events_have_it() {
        for (config, expected) in [
            (
                r#"{"Healthcheck":{"Test":["CMD","curl","-f","http://localhost/"]}}"#,
                Some("curl -f http://localhost/"),
            ),
            (r#"{"Healthcheck":{"Test":["CMD-SHELL","exit 0"]}}"#, Some("/bin/sh -c exit 0")),
            // As YAML's blocks of text end.
            (r#"{"Healthcheck":{"Test":["CMD-SHELL","exit 0\n"]}}"#, Some("/bin/sh -c exit 0")),
            (
                r#"{"Healthcheck":{"Test":["CMD-SHELL","exit 0"]},"Shell":["bash","-c"]}"#,
                Some("bash -c exit 0"),
            ),
            (r#"{"Healthcheck":{"Test":["NONE"]}}"#, None),
            (r#"{"Healthcheck":{"Interval":1}}"#, None),
            (r#"{"Healthcheck":null,"Shell":null}"#, None),
            ("{}", None),
        ] {
            let config: ContainerConfig = serde_json::from_str(config).unwrap();
            assert_eq!(config.check().as_deref(), expected);
        }
    }
}
