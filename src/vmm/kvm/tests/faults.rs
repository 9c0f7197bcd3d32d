//! Planted faults: each kind of loss or mix-up is reported by the guest itself.

use super::super::state::{MachineState, VcpuState};
use super::*;
use crate::vmm::exit::ExitVerdict;
use crate::vmm::payload::PayloadFault;

const OWN_PAGES: u64 = 0x100;
const WORKING_SET: u64 = 0x200;
const PASSES: usize = 0x00;
/// Pages that faults are planted on.
const PLANTED: [u64; 5] = [WORKING_SET, WORKING_SET + 3, WORKING_SET + 77, WORKING_SET + 100, WORKING_SET + 127];
const SHARED: u64 = 9;
const TICKS: usize = 0x00;
const LAST_TICK: usize = 0x10;
const BEATS: usize = 0x28;
const INFO: u64 = 8;
const LEAST_SPAN: usize = 0x30;

/// A paused guest, its state now, and its state and memory some passes earlier.
struct Moments {
    source: Vm,
    earlier: MachineState,
    earlier_ram: Vec<u8>,
    now: MachineState,
}

fn busy_guest() -> Moments {
    let busy = PayloadConfig { working_set_pages: 128, ticks_per_beat: 2, ..PayloadConfig::default() };
    let (mut config, console) = payload(2, busy);
    config.layout = MemoryLayout::flat(1024).unwrap();
    let source = Vm::create(&config).unwrap();
    source.start().unwrap();
    run_until_beats(&source, &console, 3);
    source.pause().unwrap();
    let earlier = MachineState::decode(&source.save_state().unwrap()).unwrap();
    let mut earlier_ram = vec![0; 1024 * PAGE_BYTES];
    source.ram().read(PageNumber(0), &mut earlier_ram).unwrap();
    loop {
        source.resume().unwrap();
        run_until_beats(&source, &console, 2);
        source.pause().unwrap();
        let now = MachineState::decode(&source.save_state().unwrap()).unwrap();
        // The LAPIC remembers eight bits of the number of passes.
        // A fault on the page that a vCPU is writing just now could be written over before it is looked at.
        let elsewhere = now.vcpus.iter().all(|vcpu| !PLANTED.contains(&(vcpu.regs.rdi / PAGE_BYTES as u64)));
        let distinct = now.vcpus.iter().zip(&earlier.vcpus).all(|(a, b)| a.regs.r15 > b.regs.r15 && a.regs.r15 % 256 != b.regs.r15 % 256);
        if distinct && elsewhere {
            return Moments { source, earlier, earlier_ram, now };
        }
    }
}

/// Moves the guest with one fault planted, and says what the guest then reports.
fn verdict_with(moments: &Moments, plant: impl FnOnce(&mut MachineState, &Vm)) -> (PayloadFault, u32) {
    verdict_within(moments, WAIT, plant).expect("the guest did not notice")
}

/// The same for a part of vCPU state. A guest that was paused between looking at that part and stamping it anew
/// overwrites the fault unseen; another moment is taken then.
fn verdict_with_stale(plant: impl Fn(&mut MachineState, &MachineState)) -> (PayloadFault, u32) {
    let tries = (0..4).find_map(|_| {
        let moments = busy_guest();
        verdict_within(&moments, WAIT / 6, |state, _| plant(state, &moments.earlier))
    });
    tries.expect("the guest did not notice, whenever it was paused")
}

fn verdict_within(moments: &Moments, wait: Duration, plant: impl FnOnce(&mut MachineState, &Vm)) -> Option<(PayloadFault, u32)> {
    let (destination, _console) = twin(&moments.source, DirtyMode::Auto);
    copy_pages(&moments.source, &destination, &PageSet::full(1024));
    let mut state = moments.now.clone();
    plant(&mut state, &destination);
    destination.restore_state(&state.encode()).unwrap();
    destination.resume().unwrap();
    let waiter = destination.clone();
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || sender.send(waiter.wait_exit()));
    match receiver.recv_timeout(wait).ok()? {
        ExitVerdict::Code(code) => Some(PayloadFault::from_code(code).unwrap_or_else(|| panic!("code {code}"))),
        other => panic!("{other:?}"),
    }
}

fn page_of_earlier(moments: &Moments, page: u64) -> &[u8] {
    let at = usize::try_from(page).unwrap() * PAGE_BYTES;
    &moments.earlier_ram[at..at + PAGE_BYTES]
}

#[test]
fn a_flipped_bit_and_a_skipped_page_are_found_by_the_guest() {
    if !kvm_usable("a_flipped_bit_and_a_skipped_page_are_found_by_the_guest") {
        return;
    }
    let moments = busy_guest();
    for (page, offset) in [(WORKING_SET + 3, 0), (WORKING_SET + 100, 0x803), (WORKING_SET + 127, 0xfff)] {
        let (fault, vcpu) = verdict_with(&moments, |_, destination| {
            let mut bytes = vec![0; PAGE_BYTES];
            destination.ram().read(PageNumber(page), &mut bytes).unwrap();
            bytes[offset] ^= 0x10;
            destination.ram().write(PageNumber(page), &bytes).unwrap();
        });
        assert_eq!((fault, vcpu), (PayloadFault::CorruptPage, u32::from(page >= WORKING_SET + 64)), "page {page}");
    }
    for page in [WORKING_SET, WORKING_SET + 77] {
        let (fault, vcpu) = verdict_with(&moments, |_, destination| {
            destination.ram().write(PageNumber(page), page_of_earlier(&moments, page)).unwrap();
        });
        assert_eq!((fault, vcpu), (PayloadFault::WrongPass, u32::from(page >= WORKING_SET + 64)), "page {page}");
    }
    let (fault, vcpu) = verdict_with(&moments, |_, destination| {
        let own = page_of_earlier(&moments, OWN_PAGES + 2).to_vec();
        assert_ne!(own[PASSES..PASSES + 8], moments.now.vcpus[1].regs.r15.to_le_bytes());
        destination.ram().write(PageNumber(OWN_PAGES + 2), &own).unwrap();
    });
    assert!(matches!((fault, vcpu), (PayloadFault::Registers | PayloadFault::TickCount, 1)), "{fault:?} {vcpu}");
}

#[test]
fn each_part_of_stale_vcpu_state_is_found_by_the_guest() {
    if !kvm_usable("each_part_of_stale_vcpu_state_is_found_by_the_guest") {
        return;
    }
    let stale = |part: fn(&mut VcpuState, &VcpuState), vcpu: usize| {
        verdict_with_stale(|state, earlier| part(&mut state.vcpus[vcpu], &earlier.vcpus[vcpu]))
    };
    assert_eq!(stale(|now, earlier| now.lapic = earlier.lapic, 1), (PayloadFault::Lapic, 1));
    assert_eq!(stale(|now, earlier| now.xsave.clone_from(&earlier.xsave), 1), (PayloadFault::Xmm, 1));
    assert_eq!(stale(|now, earlier| now.debugregs = earlier.debugregs, 1), (PayloadFault::DebugRegisters, 1));
    assert_eq!(stale(|now, earlier| now.sregs = earlier.sregs, 1), (PayloadFault::SpecialRegisters, 1));
    assert_eq!(stale(|now, earlier| now.msrs.clone_from(&earlier.msrs), 1), (PayloadFault::Msr, 1));
    for vcpu in [1, 0] {
        let (fault, reporter) = stale(|now, earlier| now.regs = earlier.regs, vcpu);
        assert_eq!(reporter, u32::try_from(vcpu).unwrap(), "{fault:?}");
    }
}

/// Not by the saved TSC: some KVMs let the guest read the host's, whatever offset was set.
#[test]
fn a_clock_that_goes_back_and_doubled_ticks_are_found_by_the_guest() {
    if !kvm_usable("a_clock_that_goes_back_and_doubled_ticks_are_found_by_the_guest") {
        return;
    }
    let moments = busy_guest();
    let with_page = |page: u64, change: fn(&mut [u8])| {
        verdict_with(&moments, |_, destination| {
            let mut bytes = vec![0; PAGE_BYTES];
            destination.ram().read(PageNumber(page), &mut bytes).unwrap();
            change(&mut bytes);
            destination.ram().write(PageNumber(page), &bytes).unwrap();
        })
    };
    let with_shared = |change: fn(&mut [u8])| with_page(SHARED, change);
    assert_eq!(with_shared(|shared| shared[LAST_TICK + 7] = 0x7f), (PayloadFault::TickRate, 0), "now is before the last tick");
    // The guest is told of a timer with a far longer period than the real one: every tick comes too early.
    assert_eq!(with_page(INFO, |info| info[LEAST_SPAN + 5] = 1), (PayloadFault::TickRate, 0), "ticks faster than the timer");
    assert_eq!(with_shared(|shared| shared[TICKS] ^= 1), (PayloadFault::TickCount, 0), "a tick more or less");
    let beat = with_shared(|shared| shared[BEATS] ^= 1);
    assert_eq!(beat, (PayloadFault::Beat, 0), "a heartbeat more or less");
}

#[test]
fn a_guest_without_a_planted_fault_goes_on() {
    if !kvm_usable("a_guest_without_a_planted_fault_goes_on") {
        return;
    }
    let moments = busy_guest();
    let (destination, console) = twin(&moments.source, DirtyMode::Auto);
    copy_pages(&moments.source, &destination, &PageSet::full(1024));
    destination.restore_state(&moments.now.encode()).unwrap();
    destination.resume().unwrap();
    run_until_beats(&destination, &console, 4);
}
