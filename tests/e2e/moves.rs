//! What has to work.

use sealane::hypervisor::attach::{AttachedSource, Timeouts};
use sealane::hypervisor::{Generation, Guest, PagedSource};

use crate::command::run;
use crate::gateway::{A, B, Name};
use crate::guest::Kind;
use crate::lab::{Lab, Setup};

/// One move of a lab's guest, with everything that it may be asked for.
#[track_caller]
fn moves(lab: &Lab, flags: &[&str]) {
    lab.runs_only_on(A);
    let report = lab.migrate(A, flags).expect_moved();
    assert_eq!(report["hypervisor"], lab.shape.kind.name(), "{report}");
    lab.settled_on(B);
    assert_eq!(lab.vm(A)["where"], "gw-b");
}

#[test]
fn a_running_guest_moves_and_goes_on() {
    let lab = Lab::start();
    lab.runs_only_on(A);
    let report = lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
    assert_eq!(report["schema"], "sealane.report/1");
    assert_eq!(report["policy"]["decision"], "allow");
    assert_eq!(report["policy"]["policy_ids"][0], "release-to-our-gateways");
    assert_eq!(report["authenticated"]["destination"], "spiffe://e2e.sealane.invalid/gateway/gw-b");
    for side in ["source_head", "destination_head"] {
        assert!(report["audit"][side].as_str().unwrap().contains("spiffe://e2e.sealane.invalid/gateway/"), "{report}");
    }
    for (name, actions) in [(A, ["request", "release", "commit"].as_slice()), (B, &["accept", "commit"])] {
        for action in actions {
            lab.gateway(name).audited("decision", "allow", &[&format!("\"action\":\"{action}\"")]);
        }
        lab.gateway(name).audited("migration-finished", "done", &["completed"]);
        // Each has seen the other's log, and holds the proof of what the other did.
        lab.gateway(name).audited("head-cosigned", "done", &["spiffe://e2e.sealane.invalid/gateway/"]);
        let record = if name == A { "run" } else { "commit" };
        lab.gateway(name).audited("peer-head", "done", &[&format!("-{record}.tlog-proof")]);
    }
    let (left, came) = (lab.vm(A), lab.vm(B));
    assert_eq!((left["state"].as_str(), left["where"].as_str()), (Some("gone"), Some("gw-b")));
    assert_eq!(came["state"], "running");
}

#[test]
fn the_same_guest_moves_back_and_forth() {
    let times = std::env::var("SEALANE_PINGPONG").map_or(6, |times| times.parse().unwrap());
    let lab = Setup::new().busy().shape(|shape| shape.vcpus = 2).start();
    lab.runs_only_on(A);
    let first = lab.generation(A);
    let mut at = A;
    for moves in 1..=times {
        lab.migrate(at, &[]).expect_moved();
        at = at.other();
        lab.runs_only_on(at);
        assert_eq!(lab.generation(at), Generation { disruptions: moves, ..first }, "a move keeps the id and counts one disruption");
    }
    lab.settled_on(at);
}

#[test]
fn a_guest_with_a_new_generation_says_so_once_and_keeps_it_when_it_moves() {
    let lab = Lab::start();
    lab.runs_only_on(A);
    let first = lab.generation(A);
    let mut guest = AttachedSource::attach(&lab.gateway(A).vmm_sockets()[0], "guest", Timeouts::default()).unwrap();
    guest.pause().unwrap();
    guest.renew().unwrap();
    guest.resume().unwrap();
    drop(guest);
    let renewed = lab.generation(A);
    assert!(renewed.id != first.id && (renewed.count, renewed.disruptions) == (2, 0), "{renewed:?}");
    moves(&lab, &[]);
    assert_eq!(lab.generation(B), renewed.disrupted());
    if lab.shape.kind == Kind::Kvm {
        let told = [A, B].map(|name| crate::guest::generations(&lab.console(name)));
        assert_eq!(told, [vec![2], vec![]], "the guest itself saw it, once");
    }
}

#[test]
fn nothing_is_left_of_the_old_copy() {
    let lab = Lab::start();
    lab.migrate(A, &[]).expect_moved();
    crate::command::wait_for("the old VMM to go", || lab.vmms(A).is_empty().then_some(()));
    lab.settled_on(B);
}

#[test]
fn a_guest_moves_on_one_lane() {
    moves(&Lab::start(), &["--lanes", "1"]);
}

#[test]
fn a_guest_moves_on_four_lanes() {
    moves(&Lab::start(), &["--lanes", "4"]);
}

#[test]
fn a_guest_with_four_vcpus_moves_while_all_of_them_write() {
    moves(&Setup::new().busy().shape(|shape| shape.vcpus = 4).start(), &[]);
}

#[test]
fn a_guest_moves_without_compression() {
    let lab = Lab::start();
    moves(&lab, &["--compress", "none"]);
    let report = &lab.gateway(A).command(&["history"]).json()["reports"][0];
    assert_eq!(report["pages"]["compressed"], 0, "{report}");
    assert_ne!(report["pages"]["raw"], 0, "{report}");
}

#[test]
fn a_synthetic_guest_moves_and_comes_back() {
    let lab = Setup::new().shape(|shape| shape.kind = Kind::Synthetic).start();
    moves(&lab, &[]);
    lab.migrate(B, &[]).expect_moved();
    lab.settled_on(A);
}

#[test]
fn a_guest_that_arrived_survives_a_restart_of_its_gateway_and_can_leave_again() {
    let mut lab = Lab::start();
    lab.migrate(A, &[]).expect_moved();
    for name in [A, B] {
        assert_eq!(lab.gateway_mut(name).stop(), Some(0));
        lab.gateway_mut(name).start();
    }
    lab.settled_on(B);
    lab.migrate(B, &[]).expect_moved();
    lab.settled_on(A);
}

/// A guest that a busy machine can follow.
const SLOW: [&str; 2] = ["--dirty-rate", "4MiB/s"];

fn demo(flags: &[&str], hypervisor: &str) {
    let directory = tempfile::tempdir().unwrap();
    let report = run(directory.path(), &[&["demo", "--json"], flags].concat()).expect_moved();
    assert_eq!(report["hypervisor"], hypervisor);
    assert_eq!(report["heartbeat"]["unbroken"], true, "{report}");
    assert_eq!(report["guest"]["ok"], true, "{report}");
    assert_eq!((&report["audit_verified"]["source"], &report["audit_verified"]["destination"]), (&true.into(), &true.into()));
}

#[test]
fn the_demo_moves_a_kvm_guest() {
    if Kind::best() == Kind::Kvm {
        demo(&SLOW, "kvm");
    } else {
        println!("SKIPPED: no KVM here");
    }
}

#[test]
fn the_demo_moves_a_synthetic_guest() {
    demo(&[&SLOW[..], &["--hypervisor", "synthetic", "--memory", "64MiB"]].concat(), "synthetic");
}

#[test]
fn both_sides_keep_the_report_in_their_history() {
    let lab = Lab::start();
    let id = lab.migrate(A, &[]).expect_moved()["migration_id"].clone();
    let of = |name: Name| lab.gateway(name).command(&["history"]).json()["reports"][0].clone();
    for name in [A, B] {
        let report = crate::command::wait_for("a report", || Some(of(name)).filter(|report| !report.is_null()));
        assert_eq!((&report["migration_id"], &report["state"]), (&id, &"completed".into()));
    }
}
