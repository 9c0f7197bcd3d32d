//! `sealane vmm run`: one guest in this process, reachable over the attach protocol.

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use ring::rand::{SecureRandom, SystemRandom};

use super::Ending;
use super::tools::{HugepagesFlag, Payload, VmmCommand, VmmRunFlags};
use crate::control::Exit;
use crate::hypervisor::attach::{self, AttachedGuest, Refusal};
use crate::hypervisor::synthetic::{SyntheticConfig, SyntheticVmm};
use crate::hypervisor::{GuestStatus, Machine};
use crate::memory::PageSet;
use crate::telemetry::{ErrorClass, Problem, chain};
use crate::types::{PAGE_BYTES, VmUuid};
use crate::vmm::{AttachedVm, Boot, EntryMode, Hugepages, PayloadConfig, SerialSink, Surroundings, Vm, VmConfig};

/// How often the heartbeat payload's timer ticks, and how many ticks make a beat.
const TICKS_PER_SECOND: u32 = 100;
const TICKS_PER_BEAT: u64 = 10;
/// Where a flat binary goes: the boot sector's address.
const FLAT_LOAD: u64 = 0x7c00;

pub(super) fn vmm(command: &VmmCommand) -> Ending {
    let VmmCommand::Run(flags) = command;
    let local = |what: String| move |error: std::io::Error| Problem::new(ErrorClass::Local, format!("{what}: {error}"));
    let guest: Arc<Mutex<dyn AttachedGuest>> = match (&flags.payload, flags.incoming) {
        (_, true) => Arc::new(Mutex::new(IncomingVmm::new(flags))),
        (Some(Payload::Synthetic), _) => Arc::new(Mutex::new(synthetic(flags)?)),
        _ => Arc::new(Mutex::new(kvm(flags)?)),
    };
    // Bound after the guest was built: whoever finds the socket finds a guest.
    let listener = attach::bind(&flags.socket).map_err(local(format!("attach socket `{}`", flags.socket.display())))?;
    attach::serve(&listener, Arc::clone(&guest)).map_err(local("attach protocol".to_owned()))?;
    // Nobody listens there any more; whoever replaced it meanwhile has a socket of its own.
    let _ = std::fs::remove_file(&flags.socket);
    let verdict = guest.lock().unwrap_or_else(PoisonError::into_inner).status().exit_code;
    Ok(if verdict.unwrap_or(0) == 0 { Exit::Done } else { Exit::Failed })
}

fn surroundings(flags: &VmmRunFlags) -> Surroundings {
    let hugepages = match flags.hugepages {
        HugepagesFlag::Off => Hugepages::Off,
        HugepagesFlag::Advise => Hugepages::Advise,
        HugepagesFlag::Reserved => Hugepages::Reserved,
    };
    let serial = flags.serial.clone().map_or(SerialSink::Stdout, SerialSink::File);
    Surroundings { hugepages, serial }
}

fn uuid(flags: &VmmRunFlags) -> Result<VmUuid, Problem> {
    let mut random = [0; 16];
    SystemRandom::new().fill(&mut random).map_err(|_| Problem::new(ErrorClass::Local, "the system's random numbers cannot be read"))?;
    // RFC 9562 section 5.4: version 4, variant 10.
    random[6] = (random[6] & 0x0f) | 0x40;
    random[8] = (random[8] & 0x3f) | 0x80;
    Ok(flags.uuid.unwrap_or(VmUuid(random)))
}

fn memory_bytes(flags: &VmmRunFlags) -> Result<u64, Problem> {
    let bytes = flags.memory.map(|memory| memory.bytes).unwrap_or_default();
    if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES as u64) {
        return Err(Problem::new(ErrorClass::Misuse, format!("--memory of {bytes} bytes: expected a multiple of {PAGE_BYTES}")));
    }
    Ok(bytes)
}

fn working_set_pages(flags: &VmmRunFlags, default: u64) -> u64 {
    flags.working_set.map_or(default, |size| size.bytes / PAGE_BYTES as u64)
}

fn kvm(flags: &VmmRunFlags) -> Result<AttachedVm, Problem> {
    let failed = |error: crate::vmm::VmmError| Problem::new(ErrorClass::Local, chain(&error));
    let boot = match &flags.kernel {
        Some(kernel) => kernel_boot(flags, kernel)?,
        None => Boot::Payload(PayloadConfig {
            working_set_pages: working_set_pages(flags, PayloadConfig::default().working_set_pages),
            pages_per_tick: flags.dirty_rate.map_or(0, |rate| pages_per_tick(rate.bytes_per_second, flags.vcpus)),
            ticks_per_second: TICKS_PER_SECOND,
            ticks_per_beat: TICKS_PER_BEAT,
            beats: 0,
        }),
    };
    let surroundings = surroundings(flags);
    let mut config = VmConfig::new(memory_bytes(flags)?, flags.vcpus, uuid(flags)?, boot).map_err(failed)?;
    config.hugepages = surroundings.hugepages;
    config.serial = surroundings.serial.clone();
    let vm = Vm::create(&config).map_err(failed)?;
    vm.start().map_err(failed)?;
    Ok(AttachedVm::running(vm, surroundings))
}

/// Pages that each vCPU writes in a tick, at least one, so that all together write this much a second.
fn pages_per_tick(bytes_per_second: u64, vcpus: u32) -> u64 {
    let ticks = u64::from(TICKS_PER_SECOND) * u64::from(vcpus.max(1));
    (bytes_per_second / (PAGE_BYTES as u64) / ticks).max(1)
}

/// What a kernel file is shows in its first bytes.
fn kernel_boot(flags: &VmmRunFlags, kernel: &std::path::Path) -> Result<Boot, Problem> {
    use std::io::{Read, Seek, SeekFrom};
    let unreadable = |error: std::io::Error| Problem::new(ErrorClass::Misuse, format!("--kernel `{}`: {error}", kernel.display()));
    let mut file = File::open(kernel).map_err(unreadable)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(unreadable)?;
    let (initrd, cmdline) = (flags.initramfs.clone(), flags.cmdline.clone().unwrap_or_default());
    if magic == *b"\x7fELF" {
        return Ok(Boot::Elf { kernel: kernel.to_owned(), initrd, cmdline });
    }
    // Linux boot protocol: "HdrS" at 0x202.
    let mut header = [0; 4];
    let is_linux = file.seek(SeekFrom::Start(0x202)).and_then(|_| file.read_exact(&mut header)).is_ok() && header == *b"HdrS";
    if is_linux {
        return Ok(Boot::Linux { kernel: kernel.to_owned(), initrd, cmdline });
    }
    let mut image = Vec::new();
    file.rewind().and_then(|()| file.take(crate::limits::FLAT_IMAGE_BYTES_MAX).read_to_end(&mut image)).map_err(unreadable)?;
    Ok(Boot::Flat { image, load: FLAT_LOAD, mode: EntryMode::Real })
}

fn synthetic(flags: &VmmRunFlags) -> Result<SyntheticVmm, Problem> {
    let pages = memory_bytes(flags)? / PAGE_BYTES as u64;
    let uuid = uuid(flags)?;
    let mut config =
        SyntheticConfig::new(u64::from_le_bytes([uuid.0[0], uuid.0[1], uuid.0[2], uuid.0[3], 0, 0, 0, 1]), pages, flags.vcpus, 20_000);
    config.uuid = Some(uuid);
    config.working_set_pages = working_set_pages(flags, 4096).min(pages);
    if let Some(rate) = flags.dirty_rate {
        config.pages_per_second = rate.bytes_per_second / PAGE_BYTES as u64;
    }
    SyntheticVmm::running("guest", &config).map_err(|error| Problem::new(ErrorClass::Local, chain(&error)))
}

/// An empty VMM: which kind of guest it hosts is known when its machine is described.
struct IncomingVmm {
    kvm: AttachedVm,
    synthetic: SyntheticVmm,
    is_synthetic: bool,
}

impl IncomingVmm {
    fn new(flags: &VmmRunFlags) -> Self {
        Self { kvm: AttachedVm::incoming(surroundings(flags)), synthetic: SyntheticVmm::incoming("guest"), is_synthetic: false }
    }

    fn guest(&self) -> &dyn AttachedGuest {
        if self.is_synthetic { &self.synthetic } else { &self.kvm }
    }

    fn guest_mut(&mut self) -> &mut dyn AttachedGuest {
        if self.is_synthetic { &mut self.synthetic } else { &mut self.kvm }
    }
}

impl AttachedGuest for IncomingVmm {
    fn machine(&self) -> Result<Machine, Refusal> {
        self.guest().machine()
    }
    fn memory(&self) -> Result<File, Refusal> {
        self.guest().memory()
    }
    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.guest_mut().start_tracking()
    }
    fn harvest(&mut self) -> Result<PageSet, Refusal> {
        self.guest_mut().harvest()
    }
    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        self.guest_mut().stop_tracking()
    }
    fn throttle(&mut self, percent: u8) -> Result<(), Refusal> {
        self.guest_mut().throttle(percent)
    }
    fn pause(&mut self) -> Result<(), Refusal> {
        self.guest_mut().pause()
    }
    fn resume(&mut self) -> Result<(), Refusal> {
        self.guest_mut().resume()
    }
    fn save_state(&mut self) -> Result<Vec<u8>, Refusal> {
        self.guest_mut().save_state()
    }
    fn prepare(&mut self, machine: &Machine) -> Result<File, Vec<String>> {
        self.is_synthetic = match machine.kind.as_str() {
            "synthetic" => true,
            "kvm" => false,
            other => return Err(vec![format!("hypervisor `{other}`: this VMM hosts `kvm` and `synthetic`")]),
        };
        self.guest_mut().prepare(machine)
    }
    fn restore_state(&mut self, state: &[u8]) -> Result<(), Refusal> {
        self.guest_mut().restore_state(state)
    }
    fn status(&mut self) -> GuestStatus {
        self.guest_mut().status()
    }
    fn quit(&mut self) {
        self.guest_mut().quit();
    }
}
