//! What kvm-ioctls does not offer: a few requests, a second view of a vCPU's run page, dirty rings.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::io::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn, kvm_reinject_control, kvm_run,
    kvm_sregs2,
};
use kvm_ioctls::{VcpuFd, VmFd};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::types::PAGE_BYTES;

ioctl_io_nr!(KVM_REINJECT_CONTROL, KVMIO, 0x71);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

fn check(result: i32) -> Result<i32, Errno> {
    if result < 0 { Err(Errno::last()) } else { Ok(result) }
}

/// Timer ticks that the guest could not take are dropped, not repeated later in a burst.
pub(super) fn drop_missed_ticks(vm: &VmFd) -> Result<(), Errno> {
    let control = kvm_reinject_control { pit_reinject: 0, ..Default::default() };
    // SAFETY: the request reads one `kvm_reinject_control`, which lives across the call.
    check(unsafe { ioctl_with_ref(vm, KVM_REINJECT_CONTROL(), &control) }).map(|_| ())
}

/// Clears the dirty bits of `bitmap` and protects those pages again.
pub(super) fn clear_dirty_log(vm: &VmFd, slot: u32, first_page: u64, pages: u32, bitmap: &mut [u64]) -> Result<(), Errno> {
    if (bitmap.len() as u64).saturating_mul(64) < u64::from(pages) {
        return Err(Errno::new(nix::libc::EINVAL));
    }
    let request = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
    };
    // SAFETY: the kernel reads the request and `pages` bits behind `dirty_bitmap`, both alive and, by the check above, long enough.
    check(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) }).map(|_| ())
}

/// Gives collected ring entries back to the kernel, which protects their pages again.
pub(super) fn reset_dirty_rings(vm: &VmFd) -> Result<i32, Errno> {
    // SAFETY: the request takes no argument.
    check(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })
}

pub(super) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, Errno> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the request writes one `kvm_sregs2`.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Errno> {
    // SAFETY: the request reads one `kvm_sregs2`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) }).map(|_| ())
}

/// A shared mapping of a vCPU's file, unmapped on drop.
#[derive(Debug)]
struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping has no thread affinity; every access through it is atomic or guarded by its owner.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

struct Raw(RawFd);

impl AsFd for Raw {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to a `VcpuFd` that the caller of `Mapping::new` borrows for as long.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}

impl Mapping {
    fn new(vcpu: &VcpuFd, bytes: usize, offset_pages: u32) -> Result<Self, std::io::Error> {
        let length = NonZeroUsize::new(bytes).ok_or(std::io::ErrorKind::InvalidInput)?;
        let offset = i64::from(offset_pages) * i64::try_from(PAGE_BYTES).unwrap_or(0);
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of this process.
        let address = unsafe {
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, Raw(vcpu.as_raw_fd()), offset)
        }?;
        Ok(Self { address: address.cast(), bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and nothing borrows from it any more.
        let _ = unsafe { munmap(self.address.cast(), self.bytes) };
    }
}

/// The `immediate_exit` byte of one vCPU, through a mapping of our own so that another thread may
/// write it while the vCPU runs.
#[derive(Debug)]
pub(super) struct ExitRequest(Mapping);

impl ExitRequest {
    pub(super) fn new(vcpu: &VcpuFd) -> Result<Self, std::io::Error> {
        Mapping::new(vcpu, PAGE_BYTES, 0).map(Self)
    }

    pub(super) fn set(&self, on: bool) {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: the byte lies within the mapped page and is only accessed as an atomic through this mapping.
        let byte = unsafe { AtomicU8::from_ptr(self.0.address.as_ptr().add(offset)) };
        byte.store(u8::from(on), Ordering::SeqCst);
    }
}

const GFN_DIRTY: u32 = 1;
const GFN_RESET: u32 = 2;

/// The dirty ring of one vCPU.
#[derive(Debug)]
pub(super) struct DirtyRing {
    mapping: Mapping,
    entries: u32,
    next: u32,
}

impl DirtyRing {
    pub(super) fn new(vcpu: &VcpuFd, entries: u32) -> Result<Self, std::io::Error> {
        let bytes = usize::try_from(entries).unwrap_or(0) * size_of::<kvm_dirty_gfn>();
        Ok(Self { mapping: Mapping::new(vcpu, bytes, KVM_DIRTY_LOG_PAGE_OFFSET)?, entries, next: 0 })
    }

    /// Takes the next page, (slot, page within the slot), and marks its entry as collected. At most
    /// one round of the ring is ever collected between two resets, because collected entries are not dirty.
    pub(super) fn collect(&mut self) -> Option<(u32, u64)> {
        let index = usize::try_from(self.next % self.entries).unwrap_or(0);
        // SAFETY: `index` is below `entries`, so the entry lies within the mapping, which is page-aligned.
        let entry = unsafe { self.mapping.address.as_ptr().cast::<kvm_dirty_gfn>().add(index) };
        // SAFETY: the kernel and this process share the flags as an atomic word (KVM_CAP_DIRTY_LOG_RING_ACQ_REL).
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        if flags.load(Ordering::Acquire) & GFN_DIRTY == 0 {
            return None;
        }
        // SAFETY: an entry whose dirty flag was seen with acquire is not written by the kernel until it is reset.
        let (slot, offset) = unsafe { ((&raw const (*entry).slot).read_volatile(), (&raw const (*entry).offset).read_volatile()) };
        flags.store(GFN_RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some((slot, offset))
    }
}

/// Asks for transparent huge pages behind a mapping; the answer does not matter.
pub(super) fn advise_huge(address: *mut u8, bytes: usize) -> Result<(), std::io::Error> {
    let Some(address) = NonNull::new(address) else { return Ok(()) };
    // SAFETY: MADV_HUGEPAGE changes no byte; a wrong range would only fail.
    unsafe { madvise(address.cast(), bytes, MmapAdvise::MADV_HUGEPAGE) }.map_err(Into::into)
}
