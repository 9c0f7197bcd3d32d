//! What a QEMU is and holds, and what of two QEMUs has to be equal before one can take the other's guest.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::qmp::Qmp;
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
    };
    let vcpus = u32::try_from(profile.cpus.len()).unwrap_or(u32::MAX);
    let profile = serde_json::to_value(profile).map_err(|error| qmp.protocol(&error.to_string()))?;
    // Where in guest-physical memory RAM lies is QEMU's affair: it sends blocks by name.
    let regions = vec![RamRegion { guest_base: 0, bytes }];
    Ok(Machine { kind: QEMU_KIND.to_owned(), uuid, regions, vcpus, profile })
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
    // QEMU reads what an older one sent, of the same machine type. The other way it does not promise.
    let release = |(major, minor, _): (u32, u32, u32)| (major, minor);
    if release(got.version) < release(wanted.version) {
        let text = |(major, minor, micro): (u32, u32, u32)| format!("{major}.{minor}.{micro}");
        lacks.push(format!("QEMU: expected {} or later, got {}", text(wanted.version), text(got.version)));
    }
    lacks
}

/// How the guest is.
pub(super) fn status(qmp: &Qmp) -> Result<GuestStatus, HypervisorError> {
    let state = match run_state(qmp)?.as_str() {
        "running" => RunState::Running,
        "inmigrate" => RunState::Incoming,
        "shutdown" | "guest-panicked" | "internal-error" => RunState::Ended,
        // `paused`, `postmigrate`, `finish-migrate`, `io-error`, and what later versions add: no vCPU executes.
        _ => RunState::Paused,
    };
    Ok(GuestStatus { state, exit_code: None, last_line: None, generation: None })
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

    fn machine(change: impl FnOnce(&mut Machine, &mut Profile)) -> Machine {
        let mut profile = Profile {
            version: (7, 2, 1),
            package: String::new(),
            machine: "pc-q35-7.2".to_owned(),
            cpus: vec!["qemu64-x86_64-cpu".to_owned(); 2],
            devices: vec!["net0 child<virtio-net-pci>".to_owned()],
        };
        let regions = vec![RamRegion { guest_base: 0, bytes: 64 << 20 }];
        let mut machine = Machine { kind: QEMU_KIND.to_owned(), uuid: VmUuid([1; 16]), regions, vcpus: 2, profile: Value::Null };
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
        check(|_, profile| profile.version = (7, 1, 9), "QEMU: expected 7.2.1 or later, got 7.1.9");
    }

    #[test]
    fn a_profile_of_something_else_is_no_qemu() {
        let source = machine(|_, _| {});
        let other = Machine { profile: json!({ "cpuid": [] }), ..source.clone() };
        assert_eq!(lacks(&source, &other), ["profile: expected one of QEMU"]);
    }
}
