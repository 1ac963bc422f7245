//! `dorm monitor`: all sessions on a screen, as they are from second to second.
//!
//! What is shown is read where it lies (`look`), kept in a pure state (`state`), and drawn from that (`view`). Looking starts
//! no host and wakes no VM; only keys do.

mod look;
mod state;
mod view;

use std::io::{self, IsTerminal};
use std::thread;
use std::time::Duration;

use clap::Args;
use dormouse_api::{Pin, SessionInfo, SessionName, SleepAnswer};
use dormouse_client::{Endpoint, Home};
use http::Method;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use self::look::Looker;
use self::state::{Order, State};
use crate::context::Context;
use crate::error::{Done, Failure, SUCCESS};

/// How often is looked when nothing else is asked for, in seconds.
const EVERY: u64 = 1;

#[derive(Args)]
pub(crate) struct Monitor {
    /// Look every so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = EVERY, value_parser = clap::value_parser!(u64).range(1..=3600))]
    every: u64,
}

/// The terminal as it is drawn on; given back when dropped. A panic gives it back as well, by ratatui's hook.
struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    fn enter() -> io::Result<Self> {
        // What fails on the way in may have changed its mode already.
        let terminal = ratatui::try_init().inspect_err(|_| drop(ratatui::try_restore()))?;
        Ok(Self { terminal })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone has nothing to be given back.
        let _ = ratatui::try_restore();
    }
}

impl Monitor {
    pub(crate) async fn run(self, context: &Context) -> Done {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Err(Failure::new("a monitor needs a terminal")
                .hint("`dorm session ls`, `dorm why` and `dorm session history` tell the same to scripts"));
        }
        let mut looker = Looker::new(Home::from_env()?, context.service().await?);
        let mut state = State::default();
        state.look(looker.look().await?);
        let mut screen = Screen::enter()?;
        let (mut keys, mut answers) = (keys(), Answers::new());
        let (mut terminate, mut hang_up) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
        let mut due = interval(Duration::from_secs(self.every));
        due.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            screen.terminal.draw(|frame| view::draw(frame, &state))?;
            crate::terminal::planted_panic();
            tokio::select! {
                _ = due.tick() => state.look(looker.look().await?),
                Some(answer) = answers.next() => state.told(answer),
                _ = terminate.recv() => return Ok(SUCCESS),
                _ = hang_up.recv() => return Ok(SUCCESS),
                typed = keys.recv() => match typed {
                    // The terminal is gone.
                    None => return Ok(SUCCESS),
                    Some(Event::Key(key)) if key.kind == KeyEventKind::Press => {
                        let interrupted =
                            key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
                        match if interrupted { Some(Order::Quit) } else { state.key(key.code) } {
                            Some(Order::Quit) => return Ok(SUCCESS),
                            Some(order) => answers.ask(context, order),
                            None => {}
                        }
                    }
                    // It is drawn anew, in its new size.
                    Some(_) => {}
                }
            }
        }
    }
}

/// What is typed. A thread of its own reads it: a read can't be taken back, and the process must be able to end without it.
fn keys() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(16);
    thread::spawn(move || {
        while let Ok(event) = event::read() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Orders that are under way: the screen goes on meanwhile.
struct Answers {
    sender: mpsc::Sender<String>,
    receiver: mpsc::Receiver<String>,
}

impl Answers {
    fn new() -> Self {
        let (sender, receiver) = mpsc::channel(16);
        Self { sender, receiver }
    }

    async fn next(&mut self) -> Option<String> {
        self.receiver.recv().await
    }

    fn ask(&self, context: &Context, order: Order) {
        let (context, sender) = (context.clone(), self.sender.clone());
        tokio::spawn(async move {
            let answer = match carry_out(&context, order).await {
                Ok(answer) => answer,
                Err(failure) => failure.message().to_owned(),
            };
            let _ = sender.send(answer).await;
        });
    }
}

/// Does what a key asks for, and tells what came of it.
async fn carry_out(context: &Context, order: Order) -> Result<String, Failure> {
    let control = async |name: &SessionName| {
        Ok::<_, Failure>(Endpoint::new(context.inspect(name).await?.control_socket))
    };
    Ok(match order {
        Order::Quit => String::new(),
        Order::Sleep(name) => match control(&name).await?.post("/v1/session/sleep").await? {
            SleepAnswer::NoVm => format!("{name} was asleep already"),
            SleepAnswer::Asleep { .. } => format!("{name} is asleep"),
            SleepAnswer::Busy { holds } => {
                let reasons: Vec<_> = holds.iter().map(|hold| hold.reason.as_str()).collect();
                format!("{name} is held awake: {}", reasons.join(", "))
            }
            SleepAnswer::Disabled => format!("{name} never sleeps: its data is in memory"),
            SleepAnswer::Failed { reason } => format!("{name} did not fall asleep: {reason}"),
        },
        Order::Wake(name) => {
            let info = context.inspect(&name).await?;
            drop(context.hold(&info, "dorm monitor".to_owned(), true).await?);
            format!("{name} is awake")
        }
        Order::Pin(name) => {
            let pin = Pin { until: None, reason: Some("dorm monitor".to_owned()) };
            let _: SessionInfo = control(&name).await?.call(Method::POST, "/v1/session/pin", &pin).await?;
            format!("{name} is pinned")
        }
        Order::Unpin(name) => {
            let _: SessionInfo = control(&name).await?.call(Method::DELETE, "/v1/session/pin", &()).await?;
            format!("{name} is no longer pinned")
        }
        Order::Terminate(name) => {
            let _: SessionInfo = control(&name).await?.post("/v1/session/terminate").await?;
            format!("{name} is terminated; `dorm session start` opens it again")
        }
    })
}
