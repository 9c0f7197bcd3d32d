//! The final image on disk before the switch: a host that loses the guest's memory builds it again.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::command::wait_for;
use crate::gateway::{A, B, Name};
use crate::guest::Kind;
use crate::lab::{Lab, Setup, VM};
use crate::outages::{Attempt, Moment};
use crate::relay::Conditions;

/// Both gateways ask for it; messages are long enough on their way to be lost when a test wants that.
fn durable(durability: &str) -> Setup {
    let kept = format!("verify = true\ndurability = \"{durability}\"\n");
    let conditions = Conditions { delay: Duration::from_millis(300), ..Conditions::default() };
    Setup::new().replace(A, "verify = true\n", &kept).replace(B, "verify = true\n", &kept).through_relay(conditions)
}

fn images(lab: &Lab, name: Name) -> Vec<PathBuf> {
    let directory = lab.gateway(name).directory().join("state/images");
    fs::read_dir(directory).map(|entries| entries.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default()
}

/// The host crashes, as far as the gateway can tell: itself and the guest's memory are gone, the disk is not.
fn crash(lab: &mut Lab, name: Name) {
    lab.gateway_mut(name).kill();
    lab.kill_vmms_of(name);
}

/// What comes from an image has a new generation, and says so.
#[track_caller]
fn knows_of_its_rebirth(lab: &Lab, name: Name) {
    if lab.shape.kind == Kind::Kvm {
        let console = fs::read_to_string(lab.console(name)).unwrap();
        assert!(console.lines().any(|line| line.starts_with("generation ")), "{console}");
    }
}

#[track_caller]
fn no_image_is_left(lab: &Lab) {
    for name in [A, B] {
        wait_for("images that nobody needs to go", || images(lab, name).is_empty().then_some(()));
    }
}

#[test]
fn a_guest_moves_with_its_image_on_disk_and_no_image_stays() {
    for durability in ["dest", "both"] {
        let lab = durable(durability).start();
        let report = lab.migrate(A, &[]).expect_moved();
        assert_eq!(report["verified"], true, "{report}");
        lab.settled_on(B);
        no_image_is_left(&lab);
        lab.migrate(B, &[]).expect_moved();
        lab.settled_on(A);
        no_image_is_left(&lab);
    }
}

#[test]
fn a_destination_that_loses_the_prepared_memory_runs_the_guest_from_its_image() {
    for durability in ["dest", "both"] {
        let mut lab = durable(durability).start();
        let mut attempt = Attempt::start(&lab, A, &[]);
        attempt.cut_at(Moment::Prepared);
        let running = attempt.into_command();
        // The audit log may have the record before the journal; the promise is the journal's.
        std::thread::sleep(Duration::from_millis(200));
        crash(&mut lab, B);
        assert_eq!(images(&lab, B).len(), 1);
        lab.gateway_mut(B).start();
        lab.restore();
        running.finish().expect_moved();
        lab.settled_on(B);
        knows_of_its_rebirth(&lab, B);
        no_image_is_left(&lab);
        lab.migrate(B, &[]).expect_moved();
        lab.settled_on(A);
    }
}

#[test]
fn a_source_that_loses_the_paused_memory_goes_on_from_its_image() {
    let mut lab = durable("both").start();
    let mut attempt = Attempt::start(&lab, A, &[]);
    attempt.cut_at(Moment::Final);
    let running = attempt.into_command();
    crash(&mut lab, A);
    assert_eq!(images(&lab, A).len(), 1);
    lab.gateway_mut(A).start();
    running.finish().expect_stayed(1, &[VM, "interrupted"]);
    lab.restore();
    lab.settled_on(A);
    knows_of_its_rebirth(&lab, A);
    wait_for("the twin to go", || lab.vmms(B).is_empty().then_some(()));
    no_image_is_left(&lab);
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}

#[test]
fn without_an_image_a_lost_memory_is_said_to_be_lost() {
    let mut lab = durable("none").start();
    let mut attempt = Attempt::start(&lab, A, &[]);
    attempt.cut_at(Moment::Prepared);
    let running = attempt.into_command();
    crash(&mut lab, B);
    lab.gateway_mut(B).start();
    lab.restore();
    // The destination cannot keep its promise, and the source goes on.
    running.finish().expect_stayed(1, &[VM]);
    lab.settled_on(A);
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}
