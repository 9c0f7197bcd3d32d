//! The saved state of a machine: format, checks, comparison. Nothing here talks to KVM.
//!
//! Layout, little endian: magic (8 bytes), version u16, sections u16, total bytes u32; then each
//! section: tag u16, index u16 (vCPU or chip), bytes u32, body. Sections come in one fixed order, each
//! exactly once; bodies are structures of KVM's x86 ABI. A reader checks everything before it hands out
//! a [`MachineState`], so what reaches KVM has the right shape; KVM itself checks the values.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};

use super::pod::{Pod, bytes_of, from_bytes};
use crate::hypervisor::Generation;
use crate::limits;
use crate::vmm::serial::SerialSnapshot;

const MAGIC: [u8; 8] = *b"SEALVMST";
const VERSION: u16 = 2;
const HEADER_BYTES: usize = 16;
/// Interrupt controllers: two PICs and the IOAPIC.
pub(super) const IRQCHIPS: usize = 3;
const SECTIONS_VM: usize = 4 + IRQCHIPS;
const SECTIONS_VCPU: usize = 10;
const XSAVE_LEGACY_BYTES: usize = 4096;
/// KVM_MP_STATE_SIPI_RECEIVED, the last that x86 has.
const MP_STATE_MAX: u32 = 4;

/// State that was refused, with where and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Not saved state at all.
    #[error("no saved state: expected it to begin with `SEALVMST`")]
    Magic,
    /// Saved by a version that this one does not read.
    #[error("saved state has version {actual}: expected {VERSION}")]
    Version {
        /// The version it has.
        actual: u16,
    },
    /// Cut off, or more than it says.
    #[error("saved state has {actual} bytes: expected {expected}")]
    Length {
        /// Bytes by its header, or the limit.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
    /// A section is missing, repeated, out of order or unknown.
    #[error("saved state has section {actual_tag}.{actual_index} where `{expected}` {index} belongs")]
    Section {
        /// Which section was expected.
        expected: &'static str,
        /// Of which vCPU or chip.
        index: u16,
        /// Tag found.
        actual_tag: u16,
        /// Index found.
        actual_index: u16,
    },
    /// A section has the wrong size.
    #[error("section `{section}` {index} has {actual} bytes: expected {expected}")]
    SectionBytes {
        /// Which section.
        section: &'static str,
        /// Of which vCPU or chip.
        index: u16,
        /// What fits.
        expected: String,
        /// Bytes it has.
        actual: usize,
    },
    /// A value that no machine can have, or not this one.
    #[error("section `{section}` {index}: {reason}")]
    Value {
        /// Which section.
        section: &'static str,
        /// Of which vCPU or chip.
        index: u16,
        /// What was expected and what was found.
        reason: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Tag {
    Machine = 1,
    Irqchip = 2,
    Pit = 3,
    Serial = 4,
    Cpuid = 5,
    MpState = 6,
    Regs = 7,
    Sregs = 8,
    Sregs2 = 9,
    Xsave = 10,
    Xcrs = 11,
    Debugregs = 12,
    Lapic = 13,
    Msrs = 14,
    Events = 15,
    Generation = 16,
}

impl Tag {
    fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Irqchip => "irqchip",
            Self::Pit => "pit",
            Self::Serial => "serial",
            Self::Cpuid => "cpuid",
            Self::MpState => "mp_state",
            Self::Regs => "regs",
            Self::Sregs => "sregs",
            Self::Sregs2 => "sregs2",
            Self::Xsave => "xsave",
            Self::Xcrs => "xcrs",
            Self::Debugregs => "debugregs",
            Self::Lapic => "lapic",
            Self::Msrs => "msrs",
            Self::Events => "events",
            Self::Generation => "generation",
        }
    }
}

/// Special registers, in the form this host has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Sregs {
    Old(kvm_sregs),
    New(kvm_sregs2),
}

/// Everything about one vCPU.
#[derive(Debug, Clone)]
pub(super) struct VcpuState {
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: Sregs,
    pub(super) xsave: Vec<u32>,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debugregs: kvm_debugregs,
    pub(super) lapic: kvm_lapic_state,
    pub(super) msrs: Vec<kvm_msr_entry>,
    pub(super) events: kvm_vcpu_events,
}

/// Everything about a machine but its RAM.
#[derive(Debug, Clone)]
pub(super) struct MachineState {
    pub(super) pages: u64,
    pub(super) tsc_khz: u32,
    pub(super) clock_nanoseconds: u64,
    pub(super) irqchips: [kvm_irqchip; IRQCHIPS],
    pub(super) pit: kvm_pit_state2,
    pub(super) serial: SerialSnapshot,
    pub(super) generation: Generation,
    pub(super) vcpus: Vec<VcpuState>,
}

struct Writer {
    bytes: Vec<u8>,
    sections: u16,
}

impl Writer {
    fn section(&mut self, tag: Tag, index: usize, body: &[u8]) {
        self.bytes.extend((tag as u16).to_le_bytes());
        self.bytes.extend(u16::try_from(index).unwrap_or(u16::MAX).to_le_bytes());
        self.bytes.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.bytes.extend(body);
        self.sections += 1;
    }
}

impl MachineState {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Writer { bytes: vec![0; HEADER_BYTES], sections: 0 };
        let mut machine = Vec::with_capacity(24);
        machine.extend(self.pages.to_le_bytes());
        machine.extend(self.clock_nanoseconds.to_le_bytes());
        machine.extend(self.tsc_khz.to_le_bytes());
        machine.extend(u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.section(Tag::Machine, 0, &machine);
        for (index, chip) in self.irqchips.iter().enumerate() {
            out.section(Tag::Irqchip, index, bytes_of(chip));
        }
        out.section(Tag::Pit, 0, bytes_of(&self.pit));
        let mut serial = self.serial.registers.to_vec();
        serial.push(u8::try_from(self.serial.received.len()).unwrap_or(u8::MAX));
        serial.extend(&self.serial.received);
        serial.extend(&self.serial.line);
        out.section(Tag::Serial, 0, &serial);
        out.section(Tag::Generation, 0, &self.generation.to_bytes());
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            vcpu.encode(&mut out, index);
        }
        let total = u32::try_from(out.bytes.len()).unwrap_or(u32::MAX);
        let header = [&MAGIC[..], &VERSION.to_le_bytes(), &out.sections.to_le_bytes(), &total.to_le_bytes()].concat();
        out.bytes.splice(..HEADER_BYTES, header);
        out.bytes
    }

    /// Reads saved state; what comes back has the right shape in every part.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        if bytes.len() > limits::STATE_BYTES_MAX {
            return Err(StateError::Length { expected: limits::STATE_BYTES_MAX, actual: bytes.len() });
        }
        let mut reader = Reader { rest: bytes };
        if bytes.get(..8).ok_or(StateError::Magic)? != MAGIC {
            return Err(StateError::Magic);
        }
        reader.take(8)?;
        let version = reader.u16()?;
        if version != VERSION {
            return Err(StateError::Version { actual: version });
        }
        let sections = reader.u16()?;
        let total = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
        if total != bytes.len() {
            return Err(StateError::Length { expected: total, actual: bytes.len() });
        }
        let mut machine = Reader { rest: reader.section_of(Tag::Machine, 0, 24..=24)? };
        let (pages, clock_nanoseconds, tsc_khz, count) = (machine.u64()?, machine.u64()?, machine.u32()?, machine.u32()?);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count == 0 || count > usize::try_from(limits::VCPUS_MAX).unwrap_or(0) {
            return Err(value(Tag::Machine, 0, format!("expected 1 to {} vCPUs, got {count}", limits::VCPUS_MAX)));
        }
        if usize::from(sections) != SECTIONS_VM + count * SECTIONS_VCPU {
            return Err(value(Tag::Machine, 0, format!("{sections} sections do not fit {count} vCPUs")));
        }
        let mut irqchips = [kvm_irqchip::default(); IRQCHIPS];
        for (index, chip) in irqchips.iter_mut().enumerate() {
            *chip = reader.pod(Tag::Irqchip, index)?;
            if usize::try_from(chip.chip_id) != Ok(index) {
                return Err(value(Tag::Irqchip, index, format!("expected chip {index}, got {}", chip.chip_id)));
            }
        }
        let pit = reader.pod(Tag::Pit, 0)?;
        let serial = reader.serial()?;
        let generation = reader.section_of(Tag::Generation, 0, Generation::BYTES..=Generation::BYTES)?;
        let generation = Generation::from_bytes(generation).map_err(|error| value(Tag::Generation, 0, error.to_string()))?;
        let vcpus = (0..count).map(|index| VcpuState::decode(&mut reader, index)).collect::<Result<_, _>>()?;
        if !reader.rest.is_empty() {
            return Err(StateError::Length { expected: total - reader.rest.len(), actual: total });
        }
        Ok(Self { pages, tsc_khz, clock_nanoseconds, irqchips, pit, serial, generation, vcpus })
    }
}

impl VcpuState {
    fn encode(&self, out: &mut Writer, index: usize) {
        out.section(Tag::Cpuid, index, &concat(&self.cpuid));
        out.section(Tag::MpState, index, bytes_of(&self.mp_state));
        out.section(Tag::Regs, index, bytes_of(&self.regs));
        match &self.sregs {
            Sregs::Old(sregs) => out.section(Tag::Sregs, index, bytes_of(sregs)),
            Sregs::New(sregs) => out.section(Tag::Sregs2, index, bytes_of(sregs)),
        }
        out.section(Tag::Xsave, index, &self.xsave.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
        out.section(Tag::Xcrs, index, bytes_of(&self.xcrs));
        out.section(Tag::Debugregs, index, bytes_of(&self.debugregs));
        out.section(Tag::Lapic, index, bytes_of(&self.lapic));
        out.section(Tag::Msrs, index, &concat(&self.msrs));
        out.section(Tag::Events, index, bytes_of(&self.events));
    }

    fn decode(reader: &mut Reader<'_>, index: usize) -> Result<Self, StateError> {
        let cpuid: Vec<kvm_cpuid_entry2> = reader.list(Tag::Cpuid, index, limits::CPUID_LEAVES_MAX)?;
        let mp_state: kvm_mp_state = reader.pod(Tag::MpState, index)?;
        if mp_state.mp_state > MP_STATE_MAX {
            return Err(value(Tag::MpState, index, format!("expected 0 to {MP_STATE_MAX}, got {}", mp_state.mp_state)));
        }
        let regs = reader.pod(Tag::Regs, index)?;
        let sregs = if reader.peek_tag() == Some(Tag::Sregs as u16) {
            Sregs::Old(reader.pod(Tag::Sregs, index)?)
        } else {
            Sregs::New(reader.pod(Tag::Sregs2, index)?)
        };
        let xsave = reader.section_of(Tag::Xsave, index, XSAVE_LEGACY_BYTES..=limits::XSAVE_BYTES_MAX)?;
        if !xsave.len().is_multiple_of(4) {
            return Err(value(Tag::Xsave, index, format!("{} bytes are no whole words", xsave.len())));
        }
        let xsave = xsave.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
        let xcrs: kvm_xcrs = reader.pod(Tag::Xcrs, index)?;
        if usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX) > xcrs.xcrs.len() {
            return Err(value(Tag::Xcrs, index, format!("expected at most {} registers, got {}", xcrs.xcrs.len(), xcrs.nr_xcrs)));
        }
        let debugregs = reader.pod(Tag::Debugregs, index)?;
        let lapic = reader.pod(Tag::Lapic, index)?;
        let msrs: Vec<kvm_msr_entry> = reader.list(Tag::Msrs, index, limits::MSRS_MAX)?;
        for (position, msr) in msrs.iter().enumerate() {
            if msrs.iter().take(position).any(|other| other.index == msr.index) {
                return Err(value(Tag::Msrs, index, format!("MSR {:#x} twice", msr.index)));
            }
        }
        let events = reader.pod(Tag::Events, index)?;
        Ok(Self { cpuid, mp_state, regs, sregs, xsave, xcrs, debugregs, lapic, msrs, events })
    }
}

fn concat<T: Pod>(items: &[T]) -> Vec<u8> {
    items.iter().flat_map(|item| bytes_of(item).iter().copied()).collect()
}

fn value(tag: Tag, index: usize, reason: String) -> StateError {
    StateError::Value { section: tag.name(), index: u16::try_from(index).unwrap_or(u16::MAX), reason }
}

/// A value of a section that does not fit the machine it is restored into.
pub(super) fn unfit(section: &'static str, index: usize, reason: String) -> StateError {
    StateError::Value { section, index: u16::try_from(index).unwrap_or(u16::MAX), reason }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], StateError> {
        let (head, rest) = self.rest.split_at_checked(bytes).ok_or(StateError::Length { expected: bytes, actual: self.rest.len() })?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| StateError::Length { expected: N, actual: bytes.len() })
    }

    fn u16(&mut self) -> Result<u16, StateError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, StateError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, StateError> {
        self.array().map(u64::from_le_bytes)
    }

    fn peek_tag(&self) -> Option<u16> {
        Some(u16::from_le_bytes([*self.rest.first()?, *self.rest.get(1)?]))
    }

    /// The body of the next section, which must be this one, with a size that fits.
    fn section_of(&mut self, tag: Tag, index: usize, fits: std::ops::RangeInclusive<usize>) -> Result<&'a [u8], StateError> {
        let index = u16::try_from(index).unwrap_or(u16::MAX);
        let (actual_tag, actual_index) = (self.u16()?, self.u16()?);
        if actual_tag != tag as u16 || actual_index != index {
            return Err(StateError::Section { expected: tag.name(), index, actual_tag, actual_index });
        }
        let bytes = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if !fits.contains(&bytes) {
            let expected =
                if fits.start() == fits.end() { fits.start().to_string() } else { format!("{} to {}", fits.start(), fits.end()) };
            return Err(StateError::SectionBytes { section: tag.name(), index, expected, actual: bytes });
        }
        self.take(bytes)
    }

    fn pod<T: Pod>(&mut self, tag: Tag, index: usize) -> Result<T, StateError> {
        let bytes = self.section_of(tag, index, size_of::<T>()..=size_of::<T>())?;
        from_bytes(bytes).ok_or(StateError::Length { expected: size_of::<T>(), actual: bytes.len() })
    }

    fn list<T: Pod>(&mut self, tag: Tag, index: usize, count_max: usize) -> Result<Vec<T>, StateError> {
        let bytes = self.section_of(tag, index, size_of::<T>()..=size_of::<T>() * count_max)?;
        if !bytes.len().is_multiple_of(size_of::<T>()) {
            return Err(value(tag, index, format!("{} bytes are no whole entries of {}", bytes.len(), size_of::<T>())));
        }
        Ok(bytes.chunks_exact(size_of::<T>()).filter_map(from_bytes).collect())
    }

    fn serial(&mut self) -> Result<SerialSnapshot, StateError> {
        let most = 10 + limits::SERIAL_FIFO_BYTES_MAX + limits::CONSOLE_LINE_BYTES_MAX;
        let mut body = Reader { rest: self.section_of(Tag::Serial, 0, 10..=most)? };
        let registers = body.array()?;
        let [received_bytes] = body.array()?;
        if usize::from(received_bytes) > limits::SERIAL_FIFO_BYTES_MAX {
            let reason = format!("expected at most {} received bytes, got {received_bytes}", limits::SERIAL_FIFO_BYTES_MAX);
            return Err(value(Tag::Serial, 0, reason));
        }
        let received = body.take(usize::from(received_bytes))?.to_vec();
        if body.rest.len() > limits::CONSOLE_LINE_BYTES_MAX {
            return Err(value(Tag::Serial, 0, format!("unfinished line of {} bytes", body.rest.len())));
        }
        Ok(SerialSnapshot { registers, received, line: body.rest.to_vec() })
    }
}

/// IA32_TIME_STAMP_COUNTER and Hyper-V's reference counter: they go on while the guest is paused.
const MSRS_THAT_TICK: [u32; 2] = [0x10, 0x4000_0020];
/// Registers of the LAPIC that are no state. The timer's current count goes on. The processor priority
/// follows from the task priority and from what is in service, which are compared (SDM volume 3, "Task and
/// Processor Priorities"): KVM takes it anew before it injects, but `KVM_SET_LAPIC` computes it before it
/// counts what is in service, so that it reads as 0 behind it if an interrupt was.
const LAPIC_NO_STATE: [usize; 2] = [0xa0, 0x390];

/// What differs between two saved states, one line each, apart from clocks that go on while the guest
/// is paused (TSC, LAPIC count, kvmclock, the PIT's load time) and from what follows from the rest.
///
/// # Errors
/// One of the two is no saved state.
pub fn state_differences(one: &[u8], other: &[u8]) -> Result<Vec<String>, StateError> {
    let (one, other) = (MachineState::decode(one)?, MachineState::decode(other)?);
    let mut found = Vec::new();
    let mut note = |same: bool, what: String| {
        if !same {
            found.push(what);
        }
    };
    note(one.pages == other.pages, "pages of RAM".to_owned());
    note(one.tsc_khz == other.tsc_khz, "TSC frequency".to_owned());
    for (index, (a, b)) in one.irqchips.iter().zip(&other.irqchips).enumerate() {
        note(bytes_of(a) == bytes_of(b), format!("irqchip {index}"));
    }
    note(bytes_of(&without_load_times(one.pit)) == bytes_of(&without_load_times(other.pit)), "PIT".to_owned());
    note(one.serial == other.serial, "serial port".to_owned());
    note(one.generation == other.generation, "generation".to_owned());
    note(one.vcpus.len() == other.vcpus.len(), "number of vCPUs".to_owned());
    for (index, (a, b)) in one.vcpus.iter().zip(&other.vcpus).enumerate() {
        note(concat(&a.cpuid) == concat(&b.cpuid), format!("CPUID of vCPU {index}"));
        note(a.mp_state == b.mp_state, format!("run state of vCPU {index}"));
        note(a.regs == b.regs, format!("registers of vCPU {index}"));
        note(a.sregs == b.sregs, format!("special registers of vCPU {index}"));
        note(a.xsave == b.xsave, format!("FPU state of vCPU {index}"));
        note(bytes_of(&a.xcrs) == bytes_of(&b.xcrs), format!("XCRs of vCPU {index}"));
        note(bytes_of(&a.debugregs) == bytes_of(&b.debugregs), format!("debug registers of vCPU {index}"));
        for (register, (a, b)) in lapic_differences(&a.lapic, &b.lapic) {
            note(false, format!("LAPIC register {register:#x} of vCPU {index}, {a:#x} and {b:#x}"));
        }
        note(bytes_of(&a.events) == bytes_of(&b.events), format!("pending events of vCPU {index}"));
        for msr in a.msrs.iter().filter(|msr| !MSRS_THAT_TICK.contains(&msr.index)) {
            let same = b.msrs.iter().any(|theirs| theirs.index == msr.index && theirs.data == msr.data);
            note(same, format!("MSR {:#x} of vCPU {index}", msr.index));
        }
        note(a.msrs.len() == b.msrs.len(), format!("number of MSRs of vCPU {index}"));
    }
    Ok(found)
}

fn without_load_times(mut pit: kvm_pit_state2) -> kvm_pit_state2 {
    for channel in &mut pit.channels {
        channel.count_load_time = 0;
    }
    pit
}

/// Registers that differ, by their offset, with both values.
fn lapic_differences(one: &kvm_lapic_state, other: &kvm_lapic_state) -> impl Iterator<Item = (usize, (u32, u32))> {
    // A register has the first 4 of 16 bytes.
    let registers = |lapic: &kvm_lapic_state| -> Vec<u32> {
        let (registers, _) = bytes_of(lapic).as_chunks::<16>();
        registers.iter().map(|[a, b, c, d, ..]| u32::from_le_bytes([*a, *b, *c, *d])).collect()
    };
    let both = registers(one).into_iter().zip(registers(other)).enumerate().map(|(index, both)| (index * 16, both));
    both.filter(|(register, (one, other))| !LAPIC_NO_STATE.contains(register) && one != other)
}
