//! How a VM is described to the reference VMM.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::VmmError;
use super::payload::PayloadConfig;
use crate::hypervisor::Machine;
use crate::limits;
use crate::memory::MemoryLayout;
use crate::types::{PAGE_BYTES, RamRegion, VmUuid};

/// Where the hole below 4 GiB begins: LAPIC, IOAPIC, KVM's own pages and firmware live in it.
const HOLE_START: u64 = 3 << 30;
const HOLE_END: u64 = 4 << 30;

/// Everything about one VM.
#[derive(Debug)]
pub struct VmConfig {
    /// Where RAM lies.
    pub layout: MemoryLayout,
    /// Number of vCPUs, 1 to `VCPUS_MAX`.
    pub vcpus: u32,
    /// The VM's UUID.
    pub uuid: VmUuid,
    /// What the vCPUs execute first.
    pub boot: Boot,
    /// Page size behind guest RAM.
    pub hugepages: Hugepages,
    /// Where the serial console goes.
    pub serial: SerialSink,
    /// How written pages are found.
    pub dirty: DirtyMode,
}

impl VmConfig {
    /// A VM with `memory_bytes` of RAM in the usual PC layout.
    ///
    /// # Errors
    /// A number is out of its bounds.
    pub fn new(memory_bytes: u64, vcpus: u32, uuid: VmUuid, boot: Boot) -> Result<Self, VmmError> {
        if !(1..=limits::VCPUS_MAX).contains(&vcpus) {
            return Err(VmmError::Config { field: "vcpus", reason: format!("expected 1 to {}, got {vcpus}", limits::VCPUS_MAX) });
        }
        Ok(Self {
            layout: pc_layout(memory_bytes)?,
            vcpus,
            uuid,
            boot,
            hugepages: Hugepages::Advise,
            serial: SerialSink::Discard,
            dirty: DirtyMode::Auto,
        })
    }

    /// An empty twin of `machine`, waiting for memory and state.
    ///
    /// # Errors
    /// The machine's description is malformed. Whether this host can run it is another question:
    /// [`super::check_compatible`].
    pub fn incoming(machine: Machine) -> Result<Self, VmmError> {
        let layout = MemoryLayout::new(machine.regions.clone())?;
        let (vcpus, uuid) = (machine.vcpus, machine.uuid);
        let memory = u64::try_from(PAGE_BYTES).unwrap_or(u64::MAX);
        Ok(Self { layout, ..Self::new(memory, vcpus, uuid, Boot::Incoming(machine))? })
    }
}

/// The usual PC layout: one region, or two around the hole below 4 GiB.
fn pc_layout(memory_bytes: u64) -> Result<MemoryLayout, VmmError> {
    let low = memory_bytes.min(HOLE_START);
    let mut regions = vec![RamRegion { guest_base: 0, bytes: low }];
    if memory_bytes > low {
        regions.push(RamRegion { guest_base: HOLE_END, bytes: memory_bytes - low });
    }
    Ok(MemoryLayout::new(regions)?)
}

/// What the vCPUs execute first.
#[derive(Debug, Clone)]
pub enum Boot {
    /// A flat binary, started on vCPU 0.
    Flat {
        /// Its bytes.
        image: Vec<u8>,
        /// Where they go, and where execution starts.
        load: u64,
        /// The processor mode at the start.
        mode: EntryMode,
    },
    /// An ELF kernel, by its PVH entry when it has one, else by the 64-bit Linux boot protocol.
    Elf {
        /// The kernel.
        kernel: PathBuf,
        /// Its initial RAM disk.
        initrd: Option<PathBuf>,
        /// Its command line.
        cmdline: String,
    },
    /// A Linux bzImage, by the 64-bit boot protocol.
    Linux {
        /// The kernel.
        kernel: PathBuf,
        /// Its initial RAM disk.
        initrd: Option<PathBuf>,
        /// Its command line.
        cmdline: String,
    },
    /// The payload guest that verifies itself, on every vCPU.
    Payload(PayloadConfig),
    /// Nothing: memory and state come from another host.
    Incoming(Machine),
}

/// Processor mode at the start of a flat binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryMode {
    /// 16-bit real mode, segments at 0.
    Real,
    /// 64-bit long mode with an identity map of all RAM and the first 4 GiB.
    Long,
}

/// Page size behind guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hugepages {
    /// Small pages.
    Off,
    /// Transparent huge pages where the host allows them for shared memory.
    Advise,
    /// Huge pages that the administrator reserved; creation fails without them.
    Reserved,
}

/// How written pages are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyMode {
    /// The bitmap with manual protection, which every kernel since 5.8 has.
    Auto,
    /// The bitmap.
    Bitmap,
    /// The dirty ring with room for `entries` pages for each vCPU; a power of two.
    Ring {
        /// Room for each vCPU.
        entries: u32,
    },
}

/// Where the serial console goes.
#[derive(Debug, Clone)]
pub enum SerialSink {
    /// Nowhere; the last line is still kept.
    Discard,
    /// Appended to a file.
    File(PathBuf),
    /// Standard output of this process; lines are dropped when nobody reads it.
    Stdout,
    /// A buffer in this process.
    Buffer(ConsoleBuffer),
}

/// Console output kept in memory, for tests and demos; holds the last `CONSOLE_BUFFER_BYTES_MAX` bytes.
#[derive(Debug, Clone, Default)]
pub struct ConsoleBuffer(Arc<Mutex<Vec<u8>>>);

impl ConsoleBuffer {
    /// What was printed so far, in complete lines.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    pub(super) fn append(&self, bytes: &[u8]) {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.extend_from_slice(bytes);
        let excess = text.len().saturating_sub(limits::CONSOLE_BUFFER_BYTES_MAX);
        text.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_beyond_three_gib_continues_above_the_hole() {
        assert_eq!(pc_layout(1 << 30).unwrap().regions().len(), 1);
        let layout = pc_layout(5 << 30).unwrap();
        assert_eq!(layout.bytes(), 5 << 30);
        assert_eq!(layout.regions()[1], RamRegion { guest_base: 4 << 30, bytes: 2 << 30 });
    }

    #[test]
    fn refuses_vcpus_and_memory_out_of_bounds() {
        let boot = || Boot::Flat { image: vec![0xf4], load: 0x1000, mode: EntryMode::Real };
        for (memory, vcpus) in [(1 << 20, 0), (1 << 20, limits::VCPUS_MAX + 1), (0, 1), (4095, 1), (u64::MAX, 1)] {
            assert!(VmConfig::new(memory, vcpus, VmUuid([1; 16]), boot()).is_err(), "{memory} {vcpus}");
        }
    }
}
