//! Every state that the handoff can get into, with the machines of production in it.
//!
//! The model knows two hosts, each with a gateway that may die, a journal and an image on disk, and a guest; and a network
//! that keeps every message for ever, so that it is lost, late, repeated or overtaken. What is said and done comes from
//! `SourceHandoff` and `DestinationHandoff` alone; the model does it action by action, and anything may come in between.
//! What a restarted gateway does before and after it has asked its machine follows `engine/recovery.rs` and
//! `gateway/recovery.rs`.
//!
//! Assumed: one attempt, of which (and of one before it) messages may be replayed for ever; a record is on disk whole or not
//! at all; the source's journal is never replaced by another; peers are honest; operators say only what is so; a VM is
//! started from its disks only where a gateway that is up says that it belongs, and one that moved on runs for ever.
//! Without an arbiter there is no ownership to take over by compare-and-swap, and nothing to decline.
//!
//! `SEALANE_MODEL=deep` searches with more faults.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, reason = "a test may stop at the first surprise")]

#[path = "model/graph.rs"]
mod graph;
#[path = "model/machines.rs"]
mod machines;
#[path = "model/mutants.rs"]
mod mutants;
#[path = "model/possible.rs"]
mod possible;
#[path = "model/promises.rs"]
mod promises;
#[path = "model/steps.rs"]
mod steps;
#[path = "model/tables.rs"]
mod tables;
#[path = "model/world.rs"]
mod world;

use std::io::Write;

use sealane::wire::Durability;
use stateright::{Checker, HasDiscoveries, Model};

use graph::Graph;
use mutants::Mutant;
use promises::*;
use steps::{Handoffs, Step};
use world::Faults;

const DURABILITIES: [Durability; 3] = [Durability::None, Durability::Destination, Durability::Both];
const NONE: Faults = Faults { gateways: 0, hosts: 0, disks: 0, losses: 0, others: 0, moves: 0 };

/// What may go wrong in one run: a few things of some kinds, in every order and at every moment.
const FAULTS: &[Faults] = &[
    Faults { gateways: 2, hosts: 2, ..NONE },
    Faults { gateways: 1, hosts: 1, disks: 1, ..NONE },
    Faults { hosts: 1, losses: 1, ..NONE },
    Faults { disks: 1, losses: 1, ..NONE },
    Faults { losses: 1, others: 1, ..NONE },
    Faults { gateways: 1, losses: 1, moves: 1, ..NONE },
];

const DEEP: &[Faults] = &[
    Faults { gateways: 3, hosts: 3, ..NONE },
    Faults { gateways: 2, hosts: 1, disks: 2, ..NONE },
    Faults { gateways: 1, hosts: 1, disks: 1, losses: 1, ..NONE },
    Faults { gateways: 1, hosts: 1, losses: 1, others: 2, ..NONE },
    Faults { gateways: 1, hosts: 1, disks: 1, losses: 1, moves: 1, ..NONE },
];

/// Seen without `--nocapture` too.
fn report(line: &str) {
    let mut terminal = std::io::stderr();
    writeln!(terminal, "{line}").unwrap();
}

#[test]
fn every_reachable_state_keeps_every_promise() {
    let deep = std::env::var("SEALANE_MODEL").is_ok_and(|value| value == "deep");
    let (mut states, mut configurations) = (0, 0);
    for faults in if deep { DEEP } else { FAULTS } {
        for durability in DURABILITIES {
            let model = || Handoffs::new(durability, *faults);
            let (checked, graph) = std::thread::scope(|scope| {
                let graph = scope.spawn(|| {
                    let (model, graph) = (model(), Graph::new(&model()));
                    if let Some(broken) = any_broken(&model, &graph) {
                        panic!("{durability:?}, {faults:?}: {broken:#?}");
                    }
                    graph.states()
                });
                let checker = model().checker().threads(1).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
                if let Some((promise, path)) = checker.discoveries().into_iter().next() {
                    panic!("{durability:?}, {faults:?}: {promise}: {:#?}\n{:?}", path.clone().into_actions(), path.last_state());
                }
                (checker.unique_state_count(), graph.join().unwrap())
            });
            assert_eq!(checked, graph, "two searches find the same states");
            states += checked;
            configurations += 1;
        }
    }
    report(&format!("model: {states} unique states, {configurations} configurations, 0 violations"));
    assert!(states >= 1_000_000, "{states} states are too few to mean something");
}

/// What is wrong, under which terms and with what faults it shows, and the promise that it breaks.
fn mutants() -> Vec<(Mutant, Durability, Faults, &'static str)> {
    use Durability::{Both, Destination, None as Nowhere};
    let gateway = Faults { gateways: 1, ..NONE };
    let host = Faults { hosts: 1, ..NONE };
    let disk = Faults { disks: 1, ..NONE };
    let loss = Faults { losses: 1, ..NONE };
    vec![
        (Mutant::CommitUnjournaled, Nowhere, gateway, SINGLE_RUNNER),
        (Mutant::RunUnjournaled, Nowhere, gateway, NO_STALE_RESUME),
        (Mutant::RefusedUnjournaled, Destination, gateway, SINGLE_RUNNER),
        (Mutant::PreparedUnjournaled, Nowhere, gateway, NOT_STUCK),
        (Mutant::ResumeBeforeRecord, Nowhere, gateway, NO_STALE_RESUME),
        (Mutant::FailureIgnored, Nowhere, disk, SINGLE_RUNNER),
        (Mutant::ResumedAfterCommit, Nowhere, NONE, SINGLE_RUNNER),
        (Mutant::ResumedWithoutAbort, Nowhere, NONE, SINGLE_RUNNER),
        (Mutant::CopyDestroyedAtCommit, Both, NONE, IMAGE_SURVIVES),
        (Mutant::RunOnPrepared, Nowhere, NONE, SINGLE_RUNNER),
        (Mutant::StrayCommitTaken, Nowhere, NONE, SINGLE_RUNNER),
        (Mutant::NewJournalBelieved, Nowhere, loss, SINGLE_RUNNER),
        (Mutant::OlderJournalBelieved, Nowhere, loss, SINGLE_RUNNER),
        (Mutant::SamePositionBelieved, Destination, Faults { gateways: 1, disks: 1, ..NONE }, SINGLE_RUNNER),
        (Mutant::UnknownAtPosition, Nowhere, Faults { losses: 1, others: 1, ..NONE }, SINGLE_RUNNER),
        (Mutant::FencedWithoutEvidence, Nowhere, NONE, SINGLE_RUNNER),
        (Mutant::NeverRanUnchecked, Nowhere, loss, NO_STALE_RESUME),
        (Mutant::HandedOverAsPrepared, Nowhere, loss, NO_STALE_RESUME),
        (Mutant::ImageKept, Both, host, NO_STALE_RESUME),
        (Mutant::GenerationKept, Both, host, NEW_GENERATION),
        (Mutant::FoundMemoryKept, Both, Faults { gateways: 1, hosts: 1, ..NONE }, NEW_GENERATION),
        (Mutant::PreparedBeforeImage, Destination, NONE, IMAGE_IS_THERE),
        (Mutant::FinalBeforeImage, Both, NONE, IMAGE_IS_THERE),
        (Mutant::MovedOnUnnoticed, Nowhere, Faults { gateways: 1, moves: 1, ..NONE }, SINGLE_RUNNER),
        (Mutant::ContinuedAfterCommit, Nowhere, Faults { gateways: 1, ..NONE }, SINGLE_RUNNER),
        (Mutant::ContinuedWithImage, Both, Faults { gateways: 1, hosts: 1, ..NONE }, NO_STALE_RESUME),
    ]
}

#[test]
fn every_mutant_is_caught() {
    for (mutant, durability, faults, promise) in mutants() {
        let find = |model: &Handoffs| broken(promise, model, &Graph::new(model));
        if let Some(broken) = find(&Handoffs::new(durability, faults)) {
            panic!("without `{mutant:?}`: {broken:#?}");
        }
        let broken = find(&Handoffs::with(mutant, durability, faults));
        let broken = broken.unwrap_or_else(|| panic!("`{mutant:?}` is not caught by `{promise}`"));
        report(&format!("mutant {mutant:?}: {} steps break `{}`", broken.trace.len(), broken.promise));
    }
}

/// The promise about memory is one of durability `both` alone; and it can be broken.
#[test]
fn memory_is_lost_with_a_host_unless_its_image_is_at_both_ends() {
    for (durability, lost) in [(Durability::None, true), (Durability::Destination, true), (Durability::Both, false)] {
        let graph = Graph::new(&Handoffs::new(durability, Faults { hosts: 1, ..NONE }));
        assert_eq!(memory_lost(&graph).is_some(), lost, "{durability:?}");
    }
}

/// A limit: a copy of the destination's journal from between PREPARED and RUN has forgotten only what it never told, and
/// nobody can know. A journal that is lost has to be begun anew, never restored.
#[test]
fn a_journal_restored_from_a_copy_as_young_as_its_prepared_is_believed() {
    let mut model = Handoffs::new(Durability::None, Faults { losses: 1, ..NONE });
    model.young_copies = true;
    let broken = broken(NO_STALE_RESUME, &model, &Graph::new(&model)).unwrap();
    assert!(broken.trace.contains(&Step::JournalRestored(1)) && broken.state.forgot, "{broken:#?}");
}
