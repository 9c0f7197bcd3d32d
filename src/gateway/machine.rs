//! What a guest's VMM or an offer says that the VM is made of, against what the configuration lets it be.

use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::config::Vm;
use crate::gateway::judge::hex;
use crate::hypervisor::Machine;

/// SHA-256 over everything that the destination has to provide for the VM: processors with their features, memory, devices.
pub(super) fn machine_digest(machine: &Machine) -> String {
    // Keys of objects are sorted, so that the text is the same for the same machine.
    let text = json!({ "kind": machine.kind, "vcpus": machine.vcpus, "regions": machine.regions, "profile": machine.profile });
    hex(digest(&SHA256, text.to_string().as_bytes()).as_ref())
}

/// Compares what the configuration says of it.
///
/// # Errors
/// What is different, in words.
pub(super) fn check_machine(vm: &Vm, machine: &Machine) -> Result<(), String> {
    if let Some(vcpus) = vm.vcpus.filter(|vcpus| *vcpus != machine.vcpus) {
        return Err(format!("VM `{}` has {} vCPUs, expected {vcpus} by the configuration", vm.name, machine.vcpus));
    }
    if let Some(wanted) = &vm.devices {
        let listed = machine.profile.get("devices").and_then(Value::as_array);
        let mut devices: Vec<&str> = listed.into_iter().flatten().map(|device| device.as_str().unwrap_or("?")).collect();
        let mut wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
        devices.sort_unstable();
        wanted.sort_unstable();
        if devices != wanted {
            let (devices, wanted) = (devices.join(", "), wanted.join(", "));
            return Err(format!("VM `{}` has the devices `{devices}`, expected `{wanted}` by the configuration", vm.name));
        }
    }
    if let Some(wanted) = &vm.machine {
        let found = machine_digest(machine);
        if found != *wanted {
            return Err(format!("VM `{}` is the machine `{found}`, expected `{wanted}` by the configuration", vm.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_machine_than_the_configured_one_is_named() {
        let text = "[gateway]\nname = \"gw-a\"\nsite = \"dc1\"\n[identity]\ncertificate = \"c\"\nkey = \"k\"\nsigning_key = \"s\"\n\
            [[identity.trust]]\ndomain = \"example.net\"\nroots = \"r\"\ncrls = [\"l\"]\n\
            [[vm]]\nname = \"web\"\nuuid = \"00000000-0000-4000-8000-000000000001\"\ntenant = \"t\"\nclassification = \"internal\"\n";
        let config = crate::config::parse(text, std::path::Path::new("gateway.toml")).unwrap();
        let plain = config.vms[0].clone();
        let machine = Machine {
            kind: "kvm".to_owned(),
            uuid: plain.uuid,
            regions: Vec::new(),
            vcpus: 2,
            profile: json!({ "cpuid": [[1, 0, 0, 1, 2, 3, 4]], "devices": ["serial", "disk@/dev/vg/web"] }),
            disks: Vec::new(),
            disks_only: false,
            mode: crate::types::Mode::Precopy,
        };
        assert_eq!(check_machine(&plain, &machine), Ok(()));
        let pinned = |change: fn(&mut Vm)| {
            let mut vm = plain.clone();
            vm.devices = Some(vec!["disk@/dev/vg/web".to_owned(), "serial".to_owned()]);
            vm.vcpus = Some(2);
            change(&mut vm);
            vm
        };
        assert_eq!(check_machine(&pinned(|_| ()), &machine), Ok(()));
        for (vm, words) in [
            (pinned(|vm| vm.vcpus = Some(1)), "2 vCPUs, expected 1"),
            (pinned(|vm| vm.devices = Some(Vec::new())), "disk@/dev/vg/web"),
            (pinned(|vm| vm.devices.as_mut().unwrap()[0].push('x')), "disk@/dev/vg/webx"),
            (pinned(|vm| vm.machine = Some("00".to_owned())), "expected `00`"),
        ] {
            let refused = check_machine(&vm, &machine).unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
        // A feature of the processor more is another machine.
        let mut vm = plain;
        vm.machine = Some(machine_digest(&machine));
        assert_eq!(check_machine(&vm, &machine), Ok(()));
        let mut other = machine;
        other.profile["cpuid"][0][5] = json!(7);
        assert!(check_machine(&vm, &other).is_err());
    }
}
