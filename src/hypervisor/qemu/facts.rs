//! What a QEMU is and holds, and what of two QEMUs has to be equal before one can take the other's guest.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::qmp::Qmp;
use crate::condense::{Expected, Grammar, RamBlock};
use crate::hypervisor::{GuestStatus, HypervisorError, Machine, RunState};
use crate::limits;
use crate::types::{PAGE_BYTES, RamRegion, VmUuid};

/// The `kind` of a QEMU guest.
pub const QEMU_KIND: &str = "qemu";

/// The profile of a QEMU guest. Names are QEMU's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    /// Major, minor, micro.
    version: (u32, u32, u32),
    package: String,
    /// For example `pc-q35-7.2`: what QEMU keeps compatible between versions.
    machine: String,
    /// Type of every vCPU.
    cpus: Vec<String>,
    /// Name and type of every device that the command line or an operator has added, sorted.
    devices: Vec<String>,
    /// RAM of the guest, and what its devices have of their own; none when QEMU does not tell.
    blocks: Vec<RamBlock>,
}

#[derive(Debug, Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

/// What the guest is made of.
pub(super) fn machine(qmp: &Qmp) -> Result<Machine, HypervisorError> {
    #[derive(Deserialize)]
    struct Uuid {
        #[serde(rename = "UUID")]
        uuid: String,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Memory {
        base_memory: u64,
        #[serde(default)]
        plugged_memory: u64,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Cpu {
        qom_path: String,
    }
    let Uuid { uuid } = qmp.ask("query-uuid", Value::Null)?;
    let uuid: VmUuid = uuid.parse().map_err(|_| qmp.protocol(&format!("its UUID is `{uuid}`")))?;
    let memory: Memory = qmp.ask("query-memory-size-summary", Value::Null)?;
    let bytes = memory.base_memory.saturating_add(memory.plugged_memory);
    if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES as u64) || bytes > limits::RAM_BYTES_MAX {
        return Err(qmp.protocol(&format!("its memory has {bytes} bytes")));
    }
    let kind: String = qmp.ask("qom-get", json!({ "path": "/machine", "property": "type" }))?;
    let mut cpus = Vec::new();
    let all: Vec<Cpu> = qmp.ask("query-cpus-fast", Value::Null)?;
    for cpu in &all {
        cpus.push(qmp.ask("qom-get", json!({ "path": cpu.qom_path, "property": "type" }))?);
    }
    let mut devices = Vec::new();
    for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let properties: Vec<Property> = qmp.ask("qom-list", json!({ "path": path }))?;
        devices
            .extend(properties.iter().filter(|property| property.name != "type").map(|device| format!("{} {}", device.name, device.kind)));
    }
    if devices.len() > limits::QEMU_DEVICES_MAX {
        return Err(qmp.protocol(&format!("it has {} devices: expected at most {}", devices.len(), limits::QEMU_DEVICES_MAX)));
    }
    devices.sort_unstable();
    let version = qmp.version();
    let profile = Profile {
        version: version.numbers,
        package: version.package.clone(),
        machine: kind.strip_suffix("-machine").unwrap_or(&kind).to_owned(),
        cpus,
        devices,
        blocks: blocks(qmp),
    };
    let vcpus = u32::try_from(profile.cpus.len()).unwrap_or(u32::MAX);
    let profile = serde_json::to_value(profile).map_err(|error| qmp.protocol(&error.to_string()))?;
    // Where in guest-physical memory RAM lies is QEMU's affair: it sends blocks by name.
    let regions = vec![RamRegion { guest_base: 0, bytes }];
    Ok(Machine {
        kind: QEMU_KIND.to_owned(),
        uuid,
        regions,
        vcpus,
        profile,
        disks: Vec::new(),
        disks_only: false,
        mode: crate::types::Mode::Precopy,
    })
}

/// The first release that leaves the disks of a guest that is split to the source until the guest is told to go on.
const SPLITS_FROM: (u32, u32) = (10, 0);

/// Why this guest cannot be split: `None` when it can.
pub(super) fn not_split(qmp: &Qmp, machine: &Machine) -> Result<Option<String>, HypervisorError> {
    let (major, minor, micro) = qmp.version().numbers;
    if (major, minor) < SPLITS_FROM {
        return Ok(Some(format!("post-copy: expected QEMU {}.{} or later, got {major}.{minor}.{micro}", SPLITS_FROM.0, SPLITS_FROM.1)));
    }
    if grammar(machine) == Grammar::Opaque {
        return Ok(Some("post-copy: expected blocks of memory that QEMU names, got none".to_owned()));
    }
    // One that gets there in time ends when the other QEMU has loaded its devices, of which their list is the end.
    if qmp.ask("qom-get", json!({ "path": "/machine", "property": "suppress-vmdesc" })).unwrap_or(false) {
        return Ok(Some("post-copy: expected a machine whose stream lists its devices, got one with `suppress-vmdesc=on`".to_owned()));
    }
    Ok(has_huge_pages(qmp).then(|| "post-copy: expected memory in pages of 4 KiB, got huge pages".to_owned()))
}

/// Whether some of its memory is in pages that are larger than 4 KiB.
pub(super) fn has_huge_pages(qmp: &Qmp) -> bool {
    !small_pages(&ramblock_text(qmp))
}

/// Whether every block has pages of 4 KiB.
fn small_pages(text: &str) -> bool {
    text.lines().skip(1).filter(|line| !line.trim().is_empty()).all(|line| {
        let mut words = line.split_whitespace().skip(1);
        (words.next(), words.next()) == (Some("4"), Some("KiB"))
    })
}

/// Blocks of memory that QEMU sends by name. Its monitor has them as text only, and one that is another text says nothing.
pub(super) fn blocks(qmp: &Qmp) -> Vec<RamBlock> {
    read_blocks(&ramblock_text(qmp)).unwrap_or_default()
}

fn ramblock_text(qmp: &Qmp) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Text {
        human_readable_text: String,
    }
    qmp.ask("x-query-ramblock", Value::Null).map_or_else(|_| String::new(), |text: Text| text.human_readable_text)
}

fn read_blocks(text: &str) -> Option<Vec<RamBlock>> {
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    // Its name, the size of its pages with a unit, where it lies, bytes in use, bytes that it may grow to.
    let block = |line: &str| match line.split_whitespace().collect::<Vec<_>>().as_slice() {
        [name, _, _, _, used, max, ..] => Some(RamBlock { name: (*name).to_owned(), used: number(used)?, max: number(max)? }),
        _ => None,
    };
    let blocks = text.lines().skip(1).filter(|line| !line.trim().is_empty()).map(block).collect::<Option<Vec<_>>>()?;
    (blocks.len() <= limits::QEMU_BLOCKS_MAX).then_some(blocks)
}

/// What a stream of this guest is written in.
pub(super) fn grammar(machine: &Machine) -> Grammar {
    match serde_json::from_value::<Profile>(machine.profile.clone()) {
        Ok(Profile { machine: kind, blocks, .. }) if !blocks.is_empty() => {
            Grammar::Qemu(Box::new(Expected { uuid: machine.uuid, machine: kind, blocks, post_copy: machine.mode.may_split() }))
        }
        _ => Grammar::Opaque,
    }
}

/// Blocks of the source for which there is none here that could take them.
fn missing_blocks(wanted: &[RamBlock], got: &[RamBlock]) -> Vec<String> {
    let fits = |wanted: &RamBlock, got: &RamBlock| {
        let grows = wanted.used < wanted.max || got.used < got.max;
        wanted.name == got.name && (wanted.used == got.used || (grows && wanted.used <= got.max))
    };
    let missing = wanted.iter().filter(|wanted| !got.iter().any(|got| fits(wanted, got)));
    missing.map(|block| format!("{} of {} bytes", block.name, block.used)).collect()
}

/// What `here` lacks to take the guest of `source`, a line each.
pub(super) fn lacks(source: &Machine, here: &Machine) -> Vec<String> {
    let mut lacks = Vec::new();
    let mut differs = |what: &str, wanted: String, got: String| {
        if wanted != got {
            lacks.push(format!("{what}: expected {wanted}, got {got}"));
        }
    };
    let bytes = |machine: &Machine| machine.regions.iter().map(|region| region.bytes).sum::<u64>().to_string();
    differs("driver", source.kind.clone(), here.kind.clone());
    differs("UUID", source.uuid.to_string(), here.uuid.to_string());
    differs("bytes of memory", bytes(source), bytes(here));
    let read = |machine: &Machine| serde_json::from_value::<Profile>(machine.profile.clone());
    let (Ok(wanted), Ok(got)) = (read(source), read(here)) else {
        lacks.push("profile: expected one of QEMU".to_owned());
        return lacks;
    };
    differs("machine type", wanted.machine, got.machine);
    differs("vCPUs", wanted.cpus.join(" "), got.cpus.join(" "));
    let missing =
        |from: &[String], of: &[String]| from.iter().filter(|device| !of.contains(device)).cloned().collect::<Vec<_>>().join(", ");
    differs("devices", missing(&wanted.devices, &got.devices), missing(&got.devices, &wanted.devices));
    if !wanted.blocks.is_empty() && !got.blocks.is_empty() {
        let missing = missing_blocks(&wanted.blocks, &got.blocks);
        let none = if missing.is_empty() { "" } else { "none that takes it" };
        differs("blocks of memory", missing.join(", "), none.to_owned());
    }
    // QEMU reads what an older one sent, of the same machine type. The other way it does not promise.
    let release = |(major, minor, _): (u32, u32, u32)| (major, minor);
    if release(got.version) < release(wanted.version) {
        let text = |(major, minor, micro): (u32, u32, u32)| format!("{major}.{minor}.{micro}");
        lacks.push(format!("QEMU: expected {} or later, got {}", text(wanted.version), text(got.version)));
    }
    if source.mode.may_split() && release(got.version) < SPLITS_FROM {
        let (major, minor, micro) = got.version;
        lacks.push(format!("QEMU for post-copy: expected {}.{} or later, got {major}.{minor}.{micro}", SPLITS_FROM.0, SPLITS_FROM.1));
    }
    lacks
}

/// How the guest is.
pub(super) fn status(qmp: &Qmp) -> Result<GuestStatus, HypervisorError> {
    let state = match run_state(qmp)?.as_str() {
        "running" => RunState::Running,
        "inmigrate" => RunState::Incoming,
        // It was split, and lacks pages that nobody sends any more: no guest that could be run.
        "paused" if is_lost(qmp)? => RunState::Incoming,
        "shutdown" | "guest-panicked" | "internal-error" => RunState::Ended,
        // `paused`, `postmigrate`, `finish-migrate`, `io-error`, and what later versions add: no vCPU executes.
        _ => RunState::Paused,
    };
    Ok(GuestStatus { state, exit_code: None, last_line: None, generation: None })
}

/// Whether its guest is one that was split and whose stream is lost, at the destination.
pub(super) fn lacks_pages(qmp: &Qmp) -> Result<bool, HypervisorError> {
    let here = matches!(run_state(qmp)?.as_str(), "running" | "paused");
    Ok(here && is_lost(qmp)?)
}

/// Whether it was split and its stream is lost.
fn is_lost(qmp: &Qmp) -> Result<bool, HypervisorError> {
    Ok(migration_state(qmp)?.as_deref() == Some("postcopy-paused"))
}

/// QEMU's own word for how its migration is.
fn migration_state(qmp: &Qmp) -> Result<Option<String>, HypervisorError> {
    #[derive(Deserialize)]
    struct Migration {
        status: Option<String>,
    }
    qmp.ask("query-migrate", Value::Null).map(|Migration { status }| status)
}

/// QEMU's own word for it.
pub(super) fn run_state(qmp: &Qmp) -> Result<String, HypervisorError> {
    #[derive(Deserialize)]
    struct Status {
        status: String,
    }
    qmp.ask("query-status", Value::Null).map(|Status { status }| status)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As 10.0 says it; 7.2 has no columns behind `Total`.
    const BLOCKS: &str =
        "              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f6557e00000  rw
    /rom@etc/acpi/tables    4 KiB  0x00000000040c0000 0x0000000000020000 0x0000000000200000 0x00007f65aa400000  ro

";

    fn machine(change: impl FnOnce(&mut Machine, &mut Profile)) -> Machine {
        let mut profile = Profile {
            version: (7, 2, 1),
            package: String::new(),
            machine: "pc-q35-7.2".to_owned(),
            cpus: vec!["qemu64-x86_64-cpu".to_owned(); 2],
            devices: vec!["net0 child<virtio-net-pci>".to_owned()],
            blocks: read_blocks(BLOCKS).unwrap(),
        };
        let regions = vec![RamRegion { guest_base: 0, bytes: 64 << 20 }];
        let (kind, uuid) = (QEMU_KIND.to_owned(), VmUuid([1; 16]));
        let mut machine = Machine {
            kind,
            uuid,
            regions,
            vcpus: 2,
            profile: Value::Null,
            disks: Vec::new(),
            disks_only: false,
            mode: crate::types::Mode::Precopy,
        };
        change(&mut machine, &mut profile);
        machine.profile = serde_json::to_value(profile).unwrap();
        machine
    }

    #[test]
    fn the_same_machine_and_a_later_qemu_lack_nothing() {
        let source = machine(|_, _| {});
        assert_eq!(lacks(&source, &source), [""; 0]);
        assert_eq!(lacks(&source, &machine(|_, profile| profile.version = (10, 0, 2))), [""; 0]);
    }

    #[test]
    fn every_difference_is_named() {
        let source = machine(|_, _| {});
        let check = |change: fn(&mut Machine, &mut Profile), says: &str| {
            let lacks = lacks(&source, &machine(change));
            assert!(lacks.len() == 1 && lacks[0].contains(says), "{lacks:?}: {says}");
        };
        check(|machine, _| machine.uuid = VmUuid([2; 16]), "UUID: expected 01010101");
        check(|machine, _| machine.regions[0].bytes = 32 << 20, "bytes of memory: expected 67108864, got 33554432");
        check(|_, profile| profile.machine = "pc-q35-10.0".to_owned(), "machine type: expected pc-q35-7.2, got pc-q35-10.0");
        check(|_, profile| profile.cpus.truncate(1), "vCPUs");
        check(
            |_, profile| profile.devices = vec!["net1 child<e1000>".to_owned()],
            "devices: expected net0 child<virtio-net-pci>, got net1",
        );
        check(
            |_, profile| profile.blocks[0] = RamBlock { name: "pc.ram".to_owned(), used: 1, max: 1 },
            "blocks of memory: expected pc.ram of 67108864 bytes",
        );
        check(|_, profile| profile.blocks[1].name = "other".to_owned(), "/rom@etc/acpi/tables of 131072 bytes");
        check(|_, profile| profile.version = (7, 1, 9), "QEMU: expected 7.2.1 or later, got 7.1.9");
        let split = Machine { mode: crate::types::Mode::Hybrid, ..source };
        assert_eq!(lacks(&split, &machine(|_, profile| profile.version = (10, 0, 2))), [""; 0]);
        assert_eq!(lacks(&split, &split), ["QEMU for post-copy: expected 10.0 or later, got 7.2.1"]);
    }

    #[test]
    fn a_block_that_grows_fits_into_one_that_may() {
        let source = machine(|_, _| {});
        assert_eq!(lacks(&source, &machine(|_, profile| profile.blocks[1].used = 0x1000)), [""; 0]);
        assert_eq!(lacks(&source, &machine(|_, profile| profile.blocks.clear())), [""; 0]);
        assert!(!lacks(&source, &machine(|_, profile| (profile.blocks[1].used, profile.blocks[1].max) = (1, 2))).is_empty());
    }

    #[test]
    fn blocks_in_another_form_are_none() {
        assert_eq!(read_blocks(BLOCKS).unwrap()[1], RamBlock { name: "/rom@etc/acpi/tables".to_owned(), used: 0x2_0000, max: 0x20_0000 });
        assert!(small_pages(BLOCKS) && !small_pages(&BLOCKS.replacen("4 KiB", "2 MiB", 1)));
        assert_eq!(read_blocks("head\n pc.ram 4 KiB 0x0 64M 64M\n"), None);
        assert_eq!(grammar(&machine(|_, profile| profile.blocks.clear())), Grammar::Opaque);
        assert!(matches!(grammar(&machine(|_, _| {})), Grammar::Qemu(_)));
    }

    #[test]
    fn a_profile_of_something_else_is_no_qemu() {
        let source = machine(|_, _| {});
        let other = Machine { profile: json!({ "cpuid": [] }), ..source.clone() };
        assert_eq!(lacks(&source, &other), ["profile: expected one of QEMU"]);
    }
}
