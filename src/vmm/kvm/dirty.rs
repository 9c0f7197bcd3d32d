//! Which pages the guest wrote: the bitmap with manual protection, or one ring for each vCPU.
//!
//! `INVARIANT(harvest-owned)`: a page is taken from the kernel's record and protected again before the
//! caller learns of it, so a write after that is in the next harvest and the caller's read sees every
//! write before. Pages of full rings are kept here until the next harvest.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};

use super::sys::{self, DirtyRing};
use crate::limits;
use crate::memory::{GuestRam, PageSet};
use crate::types::{PAGE_BYTES, PageNumber};
use crate::vmm::config::DirtyMode;
use crate::vmm::error::VmmError;

/// Pages cleared in one request: 1 GiB, so that vCPUs do not wait long for the lock behind it.
const CLEAR_PAGES: u64 = 1 << 18;
/// Each request takes back what is there unless a signal comes in between.
const RESETS_MAX: u32 = 100;

/// One piece of guest RAM as KVM knows it.
#[derive(Debug, Clone, Copy)]
struct Slot {
    first: PageNumber,
    pages: u64,
    guest_base: u64,
    host_base: u64,
}

#[derive(Debug)]
enum Method {
    Bitmap { manual: bool, initially_set: bool },
    Ring { entries: u32, rings: Vec<DirtyRing> },
}

/// The record of written pages of one VM. Keeps guest RAM mapped for as long as KVM uses it.
#[derive(Debug)]
pub(super) struct DirtyLog {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    slots: Vec<Slot>,
    method: Method,
    tracking: bool,
    pending: PageSet,
    /// Entries that were collected and that the kernel has not taken back yet.
    unreset: u64,
    /// A ring ran over: what it held is unknown, and the kernel has no way to start it again.
    lost: bool,
}

impl DirtyLog {
    /// Chooses the method and gives RAM to the VM. Before any vCPU exists.
    pub(super) fn new(vm: Arc<VmFd>, ram: Arc<GuestRam>, mode: DirtyMode) -> Result<Self, VmmError> {
        let method = match mode {
            DirtyMode::Ring { entries } => enable_ring(&vm, entries)?,
            DirtyMode::Auto | DirtyMode::Bitmap => enable_bitmap(&vm)?,
        };
        let base = ram.host_address() as u64;
        let page_bytes = PAGE_BYTES as u64;
        let slots = ram.layout().regions_with_first_page().map(|(first, region)| Slot {
            first,
            pages: region.bytes / page_bytes,
            guest_base: region.guest_base,
            host_base: base + first.0 * page_bytes,
        });
        let slots = slots.collect();
        let pending = PageSet::empty(ram.pages());
        let log = Self { vm, ram, slots, method, tracking: false, pending, unreset: 0, lost: false };
        log.set_regions(0)?;
        Ok(log)
    }

    /// Maps the ring of a new vCPU.
    pub(super) fn add_vcpu(&mut self, vcpu: &VcpuFd) -> Result<(), VmmError> {
        if let Method::Ring { entries, rings } = &mut self.method {
            rings.push(DirtyRing::new(vcpu, *entries).map_err(VmmError::local("map the dirty ring"))?);
        }
        Ok(())
    }

    fn set_regions(&self, flags: u32) -> Result<(), VmmError> {
        for (index, slot) in (0u32..).zip(&self.slots) {
            let region = kvm_userspace_memory_region {
                slot: index,
                flags,
                guest_phys_addr: slot.guest_base,
                memory_size: slot.pages * PAGE_BYTES as u64,
                userspace_addr: slot.host_base,
            };
            // SAFETY: the range lies within the mapping of `self.ram`, which lives as long as `self`, and `self` is dropped after
            // the last vCPU; regions do not overlap (`MemoryLayout`), and nothing in this process holds references into guest RAM.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(VmmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// From now on every written page is recorded; what was recorded before is forgotten.
    pub(super) fn start(&mut self) -> Result<(), VmmError> {
        if !self.tracking {
            self.set_regions(if self.lost { 0 } else { KVM_MEM_LOG_DIRTY_PAGES })?;
            self.tracking = true;
        }
        if let Method::Bitmap { initially_set: true, .. } = self.method {
            // WHY: with INITIALLY_SET nothing is protected yet and every page counts as written.
            for index in 0..self.slots.len() {
                let pages = usize::try_from(self.slots[index].pages.div_ceil(64)).unwrap_or(usize::MAX);
                self.clear(index, &mut vec![u64::MAX; pages])?;
            }
        } else {
            self.harvest()?;
        }
        self.pending = PageSet::empty(self.ram.pages());
        Ok(())
    }

    /// Recording ends.
    pub(super) fn stop(&mut self) -> Result<(), VmmError> {
        if self.tracking {
            self.collect_rings()?;
            self.set_regions(0)?;
            self.tracking = false;
            self.pending = PageSet::empty(self.ram.pages());
        }
        Ok(())
    }

    pub(super) fn is_tracking(&self) -> bool {
        self.tracking
    }

    /// Records a page that the VMM wrote itself, which the kernel does not see. After the write.
    pub(super) fn mark(&mut self, page: PageNumber) {
        if self.tracking {
            self.pending.insert(page);
        }
    }

    /// Pages written since the last harvest; the record of them is gone from here on.
    pub(super) fn harvest(&mut self) -> Result<PageSet, VmmError> {
        match self.method {
            Method::Ring { .. } => self.collect_rings()?,
            Method::Bitmap { manual, .. } => {
                for index in 0..self.slots.len() {
                    let slot = self.slots[index];
                    let number = u32::try_from(index).unwrap_or(u32::MAX);
                    let bytes = usize::try_from(slot.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
                    let mut bitmap = self.vm.get_dirty_log(number, bytes).map_err(VmmError::kvm("KVM_GET_DIRTY_LOG"))?;
                    if bitmap.iter().all(|word| *word == 0) {
                        continue;
                    }
                    merge(&mut self.pending, slot, &bitmap);
                    if manual {
                        self.clear(index, &mut bitmap)?;
                    }
                }
            }
        }
        if self.lost {
            return Ok(PageSet::full(self.ram.pages()));
        }
        Ok(self.pending.take())
    }

    /// Clears the pages of `bitmap` in the kernel's record and protects them again.
    fn clear(&self, index: usize, bitmap: &mut [u64]) -> Result<(), VmmError> {
        let slot = self.slots[index];
        let chunk_words = usize::try_from(CLEAR_PAGES / 64).unwrap_or(usize::MAX);
        let mut first = 0;
        for words in bitmap.chunks_mut(chunk_words) {
            let pages = CLEAR_PAGES.min(slot.pages - first);
            if words.iter().any(|word| *word != 0) {
                let number = u32::try_from(index).unwrap_or(u32::MAX);
                sys::clear_dirty_log(&self.vm, number, first, u32::try_from(pages).unwrap_or(0), words)
                    .map_err(VmmError::kvm("KVM_CLEAR_DIRTY_LOG"))?;
            }
            first += pages;
        }
        Ok(())
    }

    /// Whether rings have to be emptied now and then.
    pub(super) fn needs_collecting(&self) -> bool {
        self.tracking && !self.lost && matches!(self.method, Method::Ring { .. })
    }

    /// Whether the record can be emptied by [`DirtyLog::collect_rings`] at all.
    pub(super) fn uses_rings(&self) -> bool {
        matches!(self.method, Method::Ring { .. })
    }

    /// Empties the rings into `pending`: for each harvest, now and then, and when a vCPU's ring is full.
    ///
    /// A ring that is dirty all around has run over: a correct kernel leaves the guest before that, but
    /// one that emulates many instructions at a time does not always. Its pages are unknown, so from
    /// then on every page counts as written.
    pub(super) fn collect_rings(&mut self) -> Result<(), VmmError> {
        let Method::Ring { entries, rings } = &mut self.method else { return Ok(()) };
        for ring in rings {
            let mut collected = 0u64;
            while let Some((slot, offset)) = ring.collect() {
                let slot = usize::try_from(slot & 0xffff).ok().and_then(|slot| self.slots.get(slot));
                if let Some(slot) = slot.filter(|slot| offset < slot.pages) {
                    self.pending.insert(PageNumber(slot.first.0 + offset));
                }
                collected += 1;
                if collected >= u64::from(*entries) {
                    self.lost = true;
                    break;
                }
            }
            self.unreset += collected;
        }
        // The kernel stops early for a signal, so ask until it has taken back all of them.
        for _ in 0..RESETS_MAX {
            if self.unreset == 0 {
                break;
            }
            let taken = sys::reset_dirty_rings(&self.vm).map_err(VmmError::kvm("KVM_RESET_DIRTY_RINGS"))?;
            self.unreset = self.unreset.saturating_sub(u64::try_from(taken).unwrap_or(0));
        }
        if self.unreset > 0 {
            self.lost = true;
        }
        if self.lost && self.tracking {
            // WHY off: the guest would stop at its full ring for ever.
            self.set_regions(0)?;
        }
        Ok(())
    }
}

/// Adds the pages of one slot's bitmap.
fn merge(into: &mut PageSet, slot: Slot, bitmap: &[u64]) {
    let first_bit = slot.first.0 % 64;
    let skipped = usize::try_from(slot.first.0 / 64).unwrap_or(usize::MAX);
    let mut words = vec![0u64; into.words().len()];
    for (index, word) in bitmap.iter().enumerate() {
        let left = slot.pages.saturating_sub(index as u64 * 64);
        let word = if left >= 64 { *word } else { word & ((1 << left) - 1) };
        if let Some(low) = words.get_mut(skipped + index) {
            *low |= word << first_bit;
        }
        if first_bit != 0
            && let Some(high) = words.get_mut(skipped + index + 1)
        {
            *high |= word >> (64 - first_bit);
        }
    }
    into.merge(&PageSet::from_words(into.pages(), &words));
}

fn enable_bitmap(vm: &VmFd) -> Result<Method, VmmError> {
    let offered = u32::try_from(vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into())).unwrap_or(0);
    let wanted = offered & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    let manual = wanted & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
    if manual {
        let mut capability = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        capability.args[0] = wanted.into();
        vm.enable_cap(&capability).map_err(VmmError::kvm("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
    }
    Ok(Method::Bitmap { manual, initially_set: manual && wanted & KVM_DIRTY_LOG_INITIALLY_SET != 0 })
}

fn enable_ring(vm: &VmFd, entries: u32) -> Result<Method, VmmError> {
    let name = "KVM_CAP_DIRTY_LOG_RING_ACQ_REL";
    let bytes_max = u32::try_from(vm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into())).unwrap_or(0);
    if bytes_max == 0 {
        return Err(VmmError::MissingCapability { capability: name });
    }
    let entry_bytes = 16;
    let fits = entries.is_power_of_two() && entries >= limits::DIRTY_RING_ENTRIES_MIN && entries <= bytes_max / entry_bytes;
    if !fits {
        let reason =
            format!("expected a power of two from {} to {}, got {entries}", limits::DIRTY_RING_ENTRIES_MIN, bytes_max / entry_bytes);
        return Err(VmmError::Config { field: "dirty ring entries", reason });
    }
    let mut capability = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING_ACQ_REL, ..Default::default() };
    capability.args[0] = (entries * entry_bytes).into();
    vm.enable_cap(&capability).map_err(VmmError::kvm(name))?;
    Ok(Method::Ring { entries, rings: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_of_slots_that_begin_anywhere_land_on_the_right_pages() {
        for (first, pages) in [(0u64, 200u64), (64, 64), (3, 130), (63, 1), (127, 65)] {
            let slot = Slot { first: PageNumber(first), pages, guest_base: 0, host_base: 0 };
            for page in [0, pages / 2, pages - 1] {
                let mut bitmap = vec![0u64; usize::try_from(pages.div_ceil(64)).unwrap()];
                bitmap[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
                let mut set = PageSet::empty(1000);
                merge(&mut set, slot, &bitmap);
                assert_eq!(set.iter().collect::<Vec<_>>(), [PageNumber(first + page)], "{first} {pages} {page}");
            }
            let mut set = PageSet::empty(1000);
            merge(&mut set, slot, &vec![u64::MAX; usize::try_from(pages.div_ceil(64)).unwrap()]);
            assert_eq!((set.len(), set.next_run(PageNumber(0), 1000)), (pages, Some((PageNumber(first), pages))));
        }
    }
}
