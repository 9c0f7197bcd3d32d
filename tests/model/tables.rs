//! What the machines say, by number.

use std::collections::HashMap;
use std::sync::RwLock;

use sealane::migration::{DestinationHandoff, Holding, SourceHandoff};
use sealane::wire::Durability;

use crate::machines::{Act, Machine, REFUSED, Records, Stage};

/// A machine in a state, from 1; 0 is none.
pub type State = u8;
/// A list of actions, from 1; 0 is the empty one.
pub type List = u8;

/// Everything that one side's machine does.
pub struct Table<M: Machine> {
    durability: Durability,
    alter: fn(&mut Vec<Act>),
    machines: Vec<M>,
    stages: Vec<Stage>,
    /// By state and event.
    turns: Vec<Option<(State, List)>>,
    events: usize,
    lists: Lists,
    rebuilt: RwLock<HashMap<(Records, Holding), (State, List)>>,
}

/// Every list is its first action and the rest, which is a list as well.
#[derive(Default)]
struct Lists(Vec<(Act, List)>);

impl Lists {
    fn find(&self, actions: &[Act]) -> Option<List> {
        actions.iter().rev().try_fold(0, |rest, action| self.0.iter().position(|list| *list == (*action, rest)).map(number))
    }

    fn put(&mut self, actions: &[Act]) -> List {
        actions.iter().rev().fold(0, |rest, action| {
            let known = self.0.iter().position(|list| *list == (*action, rest));
            number(known.unwrap_or_else(|| {
                self.0.push((*action, rest));
                self.0.len() - 1
            }))
        })
    }
}

fn number(index: usize) -> u8 {
    u8::try_from(index + 1).expect("few enough to count")
}

impl<M: Machine> Table<M> {
    /// Asks the machine everything, from every state that a start or a journal leads to. What a mutant does to lists of
    /// actions is done here.
    fn new(durability: Durability, alter: fn(&mut Vec<Act>)) -> Self {
        let events = M::events(durability);
        let mut table = Self {
            durability,
            alter,
            machines: vec![M::fresh(durability)],
            stages: Vec::new(),
            turns: Vec::new(),
            events: events.len(),
            lists: Lists::default(),
            rebuilt: RwLock::default(),
        };
        for records in M::journals() {
            for holding in [Holding::Memory, Holding::Image, Holding::Nothing] {
                let (machine, due) = M::rebuilt(&records, holding, durability);
                table.state(machine);
                table.list(due);
            }
        }
        // What the engine does for a journal that knows nothing of the attempt.
        table.lists.put(&[Act::Journal(REFUSED), Act::RefuseUnknown]);
        let mut asked = 0;
        while asked < table.machines.len() {
            for event in &events {
                let mut machine = table.machines[asked].clone();
                let turn = machine.turn(event).map(|actions| (table.state(machine), table.list(actions)));
                table.turns.push(turn);
            }
            asked += 1;
        }
        table.stages = table.machines.iter().map(Machine::stage).collect();
        table
    }

    fn state(&mut self, machine: M) -> State {
        let known = self.machines.iter().position(|known| *known == machine);
        number(known.unwrap_or_else(|| {
            self.machines.push(machine);
            self.machines.len() - 1
        }))
    }

    fn list(&mut self, mut actions: Vec<Act>) -> List {
        (self.alter)(&mut actions);
        self.lists.put(&actions)
    }

    /// The machine at the start.
    pub fn fresh(&self) -> State {
        1
    }

    /// What it makes of a message, by its number within the side's.
    pub fn on_message(&self, state: State, message: u8) -> Option<(State, List)> {
        self.turns[(usize::from(state) - 1) * self.events + usize::from(message)]
    }

    /// What it makes of another event.
    pub fn on(&self, state: State, event: u8) -> Option<(State, List)> {
        self.on_message(state, M::MESSAGES + event)
    }

    /// Rebuilds it from a journal and what the host holds.
    pub fn rebuild(&self, records: &Records, holding: Holding) -> (State, List) {
        let key = (*records, holding);
        if let Some(known) = self.rebuilt.read().unwrap().get(&key) {
            return *known;
        }
        let (machine, mut due) = M::rebuilt(records, holding, self.durability);
        (self.alter)(&mut due);
        let state = self.machines.iter().position(|known| *known == machine).expect("a journal that leads to no known state");
        let found = (number(state), self.lists.find(&due).expect("actions that no journal is known to lead to"));
        self.rebuilt.write().unwrap().insert(key, found);
        found
    }

    pub fn stage(&self, state: State) -> Stage {
        self.stages[usize::from(state) - 1]
    }

    /// The first action of a list, and the others.
    pub fn first(&self, list: List) -> (Act, List) {
        self.lists.0[usize::from(list) - 1]
    }

    /// Whether an action is in a list.
    pub fn has(&self, mut list: List, wanted: Act) -> bool {
        while list != 0 {
            let (first, rest) = self.first(list);
            if first == wanted {
                return true;
            }
            list = rest;
        }
        false
    }

    pub fn find(&self, actions: &[Act]) -> List {
        self.lists.find(actions).expect("a known list")
    }
}

/// Both sides' tables.
pub struct Tables {
    pub source: Table<SourceHandoff>,
    pub destination: Table<DestinationHandoff>,
}

impl Tables {
    pub fn new(durability: Durability, alter: fn(&mut Vec<Act>)) -> Self {
        Self { source: Table::new(durability, alter), destination: Table::new(durability, alter) }
    }
}
