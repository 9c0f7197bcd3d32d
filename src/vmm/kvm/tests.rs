//! A real guest in this process. Skips, visibly, where KVM cannot be used.

use std::time::{Duration, Instant};

use super::*;
use crate::hypervisor::RunState;
use crate::types::{RamRegion, VmUuid};
use crate::vmm::config::{Boot, ConsoleBuffer, DirtyMode, SerialSink, VmConfig};
use crate::vmm::payload::{PayloadConfig, heartbeat_number};

const WAIT: Duration = Duration::from_secs(60);

/// Whether a test that needs KVM can run here.
fn kvm_usable(test: &str) -> bool {
    match kvm_ioctls::Kvm::new() {
        Ok(_) => true,
        Err(error) => {
            println!("skipped {test}: /dev/kvm: {error}");
            false
        }
    }
}

fn payload(vcpus: u32, config: PayloadConfig) -> (VmConfig, ConsoleBuffer) {
    let console = ConsoleBuffer::default();
    let mut vm = VmConfig::new(64 << 20, vcpus, VmUuid([7; 16]), Boot::Payload(config)).unwrap();
    vm.serial = SerialSink::Buffer(console.clone());
    (vm, console)
}

fn beats(console: &ConsoleBuffer) -> Vec<u64> {
    console.text().lines().map(|line| heartbeat_number(line).unwrap_or_else(|| panic!("no heartbeat: {line:?}"))).collect()
}

fn wait_for(vm: &Vm, what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        let status = vm.status();
        assert!(status.exit_code.is_none(), "waiting for {what}: {status:?}");
        assert!(begun.elapsed() < WAIT, "waited too long for {what}: {status:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_payload_beats_and_finds_no_fault() {
    if !kvm_usable("the_payload_beats_and_finds_no_fault") {
        return;
    }
    for vcpus in [1, 2, 4] {
        let (config, console) = payload(vcpus, PayloadConfig { working_set_pages: 1024, ..PayloadConfig::default() });
        let vm = Vm::create(&config).unwrap();
        assert_eq!(vm.status().state, RunState::Paused);
        vm.start().unwrap();
        wait_for(&vm, "ten heartbeats", || beats(&console).len() >= 10);
        vm.pause().unwrap();
        let seen = beats(&console);
        assert_eq!(seen, (1..=seen.len() as u64).collect::<Vec<_>>());
    }
}
