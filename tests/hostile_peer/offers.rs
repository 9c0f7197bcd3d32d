//! OFFERs that no honest source makes.

use sealane::hypervisor::Machine;
use sealane::telemetry::ErrorClass;
use sealane::types::{Epoch, MigrationId, RamRegion};
use sealane::wire::{Message, Offer};
use serde_json::json;

use crate::lab::{EVIL, Gateway, Lab, OTHER, uuid, vm};
use crate::source::{Evil, case, other_uuid, random, takes_an_honest_vm};

const MIB: u64 = 1 << 20;

/// Changes the machine description, and the copies of its facts in the offer with it.
fn machine(offer: &mut Offer, change: impl FnOnce(&mut Machine)) {
    let mut machine: Machine = serde_json::from_slice(&offer.machine).unwrap();
    change(&mut machine);
    offer.regions.clone_from(&machine.regions);
    offer.hypervisor.clone_from(&machine.kind);
    offer.uuid = machine.uuid;
    offer.machine = serde_json::to_vec(&machine).unwrap();
}

fn region(guest_base: u64, bytes: u64) -> RamRegion {
    RamRegion { guest_base, bytes }
}

async fn refused(gateway: &mut Gateway, evil: &Evil, name: &str, expected: ErrorClass, change: impl FnOnce(&mut Offer)) {
    case(gateway, evil, name, expected, async |attempt| {
        change(&mut attempt.offer);
        attempt.say(Message::Offer(attempt.offer.clone())).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offer_that_makes_no_sense_is_refused_before_anything_is_built() {
    use ErrorClass::{Denied, PeerIncompatible, PeerMisbehaved};
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let layouts: [(&str, Vec<RamRegion>, ErrorClass); 7] = [
        ("overlap", vec![region(0, 2 * MIB), region(MIB, MIB)], PeerMisbehaved),
        ("descending", vec![region(4 * MIB, MIB), region(0, MIB)], PeerMisbehaved),
        ("unaligned base", vec![region(1, MIB)], PeerMisbehaved),
        ("unaligned length", vec![region(0, MIB + 1)], PeerMisbehaved),
        ("wraps around", vec![region(u64::MAX - 4095, 8192)], PeerMisbehaved),
        ("64 TiB", vec![region(0, 1 << 46)], PeerIncompatible),
        ("over what is accepted", vec![region(0, 65 * MIB)], PeerIncompatible),
    ];
    for (name, regions, expected) in layouts {
        refused(&mut gateway, &evil, name, expected, |offer| machine(offer, |machine| machine.regions = regions)).await;
    }
    type Change = Box<dyn FnOnce(&mut Offer)>;
    let changes: Vec<(&str, ErrorClass, Change)> = vec![
        ("regions of another machine", PeerMisbehaved, Box::new(|offer| offer.regions = vec![region(0, MIB)])),
        ("UUID of another machine", PeerMisbehaved, Box::new(|offer| offer.uuid = other_uuid())),
        ("another kind than the machine", PeerMisbehaved, Box::new(|offer| offer.hypervisor = "kvm".into())),
        ("wrong UUID for the name", Denied, Box::new(|offer| machine(offer, |machine| machine.uuid = other_uuid()))),
        ("UUID of another VM", Denied, Box::new(|offer| machine(offer, |machine| machine.uuid = uuid(1)))),
        ("name of another VM", Denied, Box::new(|offer| offer.vm = vm(1))),
        ("unknown VM", Denied, Box::new(|offer| offer.vm = "stranger".parse().unwrap())),
        ("a VM named like the control socket", Denied, Box::new(|offer| offer.vm = "api.sock".parse().unwrap())),
        ("machine of no bytes", PeerMisbehaved, Box::new(|offer| offer.machine.clear())),
        ("machine of garbage", PeerMisbehaved, Box::new(|offer| offer.machine = vec![0xff; 1000])),
        ("machine of brackets", PeerMisbehaved, Box::new(|offer| offer.machine = vec![b'['; 262_144])),
        ("machine over its bound", PeerMisbehaved, Box::new(|offer| offer.machine = vec![b' '; 262_145])),
        ("unknown hypervisor", PeerIncompatible, Box::new(|offer| machine(offer, |machine| machine.kind = "quantum".into()))),
        ("no lanes", PeerMisbehaved, Box::new(|offer| offer.stream.lanes = 0)),
        ("too many lanes", PeerMisbehaved, Box::new(|offer| offer.stream.lanes = 17)),
        ("most lanes that can be written", PeerMisbehaved, Box::new(|offer| offer.stream.lanes = u16::MAX)),
        ("the epoch before the first", PeerMisbehaved, Box::new(|offer| offer.epoch = Epoch(0))),
        ("the last epoch", PeerMisbehaved, Box::new(|offer| offer.epoch = Epoch(u64::MAX))),
        ("no regions", PeerMisbehaved, Box::new(|offer| machine(offer, |machine| machine.regions.clear()))),
        (
            "65 regions",
            PeerMisbehaved,
            Box::new(|offer| machine(offer, |machine| machine.regions = (0..65).map(|at| region(at * 4096, 4096)).collect())),
        ),
    ];
    for (name, expected, change) in changes {
        let mut attempt = evil.attempt(0).await;
        change(&mut attempt.offer);
        attempt.say(Message::Offer(attempt.offer.clone())).await;
        let (class, reason) = attempt.verdict(name).await;
        assert_eq!(class, expected, "{name}: {reason}");
        drop(attempt);
        gateway.is_well(name, 0).await;
    }
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

/// What only the VMM can judge: it was started, and is gone again.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_the_vmm_refuses_leaves_no_vmm() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let cases: Vec<(&str, serde_json::Value, u32)> = vec![
        ("no vCPUs", json!({"seed": 1, "working_set_pages": 1, "pages_per_second": 1}), 0),
        ("all vCPUs", json!({"seed": 1, "working_set_pages": 1, "pages_per_second": 1}), u32::MAX),
        ("profile of nothing", json!(null), 1),
        ("profile of another kind", json!({"cpuid": []}), 1),
        ("working set beyond memory", json!({"seed": 1, "working_set_pages": u64::MAX, "pages_per_second": 1}), 1),
        ("profile with words for a terminal", json!({"\u{1b}[2J": "\r\n"}), 1),
    ];
    for (name, profile, vcpus) in cases {
        refused(&mut gateway, &evil, name, ErrorClass::PeerIncompatible, |offer| {
            machine(offer, |machine| (machine.profile, machine.vcpus) = (profile, vcpus));
        })
        .await;
        assert!(!gateway.log().contains('\u{1b}'), "{}", gateway.log());
    }
    // Nothing of them stays in the runtime directory: a peer could fill it.
    let left = std::fs::read_dir(gateway.directory.join("run")).unwrap().flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name != "api.sock").collect();
    assert!(left.is_empty(), "{left:?}");
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

/// A migration's id is used once, and an epoch never goes back.
#[tokio::test(flavor = "multi_thread")]
async fn ids_and_epochs_are_not_used_again() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let other = Evil::new(&lab, OTHER, &gateway);

    // While one migration of VM 0 is under way: the same VM again, by the same peer and by another, and its id for VM 1.
    let mut first = evil.attempt(0).await;
    first.joined().await;
    for (name, by, index, migration, expected) in [
        ("the same offer", &evil, 0, first.migration(), ErrorClass::PeerUnreachable),
        ("the same VM", &evil, 0, MigrationId(random()), ErrorClass::Denied),
        ("the same VM by another peer", &other, 0, MigrationId(random()), ErrorClass::Denied),
        ("another VM under its id", &evil, 1, first.migration(), ErrorClass::PeerMisbehaved),
        ("another VM under its id by another peer", &other, 1, first.migration(), ErrorClass::PeerMisbehaved),
    ] {
        let mut attempt = by.attempt(index).await;
        attempt.offer.migration = migration;
        attempt.say(Message::Offer(attempt.offer.clone())).await;
        let (class, reason) = attempt.verdict(name).await;
        assert_eq!(class, expected, "{name}: {reason}");
    }
    // The first one never noticed.
    let totals = first.pages(1);
    first.end_round(1, false, totals).await;
    first.applied().await;
    let migration = first.migration();
    drop(first);
    // An outage is waited out for as long as the configuration says.
    // The end of a lane may be seen before the end of the session, and is one that an honest source does not make.
    gateway.recorded_one_of("left alone", migration, &[ErrorClass::Local, ErrorClass::PeerMisbehaved]).await;
    gateway.is_well("left alone", 0).await;

    // An id that failed is not used again either.
    refused(&mut gateway, &evil, "the id of a migration that failed", ErrorClass::PeerMisbehaved, |offer| offer.migration = migration)
        .await;

    // What is here cannot arrive.
    let mut honest = evil.attempt(0).await;
    honest.moved().await;
    drop(honest);
    let mut again = evil.attempt(0).await;
    again.offer.epoch = Epoch(9);
    again.say(Message::Offer(again.offer.clone())).await;
    assert_eq!(again.verdict("here already").await.0, ErrorClass::Denied);
    gateway.is_well("here already", 1).await;
}
