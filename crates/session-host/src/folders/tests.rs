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
    folders.created("c1", vec![given("/var/run/docker.sock"), given("/mnt/dormouse-ro2/home/me")]);
    folders.created("c2", vec![given("/var/run/docker.sock")]);
    let gifts = folders.shared.given.of("c1");
    assert_eq!(gifts, [Gift { share: Share { path: "/home/me".into(), access: Access::Read }, make: false }]);
    assert!(folders.shared.given.of("c2").is_empty());
}
