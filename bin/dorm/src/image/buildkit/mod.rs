//! A build by the engine's BuildKit: its session, its news, and what it comes to.
//!
//! The build itself is one request, `/build?version=2`, whose body is the folder as a tar archive; secrets, agents, who one is
//! at registries and an archive that comes back go over a session beside it.

mod progress;
mod session;
pub(crate) mod spec;
mod wire;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dormouse_client::{Call, JsonLines, Payload, Target};
use http::{HeaderName, HeaderValue, Method};
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::Deserialize;
use serde_json::Value;
use tokio::time::{MissedTickBehavior, interval};

use self::progress::Progress;
use self::session::Given;
use self::spec::{Agent, Secret};
use self::wire::News;
use crate::error::Failure;
use crate::operation::Operation;
use crate::output::say;

/// How often the live view is drawn.
const DRAWN_EVERY: Duration = Duration::from_millis(100);

/// By these a line of the engine's tells what it has beside it.
const NEWS: &str = "moby.buildkit.trace";
const IMAGE: &str = "moby.image.id";

/// How a build is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    /// A view that is drawn again and again.
    Live,
    /// Lines.
    Plain,
    Quiet,
}

impl Shown {
    /// Live where somebody looks.
    pub(super) fn automatic() -> Self {
        if io::stderr().is_terminal() { Self::Live } else { Self::Plain }
    }
}

/// What a build may ask for while it goes on.
#[derive(Default)]
pub(super) struct Asked {
    given: Given,
}

impl Asked {
    /// Reads secrets, and finds agents.
    pub(super) fn of(secrets: &[Secret], agents: &[Agent]) -> Result<Self, Failure> {
        let mut given = Given::default();
        for secret in secrets {
            let (id, data) = secret.read().map_err(Failure::new)?;
            given.secrets.insert(id, data);
        }
        given.agents = agents.iter().map(socket_of).collect::<Result<BTreeMap<_, _>, _>>()?;
        Ok(Self { given })
    }

    /// Where the archive goes that the build comes to.
    #[must_use]
    pub(super) fn archive(mut self, to: Box<dyn Write + Send>) -> Self {
        self.given.archive = Some(Mutex::new(to));
        self
    }
}

fn socket_of(agent: &Agent) -> Result<(String, PathBuf), Failure> {
    use std::os::unix::fs::FileTypeExt;
    let hint = "start an agent, and give it your keys: eval \"$(ssh-agent)\"; ssh-add";
    let socket = match &agent.socket {
        Some(socket) => socket.clone(),
        None => std::env::var_os("SSH_AUTH_SOCK")
            .map(PathBuf::from)
            .ok_or_else(|| Failure::new("there is no SSH agent: SSH_AUTH_SOCK isn't set").hint(hint))?,
    };
    match std::fs::metadata(&socket) {
        Ok(metadata) if metadata.file_type().is_socket() => Ok((agent.id.clone(), socket)),
        Ok(_) => Err(Failure::new(format!("{} is no agent's socket", socket.display())).hint(hint)),
        Err(error) => {
            Err(Failure::new(format!("can't use the agent {}: {error}", socket.display())).hint(hint))
        }
    }
}

/// One line of the engine's answer.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Line {
    id: Option<String>,
    error: Option<String>,
    aux: Option<Value>,
}

/// Builds, shows how it goes, and gives the image's id, if it comes to one.
pub(super) async fn build(
    operation: &Operation,
    target: Target,
    payload: Payload,
    asked: Asked,
    shown: Shown,
) -> Result<Option<String>, Failure> {
    let mut random = [0; 16];
    getrandom(&mut random, GetRandomFlags::empty()).map_err(io::Error::from)?;
    let id = format!("{:032x}", u128::from_ne_bytes(random));
    let stream = operation.engine.upgrade(opening(&id)?, "h2c").await?;
    let _session = session::spawn(stream, asked.given);
    let target = target.with("version", "2").with("session", id);
    let reply = operation.engine.send(Call::new(Method::POST, target.text()).payload(payload)).await?;
    let mut screen = Screen::new(shown);
    let ended = follow(reply.lines(), &mut screen).await;
    screen.end(ended.is_err());
    ended
}

/// The request that becomes the session.
fn opening(id: &str) -> Result<Call, Failure> {
    let value = |text: &str| HeaderValue::from_str(text).map_err(Failure::new);
    let mut call = Call::new(Method::POST, "/session")
        .header(HeaderName::from_static("x-docker-expose-session-uuid"), value(id)?)
        .header(HeaderName::from_static("x-docker-expose-session-name"), value("dorm")?);
    for method in session::METHODS {
        call = call.header(HeaderName::from_static("x-docker-expose-session-grpc-method"), value(method)?);
    }
    Ok(call)
}

async fn follow(mut lines: JsonLines, screen: &mut Screen) -> Result<Option<String>, Failure> {
    let mut image = None;
    let mut drawn = interval(DRAWN_EVERY);
    drawn.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let next = tokio::select! {
            next = lines.next::<Line>() => next,
            _ = drawn.tick() => {
                screen.draw();
                continue;
            }
        };
        let broken = |error| Failure::lost("the engine's answer broke off", error);
        let Some(line) = next.map_err(broken)? else { return Ok(image) };
        if let Some(error) = line.error {
            return Err(Failure::new(error.trim().replace('\n', " ")));
        }
        match (line.id.as_deref(), line.aux) {
            (Some(NEWS), Some(Value::String(text))) => screen.take(news(&text)?)?,
            (Some(IMAGE), Some(aux)) => image = aux["ID"].as_str().map(str::to_owned),
            _ => {}
        }
    }
}

fn news(text: &str) -> Result<News, Failure> {
    let nonsense = "what the engine says of the build makes no sense";
    let bytes = STANDARD.decode(text).map_err(|error| Failure::new(format!("{nonsense}: {error}")))?;
    News::decode(bytes.as_slice()).map_err(|error| Failure::new(format!("{nonsense}: {error}")))
}

/// Where a build is shown.
struct Screen {
    progress: Progress,
    shown: Shown,
    /// Of the live view.
    bar: Option<ProgressBar>,
    since: Instant,
}

impl Screen {
    fn new(shown: Shown) -> Self {
        let bar = (shown == Shown::Live).then(|| {
            let style =
                ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new_spinner().with_style(style)
        });
        Self { progress: Progress::default(), shown, bar, since: Instant::now() }
    }

    fn take(&mut self, news: News) -> Result<(), Failure> {
        let lines = self.progress.take(news);
        if self.shown == Shown::Plain {
            let mut err = io::stderr().lock();
            for line in lines {
                writeln!(err, "{line}")?;
            }
        }
        Ok(())
    }

    fn draw(&self) {
        if let Some(bar) = &self.bar {
            // The last column makes some terminals break the line.
            let width = crate::terminal::size_of_errors().map_or(79, |(_, columns)| usize::from(columns) - 1);
            bar.set_message(self.progress.view(width, self.since));
        }
    }

    /// Leaves the last view, and tells what the live one had no room for.
    fn end(&self, failed: bool) {
        self.draw();
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
        if failed && self.shown != Shown::Plain {
            say(self.progress.of_failed().trim_end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_are_read_from_the_engines_lines_and_nonsense_is_no_panic() {
        let step =
            wire::Step { digest: "sha256:1".to_owned(), name: "RUN x".to_owned(), ..Default::default() };
        let text = STANDARD.encode(News { steps: vec![step.clone()], ..Default::default() }.encode_to_vec());
        assert_eq!(news(&text).unwrap().steps, [step]);
        assert!(news("!").is_err() && news(&STANDARD.encode([0xff; 9])).is_err());
    }

    #[test]
    fn an_agent_is_a_socket() {
        let folder = tempfile::tempdir().unwrap();
        let (file, socket) = (folder.path().join("key"), folder.path().join("socket"));
        std::fs::write(&file, "").unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let agent = |socket: &PathBuf| Agent { id: "default".to_owned(), socket: Some(socket.clone()) };
        assert!(socket_of(&agent(&file)).is_err() && socket_of(&agent(&folder.path().join("no"))).is_err());
        assert_eq!(socket_of(&agent(&socket)).unwrap().1, socket);
    }
}
