//! A real guest in this process. Skips, visibly, where KVM cannot be used.

use std::time::{Duration, Instant};

use super::*;
use crate::hypervisor::RunState;
use crate::memory::{MemoryLayout, PageSet};
use crate::types::{PAGE_BYTES, PageNumber, RamRegion, VmUuid};
use crate::vmm::config::{Boot, ConsoleBuffer, DirtyMode, SerialSink, VmConfig};
use crate::vmm::exit::ExitVerdict;
use crate::vmm::payload::{PayloadConfig, heartbeat_number};

mod compatible;
mod faults;
mod generation;
mod images;
mod state;

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

/// A copy of all RAM pages of `from` into `to`, but those in `except`.
fn copy_pages(from: &Vm, to: &Vm, pages: &PageSet) {
    let mut bytes = vec![0; 256 * PAGE_BYTES];
    for (first, count) in pages.runs(256) {
        let bytes = &mut bytes[..usize::try_from(count).unwrap() * PAGE_BYTES];
        from.ram().read(first, bytes).unwrap();
        to.ram().write(first, bytes).unwrap();
    }
}

fn differing_pages(one: &Vm, other: &Vm) -> Vec<u64> {
    let (mut a, mut b) = (vec![0; PAGE_BYTES], vec![0; PAGE_BYTES]);
    (0..one.ram().pages())
        .filter(|page| {
            one.ram().read(PageNumber(*page), &mut a).unwrap();
            other.ram().read(PageNumber(*page), &mut b).unwrap();
            a != b
        })
        .collect()
}

fn twin(of: &Vm, dirty: DirtyMode) -> (Vm, ConsoleBuffer) {
    let console = ConsoleBuffer::default();
    let mut config = VmConfig::incoming(of.describe().clone()).unwrap();
    config.serial = SerialSink::Buffer(console.clone());
    config.dirty = dirty;
    (Vm::create(&config).unwrap(), console)
}

/// Rounds of dirty pages until little is left, then stop and copy; the source stays paused.
fn migrate(source: &Vm, destination: &Vm, rounds: u32) -> Vec<u8> {
    source.start_tracking().unwrap();
    copy_pages(source, destination, &PageSet::full(source.ram().pages()));
    for _ in 0..rounds {
        copy_pages(source, destination, &source.harvest().unwrap());
    }
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    copy_pages(source, destination, &source.harvest().unwrap());
    source.stop_tracking().unwrap();
    assert_eq!(differing_pages(source, destination), Vec::<u64>::new(), "pages that were written but not harvested");
    state
}

fn run_until_beats(vm: &Vm, console: &ConsoleBuffer, more: usize) {
    let before = beats(console).len();
    wait_for(vm, "heartbeats", || beats(console).len() >= before + more);
}

fn migrated_guest_goes_on(vcpus: u32, dirty: DirtyMode) {
    let busy = PayloadConfig { working_set_pages: 2048, ticks_per_beat: 2, ..PayloadConfig::default() };
    let (mut config, first_console) = payload(vcpus, busy);
    config.dirty = dirty;
    config.layout = MemoryLayout::new(vec![
        RamRegion { guest_base: 0, bytes: 16 << 20 },
        RamRegion { guest_base: 32 << 20, bytes: (16 << 20) + 0x3000 },
        RamRegion { guest_base: 4 << 30, bytes: 16 << 20 },
    ])
    .unwrap();
    let mut vm = Vm::create(&config).unwrap();
    vm.start().unwrap();
    let mut consoles = vec![first_console];
    for _ in 0..3 {
        run_until_beats(&vm, consoles.last().unwrap(), 4);
        let (destination, console) = twin(&vm, dirty);
        assert_eq!(destination.status().state, RunState::Incoming);
        assert!(destination.resume().is_err(), "an empty twin does not run");
        let state = migrate(&vm, &destination, 3);
        destination.restore_state(&state).unwrap();
        assert_eq!(state_differences(&state, &destination.save_state().unwrap()).unwrap(), Vec::<String>::new());
        destination.resume().unwrap();
        consoles.push(console);
        vm = destination;
    }
    run_until_beats(&vm, consoles.last().unwrap(), 4);
    vm.pause().unwrap();
    assert_eq!(vm.status().exit_code, None);
    let all: Vec<u64> = consoles.iter().flat_map(beats).collect();
    assert_eq!(all, (1..=all.len() as u64).collect::<Vec<_>>(), "a heartbeat is missing or came twice");
}

#[test]
fn a_busy_guest_moves_three_times_by_bitmap() {
    if kvm_usable("a_busy_guest_moves_three_times_by_bitmap") {
        migrated_guest_goes_on(2, DirtyMode::Bitmap);
        migrated_guest_goes_on(4, DirtyMode::Auto);
    }
}

#[test]
fn a_busy_guest_moves_three_times_by_dirty_ring() {
    if kvm_usable("a_busy_guest_moves_three_times_by_dirty_ring") {
        migrated_guest_goes_on(4, DirtyMode::Ring { entries: 1 << 16 });
    }
}

/// Some kernels write far past a full ring; then the record says so instead of losing pages.
#[test]
fn a_dirty_ring_that_runs_over_loses_no_page() {
    if kvm_usable("a_dirty_ring_that_runs_over_loses_no_page") {
        migrated_guest_goes_on(4, DirtyMode::Ring { entries: 1024 });
    }
}

#[test]
fn pausing_and_resuming_two_hundred_times_disturbs_nothing() {
    if !kvm_usable("pausing_and_resuming_two_hundred_times_disturbs_nothing") {
        return;
    }
    let (config, console) = payload(4, PayloadConfig { working_set_pages: 1024, ticks_per_second: 1000, ..PayloadConfig::default() });
    let vm = Vm::create(&config).unwrap();
    vm.start().unwrap();
    let mut longest = Duration::ZERO;
    for round in 0..200 {
        std::thread::sleep(Duration::from_micros(1500 + 37 * (round % 50)));
        let begun = Instant::now();
        vm.pause().unwrap();
        longest = longest.max(begun.elapsed());
        assert_eq!(vm.status().state, RunState::Paused, "{:?}", vm.status());
        let one = vm.save_state().unwrap();
        assert_eq!(state_differences(&one, &vm.save_state().unwrap()).unwrap(), Vec::<String>::new(), "a paused guest stands still");
        vm.resume().unwrap();
    }
    println!("longest pause {longest:?}");
    run_until_beats(&vm, &console, 3);
    vm.pause().unwrap();
    let seen = beats(&console);
    assert_eq!(seen, (1..=seen.len() as u64).collect::<Vec<_>>());
}

#[test]
fn a_throttled_guest_gets_less_done_and_loses_nothing() {
    if !kvm_usable("a_throttled_guest_gets_less_done_and_loses_nothing") {
        return;
    }
    let (config, console) = payload(1, PayloadConfig { working_set_pages: 64, ..PayloadConfig::default() });
    let vm = Vm::create(&config).unwrap();
    assert!(vm.throttle(100).is_err());
    vm.start().unwrap();
    run_until_beats(&vm, &console, 1);
    let passes = || {
        vm.pause().unwrap();
        let state = super::state::MachineState::decode(&vm.save_state().unwrap()).unwrap();
        vm.resume().unwrap();
        state.vcpus[0].regs.r15
    };
    let passes_in = |percent: u8| {
        vm.throttle(percent).unwrap();
        let before = passes();
        std::thread::sleep(Duration::from_millis(400));
        passes() - before
    };
    // A busy machine may starve the first measurement, so one of a few has to show it.
    let shown = (0..10).any(|_| {
        let (free, throttled) = (passes_in(0), passes_in(80));
        println!("{free} passes, throttled {throttled}");
        throttled * 2 < free
    });
    assert!(shown, "80 % less time is not seen");
    vm.throttle(99).unwrap();
    run_until_beats(&vm, &console, 1);
    vm.pause().unwrap();
    assert_eq!(vm.status().exit_code, None);
}

#[test]
fn a_guest_told_to_end_itself_does_and_one_told_to_quit_is_gone() {
    if !kvm_usable("a_guest_told_to_end_itself_does_and_one_told_to_quit_is_gone") {
        return;
    }
    let (config, console) = payload(2, PayloadConfig { working_set_pages: 64, ticks_per_beat: 1, beats: 5, ..PayloadConfig::default() });
    let vm = Vm::create(&config).unwrap();
    vm.start().unwrap();
    assert_eq!(vm.wait_exit(), ExitVerdict::Code(0));
    assert_eq!(beats(&console), [1, 2, 3, 4, 5]);
    let status = vm.status();
    assert_eq!((status.state, status.exit_code, status.last_line.as_deref()), (RunState::Ended, Some(0), Some("beat 5")));

    let (config, console) = payload(2, PayloadConfig { working_set_pages: 64, ticks_per_beat: 1, ..PayloadConfig::default() });
    let vm = Vm::create(&config).unwrap();
    vm.start().unwrap();
    run_until_beats(&vm, &console, 2);
    let waiter = vm.clone();
    let waiting = std::thread::spawn(move || waiter.wait_exit());
    vm.quit();
    assert_eq!(waiting.join().unwrap(), ExitVerdict::Quit);
}

/// Numbers for people; run it alone: `cargo test --lib vmm::kvm::tests::measure -- --ignored --nocapture`.
#[test]
#[ignore = "prints measurements"]
fn measure() {
    let (mut config, console) = payload(4, PayloadConfig { working_set_pages: 8192, ..PayloadConfig::default() });
    config.layout = MemoryLayout::flat((256 << 20) / PAGE_BYTES as u64).unwrap();
    for dirty in [DirtyMode::Bitmap, DirtyMode::Ring { entries: 1 << 16 }] {
        config.dirty = dirty;
        let vm = Vm::create(&config).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "beats", || beats(&console).len() > 5);
        let begun = Instant::now();
        vm.start_tracking().unwrap();
        println!("{dirty:?}: start tracking {:?}", begun.elapsed());
        for _ in 0..6 {
            std::thread::sleep(Duration::from_millis(50));
            let begun = Instant::now();
            let pages = vm.harvest().unwrap().len();
            println!("{dirty:?}: harvest {:?} for {pages} pages", begun.elapsed());
        }
        let (mut pauses, mut saves, mut bytes) = (Vec::new(), Vec::new(), 0);
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(10));
            let begun = Instant::now();
            vm.pause().unwrap();
            pauses.push(begun.elapsed());
            let begun = Instant::now();
            bytes = vm.save_state().unwrap().len();
            saves.push(begun.elapsed());
            vm.resume().unwrap();
        }
        pauses.sort();
        saves.sort();
        println!("pause of 4 vCPUs: median {:?}, worst {:?}; save: median {:?}; state {bytes} bytes", pauses[25], pauses[49], saves[25]);
        vm.pause().unwrap();
        let state = vm.save_state().unwrap();
        let (destination, _) = twin(&vm, dirty);
        let begun = Instant::now();
        destination.restore_state(&state).unwrap();
        println!("restore {:?}", begun.elapsed());
    }
}
