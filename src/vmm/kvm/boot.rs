//! The first instruction: images into guest memory, tables, registers.

use std::fs::File;
use std::path::Path;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::cpuid::Host;
use super::vcpu::Vcpu;
use crate::limits;
use crate::memory::MemoryLayout;
use crate::types::{PAGE_BYTES, RamRegion};
use crate::vmm::config::{Boot, EntryMode};
use crate::vmm::error::VmmError;
use crate::vmm::payload::{self, Start};

const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x6100;
const ZERO_PAGE: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
const PML4: u64 = 0x5_0000;
const PDPT: u64 = 0x5_1000;
const PAGE_DIRECTORIES: u64 = 0x5_2000;
const EBDA: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;
const GIB: u64 = 1 << 30;
/// The identity map covers the first 4 GiB, where devices are, and RAM up to here.
const IDENTITY_GIB_MAX: u64 = 64;

type Ram = GuestMemoryMmap<()>;

/// Loads what `boot` names and points the vCPUs at it.
pub(super) fn load(boot: &Boot, memory: &File, layout: &MemoryLayout, vcpus: &[Vcpu], host: &Host) -> Result<(), VmmError> {
    let ram = map(memory, layout)?;
    let Some(first) = vcpus.first() else { return Ok(()) };
    match boot {
        Boot::Incoming(_) => Ok(()),
        Boot::Flat { image, load, mode } => {
            write(&ram, "flat binary", *load, image)?;
            match mode {
                EntryMode::Real => real_mode(&first.lock(), *load),
                EntryMode::Long => {
                    write_tables(&ram, layout)?;
                    long_mode(&first.lock(), &Start { entry: *load, stack: *load, idt: 0, argument: 0 }, 0)
                }
            }
        }
        Boot::Payload(config) => {
            let plan = payload::plan(config, layout, vcpus.len(), host.tsc_khz)?;
            for (address, bytes) in &plan.memory {
                write(&ram, "payload", *address, bytes)?;
            }
            write_tables(&ram, layout)?;
            vcpus.iter().zip(&plan.starts).try_for_each(|(vcpu, start)| long_mode(&vcpu.lock(), start, 0))
        }
        Boot::Elf { kernel, initrd, cmdline } => {
            let mut file = open(kernel)?;
            let loaded = Elf::load(&ram, None, &mut file, Some(GuestAddress(HIGH_MEMORY))).map_err(|error| refuse(kernel, &error))?;
            check_end(kernel, &loaded, layout)?;
            let initrd = load_initrd(&ram, layout, initrd.as_deref(), loaded.kernel_end)?;
            write_cmdline(&ram, cmdline)?;
            set_legacy_interrupts(&first.lock())?;
            if let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap {
                write_start_info(&ram, layout, initrd, kernel)?;
                return protected_mode(&first.lock(), entry.0);
            }
            start_linux(&ram, layout, first, setup_header::default(), loaded.kernel_load.0, initrd, kernel)
        }
        Boot::Linux { kernel, initrd, cmdline } => {
            let mut file = open(kernel)?;
            let start = GuestAddress(HIGH_MEMORY);
            let loaded = BzImage::load(&ram, Some(start), &mut file, Some(start)).map_err(|error| refuse(kernel, &error))?;
            check_end(kernel, &loaded, layout)?;
            let header = loaded.setup_header.unwrap_or_default();
            const XLF_KERNEL_64: u16 = 1;
            if header.xloadflags & XLF_KERNEL_64 == 0 {
                return Err(refuse(kernel, &"it has no 64-bit entry"));
            }
            let initrd = load_initrd(&ram, layout, initrd.as_deref(), loaded.kernel_end + u64::from(header.init_size))?;
            write_cmdline(&ram, cmdline)?;
            set_legacy_interrupts(&first.lock())?;
            start_linux(&ram, layout, first, header, loaded.kernel_load.0 + 0x200, initrd, kernel)
        }
    }
}

/// Guest memory for loading only: the same file as the guest's, mapped once more for a moment.
fn map(memory: &File, layout: &MemoryLayout) -> Result<Ram, VmmError> {
    let mut regions = Vec::new();
    for (first, region) in layout.regions_with_first_page() {
        let file = memory.try_clone().map_err(VmmError::local("share guest memory"))?;
        let offset = FileOffset::new(file, first.0 * PAGE_BYTES as u64);
        let bytes = usize::try_from(region.bytes).unwrap_or(usize::MAX);
        let mapping = MmapRegion::from_file(offset, bytes)
            .map_err(|source| VmmError::Ram(crate::memory::RamError::Map { bytes: region.bytes, source }))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(region.guest_base));
        regions.push(region.ok_or_else(|| VmmError::Config { field: "layout", reason: "a region wraps around".to_owned() })?);
    }
    Ram::from_regions(regions).map_err(|error| VmmError::Config { field: "layout", reason: error.to_string() })
}

fn open(path: &Path) -> Result<File, VmmError> {
    File::open(path).map_err(VmmError::local("open a guest image"))
}

fn refuse(image: &Path, reason: &dyn std::fmt::Display) -> VmmError {
    VmmError::Boot { image: image.display().to_string(), reason: reason.to_string() }
}

fn write(ram: &Ram, image: &str, address: u64, bytes: &[u8]) -> Result<(), VmmError> {
    ram.write_slice(bytes, GuestAddress(address))
        .map_err(|_| VmmError::Boot { image: image.to_owned(), reason: format!("{} bytes at {address:#x} are not all RAM", bytes.len()) })
}

fn check_end(image: &Path, loaded: &KernelLoaderResult, layout: &MemoryLayout) -> Result<(), VmmError> {
    let end = loaded.kernel_end;
    if layout.page_of(end.saturating_sub(1)).is_none() {
        return Err(refuse(image, &format!("it ends at {end:#x}, which is not RAM")));
    }
    Ok(())
}

/// As high as it fits in the first region that ends above the kernel and below 4 GiB: (address, bytes).
fn load_initrd(ram: &Ram, layout: &MemoryLayout, path: Option<&Path>, kernel_end: u64) -> Result<(u64, u64), VmmError> {
    let Some(path) = path else { return Ok((0, 0)) };
    let mut file = open(path)?;
    let bytes = file.metadata().map_err(VmmError::local("read the size of the initial RAM disk"))?.len();
    let low = layout.regions().iter().take_while(|region| region.guest_base < 1 << 32).last();
    let end = low.map_or(0, |region| (region.guest_base + region.bytes).min(1 << 32));
    let address = end.checked_sub(bytes).map(|address| address & !(PAGE_BYTES as u64 - 1)).filter(|address| *address >= kernel_end);
    let address = address.ok_or_else(|| refuse(path, &format!("{bytes} bytes do not fit between the kernel and {end:#x}")))?;
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    ram.read_exact_volatile_from(GuestAddress(address), &mut file, length).map_err(|error| refuse(path, &error))?;
    Ok((address, bytes))
}

fn write_cmdline(ram: &Ram, cmdline: &str) -> Result<(), VmmError> {
    if cmdline.len() >= limits::KERNEL_CMDLINE_BYTES_MAX || cmdline.bytes().any(|byte| byte == 0) {
        let reason = format!("expected less than {} bytes without NUL, got {}", limits::KERNEL_CMDLINE_BYTES_MAX, cmdline.len());
        return Err(VmmError::Config { field: "cmdline", reason });
    }
    write(ram, "command line", CMDLINE, &[cmdline.as_bytes(), &[0]].concat())
}

/// RAM as the guest is told: all regions but the last KiB below 640 KiB and the legacy hole.
fn usable(layout: &MemoryLayout) -> Vec<RamRegion> {
    let mut ranges = vec![RamRegion { guest_base: 0, bytes: EBDA }];
    for region in layout.regions() {
        let start = region.guest_base.max(HIGH_MEMORY);
        let end = region.guest_base + region.bytes;
        if end > start {
            ranges.push(RamRegion { guest_base: start, bytes: end - start });
        }
    }
    ranges
}

fn start_linux(
    ram: &Ram,
    layout: &MemoryLayout,
    vcpu: &Vcpu,
    header: setup_header,
    entry: u64,
    initrd: (u64, u64),
    kernel: &Path,
) -> Result<(), VmmError> {
    let small = |value: u64| u32::try_from(value).map_err(|_| refuse(kernel, &format!("address {value:#x} does not fit 32 bits")));
    let mut params = boot_params { hdr: header, ..Default::default() };
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448;
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = small(CMDLINE)?;
    params.hdr.cmdline_size = small(limits::KERNEL_CMDLINE_BYTES_MAX as u64)?;
    (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (small(initrd.0)?, small(initrd.1)?);
    if params.hdr.kernel_alignment == 0 {
        params.hdr.kernel_alignment = 0x100_0000;
    }
    let ranges = usable(layout);
    for (entry, range) in params.e820_table.iter_mut().zip(&ranges) {
        *entry = boot_e820_entry { addr: range.guest_base, size: range.bytes, r#type: 1 };
    }
    params.e820_entries = u8::try_from(ranges.len().min(params.e820_table.len())).unwrap_or(0);
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, ram).map_err(|error| refuse(kernel, &error))?;
    write_tables(ram, layout)?;
    long_mode(&vcpu.lock(), &Start { entry, stack: ZERO_PAGE, idt: 0, argument: 0 }, ZERO_PAGE)
}

fn write_start_info(ram: &Ram, layout: &MemoryLayout, initrd: (u64, u64), kernel: &Path) -> Result<(), VmmError> {
    let map: Vec<_> = usable(layout)
        .iter()
        .map(|range| hvm_memmap_table_entry { addr: range.guest_base, size: range.bytes, type_: 1, reserved: 0 })
        .collect();
    let modules: Vec<_> =
        if initrd.1 == 0 { Vec::new() } else { vec![hvm_modlist_entry { paddr: initrd.0, size: initrd.1, ..Default::default() }] };
    let module_address = MEMORY_MAP + (map.len() * size_of::<hvm_memmap_table_entry>()) as u64;
    let info = hvm_start_info {
        magic: 0x336e_c578,
        version: 1,
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        nr_modules: u32::try_from(modules.len()).unwrap_or(0),
        modlist_paddr: module_address,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(module_address));
    }
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(|error| refuse(kernel, &error))
}

/// GDT and an identity map of 2 MiB pages.
fn write_tables(ram: &Ram, layout: &MemoryLayout) -> Result<(), VmmError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let words = |address: u64, words: &[u64]| {
        write(ram, "page tables", address, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())
    };
    words(GDT, &[0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff])?;
    let end = layout.regions().last().map_or(0, |region| region.guest_base + region.bytes);
    let gibs = end.div_ceil(GIB).clamp(4, IDENTITY_GIB_MAX);
    words(PML4, &[PDPT | PRESENT_WRITABLE])?;
    let directories: Vec<u64> = (0..gibs).map(|index| (PAGE_DIRECTORIES + index * PAGE_BYTES as u64) | PRESENT_WRITABLE).collect();
    words(PDPT, &directories)?;
    let pages: Vec<u64> = (0..gibs * 512).map(|index| (index << 21) | PRESENT_WRITABLE | LARGE).collect();
    words(PAGE_DIRECTORIES, &pages)
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn task() -> kvm_segment {
    kvm_segment { base: 0, limit: 0xffff, selector: 0x18, type_: 11, present: 1, s: 0, g: 0, ..Default::default() }
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_MP_NE: u64 = (1 << 1) | (1 << 5);
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_SSE: u64 = (1 << 9) | (1 << 10);
const EFER_LME_LMA: u64 = (1 << 8) | (1 << 10);

fn long_mode(vcpu: &VcpuFd, start: &Start, rsi: u64) -> Result<(), VmmError> {
    let mut sregs = vcpu.get_sregs().map_err(VmmError::kvm("KVM_GET_SREGS"))?;
    sregs.cs = segment(0x8, 11, true);
    let data = segment(0x10, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.tr) = (data, data, data, data, data, task());
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 31);
    (sregs.idt.base, sregs.idt.limit) = (start.idt, if start.idt == 0 { 0 } else { 0xfff });
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE | CR4_SSE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_MP_NE | CR0_PG;
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs).map_err(VmmError::kvm("KVM_SET_SREGS"))?;
    set_entry(vcpu, start.entry, |regs| (regs.rsp, regs.rdi, regs.rsi) = (start.stack, start.argument, rsi))
}

fn protected_mode(vcpu: &VcpuFd, entry: u64) -> Result<(), VmmError> {
    let mut sregs = vcpu.get_sregs().map_err(VmmError::kvm("KVM_GET_SREGS"))?;
    sregs.cs = segment(0x8, 11, false);
    let data = segment(0x10, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.tr) = (data, data, data, data, data, task());
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    vcpu.set_sregs(&sregs).map_err(VmmError::kvm("KVM_SET_SREGS"))?;
    set_entry(vcpu, entry, |regs| regs.rbx = START_INFO)
}

fn real_mode(vcpu: &VcpuFd, entry: u64) -> Result<(), VmmError> {
    let mut sregs = vcpu.get_sregs().map_err(VmmError::kvm("KVM_GET_SREGS"))?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(VmmError::kvm("KVM_SET_SREGS"))?;
    set_entry(vcpu, entry, |_| {})
}

fn set_entry(vcpu: &VcpuFd, entry: u64, change: impl FnOnce(&mut kvm_bindings::kvm_regs)) -> Result<(), VmmError> {
    let mut regs = kvm_bindings::kvm_regs { rip: entry, rflags: 2, ..Default::default() };
    change(&mut regs);
    vcpu.set_regs(&regs).map_err(VmmError::kvm("KVM_SET_REGS"))?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(VmmError::kvm("KVM_SET_MP_STATE"))
}

/// LINT0 takes interrupts of the PIC and LINT1 is NMI, as firmware leaves them.
fn set_legacy_interrupts(vcpu: &VcpuFd) -> Result<(), VmmError> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    let mut lapic = vcpu.get_lapic().map_err(VmmError::kvm("KVM_GET_LAPIC"))?;
    // The delivery mode is bits 8 to 10: ExtINT 7, NMI 4.
    for (register, mode) in [(LINT0, 7), (LINT1, 4)] {
        if let Some(byte) = lapic.regs.get_mut(register + 1) {
            *byte = (*byte & !7) | mode;
        }
    }
    vcpu.set_lapic(&lapic).map_err(VmmError::kvm("KVM_SET_LAPIC"))
}
