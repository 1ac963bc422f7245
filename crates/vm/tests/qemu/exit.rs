//! How VMs end, with real QEMU and guests of a few bytes.

use std::time::Instant;

use crate::support::{Bench, exit, guest, record, within};
use dormouse_vm::{Adoption, ExitCause, Monitor, RunState, Vm, VmEvent, adopt};

async fn cause_of(code: &[u8], act: impl AsyncFn(&Vm)) -> ExitCause {
    let bench = Bench::new().await;
    let (mut spawned, vm, mut events) = bench.vm(code).await;
    vm.cont().await.unwrap();
    act(&vm).await;
    let exit = exit(&mut events).await;
    assert!(!exit.details.is_empty());
    assert!(matches!(events.next().await, VmEvent::Exited(again) if again == exit));
    within(spawned.ended()).await.unwrap();
    exit.cause
}

#[tokio::test]
async fn a_guest_that_powers_off_is_told_as_such() {
    assert_eq!(cause_of(guest::POWER_OFF, async |_| {}).await, ExitCause::GuestShutdown);
}

#[tokio::test]
async fn a_triple_fault_is_no_orderly_end_although_qemus_status_is_0() {
    let bench = Bench::new().await;
    let (mut spawned, vm, mut events) = bench.vm(guest::TRIPLE_FAULT).await;
    vm.cont().await.unwrap();
    assert_eq!(exit(&mut events).await.cause, ExitCause::GuestReset);
    assert_eq!(within(spawned.ended()).await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn quitting_and_signals_are_told_apart_from_a_kill() {
    assert_eq!(cause_of(guest::IDLE, async |vm| vm.quit().await.unwrap()).await, ExitCause::HostQuit);
    let terminate = async |vm: &Vm| {
        let pid = i32::try_from(vm.record().process.unwrap().pid).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    };
    assert_eq!(cause_of(guest::IDLE, terminate).await, ExitCause::HostSignal);
    assert_eq!(cause_of(guest::IDLE, async |vm| vm.kill()).await, ExitCause::Unknown);
}

#[tokio::test]
async fn the_death_of_qemu_is_noticed() {
    let bench = Bench::new().await;
    let (_spawned, vm, mut events) = bench.vm(guest::IDLE).await;
    vm.cont().await.unwrap();
    let killed = Instant::now();
    vm.kill();
    assert_eq!(exit(&mut events).await.cause, ExitCause::Unknown);
    println!("figure: the death of QEMU is noticed = {} ms", killed.elapsed().as_millis());
}

#[tokio::test]
async fn a_vm_outlives_its_host_and_is_found_running_by_the_next() {
    let bench = Bench::new().await;
    let (spawned, vm, events) = bench.vm(guest::IDLE).await;
    vm.cont().await.unwrap();
    drop((spawned, vm, events));
    let record = record(&bench.runtime_dir()).unwrap();
    let (vm, mut events) =
        within(Vm::connect(record, &bench.runtime_dir())).await.unwrap().expect("it lives");
    assert_eq!(vm.found(), RunState::Running);
    vm.kill();
    assert_eq!(exit(&mut events).await.cause, ExitCause::Unknown);
    vm.remove().await;
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn service_and_host_talk_to_the_same_vm_at_once() {
    let bench = Bench::new().await;
    let (_spawned, vm, mut events) = bench.vm(guest::IDLE).await;
    let adoption = within(adopt(vm.record(), &bench.runtime_dir(), Monitor::Service)).await.unwrap();
    let Adoption::Adopted(adopted) = adoption else { panic!("it lives") };
    assert_eq!(adopted.state, RunState::Prelaunch);
    adopted.process.kill();
    exit(&mut events).await;
}

#[tokio::test]
async fn a_record_without_a_pid_is_resolved_by_the_uuid() {
    let bench = Bench::new().await;
    let (_spawned, vm, _events) = bench.vm(guest::IDLE).await;
    let mut record = vm.record().clone();
    let process = record.process.take();
    let adoption = within(adopt(&record, &bench.runtime_dir(), Monitor::Service)).await.unwrap();
    let Adoption::Adopted(adopted) = adoption else { panic!("it lives") };
    assert_eq!(Some(adopted.process.identity()), process);
    adopted.process.kill();
}

#[tokio::test]
async fn a_vm_that_is_gone_leaves_nothing_once_somebody_looks_for_it() {
    let bench = Bench::new().await;
    let (mut spawned, vm, _events) = bench.vm(guest::IDLE).await;
    vm.kill();
    within(spawned.ended()).await.unwrap();
    assert!(!bench.leftovers().is_empty());
    let adoption = within(adopt(vm.record(), &bench.runtime_dir(), Monitor::Service)).await.unwrap();
    assert!(matches!(adoption, Adoption::Gone));
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_process_that_is_not_the_vm_of_the_record_is_not_adopted() {
    let bench = Bench::new().await;
    let (mut spawned, vm, _events) = bench.vm(guest::IDLE).await;
    let mut record = vm.record().clone();
    record.uuid = "00000000-0000-4000-8000-000000000000".to_owned();
    let adoption = within(adopt(&record, &bench.runtime_dir(), Monitor::Service)).await.unwrap();
    assert!(matches!(adoption, Adoption::Gone));
    within(spawned.ended()).await.unwrap();
}
