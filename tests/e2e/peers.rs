//! Peers that are not there, or not any more.

use crate::command::wait_for;
use crate::gateway::{A, B};
use crate::lab::{Lab, Setup, VM};

#[test]
fn a_peer_that_is_down_is_named_and_the_guest_stays() {
    let mut lab = Lab::start();
    assert_eq!(lab.gateway_mut(B).stop(), Some(0));
    lab.migrate(A, &[]).expect_stayed(4, &[VM, "gw-b", &lab.address(B)]);
    lab.gateway(A).audited("migration-finished", "failed", &[VM, "gw-b"]);
    let peers = lab.gateway(A).command(&["peers"]).json();
    assert_eq!(peers["peers"][0]["reachable"], false, "{peers}");
    lab.gateway_mut(B).start();
    lab.settled_on(A);
    lab.migrate(A, &[]).expect_moved();
}

#[test]
fn a_gateway_that_does_not_run_is_named_by_the_command() {
    let mut lab = Lab::start();
    lab.gateway_mut(A).kill();
    lab.migrate(A, &[]).expect_stayed(2, &["api.sock", "sealane gateway --config"]);
    lab.gateway_mut(A).start();
    lab.settled_on(A);
}

#[test]
fn a_second_gateway_with_the_same_state_does_not_start() {
    let lab = Lab::start();
    lab.gateway(A).start_in_vain().expect(1, &["journal"]);
    lab.settled_on(A);
}

#[test]
fn a_destination_gateway_that_is_killed_in_the_rounds_and_stays_away_leaves_the_guest_on_the_source() {
    let mut lab = Setup::new().busy().start();
    let (running, _) = lab.start_slow_migration(A, &["--max-outage", "2s"]);
    lab.gateway_mut(B).kill();
    running.finish().expect_stayed(1, &[VM, "away for more than 2 s", "--max-outage"]);
    // The twin waits for its source; the source says that the VM stays.
    lab.gateway_mut(B).start();
    lab.settled_on(A);
    wait_for("the empty twin to go", || lab.vmms(B).is_empty().then_some(()));
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}

#[test]
fn a_source_gateway_that_is_killed_in_the_rounds_and_finds_no_note_of_them_leaves_the_guest_where_it_runs() {
    let mut lab = Setup::new().busy().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.gateway_mut(A).kill();
    // The guest does not need its gateway.
    let before = lab.newest_beat(A);
    wait_for("heartbeats without a gateway", || (lab.newest_beat(A) > before.map(|beat| beat + 2)).then_some(()));
    // What it needs to go on is no promise, and may be lost: then the journal alone decides.
    std::fs::remove_file(lab.gateway(A).directory().join(format!("run/{id}.departure"))).unwrap();
    lab.gateway_mut(A).start();
    // The command looked for the gateway meanwhile, and hears from the new one what came of it.
    let said = running.finish();
    said.expect_stayed(1, &[VM, "interrupted"]);
    assert_eq!(said.json()["migration_id"], id.as_str());
    lab.gateway(A).audited("handoff", "done", &["\"record\":\"abort\"", &id]);
    lab.gateway(A).audited("migration-finished", "failed", &[&id, "source"]);
    wait_for("the empty twin to go", || lab.vmms(B).is_empty().then_some(()));
    lab.settled_on(A);
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}

#[test]
fn a_session_without_a_handoff_leaves_the_head_of_each_log_with_the_other() {
    let lab = Setup::new().busy().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    for (name, other) in [(A, B), (B, A)] {
        let head = lab.gateway(name).audited("peer-head", "done", &[other.gateway()]);
        assert!(!head.to_string().contains("tlog-proof"), "nothing changed hands: {head}");
        lab.gateway(name).audited("head-cosigned", "done", &[other.gateway()]);
    }
    lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
    running.finish().expect_stayed(5, &[VM]);
    lab.settled_on(A);
}

#[test]
fn a_destination_vmm_that_is_killed_in_the_rounds_leaves_the_guest_on_the_source() {
    let lab = Setup::new().busy().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.kill_vmms_of(B);
    lab.gateway(A).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    running.finish().expect_stayed(1, &[VM]);
    lab.gateway(B).audited("migration-finished", "failed", &[VM, "does not answer"]);
    lab.settled_on(A);
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}

#[test]
fn a_guest_whose_vmm_dies_in_the_rounds_fails_its_migration() {
    let lab = Setup::new().busy().start();
    let (running, _) = lab.start_slow_migration(A, &[]);
    lab.kill_vmms_of(A);
    let said = running.finish();
    // The only copy is gone: nothing says that it runs on the source.
    said.expect(6, &[VM, "does not answer", "no copy of the guest is known to run"]);
    assert_eq!(said.json()["running_on"], "neither-yet");
    wait_for("the source to see it", || (lab.vm(A)["state"] == "unreachable").then_some(()));
    wait_for("the empty twin to go", || lab.vmms(B).is_empty().then_some(()));
    assert!(lab.running_copies().is_empty());
}
