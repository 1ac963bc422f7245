//! What is answered for an engine that never ran: who it is, from the image that it would be booted from.

use bytes::Bytes;
use dormouse_api::link::EngineFacts;
use dormouse_docker_proxy::version_of;
use jiff::Timestamp;
use serde_json::json;

use super::answers::{Kept, Question};
use super::present::Part;
use crate::known::{API_OLDEST, head_lines, speaks};

/// The answer, if it needs no engine that runs.
pub(super) fn answer(engine: &EngineFacts, method: &str, target: &str, now: Timestamp) -> Option<Bytes> {
    let Question { method, target } = Question::new(method, target);
    let version = version_of(&target);
    let (kind, body) = match (method.as_str(), target.strip_prefix(&version)?) {
        ("GET" | "HEAD", "/_ping") => ("text/plain; charset=utf-8", "OK".to_owned()),
        ("GET", "/version") if speaks(engine, &target) => ("application/json", facts(engine)),
        _ => return None,
    };
    // dockerd's answer to HEAD says that there is nothing.
    let length = if method == "HEAD" { 0 } else { body.len() };
    let who = head_lines(engine);
    let head = format!(
        "HTTP/1.1 200 OK\r\n{who}Builder-Version: 2\r\nCache-Control: no-cache, no-store, must-revalidate\r\n\
         Content-Length: {length}\r\nContent-Type: {kind}\r\nDate: \r\nPragma: no-cache\r\nSwarm: inactive\r\n\r\n"
    );
    Some(Kept { head, body: vec![Part::Text(body)] }.at(&method, now))
}

fn facts(engine: &EngineFacts) -> String {
    let EngineFacts { version, api, kernel } = engine;
    let details = json!({
        "ApiVersion": api, "Arch": "amd64", "KernelVersion": kernel, "MinAPIVersion": API_OLDEST, "Os": "linux",
    });
    json!({
        "Platform": { "Name": "" },
        "Components": [{ "Name": "Engine", "Version": version, "Details": details }],
        "Version": version, "ApiVersion": api, "MinAPIVersion": API_OLDEST, "Os": "linux", "Arch": "amd64",
        "KernelVersion": kernel,
    })
    .to_string()
        + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(method: &str, target: &str) -> Option<String> {
        let engine = EngineFacts { version: "26.1.5".into(), api: "1.45".into(), kernel: "6.12".into() };
        let answer = answer(&engine, method, target, Timestamp::from_second(1_700_000_000).unwrap())?;
        Some(String::from_utf8(answer.to_vec()).unwrap())
    }

    #[test]
    fn who_the_engine_is_is_known_before_it_ever_ran() {
        let ping = asked("HEAD", "/_ping").unwrap();
        assert!(ping.contains("Api-Version: 1.45\r\n") && ping.contains("Date: Tue, 14 Nov 2023"), "{ping}");
        assert!(ping.contains("Content-Length: 0\r\n") && ping.ends_with("\r\n\r\n"), "{ping}");
        assert!(asked("GET", "/_ping").unwrap().ends_with("\r\n\r\nOK"));
        let version = asked("GET", "/v1.45/version").unwrap();
        let body: serde_json::Value =
            serde_json::from_str(version.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!((&body["Version"], &body["KernelVersion"]), (&json!("26.1.5"), &json!("6.12")));
    }

    #[test]
    fn what_only_an_engine_can_say_is_not_made_up() {
        for (method, target) in
            [("GET", "/info"), ("GET", "/v1.46/version"), ("GET", "/v1.12/version"), ("HEAD", "/version")]
        {
            assert_eq!(asked(method, target), None, "{method} {target}");
        }
    }
}
