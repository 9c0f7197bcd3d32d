//! Whole lives of a VM that moves between hosts, in virtual time, from one seed: the machines of `migration/` and the journal
//! are the real ones; clocks, network, disks and guests are simulated, and fail. What never may be is looked for after every
//! step.
//!
//! `SEALANE_SIM_SEED=n` replays one seed and tells its story; `SEALANE_SIM_HANDOFFS=n` says how much is simulated.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may stop at the first surprise")]

#[path = "simulation/actions.rs"]
mod actions;
#[path = "simulation/arrival.rs"]
mod arrival;
#[path = "simulation/chance.rs"]
mod chance;
#[path = "simulation/checks.rs"]
mod checks;
#[path = "simulation/disk.rs"]
mod disk;
#[path = "simulation/host.rs"]
mod host;
#[path = "simulation/live.rs"]
mod live;
#[path = "simulation/network.rs"]
mod network;
#[path = "simulation/operators.rs"]
mod operators;
#[path = "simulation/recovery.rs"]
mod recovery;
#[path = "simulation/world.rs"]
mod world;

use std::io::Write;

use world::{Bug, World};

/// Handoffs of one seed.
const HANDOFFS: u64 = 40;
/// Handoffs of a usual run of the tests.
const USUAL: u64 = 40_000;

#[derive(Default)]
struct Sum {
    handoffs: u64,
    moved: u64,
    continued: u64,
    faults: u64,
    violations: Vec<(u64, String)>,
}

fn simulate(seed: u64, bug: Option<Bug>, told: bool) -> (World, u64) {
    let mut world = World::new(seed, bug, told);
    let made = world.live(HANDOFFS);
    (world, made)
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: expected a number")))
}

/// Seeds that once found something; always first.
fn kept() -> Vec<u64> {
    let text = include_str!("simulation/seeds.txt");
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or("").trim()).filter(|line| !line.is_empty());
    lines.map(|line| line.parse().unwrap()).collect()
}

fn run(seeds: impl Iterator<Item = u64>) -> Sum {
    let mut sum = Sum::default();
    for seed in seeds {
        let (world, made) = simulate(seed, None, false);
        sum.handoffs += made;
        sum.moved += world.moved;
        sum.continued += world.continued;
        sum.faults += world.faults;
        sum.violations.extend(world.truth.violation.map(|what| (seed, what)));
    }
    sum
}

/// Not caught by the test harness: the figures are what a run is for.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn tell(seed: u64, what: &str) -> String {
    let (world, _) = simulate(seed, None, true);
    let story = world.story.unwrap_or_default();
    let end = story[story.len().saturating_sub(120)..].join("\n");
    format!("{end}\nSEALANE_SIM_SEED={seed}: {what}")
}

#[test]
fn no_guest_runs_twice_or_is_lost_whatever_fails_when() {
    if let Some(seed) = environment("SEALANE_SIM_SEED") {
        let (world, _) = simulate(seed, None, true);
        say(&world.story.unwrap_or_default().join("\n"));
        assert_eq!(world.truth.violation, None, "seed {seed}");
        return;
    }
    let handoffs = environment("SEALANE_SIM_HANDOFFS").unwrap_or(USUAL);
    let seeds = handoffs.div_ceil(HANDOFFS);
    let kept = run(kept().into_iter());
    let halves: Vec<Sum> = std::thread::scope(|scope| {
        let halves = [(1, seeds / 2), (seeds / 2 + 1, seeds)].map(|(first, last)| scope.spawn(move || run(first..=last)));
        halves.into_iter().map(|half| half.join().unwrap()).collect()
    });
    let sum = std::iter::once(kept).chain(halves).fold(Sum::default(), |mut sum, half| {
        sum.handoffs += half.handoffs;
        sum.moved += half.moved;
        sum.continued += half.continued;
        sum.faults += half.faults;
        sum.violations.extend(half.violations);
        sum
    });
    say(&format!(
        "simulation: {} handoffs, {} faults injected, {} moved, {} continued by a restarted source, seeds 1..{seeds}, {} violations",
        sum.handoffs,
        sum.faults,
        sum.moved,
        sum.continued,
        sum.violations.len()
    ));
    for (seed, what) in &sum.violations {
        say(&format!("SEALANE_SIM_SEED={seed}: {what}"));
    }
    assert!(sum.moved * 3 > sum.handoffs, "too few handoffs get through to say anything");
    assert!(sum.continued > 0, "no restarted source goes on");
    if let Some((seed, what)) = sum.violations.first() {
        panic!("{}", tell(*seed, what));
    }
}

#[test]
fn one_seed_is_one_story() {
    for seed in [7, 8, 9] {
        let (one, other) = (simulate(seed, None, false).0, simulate(seed, None, false).0);
        assert_eq!(one.hash(), other.hash(), "seed {seed}");
    }
}

/// Handoffs until a planted mistake shows.
const WITHIN: u64 = 1_000;

fn caught(bug: Bug) {
    let mut handoffs = 0;
    for seed in 1_000_001.. {
        let (world, made) = simulate(seed, Some(bug), false);
        handoffs += made;
        if let Some(what) = world.truth.violation {
            say(&format!("{bug:?}: caught after {handoffs} handoffs: {what}"));
            return;
        }
        assert!(handoffs < WITHIN, "{bug:?}: not caught in {handoffs} handoffs");
    }
}

#[test]
fn a_disk_that_does_not_sync_is_caught() {
    caught(Bug::SkipSync);
}

#[test]
fn going_on_behind_a_record_that_failed_is_caught() {
    caught(Bug::IgnoreFailed);
}

#[test]
fn resuming_before_the_image_is_gone_is_caught() {
    caught(Bug::ResumeBeforeForget);
}

#[test]
fn resuming_before_the_record_is_caught() {
    caught(Bug::ResumeBeforeJournal);
}

#[test]
fn speaking_before_the_record_is_caught() {
    caught(Bug::SayBeforeJournal);
}

#[test]
fn believing_a_journal_that_went_back_is_caught() {
    caught(Bug::NoPositionCheck);
}
