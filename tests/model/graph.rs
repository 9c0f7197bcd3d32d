//! Every reachable state with the steps between them, to ask what can still be reached from where.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use stateright::Model;

use crate::steps::{Handoffs, Kind, Step};
use crate::world::World;

/// The states that a model reaches, in the order of a breadth-first search.
pub struct Graph {
    states: Vec<World>,
    /// For each state, the one it was found from and how.
    found: Vec<Option<(u32, Step)>>,
    /// Steps as pairs of states, with their kind.
    steps: Vec<(u32, u32, Kind)>,
}

/// Four words are mixed; nobody chooses them to collide.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("states are words");
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 ^= self.0 >> 29;
    }
}

impl Graph {
    pub fn new(model: &Handoffs) -> Self {
        let mut graph = Self { states: model.init_states(), found: vec![None], steps: Vec::new() };
        let mut known: HashMap<World, u32, BuildHasherDefault<Mix>> = HashMap::default();
        known.insert(graph.states[0], 0);
        let (mut next, mut possible) = (0, Vec::new());
        while let Some(world) = graph.states.get(next).copied() {
            let from = u32::try_from(next).unwrap();
            model.actions(&world, &mut possible);
            for step in possible.drain(..) {
                let Some(world) = model.next_state(&world, step) else { continue };
                let new = u32::try_from(graph.states.len()).unwrap();
                let to = *known.entry(world).or_insert(new);
                if to == new {
                    graph.states.push(world);
                    graph.found.push(Some((from, step)));
                }
                graph.steps.push((from, to, step.kind()));
            }
            next += 1;
        }
        graph
    }

    /// A state of those that `matter` from which no state of the `goal` is reached by the steps that are `taken`, and the
    /// steps that lead to it.
    pub fn lost(
        &self,
        matter: impl Fn(&World) -> bool,
        goal: impl Fn(&World) -> bool,
        taken: impl Fn(Kind) -> bool,
    ) -> Option<(World, Vec<Step>)> {
        let mut reaches: Vec<bool> = self.states.iter().map(goal).collect();
        // Steps back, by where they lead: a counting sort.
        let mut start = vec![0_u32; self.states.len() + 1];
        let steps = || self.steps.iter().filter(|(.., kind)| taken(*kind));
        steps().for_each(|(_, to, _)| start[*to as usize + 1] += 1);
        (1..start.len()).for_each(|at| start[at] += start[at - 1]);
        let (mut back, mut free) = (vec![0_u32; start[self.states.len()] as usize], start.clone());
        for (from, to, _) in steps() {
            back[free[*to as usize] as usize] = *from;
            free[*to as usize] += 1;
        }
        let mut open: Vec<usize> = (0..self.states.len()).filter(|at| reaches[*at]).collect();
        while let Some(at) = open.pop() {
            for from in &back[start[at] as usize..start[at + 1] as usize] {
                if !std::mem::replace(&mut reaches[*from as usize], true) {
                    open.push(*from as usize);
                }
            }
        }
        let lost = (0..self.states.len()).find(|at| !reaches[*at] && matter(&self.states[*at]))?;
        Some((self.states[lost], self.trace(lost)))
    }

    /// The first state found that is like this, and the steps that lead to it.
    pub fn first(&self, like: impl Fn(&World) -> bool) -> Option<(World, Vec<Step>)> {
        let at = self.states.iter().position(like)?;
        Some((self.states[at], self.trace(at)))
    }

    pub fn states(&self) -> usize {
        self.states.len()
    }

    fn trace(&self, mut at: usize) -> Vec<Step> {
        let mut trace = Vec::new();
        while let Some((from, step)) = self.found[at] {
            trace.push(step);
            at = from as usize;
        }
        trace.reverse();
        trace
    }
}
