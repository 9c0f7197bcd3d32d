//! The payload guest: a small program that dirties memory on every vCPU and verifies it, from inside.
//!
//! `payload.S` is the program with its explanation. This module decides where things lie and reads
//! the verdict.

use std::fmt;

use super::error::VmmError;
use super::payload_image::PAYLOAD_IMAGE;
use crate::limits;
use crate::memory::MemoryLayout;
use crate::types::PAGE_BYTES;

const INFO: u64 = 0x8000;
const IDT: u64 = 0xa000;
const LOAD: u64 = 0x1_0000;
const OWN: u64 = 0x10_0000;
const OWN_BYTES: u64 = 0x2000;
/// Below it lie tables, the program and the vCPUs' own pages.
const WORKING_SET: u64 = 0x20_0000;
const PIT_HZ: u32 = 1_193_182;
const CODE_SELECTOR: u16 = 8;

/// How busy the payload is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PayloadConfig {
    /// Pages that all vCPUs together keep writing.
    pub working_set_pages: u64,
    /// Pages that each vCPU writes for each timer tick; 0 writes as fast as it goes.
    pub pages_per_tick: u64,
    /// Timer ticks a second, 19 to 1000.
    pub ticks_per_second: u32,
    /// Timer ticks between two heartbeats.
    pub ticks_per_beat: u64,
    /// Heartbeats until the payload ends with code 0; 0 never does.
    pub beats: u64,
}

impl Default for PayloadConfig {
    fn default() -> Self {
        Self { working_set_pages: 4096, pages_per_tick: 0, ticks_per_second: 100, ticks_per_beat: 10, beats: 0 }
    }
}

/// Where a vCPU begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    pub(super) entry: u64,
    pub(super) stack: u64,
    pub(super) idt: u64,
    pub(super) argument: u64,
}

/// What goes into guest memory and registers.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) memory: Vec<(u64, Vec<u8>)>,
    pub(super) starts: Vec<Start>,
}

/// Why the payload stopped itself: what its exit code means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PayloadFault {
    /// A page holds something that was never written to it.
    CorruptPage,
    /// A page is of another pass: it was not transferred, or its vCPU continued at another place.
    WrongPass,
    /// General registers do not fit memory.
    Registers,
    /// XMM registers do not fit the general ones.
    Xmm,
    /// Debug registers do not fit the general ones.
    DebugRegisters,
    /// Special registers do not fit the general ones.
    SpecialRegisters,
    /// An MSR does not fit the general registers.
    Msr,
    /// The LAPIC does not fit the general registers.
    Lapic,
    /// Counters of timer ticks disagree.
    TickCount,
    /// Ticks came faster than the timer runs, or time went back.
    TickRate,
    /// Counters of heartbeats disagree.
    Beat,
    /// An exception that nothing in the payload raises.
    Exception,
}

impl PayloadFault {
    /// The fault and the vCPU that found it; `None` for 0, a clean end, and for codes of other guests.
    #[must_use]
    pub fn from_code(code: u32) -> Option<(Self, u32)> {
        let fault = match code & 0xff {
            1 => Self::CorruptPage,
            2 => Self::WrongPass,
            3 => Self::Registers,
            4 => Self::Xmm,
            5 => Self::DebugRegisters,
            6 => Self::SpecialRegisters,
            7 => Self::Msr,
            8 => Self::Lapic,
            9 => Self::TickCount,
            10 => Self::TickRate,
            11 => Self::Beat,
            12 => Self::Exception,
            _ => return None,
        };
        Some((fault, code >> 8))
    }
}

impl fmt::Display for PayloadFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CorruptPage => "a page holds what was never written",
            Self::WrongPass => "a page is of another pass",
            Self::Registers => "general registers do not fit memory",
            Self::Xmm => "XMM registers do not fit",
            Self::DebugRegisters => "debug registers do not fit",
            Self::SpecialRegisters => "special registers do not fit",
            Self::Msr => "an MSR does not fit",
            Self::Lapic => "the LAPIC does not fit",
            Self::TickCount => "tick counters disagree",
            Self::TickRate => "ticks came faster than the timer runs",
            Self::Beat => "heartbeat counters disagree",
            Self::Exception => "an unexpected exception",
        })
    }
}

/// The number of a heartbeat line, `beat N`.
#[must_use]
pub fn heartbeat_number(line: &str) -> Option<u64> {
    line.strip_prefix("beat ")?.parse().ok()
}

/// The generation counter of a line that the payload prints when it has changed, `generation N`.
#[must_use]
pub fn generation_number(line: &str) -> Option<u64> {
    line.strip_prefix("generation ")?.parse().ok()
}

/// Lays the payload out in `layout` for `vcpus` vCPUs.
pub(super) fn plan(config: &PayloadConfig, layout: &MemoryLayout, vcpus: usize, tsc_khz: u32) -> Result<Plan, VmmError> {
    let refuse = |field, reason| VmmError::Config { field, reason };
    if !(19..=1000).contains(&config.ticks_per_second) {
        return Err(refuse("payload ticks", format!("expected 19 to 1000 a second, got {}", config.ticks_per_second)));
    }
    if config.ticks_per_beat == 0 {
        return Err(refuse("payload beats", "expected at least one tick between heartbeats".to_owned()));
    }
    let slices = slices(config.working_set_pages, layout, vcpus)?;
    let divisor = PIT_HZ / config.ticks_per_second;
    // Of eight tick periods, delivery may be late at the first and early at the last by three and a half in all.
    let period_cycles = u64::from(tsc_khz) * 1000 * u64::from(divisor) / u64::from(PIT_HZ);
    let mut info = vec![0u8; PAGE_BYTES];
    let mut put = |offset: usize, value: u64| {
        if let Some(place) = info.get_mut(offset..offset + 8) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    };
    put(0x00, u64::from_le_bytes(*b"SEALANEP"));
    put(0x10, vcpus as u64);
    put(0x18, u64::from(divisor));
    put(0x20, config.ticks_per_beat);
    put(0x28, config.pages_per_tick);
    put(0x30, period_cycles * 9 / 2);
    put(0x38, config.beats);
    for (index, (start, end)) in slices.iter().enumerate() {
        put(0x40 + index * 16, *start);
        put(0x48 + index * 16, *end);
    }
    let start = |vcpu: u64| Start { entry: LOAD, stack: OWN + (vcpu + 1) * OWN_BYTES, idt: IDT, argument: vcpu };
    Ok(Plan { memory: vec![(INFO, info), (IDT, idt()), (LOAD, PAYLOAD_IMAGE.to_vec())], starts: (0..vcpus as u64).map(start).collect() })
}

/// A piece of RAM for each vCPU, spread over the regions so that all of them are written.
fn slices(pages: u64, layout: &MemoryLayout, vcpus: usize) -> Result<Vec<(u64, u64)>, VmmError> {
    let page = PAGE_BYTES as u64;
    let each = pages / vcpus.max(1) as u64;
    let refuse = |reason| VmmError::Config { field: "payload working set", reason };
    if each == 0 || pages > limits::RAM_BYTES_MAX / page {
        return Err(refuse(format!("expected at least one page for each of {vcpus} vCPUs, got {pages} pages")));
    }
    let mut free: Vec<(u64, u64)> = layout
        .regions()
        .iter()
        .map(|region| (region.guest_base.max(WORKING_SET), region.guest_base + region.bytes))
        .filter(|(start, end)| start < end)
        .collect();
    let count = free.len();
    let mut slices = Vec::new();
    for vcpu in 0..vcpus {
        let place =
            (0..count).map(|step| (vcpu + step) % count).find(|at| free.get(*at).is_some_and(|(start, end)| end - start >= each * page));
        let range = place.and_then(|at| free.get_mut(at));
        let Some((start, _)) = range else {
            return Err(refuse(format!("{pages} pages do not fit: no region has room for {each} pages of vCPU {vcpu}")));
        };
        slices.push((*start, *start + each * page));
        *start += each * page;
    }
    Ok(slices)
}

/// Interrupt gates: the timer, the wake-up, spurious ones, and everything else as a fault. The program's
/// header holds the addresses.
fn idt() -> Vec<u8> {
    let handler = |index: usize| {
        let bytes = PAYLOAD_IMAGE.get(8 + index * 8..16 + index * 8).and_then(|bytes| bytes.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    let mut table = Vec::with_capacity(PAGE_BYTES);
    for vector in 0..256 {
        let address = handler(match vector {
            0x20 => 0,
            0x40 => 1,
            0x27 | 0x2f | 0xff => 2,
            _ => 3,
        });
        let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
        let [low, high] = CODE_SELECTOR.to_le_bytes();
        table.extend([a, b, low, high, 0, 0x8e, c, d, e, f, g, h, 0, 0, 0, 0]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::RamRegion;
    use std::process::Command;

    /// Without binutils the bytes are taken as they are; the build machines have it.
    #[test]
    fn the_committed_bytes_are_what_the_assembler_makes_of_the_listing() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let listing = concat!(env!("CARGO_MANIFEST_DIR"), "/src/vmm/payload.S");
        let assembled = Command::new("as").args([listing, "-o", &path("p.o")]).status();
        if assembled.is_err() {
            println!("skipped: no GNU as on this machine");
            return;
        }
        assert!(assembled.unwrap().success());
        let script = ["-N", "-e", "0x10000", "--oformat", "binary", "-Ttext", "0x10000"];
        assert!(Command::new("ld").args(script).args([&path("p.o"), "-o", &path("p.bin")]).status().unwrap().success());
        assert!(std::fs::read(path("p.bin")).unwrap() == PAYLOAD_IMAGE, "run the assembler as payload.S says and update payload_image.rs");
    }

    #[test]
    fn slices_cover_every_region_and_do_not_overlap() {
        let regions = vec![
            RamRegion { guest_base: 0, bytes: 16 << 20 },
            RamRegion { guest_base: 64 << 20, bytes: 16 << 20 },
            RamRegion { guest_base: 4 << 30, bytes: 16 << 20 },
        ];
        let layout = MemoryLayout::new(regions).unwrap();
        let slices = slices(4096, &layout, 4).unwrap();
        for (index, (start, end)) in slices.iter().enumerate() {
            assert!(layout.page_of(*start).is_some() && layout.page_of(end - 1).is_some() && *start >= WORKING_SET);
            assert!(slices[..index].iter().all(|(a, b)| end <= a || start >= b));
        }
        assert!(slices[2].0 >= 4 << 30 && slices[1].0 >= 64 << 20);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let layout = MemoryLayout::flat(1024).unwrap();
        let base = PayloadConfig { working_set_pages: 256, ..PayloadConfig::default() };
        assert!(plan(&base, &layout, 4, 1_000_000).is_ok());
        for bad in [
            PayloadConfig { working_set_pages: 0, ..base.clone() },
            PayloadConfig { working_set_pages: 3, ..base.clone() },
            PayloadConfig { working_set_pages: 1024, ..base.clone() },
            PayloadConfig { working_set_pages: u64::MAX, ..base.clone() },
            PayloadConfig { ticks_per_second: 18, ..base.clone() },
            PayloadConfig { ticks_per_second: 1001, ..base.clone() },
            PayloadConfig { ticks_per_beat: 0, ..base.clone() },
        ] {
            assert!(plan(&bad, &layout, 4, 1_000_000).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn lines_of_the_payload_are_read_strictly() {
        assert_eq!(heartbeat_number("beat 12"), Some(12));
        for bad in ["beat", "beat ", "beat x", "bea 1", "beat 1 "] {
            assert_eq!(heartbeat_number(bad), None, "{bad}");
        }
        assert_eq!(
            (generation_number("generation 2"), generation_number("generation"), generation_number("beat 2")),
            (Some(2), None, None)
        );
    }
}
