//! `sealane vmm run`: one guest in this process, reachable over the attach protocol.

use std::fs::File;

use ring::rand::{SecureRandom, SystemRandom};

use super::Ending;
use super::tools::{HugepagesFlag, Payload, VmmCommand, VmmRunFlags};
use crate::control::Exit;
use crate::telemetry::{ErrorClass, Problem, chain};
use crate::types::{PAGE_BYTES, VmUuid};
use crate::vmm::{Boot, EntryMode, Hugepages, PayloadConfig, Process, SerialSink, Surroundings, SyntheticConfig, VmConfig};

/// How often the heartbeat payload's timer ticks, and how many ticks make a beat.
const TICKS_PER_SECOND: u32 = 100;
const TICKS_PER_BEAT: u64 = 10;
/// Where a flat binary goes: the boot sector's address.
const FLAT_LOAD: u64 = 0x7c00;

pub(super) fn vmm(command: &VmmCommand) -> Ending {
    let VmmCommand::Run(flags) = command;
    let process = match (&flags.payload, flags.incoming) {
        (_, true) => Process::Incoming(surroundings(flags)),
        (Some(Payload::Synthetic), _) => Process::Synthetic(synthetic(flags)?),
        _ => Process::Kvm(Box::new(kvm(flags)?)),
    };
    let verdict = crate::vmm::serve(process, &flags.socket).map_err(failed)?;
    Ok(if verdict.unwrap_or(0) == 0 { Exit::Done } else { Exit::Failed })
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function for map_err")]
fn failed(error: crate::vmm::VmmError) -> Problem {
    Problem::new(ErrorClass::Local, chain(&error))
}

fn surroundings(flags: &VmmRunFlags) -> Surroundings {
    let hugepages = match flags.hugepages {
        HugepagesFlag::Off => Hugepages::Off,
        HugepagesFlag::Advise => Hugepages::Advise,
        HugepagesFlag::Reserved => Hugepages::Reserved,
    };
    let serial = flags.serial.clone().map_or(SerialSink::Stdout, SerialSink::File);
    Surroundings { hugepages, serial, overcommit: flags.overcommit }
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

fn kvm(flags: &VmmRunFlags) -> Result<VmConfig, Problem> {
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
    config.serial = surroundings.serial;
    Ok(config)
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

fn synthetic(flags: &VmmRunFlags) -> Result<SyntheticConfig, Problem> {
    let pages = memory_bytes(flags)? / PAGE_BYTES as u64;
    let uuid = uuid(flags)?;
    let mut config =
        SyntheticConfig::new(u64::from_le_bytes([uuid.0[0], uuid.0[1], uuid.0[2], uuid.0[3], 0, 0, 0, 1]), pages, flags.vcpus, 20_000);
    config.uuid = Some(uuid);
    config.working_set_pages = working_set_pages(flags, 4096).min(pages);
    if let Some(rate) = flags.dirty_rate {
        config.pages_per_second = rate.bytes_per_second / PAGE_BYTES as u64;
    }
    Ok(config)
}
