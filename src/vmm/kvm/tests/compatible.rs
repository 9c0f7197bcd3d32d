//! What a host lacks is named, one by one, before anything is sent.

use super::super::cpuid::{Host, Profile, lacks_of};
use super::*;
use crate::hypervisor::Machine;

fn host_and_machine() -> Option<(Host, Machine)> {
    let host = Host::open().ok()?;
    let profile = serde_json::to_value(host.profile(host.msrs.clone())).unwrap();
    let regions = vec![RamRegion { guest_base: 0, bytes: 64 << 20 }];
    Some((
        host,
        Machine {
            kind: "kvm".to_owned(),
            uuid: VmUuid([1; 16]),
            regions,
            vcpus: 2,
            profile,
            disks: Vec::new(),
            disks_only: false,
            mode: crate::types::Mode::Precopy,
        },
    ))
}

#[test]
fn a_host_can_take_its_own_machines() {
    if kvm_usable("a_host_can_take_its_own_machines") {
        let (_, machine) = host_and_machine().unwrap();
        assert_eq!(check_compatible(&machine, false), Vec::<String>::new());
        let size = serde_json::to_vec(&machine).unwrap().len();
        println!("machine description: {size} bytes");
        assert!(size < crate::limits::MACHINE_BYTES_MAX / 4);
    }
}

#[test]
fn every_missing_thing_is_named_on_its_own() {
    if !kvm_usable("every_missing_thing_is_named_on_its_own") {
        return;
    }
    let (host, machine) = host_and_machine().unwrap();
    let mut poor = host.clone();
    for leaf in &mut poor.shown {
        match (leaf.function, leaf.index) {
            (1, _) => leaf.ecx &= !((1 << 25) | (1 << 26) | (1 << 27)),
            (0x8000_0001, _) => leaf.edx &= !(1 << 20),
            _ => {}
        }
    }
    poor.msrs.retain(|index| *index != 0x10);
    poor.tsc_khz = host.tsc_khz + 100_000;
    poor.tsc_scaling = false;
    poor.sregs2 = false;
    let lacks = lacks_of(&machine, &poor, Some(1 << 20));
    let wanted = [
        "memory: the guest has 67108864 bytes",
        "CPUID 0x1.0 ecx bit 25 (aes)",
        "CPUID 0x1.0 ecx bit 26 (xsave)",
        "CPUID 0x80000001.0 edx bit 20 (nx)",
        "MSR 0x10",
        "TSC of",
    ];
    for name in wanted {
        assert_eq!(lacks.iter().filter(|lack| lack.starts_with(name)).count(), 1, "{name} in {lacks:#?}");
    }
    assert_eq!(lacks.iter().any(|lack| lack.contains("KVM_CAP_SREGS2")), host.sregs2);
    assert!(!lacks.iter().any(|lack| lack.contains("osxsave")), "a bit that the guest sets itself");
    poor.tsc_scaling = true;
    assert!(!lacks_of(&machine, &poor, None).iter().any(|lack| lack.starts_with("TSC")));
}

#[test]
fn hostile_machine_descriptions_are_refused_with_a_reason() {
    if !kvm_usable("hostile_machine_descriptions_are_refused_with_a_reason") {
        return;
    }
    let (host, machine) = host_and_machine().unwrap();
    let good: Profile = serde_json::from_value(machine.profile.clone()).unwrap();
    let with = |profile: Profile| Machine { profile: serde_json::to_value(profile).unwrap(), ..machine.clone() };
    let cases = [
        (Machine { kind: "qemu".to_owned(), ..machine.clone() }, "kind"),
        (Machine { profile: serde_json::json!({"format": 1}), ..machine.clone() }, "profile"),
        (Machine { profile: serde_json::json!([]), ..machine.clone() }, "profile"),
        (Machine { vcpus: 0, ..machine.clone() }, "vCPUs"),
        (Machine { vcpus: u32::MAX, ..machine.clone() }, "vCPUs"),
        (Machine { regions: Vec::new(), ..machine.clone() }, "region"),
        (Machine { regions: vec![RamRegion { guest_base: 1 << 60, bytes: 4096 }], ..machine.clone() }, "bits"),
        (with(Profile { format: 2, ..good.clone() }), "format 2"),
        (with(Profile { cpuid: vec![[0; 7]; 257], ..good.clone() }), "CPUID leaves"),
        (with(Profile { msrs: vec![1; 5000], ..good.clone() }), "MSRs"),
        (with(Profile { xsave_bytes: usize::MAX, ..good.clone() }), "XSAVE"),
        (with(Profile { devices: vec!["virtio-net".to_owned()], ..good.clone() }), "virtio-net"),
        (with(Profile { capabilities: vec!["KVM_CAP_XEN_HVM".to_owned()], ..good }), "KVM_CAP_XEN_HVM"),
    ];
    for (machine, name) in cases {
        let lacks = lacks_of(&machine, &host, None);
        assert!(lacks.iter().any(|lack| lack.contains(name)), "{name} in {lacks:?}");
    }
}
