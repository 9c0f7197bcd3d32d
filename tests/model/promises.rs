//! What has to hold. What holds in every state is checked by stateright; what has to stay reachable, by `graph.rs`.

use sealane::wire::Durability;
use stateright::Property;

use crate::graph::Graph;
use crate::machines::{OFFER, Said, bits, is_commit, is_prepared};
use crate::steps::{Handoffs, Kind, Step};
use crate::world::World;

pub const SINGLE_RUNNER: &str = "at most one host runs the VM";
pub const NO_STALE_RESUME: &str = "nobody resumes what the VM has run past";
pub const NEW_GENERATION: &str = "a guest from an image, or one taken back, has a new generation";
pub const IMAGE_IS_THERE: &str = "FINAL and PREPARED are said with the image on disk";
pub const NONE_KILLED: &str = "no guest is destroyed while it runs";
pub const NOT_STUCK: &str = "somebody can run the VM without operators, while both disks are there";
pub const IMAGE_SURVIVES: &str = "with the image at both ends, its memory is not lost while both disks are there";
pub const OWNED: &str = "somebody can run the VM, with operators if need be";

type Holds = fn(&Handoffs, &World) -> bool;

const ALWAYS: &[(&str, Holds)] = &[
    (SINGLE_RUNNER, |_, world| world.runners() < 2),
    (NO_STALE_RESUME, |_, world| !world.stale),
    (NEW_GENERATION, |_, world| !world.same_generation),
    (IMAGE_IS_THERE, image_is_there),
    (NONE_KILLED, |_, world| !world.killed),
];

/// What holds in every state, for stateright.
pub fn always() -> Vec<Property<Handoffs>> {
    ALWAYS.iter().map(|(promise, holds)| Property::always(promise, *holds)).collect()
}

/// As long as a side is bound by what it said, and the guest has not run from there.
fn image_is_there(model: &Handoffs, world: &World) -> bool {
    let (source, destination) = (&world.source, &world.destination);
    let source_bound = said_final(world) && !source.ran && (source.last() == OFFER || is_commit(source.last()));
    let destination_bound = is_prepared(destination.last()) && said_prepared(world);
    let source_keeps = model.durability == Durability::Both;
    let destination_keeps = model.durability != Durability::None;
    (source.image || !source_keeps || !source_bound) && (destination.image || !destination_keeps || !destination_bound)
}

fn said_final(world: &World) -> bool {
    // A guest that went on is bound by what was said of it since.
    [1, 2].into_iter().skip(usize::from(world.superseded)).any(|digest| world.has_heard_of(bits::source(Said::Final(digest))))
}

fn said_prepared(world: &World) -> bool {
    (bits::DESTINATION..64).any(|bit| world.has_heard_of(bit) && matches!(bits::answer(bit), (Said::Prepared(_), ..)))
}

/// A promise that does not hold.
#[derive(Debug)]
pub struct Broken {
    pub promise: &'static str,
    /// Where it does not.
    pub state: World,
    /// A shortest way there.
    pub trace: Vec<Step>,
}

/// Where a promise is broken first.
pub fn broken(promise: &'static str, model: &Handoffs, graph: &Graph) -> Option<Broken> {
    let runs = |world: &World| world.runners() > 0;
    let found = match promise {
        NOT_STUCK => graph.lost(World::is_whole, runs, |kind| matches!(kind, Kind::Ordinary | Kind::Cold)),
        IMAGE_SURVIVES if model.durability == Durability::Both => memory_lost(graph),
        IMAGE_SURVIVES => None,
        OWNED => graph.lost(|_| true, runs, |kind| kind != Kind::Fault),
        _ => {
            let (_, holds) = ALWAYS.iter().find(|(name, _)| *name == promise).expect("a promise");
            graph.first(|world| !holds(model, world))
        }
    };
    found.map(|(state, trace)| Broken { promise, state, trace })
}

/// The first of all promises that is broken.
pub fn any_broken(model: &Handoffs, graph: &Graph) -> Option<Broken> {
    let promises = ALWAYS.iter().map(|(promise, _)| *promise).chain([NOT_STUCK, IMAGE_SURVIVES, OWNED]);
    promises.filter_map(|promise| broken(promise, model, graph)).next()
}

/// A state in which FINAL was said and nobody has begun to run from it, and never will without starting from the disks,
/// although both hosts are whole.
pub fn memory_lost(graph: &Graph) -> Option<(World, Vec<Step>)> {
    let kept = |world: &World| world.is_whole() && said_final(world) && !world.source.ran && !world.destination.ran;
    graph.lost(kept, |world| world.source.running || world.destination.running, |kind| kind == Kind::Ordinary)
}
