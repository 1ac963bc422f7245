//! What a running guest's host sees: console, ports, saved state. Real QEMU, guests of a few bytes.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use crate::support::{Bench, exit, guest, within};
use dormouse_vm::{ConsoleLine, RunState, Start, StateError, allocated_bytes, copy_sparse};

#[tokio::test]
async fn the_console_is_read_from_its_first_byte_on_and_survives_the_vm() {
    let bench = Bench::new().await;
    let (_spawned, vm, mut events) = bench.vm(guest::CHATTER).await;
    let console = vm.console().await.unwrap();
    let mut reader = console.follow();
    vm.cont().await.unwrap();
    for _ in 0..100 {
        assert_eq!(within(reader.next()).await, Some(ConsoleLine::Line("dorm".into())));
    }
    vm.kill();
    exit(&mut events).await;
    while within(reader.next()).await.is_some() {}
    assert!(console.last_lines(3).iter().any(|line| line == "dorm"));
}

#[tokio::test]
async fn a_guest_that_talks_to_nobody_does_not_stop_and_is_heard_when_somebody_comes() {
    let bench = Bench::new().await;
    let (_spawned, vm, _events) = bench.vm(guest::CHATTER).await;
    vm.cont().await.unwrap();
    // A reader that came and went must not block the guest either.
    drop(vm.console().await.unwrap());
    let console = vm.console().await.unwrap();
    let mut reader = console.follow();
    for _ in 0..100 {
        assert!(within(reader.next()).await.is_some());
    }
    vm.kill();
}

fn counter(memory: &Path) -> u32 {
    let mut bytes = [0; 4];
    std::fs::File::open(memory).unwrap().read_exact_at(&mut bytes, 0x0030_0000).unwrap();
    u32::from_le_bytes(bytes)
}

async fn until_counted(memory: &Path, beyond: u32) {
    let mut poll = tokio::time::interval(std::time::Duration::from_millis(5));
    while counter(memory) <= beyond {
        poll.tick().await;
    }
}

#[tokio::test]
async fn a_saved_vm_goes_on_where_it_was_in_a_new_qemu() {
    let bench = Bench::new().await;
    let (mut spawned, vm, mut events) = bench.vm(guest::COUNTER).await;
    vm.cont().await.unwrap();
    let (memory, state) = (bench.path("memory"), bench.path("state"));
    within(until_counted(&memory, 1000)).await;
    within(vm.save_state(&state)).await.unwrap();
    let counted = counter(&memory);
    vm.quit().await.unwrap();
    exit(&mut events).await;
    vm.remove().await;
    within(spawned.ended()).await.unwrap();
    assert_eq!(counter(&memory), counted);
    assert!(std::fs::metadata(&state).unwrap().len() < 4 << 20);
    assert!(allocated_bytes(&memory).unwrap() < 32 << 20);

    let mut config = bench.config(guest::COUNTER);
    config.generation = 2;
    config.start = Start::Incoming;
    let spawned = bench.spawn(&config).await;
    let (vm, _events) = bench.connect(&spawned).await;
    assert_eq!(vm.found(), RunState::Inmigrate);
    within(vm.load_state(&state)).await.unwrap();
    assert_eq!(counter(&memory), counted, "it ran before it was told to");
    vm.cont().await.unwrap();
    within(until_counted(&memory, counted)).await;
    vm.kill();
}

#[tokio::test]
async fn a_clone_runs_on_copies_and_leaves_the_original_untouched() {
    let bench = Bench::new().await;
    let (_spawned, vm, mut events) = bench.vm(guest::COUNTER).await;
    vm.cont().await.unwrap();
    within(until_counted(&bench.path("memory"), 1000)).await;
    within(vm.save_state(&bench.path("state"))).await.unwrap();
    vm.quit().await.unwrap();
    exit(&mut events).await;
    let counted = counter(&bench.path("memory"));

    let mut clones = Vec::new();
    for number in 1..=2 {
        let mut config = bench.config(guest::COUNTER);
        config.memory_file = bench.path(&format!("memory-{number}"));
        config.data_disk = bench.path(&format!("data-{number}"));
        config.runtime_dir = bench.path(&format!("run-{number}"));
        config.start = Start::Incoming;
        copy_sparse(&bench.path("memory"), &config.memory_file, &AtomicU64::new(0)).unwrap();
        copy_sparse(&bench.path("data"), &config.data_disk, &AtomicU64::new(0)).unwrap();
        let spawned = bench.spawn(&config).await;
        let (vm, events) = bench.connect(&spawned).await;
        within(vm.load_state(&bench.path("state"))).await.unwrap();
        vm.cont().await.unwrap();
        within(until_counted(&config.memory_file, counted)).await;
        clones.push((vm, events));
    }
    assert_eq!(counter(&bench.path("memory")), counted);
    for (vm, _) in clones {
        vm.kill();
    }
}

#[tokio::test]
async fn a_save_that_fails_leaves_a_vm_that_runs_on() {
    let bench = Bench::new().await;
    let (_spawned, vm, _events) = bench.vm(guest::COUNTER).await;
    vm.cont().await.unwrap();
    std::fs::write(bench.path("state"), "in the way").unwrap();
    let error = within(vm.save_state(&bench.path("state"))).await.unwrap_err();
    assert!(matches!(error, StateError::Io(_)), "{error}");
    assert_eq!(std::fs::read(bench.path("state")).unwrap(), b"in the way");
    let error = within(vm.save_state(Path::new("/dev/full"))).await.unwrap_err();
    assert!(matches!(error, StateError::Io(_)), "{error}");
    let counted = counter(&bench.path("memory"));
    vm.cont().await.unwrap();
    within(until_counted(&bench.path("memory"), counted)).await;
    // And it can still be saved.
    within(vm.save_state(&bench.path("state-2"))).await.unwrap();
    vm.kill();
}

#[tokio::test]
async fn a_device_state_that_is_cut_short_is_refused() {
    let bench = Bench::new().await;
    let (mut spawned, vm, mut events) = bench.vm(guest::COUNTER).await;
    vm.cont().await.unwrap();
    within(vm.save_state(&bench.path("state"))).await.unwrap();
    vm.quit().await.unwrap();
    exit(&mut events).await;
    within(spawned.ended()).await.unwrap();
    let state = std::fs::read(bench.path("state")).unwrap();
    std::fs::write(bench.path("half"), &state[..state.len() / 2]).unwrap();
    let mut config = bench.config(guest::COUNTER);
    config.generation = 2;
    config.start = Start::Incoming;
    let spawned = bench.spawn(&config).await;
    let (vm, mut events) = bench.connect(&spawned).await;
    let error = within(vm.load_state(&bench.path("half"))).await.unwrap_err();
    assert!(matches!(error, StateError::Failed(_) | StateError::Execute(_)), "{error}");
    vm.kill();
    exit(&mut events).await;
}

#[tokio::test]
async fn a_disk_grows_while_its_vm_runs() {
    let bench = Bench::new().await;
    let (_spawned, vm, _events) = bench.vm(guest::IDLE).await;
    vm.cont().await.unwrap();
    dormouse_vm::grow_data_disk(&bench.path("data"), 2 << 30).unwrap();
    vm.resize_data_disk(2 << 30).await.unwrap();
    assert_eq!(std::fs::metadata(bench.path("data")).unwrap().len(), 2 << 30);
    vm.kill();
}
