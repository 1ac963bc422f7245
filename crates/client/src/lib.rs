//! A typed client of the control API, and where everything of Dormouse lies on a machine.

mod connection;
mod engine;
mod home;
mod service;
mod settings;

pub use connection::{CONNECT_SECONDS_MAX, ClientError, Endpoint, JsonLines, Upgraded, Warn, first_line};
pub use engine::{Call, DOCKER_API, Engine, EngineError, Payload, Reply, Target};
pub use home::{Home, HomeError, SOCKET_PATH_MAX};
pub use service::{Service, ServiceStartError, program_beside_this_one};
pub use settings::{KEYS, Key, UserSettings, size};
