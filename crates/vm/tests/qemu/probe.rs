//! What the probe finds out.

use std::time::Instant;

use crate::support::SOON;
use dormouse_vm::{Acceleration, KvmPolicy, ProbeError, ProbeOptions, Qemu};

fn options(directory: &tempfile::TempDir, kvm: KvmPolicy) -> ProbeOptions {
    ProbeOptions {
        qemu: None,
        passt: None,
        frame_filter: None,
        cache_dir: directory.path().join("cache"),
        kvm,
    }
}

#[tokio::test]
async fn acceleration_is_settled_in_bounded_time_and_remembered() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(&directory, KvmPolicy::IfItWorks);
    let started = Instant::now();
    let first = Qemu::probe(&options).await.unwrap();
    // On a host whose KVM hangs this is the deadline of the test guest and what else is asked.
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    if let Acceleration::Emulation { why } = &first.acceleration {
        assert!(why.contains("kvm"), "{why}");
    }
    assert_eq!(first.build.len(), 64);
    // A mark in what is remembered comes back: nothing was asked again.
    let remembered = std::fs::read_dir(&options.cache_dir).unwrap().next().unwrap().unwrap().path();
    let marked = std::fs::read_to_string(&remembered).unwrap().replace(&first.build, &"0".repeat(64));
    std::fs::write(&remembered, marked).unwrap();
    assert_eq!(Qemu::probe(&options).await.unwrap().build, "0".repeat(64));
}

#[tokio::test]
async fn a_deleted_or_damaged_cache_costs_time_only() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(&directory, KvmPolicy::Never);
    let first = Qemu::probe(&options).await.unwrap();
    for entry in std::fs::read_dir(&options.cache_dir).unwrap() {
        std::fs::write(entry.unwrap().path(), "{\"key\":").unwrap();
    }
    assert_eq!(Qemu::probe(&options).await.unwrap(), first);
    std::fs::remove_dir_all(&options.cache_dir).unwrap();
    assert_eq!(Qemu::probe(&options).await.unwrap(), first);
}

#[tokio::test]
async fn a_qemu_that_is_missing_or_no_qemu_is_told_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let mut options = options(&directory, KvmPolicy::Never);
    options.qemu = Some(directory.path().join("none"));
    let error = Qemu::probe(&options).await.unwrap_err();
    assert!(matches!(error, ProbeError::Missing(_)), "{error}");
    options.qemu = Some("/bin/false".into());
    let error = Qemu::probe(&options).await.unwrap_err();
    assert!(matches!(error, ProbeError::Broken { .. }), "{error}");
}

#[tokio::test]
async fn a_qemu_that_is_too_old_is_named_with_its_version() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("qemu-6");
    // Speaks just enough QMP, on the descriptor that the probe passes.
    let script = r#"#!/bin/bash
echo '{"QMP": {"version": {"qemu": {"micro": 1, "minor": 2, "major": 6}, "package": ""}, "capabilities": []}}' >&10
read -u 10
echo '{"return": {}, "id": 0}' >&10
read -u 10
echo '{"return": {}, "id": 1}' >&10
"#;
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut options = options(&directory, KvmPolicy::Never);
    options.qemu = Some(program);
    let error = Qemu::probe(&options).await.unwrap_err();
    assert!(matches!(error, ProbeError::TooOld((6, 2, 1))), "{error}");
    assert_eq!(error.to_string(), "QEMU 6.2.1 is too old: 7.2 is needed");
}
