//! Migrations that somebody or something stops on purpose.

use crate::command::wait_for;
use crate::gateway::{A, B};
use crate::guest::{Kind, Shape};
use crate::lab::{Lab, Setup, VM};

/// After a stop on purpose: the guest goes on, the twin is gone, and the next attempt works.
#[track_caller]
fn goes_on_and_moves_later(lab: &Lab) {
    lab.settled_on(A);
    let stayed = lab.generation(A);
    assert_eq!((stayed.count, stayed.disruptions), (1, 0), "a guest that stays sees no change");
    wait_for("the empty twin to go", || lab.vmms(B).is_empty().then_some(()));
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
    assert_eq!(lab.generation(B), stayed.disrupted());
}

#[test]
fn cancel_stops_a_migration_and_the_guest_goes_on() {
    let lab = Setup::new().busy().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.gateway(A).command(&["cancel", &id[..8]]).expect(0, &["asked to stop"]);
    let said = running.finish();
    said.expect_stayed(5, &[VM, "cancelled"]);
    assert_eq!(said.json()["state"], "cancelled");
    lab.gateway(A).audited("migration-finished", "cancelled", &[VM, &id]);
    lab.gateway(A).command(&["cancel", &id]).expect(2, &["ended"]);
    goes_on_and_moves_later(&lab);
}

#[test]
fn ctrl_c_cancels_with_the_guest_on_the_source() {
    let lab = Setup::new().busy().start();
    let (running, _) = lab.start_slow_migration(A, &[]);
    running.interrupt();
    running.finish().expect_stayed(5, &[VM, "cancelled"]);
    goes_on_and_moves_later(&lab);
}

#[test]
fn cancel_at_the_destination_says_where_to_steer() {
    let lab = Setup::new().busy().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.gateway(B).command(&["cancel", &id]).expect(2, &["gw-a", "source"]);
    lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
    running.finish().expect_stayed(5, &[VM]);
    goes_on_and_moves_later(&lab);
}

#[test]
fn a_migration_that_takes_too_long_ends_with_the_guest_on_the_source() {
    let lab = Setup::new().busy().start();
    lab.migrate(A, &["--compress", "none", "--bandwidth", "1MiB/s", "--timeout", "2s"])
        .expect_stayed(7, &[VM, "did not end within 2 s", "--timeout"]);
    lab.gateway(A).audited("migration-finished", "failed", &[VM, "did not end within"]);
    goes_on_and_moves_later(&lab);
}

#[test]
fn a_guest_that_dirties_faster_than_the_link_gets_a_verdict_in_words() {
    let lab = Setup::new().shape(|shape| (shape.working_set, shape.dirty_rate) = ("2MiB", "16MiB/s")).start();
    let said = lab.migrate(A, &["--compress", "none", "--bandwidth", "1MiB/s", "--max-downtime", "50ms"]);
    said.expect_stayed(1, &[VM, "does not converge, because the guest dirties", "MiB/s are sent", "50 ms are allowed", "--throttle"]);
    assert_eq!(said.json()["error"]["class"], "not-converged");
    lab.gateway(A).audited("migration-finished", "failed", &[VM, "does not converge"]);
    goes_on_and_moves_later(&lab);
}

#[test]
fn a_guest_that_does_not_converge_does_when_it_may_be_slowed_down() {
    // A synthetic one: what is taken away from a KVM guest is vCPU time, and a guest that idles a lot has some to spare.
    let busy = |shape: &mut Shape| *shape = Shape { kind: Kind::Synthetic, working_set: "1MiB", dirty_rate: "64MiB/s", ..*shape };
    let lab = Setup::new().shape(busy).start();
    let link = ["--compress", "none", "--bandwidth", "8MiB/s", "--max-downtime", "60ms"];
    lab.migrate(A, &link).expect_stayed(1, &["does not converge"]);
    lab.migrate(A, &[&link[..], &["--throttle"]].concat()).expect_moved();
    lab.settled_on(B);
}

#[test]
fn two_migrations_of_one_vm_at_once_are_one_too_many() {
    let lab = Setup::new().busy().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.migrate(A, &[]).expect_stayed(2, &[VM, "moving already", &id]);
    lab.gateway(A).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    running.finish().expect_moved();
    lab.settled_on(B);
}

#[test]
fn a_source_gateway_that_is_told_to_stop_cancels_first() {
    let mut lab = Setup::new().busy().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    assert_eq!(lab.gateway_mut(A).stop(), Some(0));
    running.finish().expect_stayed(5, &[VM]);
    lab.gateway(A).audited("handoff", "done", &["\"record\":\"abort\"", &id]);
    lab.gateway(A).audited("gateway-stopped", "done", &[]);
    lab.gateway_mut(A).start();
    goes_on_and_moves_later(&lab);
}

#[test]
fn a_destination_gateway_that_is_told_to_stop_gives_up_first() {
    let mut lab = Setup::new().busy().start();
    let (running, _) = lab.start_slow_migration(A, &[]);
    lab.gateway(B).ask_to_stop();
    // It does not wait for rounds that may take hours.
    let said = running.finish();
    said.expect_stayed(4, &[VM, "shutting down"]);
    assert_eq!(lab.gateway_mut(B).stopped(), Some(0));
    lab.gateway(B).audited("migration-finished", "failed", &[VM, "shutting down"]);
    lab.gateway(B).audited("gateway-stopped", "done", &[]);
    lab.gateway_mut(B).start();
    goes_on_and_moves_later(&lab);
}
