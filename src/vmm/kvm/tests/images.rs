//! Guest images: each kind is loaded where it belongs and started the way its protocol says.

use std::io::Write;

use super::*;
use crate::vmm::config::EntryMode;
use crate::vmm::exit::ExitVerdict;

/// `mov eax, esi or ebx; mov dx, 0xf4; out dx, eax; hlt`: reports a register as the verdict.
const REPORT_RSI: [u8; 9] = [0x89, 0xf0, 0x66, 0xba, 0xf4, 0x00, 0xef, 0xf4, 0xf4];
const REPORT_EBX: [u8; 9] = [0x89, 0xd8, 0x66, 0xba, 0xf4, 0x00, 0xef, 0xf4, 0xf4];

fn verdict(boot: Boot) -> ExitVerdict {
    let mut config = VmConfig::new(32 << 20, 1, VmUuid([3; 16]), boot).unwrap();
    config.serial = SerialSink::Discard;
    let vm = Vm::create(&config).unwrap();
    vm.start().unwrap();
    vm.wait_exit()
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A bzImage of one setup sector: `version` 2.15, loaded high, with or without the 64-bit entry.
fn bzimage(code: &[u8], xloadflags: u16) -> Vec<u8> {
    let mut image = vec![0; 1024 + 0x200];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
    image.extend(code);
    image
}

/// An ELF with one segment at 1 MiB and, if wanted, a PVH note.
fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(0x200, 0);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, if pvh { 2 } else { 1 }, 0]);
    let mut header = |at: usize, kind: u32, offset: u64, address: u64, bytes: u64| {
        put(at, &kind.to_le_bytes());
        for (step, value) in [(8, offset), (16, address), (24, address), (32, bytes), (40, bytes)] {
            put(at + step, &value.to_le_bytes());
        }
    };
    header(64, 1, 0x200, 0x10_0000, code.len() as u64);
    if pvh {
        header(120, 4, 0x180, 0, 20);
        put(0x180, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        put(0x18c, b"Xen\0");
        put(0x190, &0x10_0000u32.to_le_bytes());
    }
    image.extend(code);
    image
}

#[test]
fn flat_binaries_start_in_either_mode() {
    if !kvm_usable("flat_binaries_start_in_either_mode") {
        return;
    }
    // mov eax, 0x12345678 (66 b8 in real mode); mov dx, 0xf4; out dx, eax
    let real = vec![0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, 0xba, 0xf4, 0x00, 0x66, 0xef, 0xf4];
    assert_eq!(verdict(Boot::Flat { image: real, load: 0x7c00, mode: EntryMode::Real }), ExitVerdict::Code(0x1234_5678));
    // mov rax, [0xfee00030] >> needs the identity map up to 4 GiB: report the LAPIC version's low byte as non-zero
    let long = [&[0x31, 0xf6, 0xb8, 0x30, 0x00, 0xe0, 0xfe, 0x8b, 0x30][..], &REPORT_RSI].concat();
    let ExitVerdict::Code(version) = verdict(Boot::Flat { image: long, load: 0x10_0000, mode: EntryMode::Long }) else { panic!() };
    assert_eq!(version & 0xf0, 0x10, "an integrated LAPIC has version 0x1X");
}

#[test]
fn a_triple_fault_and_a_reset_end_the_guest() {
    if !kvm_usable("a_triple_fault_and_a_reset_end_the_guest") {
        return;
    }
    let fault = vec![0x0f, 0x0b];
    assert_eq!(verdict(Boot::Flat { image: fault, load: 0x10_0000, mode: EntryMode::Long }), ExitVerdict::Shutdown);
    let reset = vec![0xb0, 0xfe, 0xe6, 0x64, 0xf4];
    assert_eq!(verdict(Boot::Flat { image: reset, load: 0x10_0000, mode: EntryMode::Long }), ExitVerdict::Reset);
}

#[test]
fn a_bzimage_starts_at_its_64_bit_entry_with_the_zero_page() {
    if !kvm_usable("a_bzimage_starts_at_its_64_bit_entry_with_the_zero_page") {
        return;
    }
    // mov esi, [rsi + 0x228]: the command line's address, from the boot parameters that RSI points at
    let code = [&[0x8b, 0xb6, 0x28, 0x02, 0x00, 0x00][..], &REPORT_RSI].concat();
    let (kernel, initrd) = (file(&bzimage(&code, 1)), file(&[7; 5000]));
    let boot = |kernel: &tempfile::NamedTempFile, cmdline: &str| Boot::Linux {
        kernel: kernel.path().to_owned(),
        initrd: Some(initrd.path().to_owned()),
        cmdline: cmdline.to_owned(),
    };
    assert_eq!(verdict(boot(&kernel, "console=ttyS0")), ExitVerdict::Code(0x2_0000));
    let refused = |boot| Vm::create(&VmConfig::new(32 << 20, 1, VmUuid([3; 16]), boot).unwrap()).unwrap_err().to_string();
    assert!(refused(boot(&file(&bzimage(&code, 0)), "")).contains("no 64-bit entry"));
    assert!(refused(boot(&file(b"#!/bin/sh"), "")).contains("cannot boot"));
    assert!(refused(boot(&kernel, &"x".repeat(4096))).contains("cmdline"));
}

#[test]
fn an_elf_starts_by_pvh_or_by_the_linux_protocol() {
    if !kvm_usable("an_elf_starts_by_pvh_or_by_the_linux_protocol") {
        return;
    }
    let boot = |image: &[u8]| {
        let kernel = file(image);
        verdict(Boot::Elf { kernel: kernel.path().to_owned(), initrd: None, cmdline: "quiet".to_owned() })
    };
    // PVH: EBX points at the start information, which begins with its magic.
    let code = [&[0x8b, 0x1b][..], &REPORT_EBX].concat();
    assert_eq!(boot(&elf(&code, true)), ExitVerdict::Code(0x336e_c578));
    assert_eq!(boot(&elf(&REPORT_RSI, false)), ExitVerdict::Code(0x7000));
}

#[test]
fn images_outside_ram_are_refused() {
    if !kvm_usable("images_outside_ram_are_refused") {
        return;
    }
    for load in [32 << 20, (32 << 20) - 1, u64::MAX] {
        let boot = Boot::Flat { image: vec![0xf4; 16], load, mode: EntryMode::Long };
        let error = Vm::create(&VmConfig::new(32 << 20, 1, VmUuid([3; 16]), boot).unwrap()).unwrap_err();
        assert!(error.to_string().contains("not all RAM"), "{error}");
    }
}

/// A vCPU that is stopped at a port access has to complete it before its registers are read: else the
/// destination repeats it, and a read that changes the device gives another answer.
#[test]
fn a_guest_moved_in_the_middle_of_port_accesses_repeats_and_drops_none() {
    if !kvm_usable("a_guest_moved_in_the_middle_of_port_accesses_repeats_and_drops_none") {
        return;
    }
    // For each letter: write 2 to IER (0x3f9), which raises "transmitter empty"; read IIR (0x3fa), which says so (0xc2) and
    // takes it back, so that a repeated read says otherwise and ends the guest with code 1; print the letter.
    let code = vec![
        0xb3, 0x41, 0x66, 0xba, 0xf9, 0x03, 0xb0, 0x02, 0xee, 0x66, 0xba, 0xfa, 0x03, 0xec, 0x3c, 0xc2, 0x75, 0x13, 0x66, 0xba, 0xf8, 0x03,
        0x88, 0xd8, 0xee, 0xfe, 0xc3, 0x80, 0xfb, 0x5b, 0x75, 0xe2, 0xb0, 0x0a, 0xee, 0xeb, 0xdb, 0xb8, 0x01, 0x00, 0x00, 0x00, 0x66, 0xba,
        0xf4, 0x00, 0xef,
    ];
    let boot = Boot::Flat { image: code, load: 0x10_0000, mode: EntryMode::Long };
    let mut config = VmConfig::new(2 << 20, 1, VmUuid([3; 16]), boot).unwrap();
    let console = ConsoleBuffer::default();
    config.serial = SerialSink::Buffer(console.clone());
    let (mut vm, mut consoles) = (Vm::create(&config).unwrap(), vec![console]);
    vm.start().unwrap();
    for _ in 0..20 {
        let lines = || consoles.last().unwrap().text().len();
        wait_for(&vm, "output", || lines() > 0);
        vm.pause().unwrap();
        let (destination, console) = twin(&vm, DirtyMode::Auto);
        copy_pages(&vm, &destination, &PageSet::full(vm.ram().pages()));
        destination.restore_state(&vm.save_state().unwrap()).unwrap();
        destination.resume().unwrap();
        consoles.push(console);
        vm = destination;
    }
    vm.pause().unwrap();
    let text: String = consoles.iter().map(ConsoleBuffer::text).collect();
    let odd: Vec<_> = text.lines().filter(|line| *line != "ABCDEFGHIJKLMNOPQRSTUVWXYZ").collect();
    assert_eq!(odd, Vec::<&str>::new());
}
