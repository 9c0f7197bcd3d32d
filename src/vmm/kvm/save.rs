//! Saving and restoring: the order in which KVM wants state read and written.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_MSR_ENTRIES, Msrs, Xsave, kvm_clock_data, kvm_irqchip,
    kvm_msr_entry, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};

use super::cpuid::{self, Host, leaf_of};
use super::state::{IRQCHIPS, MachineState, Sregs, StateError, VcpuState, unfit};
use super::sys;
use super::vcpu::{Shared, lock};
use super::vm::Clocks;
use crate::hypervisor::{Generation, Machine};
use crate::limits;
use crate::vmm::error::VmmError;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

pub(super) fn read_clocks(vm: &VmFd) -> Result<Clocks, VmmError> {
    let pit = vm.get_pit2().map_err(VmmError::kvm("KVM_GET_PIT2"))?;
    let nanoseconds = vm.get_clock().map_err(VmmError::kvm("KVM_GET_CLOCK"))?.clock;
    Ok(Clocks { nanoseconds, pit })
}

/// kvmclock continues from where it stood; the timer begins a new period.
pub(super) fn start_clocks(vm: &VmFd, clocks: &Clocks) -> Result<(), VmmError> {
    let clock = kvm_clock_data { clock: clocks.nanoseconds, ..Default::default() };
    vm.set_clock(&clock).map_err(VmmError::kvm("KVM_SET_CLOCK"))?;
    vm.set_pit2(&clocks.pit).map_err(VmmError::kvm("KVM_SET_PIT2"))
}

/// State of a machine whose vCPUs are parked.
pub(super) fn save(
    vm: &VmFd,
    shared: &Shared,
    host: &Host,
    pages: u64,
    clocks: &Clocks,
    generation: Generation,
) -> Result<MachineState, VmmError> {
    let vcpus = shared.vcpus.iter().map(|vcpu| save_vcpu(&vcpu.lock(), host)).collect::<Result<_, _>>()?;
    let mut irqchips = [kvm_irqchip::default(); IRQCHIPS];
    for (chip, id) in irqchips.iter_mut().zip([KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]) {
        chip.chip_id = id;
        vm.get_irqchip(chip).map_err(VmmError::kvm("KVM_GET_IRQCHIP"))?;
    }
    let serial = lock(&shared.serial).snapshot();
    let (tsc_khz, clock_nanoseconds, pit) = (host.tsc_khz, clocks.nanoseconds, clocks.pit);
    Ok(MachineState { pages, tsc_khz, clock_nanoseconds, irqchips, pit, serial, generation, vcpus })
}

/// The run state comes first, because reading it lets KVM take in INIT and SIPI; events come last,
/// because reading other parts may change them.
fn save_vcpu(vcpu: &VcpuFd, host: &Host) -> Result<VcpuState, VmmError> {
    let mp_state = vcpu.get_mp_state().map_err(VmmError::kvm("KVM_GET_MP_STATE"))?;
    let regs = vcpu.get_regs().map_err(VmmError::kvm("KVM_GET_REGS"))?;
    let sregs = if host.sregs2 {
        Sregs::New(sys::get_sregs2(vcpu).map_err(VmmError::kvm("KVM_GET_SREGS2"))?)
    } else {
        Sregs::Old(vcpu.get_sregs().map_err(VmmError::kvm("KVM_GET_SREGS"))?)
    };
    let xsave = save_xsave(vcpu, host)?;
    let xcrs = vcpu.get_xcrs().map_err(VmmError::kvm("KVM_GET_XCRS"))?;
    let debugregs = vcpu.get_debug_regs().map_err(VmmError::kvm("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(VmmError::kvm("KVM_GET_LAPIC"))?;
    let cpuid = vcpu.get_cpuid2(limits::CPUID_LEAVES_MAX).map_err(VmmError::kvm("KVM_GET_CPUID2"))?.as_slice().to_vec();
    let msrs = read_msrs(vcpu, &host.msrs)?;
    let events = vcpu.get_vcpu_events().map_err(VmmError::kvm("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuState { cpuid, mp_state, regs, sregs, xsave, xcrs, debugregs, lapic, msrs, events })
}

fn extra_words(bytes: usize) -> usize {
    bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>())
}

fn save_xsave(vcpu: &VcpuFd, host: &Host) -> Result<Vec<u32>, VmmError> {
    if host.xsave_bytes <= size_of::<kvm_xsave>() {
        return Ok(vcpu.get_xsave().map_err(VmmError::kvm("KVM_GET_XSAVE"))?.region.to_vec());
    }
    let mut xsave = empty_xsave(host)?;
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 names, and nothing in this process enables features after that.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(VmmError::kvm("KVM_GET_XSAVE2"))?;
    Ok([&xsave.as_fam_struct_ref().xsave.region, xsave.as_slice()].concat())
}

fn empty_xsave(host: &Host) -> Result<Xsave, VmmError> {
    Xsave::new(extra_words(host.xsave_bytes))
        .map_err(|_| VmmError::Config { field: "xsave", reason: format!("{} bytes cannot be allocated", host.xsave_bytes) })
}

/// The values of every MSR of `indices` that this vCPU has.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VmmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let entries: Vec<_> = batch.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = msr_list(&entries)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(VmmError::kvm("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice().iter().take(read));
        // KVM stops at the first MSR that this vCPU does not have: leave it out and go on.
        let done = if read < batch.len() { read + 1 } else { read };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(values)
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, VmmError> {
    Msrs::from_entries(entries).map_err(|_| VmmError::Config { field: "msrs", reason: format!("{} are too many for KVM", entries.len()) })
}

/// MSRs of `indices` that can be read on this vCPU.
pub(super) fn readable_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<u32>, VmmError> {
    Ok(read_msrs(vcpu, indices)?.iter().map(|msr| msr.index).collect())
}

/// Reads saved state and checks that this machine can take it. Applies nothing.
pub(super) fn check(bytes: &[u8], machine: &Machine, host: &Host, pages: u64) -> Result<MachineState, StateError> {
    let state = MachineState::decode(bytes)?;
    if u32::try_from(state.vcpus.len()) != Ok(machine.vcpus) {
        return Err(unfit("machine", 0, format!("expected {} vCPUs, got {}", machine.vcpus, state.vcpus.len())));
    }
    if state.pages != pages {
        return Err(unfit("machine", 0, format!("expected {pages} pages of RAM, got {}", state.pages)));
    }
    if state.tsc_khz != host.tsc_khz && !host.tsc_scaling && state.tsc_khz.abs_diff(host.tsc_khz) > host.tsc_khz / 4000 {
        return Err(unfit("machine", 0, format!("expected a TSC of {} kHz, got {}", host.tsc_khz, state.tsc_khz)));
    }
    for (index, vcpu) in state.vcpus.iter().enumerate() {
        let leaves: Vec<_> = vcpu.cpuid.iter().map(leaf_of).collect();
        if let Some(missing) = cpuid::missing_cpuid(&leaves, &host.shown).first() {
            return Err(unfit("cpuid", index, format!("this host lacks {missing}")));
        }
        let apic_id = leaves.iter().find(|leaf| leaf[0] == 1).map(|leaf| leaf[4] >> 24);
        if apic_id.is_none_or(|id| usize::try_from(id) != Ok(index)) {
            return Err(unfit("cpuid", index, "the APIC id is another vCPU's".to_owned()));
        }
        if let Some(msr) = vcpu.msrs.iter().find(|msr| !host.msrs.contains(&msr.index)) {
            return Err(unfit("msrs", index, format!("MSR {:#x} is not in this kernel's list", msr.index)));
        }
        if vcpu.xsave.len() * size_of::<u32>() > host.xsave_bytes {
            let actual = vcpu.xsave.len() * size_of::<u32>();
            return Err(unfit("xsave", index, format!("expected at most {} bytes, got {actual}", host.xsave_bytes)));
        }
        if matches!(vcpu.sregs, Sregs::New(_)) && !host.sregs2 {
            return Err(unfit("sregs2", index, "this kernel has no KVM_CAP_SREGS2".to_owned()));
        }
    }
    Ok(state)
}

/// Applies checked state, but for the clocks, which begin with the resume.
pub(super) fn restore(vm: &VmFd, shared: &Shared, host: &Host, state: &MachineState) -> Result<(), VmmError> {
    for ((number, vcpu), saved) in (0u32..).zip(&shared.vcpus).zip(&state.vcpus) {
        restore_vcpu(&vcpu.lock(), number, saved, host, state.tsc_khz)?;
    }
    for chip in &state.irqchips {
        vm.set_irqchip(chip).map_err(refused("irqchip", 0))?;
    }
    lock(&shared.serial).restore(&state.serial);
    Ok(())
}

fn refused(part: &'static str, vcpu: u32) -> impl FnOnce(vmm_sys_util::errno::Error) -> VmmError {
    move |source| VmmError::Apply { part, vcpu, source: source.into() }
}

/// CPUID first, because everything after is checked against it; the run state before registers; the LAPIC
/// after its base in the special registers; MSRs after the LAPIC, for the deadline timer; events last.
fn restore_vcpu(vcpu: &VcpuFd, number: u32, state: &VcpuState, host: &Host, tsc_khz: u32) -> Result<(), VmmError> {
    let table = kvm_bindings::CpuId::from_entries(&state.cpuid)
        .map_err(|_| VmmError::State(unfit("cpuid", 0, format!("{} leaves are too many for KVM", state.cpuid.len()))))?;
    vcpu.set_cpuid2(&table).map_err(refused("cpuid", number))?;
    if tsc_khz != host.tsc_khz && tsc_khz != 0 && host.tsc_scaling {
        vcpu.set_tsc_khz(tsc_khz).map_err(refused("TSC frequency", number))?;
    }
    vcpu.set_mp_state(state.mp_state).map_err(refused("mp_state", number))?;
    vcpu.set_regs(&state.regs).map_err(refused("regs", number))?;
    match &state.sregs {
        Sregs::Old(sregs) => vcpu.set_sregs(sregs).map_err(refused("sregs", number))?,
        Sregs::New(sregs) => sys::set_sregs2(vcpu, sregs).map_err(refused("sregs2", number))?,
    }
    restore_xsave(vcpu, number, &state.xsave, host)?;
    vcpu.set_xcrs(&state.xcrs).map_err(refused("xcrs", number))?;
    vcpu.set_debug_regs(&state.debugregs).map_err(refused("debugregs", number))?;
    vcpu.set_lapic(&state.lapic).map_err(refused("lapic", number))?;
    restore_msrs(vcpu, number, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events).map_err(refused("events", number))
}

fn restore_xsave(vcpu: &VcpuFd, number: u32, words: &[u32], host: &Host) -> Result<(), VmmError> {
    let mut xsave = empty_xsave(host)?;
    let (legacy, extra) = words.split_at(words.len().min(size_of::<kvm_xsave>() / size_of::<u32>()));
    xsave.as_mut_slice().iter_mut().zip(extra).for_each(|(word, saved)| *word = *saved);
    // SAFETY: only the fixed part is written; the length of the flexible part stays as allocated.
    let fixed = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    fixed.iter_mut().zip(legacy).for_each(|(word, saved)| *word = *saved);
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 names, so KVM reads nothing behind it.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(refused("xsave", number))
}

/// The TSC first and the deadline that is counted in it last. An MSR that the kernel will not write is
/// fine if it has the wanted value already.
fn restore_msrs(vcpu: &VcpuFd, number: u32, saved: &[kvm_msr_entry]) -> Result<(), VmmError> {
    let rank = |index: u32| match index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    };
    let mut msrs = saved.to_vec();
    msrs.sort_by_key(|msr| rank(msr.index));
    let mut rest = msrs.as_slice();
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let written = vcpu.set_msrs(&msr_list(batch)?).map_err(refused("msrs", number))?;
        let mut done = written;
        if let Some(odd) = batch.get(written) {
            let same = read_msrs(vcpu, &[odd.index])?.first().is_some_and(|now| now.data == odd.data);
            if !same {
                let text = format!("MSR {:#x} takes another value only", odd.index);
                return Err(VmmError::Apply { part: "msrs", vcpu: number, source: std::io::Error::other(text) });
            }
            done += 1;
        }
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(())
}
