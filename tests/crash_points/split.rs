//! SIGKILL of either gateway and of either QEMU, and a cancel, at each phase of a guest that is split (post-copy): before it runs at the
//! destination it goes on at the source.

use sealane::hypervisor::RunState;

use crate::command::wait_for;
use crate::gateway::Name;
use crate::place::Role::{self, Destination, Source};
use crate::qemu::{Blow, impatient, is_as_it_was, struck};
use crate::qemus::{OneCopy, Qemus};

/// Slower than the guest writes, so that it lacks pages for a while.
const SPLIT: [&str; 6] = ["--mode", "postcopy", "--compress", "none", "--bandwidth", "2MiB/s"];

/// In the order in which a move comes by.
const PHASES: [(&str, Role); 8] = [
    ("source.paused", Source),
    ("send.FINAL.after", Source),
    ("destination.compare", Destination),
    ("destination.state-restored", Destination),
    ("record.prepared.done", Destination),
    ("send.PREPARED.after", Destination),
    ("source.policy-asked", Source),
    ("record.commit.done", Source),
];

/// Behind COMMIT: it goes on at the source, or it is the destination's, and gets what it lacks.
const BEHIND: [(&str, Role); 4] = [
    ("send.COMMIT.after", Source),
    ("record.run.done", Destination),
    ("destination.resume.after", Destination),
    ("send.RUNNING.before", Destination),
];

/// Plays one phase, and looks where the guest is then.
#[track_caller]
fn play(qemus: &mut Qemus, (point, reacher): (&str, Role), blow: Blow, look: fn(&mut Qemus, Name, Blow)) {
    let from = qemus.at;
    let copies = OneCopy::watch(&qemus.lab);
    let said = struck(&mut qemus.lab, from, (point, reacher), &SPLIT, blow);
    let _ = qemus.first.try_wait();
    look(qemus, from, blow);
    copies.end();
    println!("split, {point}, {blow:?}: from {from:?}, on {:?}, {}", qemus.at, said.json()["state"]);
    // What a destination takes a guest with stays as it is; the first QEMU never was one.
    let ours = ["pause-before-switchover", "return-path", "postcopy-ram"];
    let first = matches!(qemus.first.try_wait(), Ok(None));
    is_as_it_was(&qemus.lab, qemus.at, if first { &ours } else { &ours[..1] });
}

/// With every point and blow that was chosen.
fn play_all(phases: &[(&str, Role)], blows: &[Blow], look: fn(&mut Qemus, Name, Blow)) {
    let chosen = |variable: &str| std::env::var(variable).unwrap_or_default();
    let (points, wanted) = (chosen("SEALANE_POINTS"), chosen("SEALANE_BLOWS"));
    let has = |wanted: &str, name: &str| wanted.split(',').any(|part| name.contains(part));
    let Some(mut qemus) = Qemus::start(impatient()) else { return };
    for phase in phases.iter().filter(|(point, _)| has(&points, point)) {
        for blow in blows.iter().filter(|blow| has(&wanted, &format!("{blow:?}"))) {
            // Behind COMMIT nobody cancels.
            if (phase.0, *blow) != ("record.commit.done", Blow::Cancel) {
                play(&mut qemus, *phase, *blow, look);
            }
        }
    }
}

#[test]
fn a_guest_that_is_split_goes_on_at_the_source_whoever_is_killed_before_it_runs() {
    let blows = [Blow::SourceGateway, Blow::DestinationGateway, Blow::DestinationQemu, Blow::Cancel];
    play_all(&PHASES, &blows, |qemus, from, blow| match blow {
        // It may come too late.
        Blow::Cancel => drop(qemus.settle()),
        _ => qemus.is_only_at(from),
    });
}

#[test]
fn a_guest_that_is_split_and_given_goes_on_where_it_was_given_to_and_gets_what_it_lacks() {
    play_all(&BEHIND, &[Blow::SourceGateway, Blow::DestinationGateway], |qemus, from, _| {
        let at = wait_for("one copy that runs", || match [from, from.other()].map(|name| qemus.states(name)) {
            [here, there] if here == [RunState::Running] && there.is_empty() => Some(from),
            [here, there] if here.is_empty() && there == [RunState::Running] => Some(from.other()),
            _ => None,
        });
        qemus.is_only_at(at);
    });
}
