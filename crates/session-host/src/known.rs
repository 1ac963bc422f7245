//! What is known of an engine before it is asked.

use dormouse_api::link::EngineFacts;
use dormouse_docker_proxy::version_of;

/// The oldest version of the API that engines of these years speak.
pub(crate) const API_OLDEST: &str = "1.24";

/// The lines of a head by which an engine tells who it is.
pub(crate) fn head_lines(engine: &EngineFacts) -> String {
    let EngineFacts { version, api, .. } = engine;
    format!(
        "Api-Version: {api}\r\nDocker-Experimental: false\r\nOstype: linux\r\nServer: Docker/{version} (linux)\r\n"
    )
}

/// Does the engine speak the version that a target names? One that it doesn't speak is for it to refuse.
pub(crate) fn speaks(engine: &EngineFacts, target: &str) -> bool {
    let version = version_of(target);
    let Some(asked) = version.strip_prefix("/v") else { return version.is_empty() };
    match (number(asked), number(API_OLDEST), number(&engine.api)) {
        (Some(asked), Some(oldest), Some(newest)) => (oldest..=newest).contains(&asked),
        _ => false,
    }
}

fn number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
