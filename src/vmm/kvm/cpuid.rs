//! What this host's KVM can give a guest, what a machine needs, and the difference by name.

use kvm_bindings::{CpuId, KVM_CAP_SREGS2, KVM_CAP_XSAVE2, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use super::names::bit_name;
use crate::hypervisor::Machine;
use crate::limits;
use crate::memory::MemoryLayout;
use crate::vmm::error::VmmError;

/// What `Machine::kind` says for machines of this VMM.
pub(super) const KIND: &str = "kvm";
const FORMAT: u32 = 1;
/// Devices of every machine; a host with other devices cannot take the guest.
const DEVICES: [&str; 4] = ["serial-16550@0x3f8:4", "debug-exit@0xf4", "i8042-reset@0x64", "irqchip+pit2"];

/// Requirements of a machine, in `Machine::profile`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Profile {
    pub(super) format: u32,
    pub(super) cpuid: Vec<Leaf>,
    pub(super) msrs: Vec<u32>,
    pub(super) tsc_khz: u32,
    pub(super) xsave_bytes: usize,
    pub(super) capabilities: Vec<String>,
    pub(super) devices: Vec<String>,
}

/// One CPUID leaf: function, index, flags, eax, ebx, ecx, edx.
pub(super) type Leaf = [u32; 7];

pub(super) fn leaf_of(entry: &kvm_cpuid_entry2) -> Leaf {
    [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// What this host can give.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// What this VMM asks KVM to show to a guest.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    /// What KVM then shows; a KVM that cannot hide the processor's features shows more.
    pub(super) shown: Vec<kvm_cpuid_entry2>,
    pub(super) msrs: Vec<u32>,
    pub(super) tsc_khz: u32,
    pub(super) tsc_scaling: bool,
    pub(super) xsave_bytes: usize,
    pub(super) sregs2: bool,
    pub(super) vcpus_max: usize,
    pub(super) kvmclock_ctrl: bool,
}

const REQUIRED: [(Cap, &str); 12] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

impl Host {
    /// Probes this host with an empty VM that is dropped again.
    pub(super) fn probe(kvm: &Kvm) -> Result<Self, VmmError> {
        for (capability, name) in REQUIRED {
            if !kvm.check_extension(capability) {
                return Err(VmmError::MissingCapability { capability: name });
            }
        }
        let raw = |capability: u32| kvm.check_extension_raw(capability.into());
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(VmmError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let mut cpuid = supported.as_slice().to_vec();
        adapt(&mut cpuid, kvm.check_extension(Cap::TscDeadlineTimer));
        let msrs = kvm.get_msr_index_list().map_err(VmmError::kvm("KVM_GET_MSR_INDEX_LIST"))?.as_slice().to_vec();
        let vm = kvm.create_vm().map_err(VmmError::kvm("KVM_CREATE_VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(VmmError::kvm("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(&Self::cpuid_of(&cpuid, 0, 1)?).map_err(VmmError::kvm("KVM_SET_CPUID2"))?;
        let shown = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(VmmError::kvm("KVM_GET_CPUID2"))?.as_slice().to_vec();
        Ok(Self {
            cpuid,
            shown,
            msrs,
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            xsave_bytes: usize::try_from(raw(KVM_CAP_XSAVE2)).unwrap_or(0).clamp(4096, limits::XSAVE_BYTES_MAX),
            sregs2: raw(KVM_CAP_SREGS2) > 0,
            vcpus_max: kvm.get_max_vcpus(),
            kvmclock_ctrl: kvm.check_extension(Cap::KvmclockCtrl),
        })
    }

    pub(super) fn open() -> Result<Self, VmmError> {
        Self::probe(&Kvm::new().map_err(|source| VmmError::NoKvm(source.into()))?)
    }

    pub(super) fn profile(&self, msrs: Vec<u32>) -> Profile {
        let mut capabilities: Vec<String> = REQUIRED.iter().map(|(_, name)| (*name).to_owned()).collect();
        if self.sregs2 {
            capabilities.push("KVM_CAP_SREGS2".to_owned());
        }
        Profile {
            format: FORMAT,
            cpuid: self.shown.iter().map(leaf_of).collect(),
            msrs,
            tsc_khz: self.tsc_khz,
            xsave_bytes: self.xsave_bytes,
            capabilities,
            devices: DEVICES.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    /// The CPUID table of one vCPU: the machine's, with that vCPU's APIC id where it belongs.
    pub(super) fn cpuid_of(table: &[kvm_cpuid_entry2], vcpu: u32, vcpus: u32) -> Result<CpuId, VmmError> {
        let mut entries = table.to_vec();
        for entry in &mut entries {
            match entry.function {
                1 => entry.ebx = (entry.ebx & 0xffff) | (vcpus << 16) | (vcpu << 24),
                0xb | 0x1f => entry.edx = vcpu,
                _ => {}
            }
        }
        CpuId::from_entries(&entries)
            .map_err(|_| VmmError::Config { field: "cpuid", reason: format!("{} leaves are too many for KVM", entries.len()) })
    }
}

/// Takes away what this VMM does not migrate (nested virtualisation, performance counters) and adds what it emulates.
fn adapt(cpuid: &mut Vec<kvm_cpuid_entry2>, tsc_deadline: bool) {
    const VMX: u32 = 1 << 5;
    const MONITOR: u32 = 1 << 3;
    const DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const SVM: u32 = 1 << 2;
    for entry in cpuid.iter_mut() {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ecx &= !(VMX | MONITOR | DEADLINE);
                entry.ecx |= HYPERVISOR | if tsc_deadline { DEADLINE } else { 0 };
            }
            (0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0x8000_0001, _) => entry.ecx &= !SVM,
            _ => {}
        }
    }
    cpuid.retain(|entry| entry.function != 0x8000_000a);
}

/// Registers of CPUID whose set bits are features: every bit a guest saw must exist at the destination.
/// Bits that follow the guest's own settings (OSXSAVE, OSPKE) are masked out.
const FEATURES: [(u32, u32, [u32; 4]); 12] = [
    (0x1, 0, [0, 0, !(1 << 27), u32::MAX]),
    (0x6, 0, [1 << 2, 0, 0, 0]),
    (0x7, 0, [0, u32::MAX, !(1 << 4), u32::MAX]),
    (0x7, 1, [u32::MAX, u32::MAX, u32::MAX, u32::MAX]),
    (0x7, 2, [0, 0, 0, u32::MAX]),
    (0xd, 0, [u32::MAX, 0, 0, u32::MAX]),
    (0xd, 1, [u32::MAX, 0, u32::MAX, u32::MAX]),
    (0x4000_0001, 0, [u32::MAX, 0, 0, u32::MAX]),
    (0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
    (0x8000_0007, 0, [0, 0, 0, u32::MAX]),
    (0x8000_0008, 0, [0, u32::MAX, 0, 0]),
    (0x8000_0021, 0, [u32::MAX, 0, 0, 0]),
];
const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

/// CPUID features of `wanted` that `offered` lacks, one line each.
pub(super) fn missing_cpuid(wanted: &[Leaf], offered: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut lacks = Vec::new();
    let vendor = |leaf: Leaf| (leaf[0] == 0).then_some([leaf[4], leaf[6], leaf[5]]);
    let (want, have) = (wanted.iter().copied().find_map(vendor), offered.iter().map(leaf_of).find_map(vendor));
    if want.is_some() && want != have {
        lacks.push(format!("CPU vendor: the guest was started on `{}`, this host is `{}`", vendor_name(want), vendor_name(have)));
    }
    for leaf in wanted {
        let Some((_, _, masks)) = FEATURES.iter().find(|(function, index, _)| (*function, *index) == (leaf[0], leaf[1])) else { continue };
        let have = offered.iter().map(leaf_of).find(|other| other[..2] == leaf[..2]).unwrap_or_default();
        for (register, mask) in masks.iter().enumerate() {
            let missing = leaf[3 + register] & mask & !have[3 + register];
            for bit in (0..u32::BITS).filter(|bit| missing & (1 << bit) != 0) {
                let name = bit_name(leaf[0], leaf[1], register, bit).map(|name| format!(" ({name})")).unwrap_or_default();
                lacks.push(format!("CPUID {:#x}.{} {} bit {bit}{name}", leaf[0], leaf[1], REGISTERS[register]));
            }
        }
    }
    lacks
}

fn vendor_name(words: Option<[u32; 3]>) -> String {
    let bytes = words.unwrap_or_default().into_iter().flat_map(u32::to_le_bytes);
    bytes.map(|byte| if byte.is_ascii_graphic() { char::from(byte) } else { '?' }).collect()
}

/// Physical address bits of a CPUID table; 36 is what the manual assumes without the leaf.
fn physical_bits<'a>(leaves: impl IntoIterator<Item = &'a Leaf>) -> u32 {
    leaves.into_iter().find(|leaf| leaf[0] == 0x8000_0008).map_or(36, |leaf| leaf[3] & 0xff)
}

/// What this host lacks to run `machine`, one line each; empty when it can. With `overcommit` memory is not asked for: a guest that has
/// touched little of its own needs little here.
#[must_use]
pub fn check_compatible(machine: &Machine, overcommit: bool) -> Vec<String> {
    match Host::open() {
        Ok(host) => lacks_of(machine, &host, available_memory_bytes().filter(|_| !overcommit)),
        Err(error) => vec![error.to_string()],
    }
}

/// The profile of a machine of this VMM, checked for its bounds.
pub(super) fn read_profile(machine: &Machine) -> Result<Profile, String> {
    if machine.kind != KIND {
        return Err(format!("machine of kind `{}`: expected `{KIND}`", machine.kind.escape_debug()));
    }
    let profile: Profile = serde_json::from_value(machine.profile.clone()).map_err(|error| format!("machine profile: {error}"))?;
    if profile.format != FORMAT {
        return Err(format!("machine profile has format {}: expected {FORMAT}", profile.format));
    }
    let counts = [
        ("CPUID leaves", profile.cpuid.len(), limits::CPUID_LEAVES_MAX),
        ("MSRs", profile.msrs.len(), limits::MSRS_MAX),
        ("bytes of XSAVE state", profile.xsave_bytes, limits::XSAVE_BYTES_MAX),
        ("capabilities", profile.capabilities.len(), limits::MACHINE_NAMES_MAX),
        ("devices", profile.devices.len(), limits::MACHINE_NAMES_MAX),
    ];
    for (what, count, most) in counts {
        if count > most {
            return Err(format!("machine profile has {count} {what}: expected at most {most}"));
        }
    }
    Ok(profile)
}

pub(super) fn lacks_of(machine: &Machine, host: &Host, memory_bytes: Option<u64>) -> Vec<String> {
    let profile = match read_profile(machine) {
        Ok(profile) => profile,
        Err(reason) => return vec![reason],
    };
    let mut lacks = Vec::new();
    match MemoryLayout::new(machine.regions.clone()) {
        Ok(layout) => {
            if let Some(available) = memory_bytes.filter(|available| *available < layout.bytes()) {
                lacks.push(format!("memory: the guest has {} bytes, this host has {available} bytes available", layout.bytes()));
            }
            let bits = physical_bits(&host.shown.iter().map(leaf_of).collect::<Vec<_>>()).min(63);
            let end = layout.regions().last().map_or(0, |region| region.guest_base + region.bytes);
            if end > 1 << bits {
                lacks.push(format!("memory: guest RAM ends at {end:#x}, this host's CPU addresses {bits} bits"));
            }
        }
        Err(error) => lacks.push(error.to_string()),
    }
    let vcpus_max = u32::try_from(host.vcpus_max).unwrap_or(u32::MAX).min(limits::VCPUS_MAX);
    if !(1..=vcpus_max).contains(&machine.vcpus) {
        lacks.push(format!("vCPUs: the guest has {}, this VMM runs 1 to {vcpus_max}", machine.vcpus));
    }
    lacks.extend(missing_cpuid(&profile.cpuid, &host.shown));
    lacks.extend(profile.msrs.iter().filter(|index| !host.msrs.contains(index)).map(|index| format!("MSR {index:#x}")));
    lacks.extend(tsc_lack(profile.tsc_khz, host));
    if profile.xsave_bytes > host.xsave_bytes {
        lacks.push(format!("XSAVE state of {} bytes: this host keeps {}", profile.xsave_bytes, host.xsave_bytes));
    }
    let offered = host.profile(Vec::new());
    lacks.extend(
        profile.capabilities.iter().filter(|name| !offered.capabilities.contains(name)).map(|name| format!("`{}`", name.escape_debug())),
    );
    lacks.extend(
        profile.devices.iter().filter(|name| !offered.devices.contains(name)).map(|name| format!("device `{}`", name.escape_debug())),
    );
    lacks.extend(
        offered.devices.iter().filter(|name| !profile.devices.contains(name)).map(|name| format!("a way to leave out device `{name}`")),
    );
    lacks
}

/// A guest that has calibrated its clock against one frequency cannot live with another.
/// KVM itself tolerates 250 parts per million before it scales.
fn tsc_lack(guest_khz: u32, host: &Host) -> Option<String> {
    let tolerated = u64::from(host.tsc_khz) * 250 / 1_000_000;
    let differ = u64::from(guest_khz.abs_diff(host.tsc_khz)) > tolerated;
    (guest_khz != 0 && differ && !host.tsc_scaling)
        .then(|| format!("TSC of {guest_khz} kHz: this host has {} kHz and cannot scale it", host.tsc_khz))
}

fn available_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
