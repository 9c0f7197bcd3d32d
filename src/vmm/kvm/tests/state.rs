//! Hostile state: refused with a reason, never a panic, nothing applied.

use kvm_bindings::{kvm_cpuid_entry2, kvm_irqchip, kvm_msr_entry};
use proptest::prelude::*;

use super::super::state::{MachineState, Sregs, StateError, VcpuState};
use super::*;
use crate::hypervisor::Generation;
use crate::types::GenerationId;
use crate::vmm::serial::SerialSnapshot;

fn sample(vcpus: usize) -> MachineState {
    let vcpu = VcpuState {
        cpuid: vec![kvm_cpuid_entry2 { function: 1, ..Default::default() }],
        mp_state: Default::default(),
        regs: kvm_bindings::kvm_regs { rip: 0x1234, r15: 77, ..Default::default() },
        sregs: Sregs::New(Default::default()),
        xsave: vec![0; 1024],
        xcrs: Default::default(),
        debugregs: Default::default(),
        lapic: Default::default(),
        msrs: vec![kvm_msr_entry { index: 0x10, data: 5, ..Default::default() }],
        events: Default::default(),
    };
    let mut irqchips = [kvm_irqchip::default(); 3];
    (0..).zip(&mut irqchips).for_each(|(id, chip)| chip.chip_id = id);
    MachineState {
        pages: 16,
        tsc_khz: 1_000_000,
        clock_nanoseconds: 9,
        irqchips,
        pit: Default::default(),
        serial: SerialSnapshot { registers: [3; 9], received: b"in".to_vec(), line: b"bea".to_vec() },
        generation: Generation { id: GenerationId([6; 16]), count: 2, disruptions: 3 },
        vcpus: vec![vcpu; vcpus],
    }
}

#[test]
fn state_survives_encoding() {
    for vcpus in [1, 8] {
        let bytes = sample(vcpus).encode();
        let back = MachineState::decode(&bytes).unwrap();
        assert_eq!(back.encode(), bytes);
        assert_eq!(back.generation, sample(1).generation);
        assert_eq!((back.vcpus.len(), back.vcpus[0].regs.r15, back.serial.line.as_slice()), (vcpus, 77, &b"bea"[..]));
    }
}

#[test]
fn state_cut_off_at_any_byte_is_refused() {
    let bytes = sample(1).encode();
    for length in 0..bytes.len() {
        assert!(MachineState::decode(&bytes[..length]).is_err(), "{length}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(matches!(MachineState::decode(&longer), Err(StateError::Length { .. })));
}

#[test]
fn values_that_no_machine_has_are_refused_by_name() {
    type Change = fn(&mut MachineState);
    let cases: [(Change, &str); 12] = [
        (|state| state.vcpus.clear(), "vCPUs"),
        (|state| state.vcpus = vec![state.vcpus[0].clone(); 9], "vCPUs"),
        (|state| state.irqchips[1].chip_id = 2, "irqchip"),
        (|state| state.vcpus[0].mp_state.mp_state = 5, "mp_state"),
        (|state| state.vcpus[0].xcrs.nr_xcrs = 17, "xcrs"),
        (|state| state.vcpus[0].xsave.truncate(1023), "xsave"),
        (|state| state.vcpus[0].msrs = vec![state.vcpus[0].msrs[0]; 2], "MSR 0x10 twice"),
        (|state| state.vcpus[0].cpuid.clear(), "cpuid"),
        (|state| state.serial.received = vec![0; 65], "serial"),
        (|state| state.generation.id = GenerationId([0; 16]), "generation"),
        (|state| state.generation.count = 0, "generation"),
        (|state| state.generation.disruptions = u64::MAX, "generation"),
    ];
    for (change, name) in cases {
        let mut state = sample(1);
        change(&mut state);
        let error = MachineState::decode(&state.encode()).unwrap_err().to_string();
        assert!(error.contains(name), "{error} should name {name}");
    }
}

#[test]
fn another_version_and_another_file_are_told_apart() {
    let mut bytes = sample(1).encode();
    bytes[8] = 3;
    assert_eq!(MachineState::decode(&bytes).unwrap_err(), StateError::Version { actual: 3 });
    assert_eq!(MachineState::decode(b"\x7fELF_this_is_not_state").unwrap_err(), StateError::Magic);
}

#[test]
fn differences_are_named_and_running_clocks_are_none() {
    let one = sample(2);
    let mut other = one.clone();
    other.vcpus[1].msrs[0].data += 1000;
    other.vcpus[1].lapic.regs[0x390] = 7;
    other.pit.channels[0].count_load_time = 5;
    other.clock_nanoseconds += 1;
    assert_eq!(state_differences(&one.encode(), &other.encode()).unwrap(), Vec::<String>::new());
    other.vcpus[1].lapic.regs[0x310] = 1;
    other.vcpus[0].regs.rip += 1;
    other.irqchips[2].pad = 0;
    other.generation.count += 1;
    let found = state_differences(&one.encode(), &other.encode()).unwrap();
    assert_eq!(found, ["generation", "registers of vCPU 0", "LAPIC register 0x310 of vCPU 1, 0x0 and 0x1"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn damaged_state_never_panics(at in 0usize..10_000, bytes in prop::collection::vec(any::<u8>(), 1..9)) {
        let mut state = sample(1).encode();
        let at = at % state.len();
        for (place, byte) in state[at..].iter_mut().zip(bytes) {
            *place = byte;
        }
        let _ = MachineState::decode(&state);
    }

    #[test]
    fn noise_behind_a_right_header_never_panics(sections in any::<u16>(), noise in prop::collection::vec(any::<u8>(), 0..400)) {
        let total = u32::try_from(16 + noise.len()).unwrap();
        let header = [&b"SEALVMST"[..], &2u16.to_le_bytes(), &sections.to_le_bytes(), &total.to_le_bytes(), &noise].concat();
        prop_assert!(MachineState::decode(&header).is_err());
    }
}

#[test]
fn state_that_does_not_fit_the_machine_is_refused_and_the_twin_still_takes_the_right_one() {
    if !kvm_usable("state_that_does_not_fit_the_machine_is_refused_and_the_twin_still_takes_the_right_one") {
        return;
    }
    let (mut config, console) = payload(2, PayloadConfig { working_set_pages: 64, ticks_per_beat: 2, ..PayloadConfig::default() });
    config.layout = MemoryLayout::flat(1024).unwrap();
    let source = Vm::create(&config).unwrap();
    assert!(source.restore_state(&source.save_state().unwrap()).is_err(), "a VM that has a guest takes no other");
    source.start().unwrap();
    assert!(source.save_state().is_err(), "a running guest has no state");
    run_until_beats(&source, &console, 2);
    source.pause().unwrap();
    let right = source.save_state().unwrap();
    let (destination, console) = twin(&source, DirtyMode::Auto);
    copy_pages(&source, &destination, &PageSet::full(1024));
    type Change = fn(&mut MachineState);
    let cases: [(Change, &str); 7] = [
        (|state| state.vcpus.truncate(1), "expected 2 vCPUs, got 1"),
        (|state| state.pages -= 1, "pages of RAM"),
        (|state| state.tsc_khz *= 2, "TSC"),
        (|state| state.vcpus.swap(0, 1), "APIC id"),
        (|state| state.vcpus[1].msrs[0].index = 0xdead_beef, "MSR 0xdeadbeef"),
        (|state| state.vcpus[1].xsave.resize(4096, 0), "xsave"),
        (|state| state.vcpus[0].cpuid.iter_mut().filter(|leaf| leaf.function == 7).for_each(|leaf| leaf.edx = u32::MAX), "CPUID 0x7.0 edx"),
    ];
    for (change, name) in cases {
        let mut state = MachineState::decode(&right).unwrap();
        change(&mut state);
        let error = destination.restore_state(&state.encode()).unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default());
        assert!(text.contains(name), "{text} should name {name}");
        assert_eq!(destination.status().state, RunState::Incoming);
    }
    assert!(destination.restore_state(&right[..right.len() - 1]).is_err());
    destination.restore_state(&right).unwrap();
    destination.resume().unwrap();
    run_until_beats(&destination, &console, 2);
}

#[test]
fn state_that_kvm_refuses_half_way_leaves_a_vm_that_never_runs() {
    if !kvm_usable("state_that_kvm_refuses_half_way_leaves_a_vm_that_never_runs") {
        return;
    }
    let (mut config, _) = payload(1, PayloadConfig { working_set_pages: 64, ..PayloadConfig::default() });
    config.layout = MemoryLayout::flat(1024).unwrap();
    let source = Vm::create(&config).unwrap();
    let (destination, _) = twin(&source, DirtyMode::Auto);
    let mut state = MachineState::decode(&source.save_state().unwrap()).unwrap();
    match &mut state.vcpus[0].sregs {
        Sregs::New(sregs) => sregs.cr4 = u64::MAX,
        Sregs::Old(sregs) => sregs.cr4 = u64::MAX,
    }
    let error = destination.restore_state(&state.encode()).unwrap_err();
    assert!(matches!(error, crate::vmm::VmmError::Apply { part: "sregs" | "sregs2", vcpu: 0, .. }), "{error}");
    assert!(destination.resume().is_err() && destination.restore_state(&source.save_state().unwrap()).is_err());
}

#[test]
fn an_interrupt_in_service_is_kept_and_the_priority_that_follows_from_it_is_no_difference() {
    if !kvm_usable("an_interrupt_in_service_is_kept_and_the_priority_that_follows_from_it_is_no_difference") {
        return;
    }
    let (mut config, _) = payload(1, PayloadConfig { working_set_pages: 64, ..PayloadConfig::default() });
    config.layout = MemoryLayout::flat(1024).unwrap();
    let source = Vm::create(&config).unwrap();
    let mut state = MachineState::decode(&source.save_state().unwrap()).unwrap();
    // Vector 0x40 is bit 0 of the third in-service register, and makes the processor priority 0x40.
    state.vcpus[0].lapic.regs[0x120] = 1;
    state.vcpus[0].lapic.regs[0xa0] = 0x40;
    let (destination, _) = twin(&source, DirtyMode::Auto);
    destination.restore_state(&state.encode()).unwrap();
    let taken = destination.save_state().unwrap();
    assert_eq!(state_differences(&state.encode(), &taken).unwrap(), Vec::<String>::new());
    assert_eq!(MachineState::decode(&taken).unwrap().vcpus[0].lapic.regs[0x120], 1);
}
