//! SIGKILL at every failpoint: of the gateway that reaches it, of its peer, and of both, with every durability.
//!
//! A lab is two gateways and a guest that checks itself; its guest goes from point to point and back. Labs mostly sleep, so
//! several run at once. `SEALANE_DURABILITIES=none,dest,both`, `SEALANE_POINTS=journal.,send.COMMIT` (parts of names) and
//! `SEALANE_LABS=6` choose.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test may stop at the first surprise, and says what it skips"
)]
#![allow(dead_code, reason = "the lab is made for the tests of tests/e2e, which use all of it")]

#[path = "../../certs/fixtures.rs"]
mod fixtures;

#[path = "../e2e/command.rs"]
mod command;
#[path = "../e2e/disks.rs"]
mod disks;
#[path = "../e2e/gateway.rs"]
mod gateway;
#[path = "../e2e/guest.rs"]
mod guest;
#[path = "../e2e/lab.rs"]
mod lab;
#[path = "../e2e/one_copy.rs"]
mod one_copy;
#[path = "../e2e/qemus.rs"]
mod qemus;
#[path = "../e2e/random.rs"]
mod random;
#[path = "../e2e/relay.rs"]
mod relay;

mod place;
mod qemu;
mod run;
mod split;
mod tally;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use place::{Blow, Place};
use random::{durabilities, number};
use run::Scene;
use tally::{Run, Tally};

/// Why no run with these durabilities reaches a point, if none does.
fn unreached(point: &str, durabilities: &[String]) -> Option<&'static str> {
    let kept = durabilities.iter().any(|durability| durability != "none");
    let not_kept = durabilities.iter().any(|durability| durability == "none");
    [
        ("fenced", true, "written on an operator's word: `sealane resolve`"),
        ("reclaim", !not_kept, "a twin that is lost is built from its image"),
        ("disks-", true, "of a guest that moves with its disks: `a_qemu_or` goes there"),
        ("rebuilt-launched", !kept, "without an image nothing is built again"),
    ]
    .into_iter()
    .find_map(|(part, unreached, why)| (unreached && point.contains(part)).then_some(why))
}

/// Every run with one durability.
fn cases(places: &[Place]) -> VecDeque<(Place, Blow)> {
    let blows = |place: &Place| {
        let fails = place.point.starts_with("record.") && place.point.ends_with(".begin");
        [Blow::Reacher, Blow::Peer, Blow::Both].into_iter().chain(fails.then_some(Blow::Error))
    };
    places.iter().flat_map(|place| blows(place).map(|blow| (place.clone(), blow))).collect()
}

/// One lab takes run after run. A lab in which something was wrong is not used again.
fn work(durability: &str, waiting: &Mutex<VecDeque<(Place, Blow)>>, tally: &Mutex<Tally>) {
    let mut scene = None;
    loop {
        let Some((place, blow)) = waiting.lock().unwrap().pop_front() else { break };
        let name = format!("{} {:?} of {}, {blow:?}, durability {durability}", place.point, place.way, place.reacher);
        let mut run = Run::new(place.point);
        let result = catch_unwind(AssertUnwindSafe(|| {
            let scene = scene.get_or_insert_with(|| Scene::start(durability));
            scene.play(&place, blow, &mut run);
        }));
        if let Err(panic) = result {
            let why = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            run.violation = Some(why.unwrap_or("a panic without words").to_owned());
            if let Some(scene) = scene.take() {
                println!("--- {name}\n{}", scene.last_words());
            }
        }
        println!("{name}: {run}");
        tally.lock().unwrap().add(&name, &run);
    }
}

#[test]
fn a_crash_at_any_failpoint_leaves_exactly_one_running_guest() {
    let labs = number("SEALANE_LABS").unwrap_or(5);
    let wanted = std::env::var("SEALANE_POINTS").unwrap_or_default();
    let durabilities = durabilities();
    let reason = |point: &str| unreached(point, &durabilities);
    let points = sealane::failpoint::ALL.iter().copied().filter(|point| wanted.split(',').any(|part| point.contains(part)));
    let (unreached, points): (Vec<_>, Vec<_>) = points.partition(|point| reason(point).is_some());
    let places: Vec<_> = points.iter().flat_map(|point| place::places(point)).collect();
    let tally = Mutex::new(Tally::default());
    for durability in &durabilities {
        let waiting = Mutex::new(cases(&places));
        std::thread::scope(|scope| {
            for _ in 0..labs {
                scope.spawn(|| work(durability, &waiting, &tally));
            }
        });
    }
    let tally = tally.into_inner().unwrap();
    for point in unreached {
        println!("not reached: {point}: {}", reason(point).unwrap_or_default());
    }
    let never = tally.never_reached(&points);
    println!("{tally}");
    assert!(tally.violations.is_empty(), "violations:\n{}", tally.violations.join("\n"));
    assert!(never.is_empty(), "never reached: {never:?}");
}
