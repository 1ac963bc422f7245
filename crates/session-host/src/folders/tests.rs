use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;

fn settings(folder: &Path) -> HostSettings {
    let facts = crate::owner::tests::stage::facts(folder);
    HostSettings {
        folder_rules: folder.join("rules"),
        own_folders: vec![folder.join("own")],
        ..facts.settings
    }
}

fn bind(source: &str, by: By) -> Bind<'_> {
    Bind { source, by, read_only: false }
}

#[test]
fn the_machines_rules_say_what_may_be_shared_and_no_sessions_storage_ever_is() {
    let folder = tempfile::tempdir().unwrap();
    let at = |path: &str| folder.path().join(path);
    for path in ["src", "own", "disks/a", "sessions/x", "sessions/me"] {
        std::fs::create_dir_all(at(path)).unwrap();
    }
    std::fs::write(
        at("sessions/x/session.json"),
        serde_json::json!({ "storage": at("disks/a") }).to_string(),
    )
    .unwrap();
    let folders = Folders::load(&at("sessions/me"), &settings(&at("sessions/me")));
    let refused = |path: &str| match folders.mount(bind(at(path).to_str().unwrap(), By::Volume)) {
        Mount::Refused(why) => why,
        other => panic!("{path}: {other:?}"),
    };
    let rules = at("sessions/me/rules");
    std::fs::write(&rules, folder.path().to_str().unwrap()).unwrap();
    let shared = folders.mount(bind(at("src").to_str().unwrap(), By::Volume));
    let Mount::From(path) = shared else { panic!("{shared:?}") };
    assert!(path.starts_with("/mnt/dormouse-rw") && path.ends_with("/src"), "{path}");
    for path in ["disks/a", "disks", "disks/a/hooks.d", "sessions"] {
        assert!(refused(path).contains("Dormouse's own"), "{path}: {}", refused(path));
    }
    let why = folders.mount(bind(at("src").to_str().unwrap(), By::Driver));
    assert!(matches!(&why, Mount::Refused(why) if why.contains("--volume")), "{why:?}");
    std::fs::write(&rules, "# nothing\n").unwrap();
    assert!(refused("src").ends_with("it is outside of the folders that may be shared (none)"));
    std::fs::remove_file(&rules).unwrap();
    std::fs::create_dir(&rules).unwrap();
    assert!(refused("src").contains("(none)"), "rules that can't be read allow nothing");
}

#[test]
fn only_what_was_named_on_the_host_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let folders = Folders::load(folder.path(), &settings(folder.path()));
    let given = |path: &str| dormouse_docker_proxy::Given { path: path.to_owned(), make: false };
    folders.created("c1", &[given("/var/run/docker.sock"), given("/mnt/dormouse-ro2/home/me")]);
    folders.created("c2", &[given("/var/run/docker.sock")]);
    let gifts = folders.shared.given.of("c1");
    assert_eq!(gifts, [Gift { share: Share { path: "/home/me".into(), access: Access::Read }, make: false }]);
    assert!(folders.shared.given.of("c2").is_empty());
}

#[test]
fn what_one_container_was_given_another_can_be_given_as_well_and_once() {
    let folder = tempfile::tempdir().unwrap();
    let folders = Folders::load(folder.path(), &settings(folder.path()));
    let given = |path: &str, make| dormouse_docker_proxy::Given { path: path.to_owned(), make };
    folders.created("a", &[given("/mnt/dormouse-ro2/home/me", false), given("/mnt/dormouse-rw1/tmp", true)]);
    let of = |id: &str| folders.shared.given.of(id);
    let inherited: Vec<_> = of("a").iter().chain(&of("a")).filter_map(Gift::in_guest).collect();
    folders.created("b", &inherited);
    assert_eq!((of("b").len(), of("b")), (2, of("a")));
}

#[tokio::test]
async fn a_container_is_known_by_any_name_that_the_engine_knows() {
    for (status, body, id) in [
        ("200 OK", r#"{"Id":"ab12","Name":"/web"}"#, Some("ab12")),
        ("404 Not Found", r#"{"message":"No such container: web"}"#, None),
    ] {
        let (mut ours, mut engine) = duplex(4096);
        let asking = tokio::spawn(async move { id_in(&mut ours, "web").await });
        let asked = "GET /containers/web/json HTTP/1.1\r\nHost: docker\r\n\r\n";
        let mut request = vec![0; asked.len()];
        engine.read_exact(&mut request).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&request), asked);
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        engine.write_all(answer.as_bytes()).await.unwrap();
        assert_eq!(asking.await.unwrap().as_deref(), id, "{body}");
    }
}
