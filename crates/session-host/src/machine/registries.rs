//! The registries that a session's engine treats in a way of their own.
//!
//! dockerd reads its file when it starts, and again on SIGHUP. The file lies in the guest's memory, and so is there for as
//! long as this boot lasts: over resumes, and when the engine is restarted. A clone's engine was started before it was
//! this session's, which is why it is told while it runs.

use std::collections::BTreeMap;
use std::time::Duration;

use dormouse_api::Registries;
use dormouse_mux::Agent;
use serde::Deserialize;
use tokio::time::{sleep, timeout};

use super::census::ask;
use super::script;

/// Writes what it reads into the engine's file, and has the engine read that.
const TELL: &str = "mkdir -p /etc/docker && cat > /etc/docker/daemon.json \
                    && kill -HUP \"$(cat /run/docker.pid)\"";

/// How long all of it may take.
const TAKEN_WITHIN: Duration = Duration::from_secs(30);

/// How often the engine is asked whether it has read its file.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Tells a guest's engine of them, and waits until it has taken them over.
///
/// # Errors
/// In words, when it doesn't.
pub(super) async fn introduce(agent: &Agent, registries: &Registries) -> Result<(), String> {
    if registries.are_all_alike() {
        return Ok(());
    }
    let introducing = async {
        tell(agent, registries).await?;
        loop {
            let info: Info = ask(agent, "/info").await?;
            if info.registry_config.has(registries) {
                return Ok(());
            }
            sleep(ASK_EVERY).await;
        }
    };
    timeout(TAKEN_WITHIN, introducing).await.map_err(|_| "the engine doesn't take them over".to_owned())?
}

async fn tell(agent: &Agent, registries: &Registries) -> Result<(), String> {
    let Registries { mirrors, insecure, authorities: _ } = registries;
    let file =
        serde_json::json!({ "registry-mirrors": mirrors, "insecure-registries": insecure }).to_string();
    script::run(agent, TELL, file.as_bytes()).await
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    registry_config: Config,
}

/// What the engine does with registries.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    #[serde(default)]
    mirrors: Option<Vec<String>>,
    #[serde(default, rename = "InsecureRegistryCIDRs")]
    networks: Option<Vec<String>>,
    #[serde(default, rename = "IndexConfigs")]
    hosts: Option<BTreeMap<String, Host>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Host {
    secure: bool,
}

impl Config {
    /// Are these in force? The engine writes mirrors with a slash at their end, and networks in its own way.
    fn has(&self, registries: &Registries) -> bool {
        let is_mirror = |wanted: &String| {
            let mut mirrors = self.mirrors.iter().flatten();
            mirrors.any(|mirror| mirror.trim_end_matches('/') == wanted.trim_end_matches('/'))
        };
        let is_insecure = |wanted: &String| match dormouse_api::network(wanted) {
            Some(network) => {
                self.networks.iter().flatten().any(|known| dormouse_api::network(known) == Some(network))
            }
            None => self.hosts.iter().flatten().any(|(name, host)| name == wanted && !host.secure),
        };
        registries.mirrors.iter().all(is_mirror) && registries.insecure.iter().all(is_insecure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_force_is_read_from_the_engines_own_words() {
        let info = r#"{"ID":"x","RegistryConfig":{"AllowNondistributableArtifactsCIDRs":null,
            "InsecureRegistryCIDRs":["2001:db8::/32","127.0.0.0/8"],"IndexConfigs":{
            "docker.io":{"Name":"docker.io","Mirrors":["http://192.0.2.7:5000/"],"Secure":true,"Official":true},
            "192.0.2.7:5000":{"Name":"192.0.2.7:5000","Mirrors":[],"Secure":false,"Official":false}},
            "Mirrors":["http://192.0.2.7:5000/"]}}"#;
        let config = serde_json::from_str::<Info>(info).unwrap().registry_config;
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let has = |mirrors: &[&str], insecure: &[&str]| {
            config.has(&Registries {
                mirrors: words(mirrors),
                insecure: words(insecure),
                ..Registries::default()
            })
        };
        assert!(has(&["http://192.0.2.7:5000"], &["192.0.2.7:5000", "127.0.0.0/8", "2001:DB8::/32"]));
        assert!(!has(&["http://192.0.2.8"], &[]) && !has(&[], &["docker.io"]) && !has(&[], &["10.0.0.0/8"]));
        let none: Info = serde_json::from_str(r#"{"RegistryConfig":{}}"#).unwrap();
        assert!(none.registry_config.has(&Registries::default()));
    }
}
