//! Making VMs, with real QEMU.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use crate::support::{Bench, exit, guest, processes_with, record, within};
use dormouse_vm::{
    ConfigError, NetworkKind, Owner, RunState, SocketError, SpawnError, Start, Vm, VmEvent, spawn,
};

#[tokio::test]
async fn a_vm_that_was_made_answers_and_waits_for_its_host() {
    let bench = Bench::new().await;
    let (mut spawned, vm, mut events) = bench.vm(guest::IDLE).await;
    assert_eq!(vm.status().await.unwrap().status, RunState::Prelaunch);
    vm.cont().await.unwrap();
    assert_eq!(events.next().await, VmEvent::Resumed);
    assert_eq!(vm.status().await.unwrap().status, RunState::Running);
    vm.quit().await.unwrap();
    exit(&mut events).await;
    vm.remove().await;
    assert!(within(spawned.ended()).await.unwrap().success());
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn qemu_is_no_child_of_a_terminal_and_inherits_nothing_but_its_sockets() {
    let bench = Bench::new().await;
    // Descriptors that nobody marked close-on-exec; so many that QEMU's own can't hide all of them.
    let directory = std::fs::File::open(bench.path(".")).unwrap();
    let unmarked: Vec<_> = (0..20).map(|_| rustix::io::dup(&directory).unwrap()).collect();
    let (_spawned, vm, _events) = bench.vm(guest::IDLE).await;
    let pid = vm.record().process.unwrap().pid;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session: u32 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().parse().unwrap();
    assert_eq!(session, pid);
    let listening = |fd: u32| {
        let target = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        target.to_string_lossy().starts_with("socket:")
    };
    assert!((10..=14).all(listening));
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/fd/0")).unwrap().to_str(), Some("/dev/null"));
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let target = std::fs::read_link(fd.unwrap().path()).unwrap_or_default();
        assert_ne!(target, bench.path(".").canonicalize().unwrap());
    }
    drop(unmarked);
    vm.kill();
}

#[tokio::test]
async fn sockets_memory_and_record_are_for_the_owner_only() {
    let bench = Bench::new().await;
    let (_spawned, vm, _events) = bench.vm(guest::IDLE).await;
    assert_eq!(std::fs::metadata(bench.runtime_dir()).unwrap().mode() & 0o777, 0o700);
    for name in bench.leftovers() {
        let mode = std::fs::metadata(bench.runtime_dir().join(&name)).unwrap().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
    assert_eq!(std::fs::metadata(bench.path("memory")).unwrap().mode() & 0o777, 0o600);
    vm.kill();
}

#[tokio::test]
async fn a_failed_start_leaves_nothing_behind_and_says_why() {
    let bench = Bench::new().await;
    let mut config = bench.config(guest::IDLE);
    std::fs::write(&config.image.kernel, b"not a kernel").unwrap();
    let error = within(spawn(&config, &bench.qemu)).await.unwrap_err();
    assert!(matches!(&error, SpawnError::QemuEnded { stderr, .. } if !stderr.is_empty()), "{error}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert!(!config.memory_file.exists());

    let mut qemu = bench.qemu.clone();
    qemu.program = bench.path("no-qemu");
    config.generation = 2;
    let error = within(spawn(&config, &qemu)).await.unwrap_err();
    assert!(matches!(error, SpawnError::QemuMissing { .. }), "{error}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert!(!config.memory_file.exists());
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_nothing_behind() {
    let bench = Bench::new().await;
    // This QEMU never answers.
    let program = bench.path("qemu-that-hangs");
    std::fs::write(&program, format!("#!/bin/sh\nexec sleep 1000 # {}\n", program.display())).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut qemu = bench.qemu.clone();
    qemu.program = program.clone();
    let config = bench.config(guest::IDLE);
    let given_up = tokio::select! {
        made = spawn(&config, &qemu) => Some(made),
        () = until(|| record(&bench.runtime_dir()).is_some_and(|record| record.process.is_some())) => None,
    };
    assert!(given_up.is_none(), "{given_up:?}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert!(!config.memory_file.exists());
    within(until(|| processes_with(&program.to_string_lossy()).is_empty())).await;
}

/// Waits for a state that nothing announces.
async fn until(mut reached: impl FnMut() -> bool) {
    let mut poll = tokio::time::interval(std::time::Duration::from_millis(5));
    while !reached() {
        poll.tick().await;
    }
}

#[tokio::test]
async fn a_disk_in_use_by_another_vm_is_refused() {
    let bench = Bench::new().await;
    let (_spawned, vm, _events) = bench.vm(guest::IDLE).await;
    let mut second = bench.config(guest::IDLE);
    second.generation = 2;
    second.memory_file = bench.path("memory-2");
    second.runtime_dir = bench.path("run-2");
    let error = within(spawn(&second, &bench.qemu)).await.unwrap_err();
    assert!(matches!(error, SpawnError::DiskInUse), "{error}");
    vm.kill();
}

#[tokio::test]
async fn a_request_for_a_second_vm_takes_nothing_from_the_first() {
    let bench = Bench::new().await;
    let (_spawned, vm, _events) = bench.vm(guest::IDLE).await;
    let memory = std::fs::metadata(bench.path("memory")).unwrap().ino();
    for generation in [1, 2] {
        let mut again = bench.config(guest::IDLE);
        again.generation = generation;
        again.data_disk = bench.path("another-disk");
        if generation == 1 {
            dormouse_vm::create_data_disk(&again.data_disk, 1 << 20).unwrap();
        }
        let error = within(spawn(&again, &bench.qemu)).await.unwrap_err();
        assert!(matches!(error, SpawnError::Up(1)), "{error}");
    }
    assert_eq!(record(&bench.runtime_dir()).as_ref(), Some(vm.record()));
    assert_eq!(std::fs::metadata(bench.path("memory")).unwrap().ino(), memory);
    assert_eq!(vm.status().await.unwrap().status, RunState::Prelaunch);
    vm.kill();
}

#[tokio::test]
async fn what_cannot_work_is_refused_before_anything_is_made() {
    let bench = Bench::new().await;
    let good = bench.config(guest::IDLE);
    let refused = async |change: &dyn Fn(&mut dormouse_vm::VmConfig)| {
        let mut config = good.clone();
        change(&mut config);
        let error = within(spawn(&config, &bench.qemu)).await.unwrap_err();
        assert_eq!(bench.leftovers(), Vec::<String>::new());
        assert!(!config.memory_file.exists());
        error
    };
    let error = refused(&|config| config.cpus = 0).await;
    assert!(matches!(error, SpawnError::Config(ConfigError::Cpus(0))), "{error}");
    let error = refused(&|config| config.memory_mib = 1).await;
    assert!(matches!(error, SpawnError::Config(ConfigError::Memory(1))), "{error}");
    let error = refused(&|config| config.memory_mib = 1 << 40).await;
    assert!(matches!(error, SpawnError::NoMemory { .. }), "{error}");
    let error = refused(&|config| config.image.root = "/nowhere/root".into()).await;
    assert!(matches!(error, SpawnError::Config(ConfigError::Unreadable { .. })), "{error}");
    let error = refused(&|config| config.data_disk = "data".into()).await;
    assert!(matches!(error, SpawnError::Config(ConfigError::Relative(_))), "{error}");
    let error = refused(&|config| config.start = Start::Incoming).await;
    assert!(matches!(error, SpawnError::Config(ConfigError::Unreadable { .. })), "{error}");
    let error = refused(&|config| config.runtime_dir = format!("/tmp/{}", "d".repeat(120)).into()).await;
    assert!(matches!(error, SpawnError::Socket(SocketError::TooLong(_))), "{error}");
    let mut without_passt = bench.qemu.clone();
    without_passt.passt = None;
    let mut config = good.clone();
    config.network = NetworkKind::Passt;
    let error = within(spawn(&config, &without_passt)).await.unwrap_err();
    assert!(matches!(error, SpawnError::PasstMissing), "{error}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn paths_with_odd_characters_mean_themselves() {
    let bench = Bench::new().await;
    let mut config = bench.config(guest::IDLE);
    config.data_disk = bench.path("a disk,readonly=on \"quoted\"");
    config.memory_file = bench.path("a memory,share=off");
    dormouse_vm::create_data_disk(&config.data_disk, 1 << 20).unwrap();
    let spawned = bench.spawn(&config).await;
    assert!(config.memory_file.exists());
    let (vm, _events) = bench.connect(&spawned).await;
    vm.kill();
}

#[tokio::test]
async fn a_user_network_guest_starts_too() {
    let bench = Bench::new().await;
    let mut config = bench.config(guest::IDLE);
    config.network = NetworkKind::UserUnsafe;
    let spawned = bench.spawn(&config).await;
    let (vm, _events): (Vm, _) = bench.connect(&spawned).await;
    assert_eq!(vm.record().key.network, NetworkKind::UserUnsafe);
    vm.kill();
}

/// The only test with network helpers, so that those of this process are those of its VM.
#[tokio::test]
async fn a_vm_and_its_network_helpers_run_as_the_owner_and_end_together() {
    let bench = Bench::new().await;
    let mut config = bench.config(guest::IDLE);
    config.network = NetworkKind::Passt;
    // Only root can make VMs for others.
    let (uid, gid) = match rustix::process::geteuid().as_raw() {
        0 => (64_001, 64_002),
        uid => (uid, rustix::process::getegid().as_raw()),
    };
    bench.give_to(Owner { uid, gid });
    config.owner = Some(Owner { uid, gid });
    let mut spawned = bench.spawn(&config).await;
    let (vm, mut events) = bench.connect(&spawned).await;
    assert_eq!(helpers().len(), 2, "{:?}", helpers());
    let qemu = i32::try_from(vm.record().process.unwrap().pid).unwrap();
    for pid in helpers().into_iter().chain([qemu]) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains(&format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n")), "{status}");
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        let sigpipe = 1 << (13 - 1);
        assert_ne!(u64::from_str_radix(ignored, 16).unwrap() & sigpipe, 0, "{status}");
    }
    for path in [&config.memory_file, &vm.record().sockets.agent, &config.runtime_dir] {
        assert_eq!(std::fs::metadata(path).unwrap().uid(), uid, "{}", path.display());
    }
    vm.kill();
    exit(&mut events).await;
    within(spawned.ended()).await.unwrap();
    assert_eq!(helpers(), Vec::<i32>::new());
}

/// The network helpers that this process has started.
fn helpers() -> Vec<i32> {
    let is_ours = |pid: &i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((name, fields)) = stat.rsplit_once(')') else { return false };
        let parent = fields.split_whitespace().nth(1);
        (name.contains("(passt") || name.contains("(dorm-frames"))
            && parent == Some(std::process::id().to_string().as_str())
    };
    processes_with("").into_iter().filter(is_ours).collect()
}
