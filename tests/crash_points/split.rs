//! SIGKILL of either gateway and of either QEMU, and a cancel, at each phase of a guest that is split (post-copy): before it runs at the
//! destination it goes on at the source.

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
