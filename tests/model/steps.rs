//! What can happen, and what comes of it. Nothing of the protocol is decided here: machines are told what happens, and
//! what they answer is done, in order, up to the first that fails.

use sealane::migration::SourceDecision;
use sealane::types::Side;
use sealane::wire::Durability;
use stateright::{Model, Property};

use crate::machines::{
    ABORT, Act, CLOSED, FENCED, OFFER, POSITIONS, RECLAIM, REFUSED, RUN, Said, Stage, bits, event, is_commit, is_prepared,
};
use crate::mutants::Mutant;
use crate::tables::{List, State, Tables};
use crate::world::{Faults, Host, Memory, World};

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The next action is done. Where policy is asked, it permits.
    Perform(Side),
    /// Policy denies.
    Deny(Side),
    /// The next action fails: whether it is done all the same, and whether the machine is told or the gateway dies of it.
    Fail {
        side: Side,
        done: bool,
        told: bool,
    },
    /// The journal has failed before and takes nothing more.
    Refuse {
        side: Side,
        told: bool,
    },
    /// The guest is paused for stop-and-copy.
    Pause,
    /// The link is lost before FINAL: the guest goes on.
    GoOn,
    /// The last page and the state are on their way; FINAL with this digest.
    Finalise(u8),
    /// FINAL with this digest came and the twin equals it.
    Complete(u8),
    /// A message comes, by its bit.
    Hear(u8),
    Reconnect(Side),
    GiveUp(Side),
    /// A gateway starts.
    Start(Side),
    /// A source gateway starts, lets the guest go on, and goes on with the attempt.
    Continue,
    /// Operators decide about the VM at the source.
    Decide(SourceDecision),
    /// Operators give the VM to the destination.
    HandOver,
    /// Operators switch off a destination whose journal has lost records.
    PowerOff,
    /// A VM that belongs to a host and has no memory is started there from its disks.
    StartCold(Side),
    /// A later migration takes the VM from here to a third gateway.
    MoveOn(Side),
    /// What only a mutant does.
    Rogue,
    GatewayDies(Side),
    HostDies(Side),
    HostDestroyed(Side),
    JournalWiped,
    /// The destination's journal is replaced by a copy from when it had this many of its records.
    JournalRestored(u8),
    /// Another migration's record is written to the destination's journal.
    OtherRecord,
}

/// What kind of step it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ordinary,
    /// The guest starts from its disks.
    Cold,
    Operator,
    Fault,
}

impl Step {
    pub fn kind(self) -> Kind {
        match self {
            Self::Fail { .. }
            | Self::GatewayDies(_)
            | Self::HostDies(_)
            | Self::HostDestroyed(_)
            | Self::JournalWiped
            | Self::JournalRestored(_)
            | Self::OtherRecord => Kind::Fault,
            Self::Decide(_) | Self::HandOver | Self::PowerOff => Kind::Operator,
            Self::StartCold(_) => Kind::Cold,
            _ => Kind::Ordinary,
        }
    }
}

/// The handoff under given terms and faults.
pub struct Handoffs {
    pub durability: Durability,
    pub faults: Faults,
    /// Whether a copy of the destination's journal may be as young as its PREPARED.
    pub young_copies: bool,
    pub mutant: Option<Mutant>,
    pub tables: Tables,
}

pub const SIDES: [Side; 2] = [Side::Source, Side::Destination];

impl Handoffs {
    pub fn new(durability: Durability, faults: Faults) -> Self {
        Self { durability, faults, young_copies: false, mutant: None, tables: Tables::new(durability, |_| ()) }
    }

    pub fn with(mutant: Mutant, durability: Durability, faults: Faults) -> Self {
        Self { mutant: Some(mutant), tables: Tables::new(durability, mutant.alter()), ..Self::new(durability, faults) }
    }

    pub fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub fn stage(&self, side: Side, state: State) -> Stage {
        match side {
            Side::Source => self.tables.source.stage(state),
            Side::Destination => self.tables.destination.stage(state),
        }
    }

    pub fn first(&self, side: Side, list: List) -> (Act, List) {
        match side {
            Side::Source => self.tables.source.first(list),
            Side::Destination => self.tables.destination.first(list),
        }
    }

    fn has(&self, side: Side, list: List, act: Act) -> bool {
        match side {
            Side::Source => self.tables.source.has(list, act),
            Side::Destination => self.tables.destination.has(list, act),
        }
    }

    fn on(&self, side: Side, state: State, event: u8) -> Option<(State, List)> {
        match side {
            Side::Source => self.tables.source.on(state, event),
            Side::Destination => self.tables.destination.on(state, event),
        }
    }

    /// A journal that knows nothing of the attempt: its gateway answers by itself (`engine::answer`).
    pub fn is_unknown(&self, destination: &Host) -> bool {
        !is_prepared(destination.records[0])
            && destination.machine != 0
            && self.stage(Side::Destination, destination.machine) == Stage::Refused
    }

    /// The machine is told; nothing when it does not take that, or it changes nothing.
    fn tell(&self, world: &World, side: Side, event: u8) -> Option<World> {
        Self::turned(world, side, self.on(side, world.host(side).machine, event)?)
    }

    fn turned(world: &World, side: Side, (machine, due): (State, List)) -> Option<World> {
        let mut next = *world;
        let host = next.host_mut(side);
        (host.machine, host.due) = (machine, due);
        (next != *world).then_some(next)
    }

    fn perform(&self, world: &World, side: Side) -> Option<World> {
        let (act, rest) = self.first(side, world.host(side).due);
        let mut next = *world;
        next.host_mut(side).due = rest;
        match act {
            Act::AskCommit => return self.tell(&next, side, event::PERMITTED),
            Act::Send(said) => {
                let position = next.position;
                Self::say(&mut next, side, said, position);
            }
            // It has no position in an attempt that it does not know.
            Act::RefuseUnknown => {
                let position = if self.is(Mutant::UnknownAtPosition) { next.position } else { 0 };
                Self::say(&mut next, side, Said::Refuse, position);
            }
            Act::Resume => self.resume(&mut next, side),
            Act::Destroy => {
                let host = next.host_mut(side);
                let killed = host.running;
                host.lose_memory();
                next.killed |= killed;
            }
            // A guest that runs keeps its own.
            Act::Renew if next.host(side).running => {}
            Act::Renew => next.host_mut(side).memory = Memory::Renewed,
            Act::Leave => next.host_mut(side).stop_gateway(),
            Act::End => {}
            act => self.make_durable(&mut next, side, act),
        }
        Some(next)
    }

    /// What may fail, done.
    fn make_durable(&self, next: &mut World, side: Side, act: Act) {
        let finalised = next.finalised;
        let old = next.has_old(side);
        let host = next.host_mut(side);
        match act {
            Act::Journal(record) => {
                let on_disk = !self.mutant.is_some_and(|mutant| mutant.skips(record));
                if on_disk {
                    host.write(record);
                }
                if side == Side::Destination {
                    next.position = if on_disk { next.position + 1 } else { POSITIONS.min(next.position + 2) - 1 };
                }
            }
            Act::Keep => host.image = true,
            Act::Forget => {
                // From here on a crash is the crash of a guest that runs.
                host.ran |= finalised && host.memory != Memory::None && self.has(side, host.due, Act::Resume);
                host.image = false;
            }
            Act::Restore => {
                let past = old || host.ran || !host.image || host.memory != Memory::None;
                host.memory = Memory::Restored;
                next.stale |= past;
            }
            other => panic!("{other:?} cannot fail"),
        }
    }

    fn fail(&self, world: &World, side: Side, done: bool, told: bool) -> Option<World> {
        let (act, _) = self.first(side, world.host(side).due);
        let mut next = *world;
        if done {
            self.make_durable(&mut next, side, act);
        }
        let host = next.host_mut(side);
        host.stopped |= matches!(act, Act::Journal(_));
        if act == Act::Restore {
            host.lose_memory();
        }
        if self.is(Mutant::FailureIgnored) {
            let (_, rest) = self.first(side, host.due);
            host.due = rest;
            return Some(next);
        }
        host.due = 0;
        let machine = host.machine;
        match self.on(side, machine, event::FAILED).filter(|_| told) {
            Some((machine, due)) => (next.host_mut(side).machine, next.host_mut(side).due) = (machine, due),
            None => next.host_mut(side).stop_gateway(),
        }
        Some(next)
    }

    fn say(next: &mut World, side: Side, said: Said, position: u8) {
        let bit = match side {
            Side::Source => bits::source(said),
            Side::Destination => bits::destination(said, next.new_journal, position),
        };
        next.said |= 1 << bit;
    }

    fn resume(&self, next: &mut World, side: Side) {
        let (finalised, elsewhere) = (next.finalised, next.elsewhere);
        let old = next.has_old(side);
        let other_ran = next.host(if side == Side::Source { Side::Destination } else { Side::Source }).ran;
        let host = next.host_mut(side);
        if host.memory == Memory::None || host.running {
            return;
        }
        host.running = true;
        host.ran |= finalised;
        let fenced = side == Side::Source && host.last() == FENCED;
        let same = host.memory == Memory::Restored || (fenced && host.memory == Memory::Intact);
        next.same_generation |= same;
        next.stale |= other_ran || elsewhere || old;
    }

    fn hear(&self, world: &World, bit: u8) -> Option<World> {
        if bit < bits::DESTINATION {
            let host = &world.destination;
            if self.is_unknown(host) {
                return self.answer_unknown(world, bit);
            }
            let bit = match (self.stage(Side::Destination, host.machine), bits::word(bit)) {
                (Stage::Prepared(digest), Some(Said::Commit(_))) if self.is(Mutant::StrayCommitTaken) => bits::source(Said::Commit(digest)),
                _ => bit,
            };
            let turn = self.tables.destination.on_message(host.machine, bit);
            return Self::turned(world, Side::Destination, turn?);
        }
        let (said, new_journal, position) = bits::answer(bit);
        let (new_journal, position) = match (said, self.mutant) {
            (Said::Refuse, Some(Mutant::NewJournalBelieved)) if new_journal => (false, POSITIONS - 1),
            (Said::Refuse, Some(Mutant::OlderJournalBelieved)) => (new_journal, POSITIONS - 1),
            (Said::Refuse, Some(Mutant::SamePositionBelieved)) => (new_journal, (position + 1).min(POSITIONS - 1)),
            _ => (new_journal, position),
        };
        let heard = bits::destination(said, new_journal, position) - bits::DESTINATION;
        Self::turned(world, Side::Source, self.tables.source.on_message(world.source.machine, heard)?)
    }

    /// `engine::recovery::refuse_unknown`: it is written that this attempt was refused, and said.
    fn answer_unknown(&self, world: &World, bit: u8) -> Option<World> {
        if !matches!(bits::word(bit), Some(Said::Final(_) | Said::Commit(_))) {
            return None;
        }
        let (refuse, lists) = (Act::RefuseUnknown, &self.tables.destination);
        let due = if world.destination.records[0] == 0 { lists.find(&[Act::Journal(REFUSED), refuse]) } else { lists.find(&[refuse]) };
        Self::turned(world, Side::Destination, (world.destination.machine, due))
    }

    /// A gateway starts: its machine is rebuilt, and what follows from the journal alone is done, but only as long as the
    /// VM is where that record put it (`gateway::recovery`, `engine::recovery`).
    fn start(&self, world: &World, side: Side) -> World {
        let mut next = *world;
        let host = next.host_mut(side);
        host.stopped = false;
        let (machine, due) = match side {
            Side::Source => self.tables.source.rebuild(&host.records, host.holding()),
            Side::Destination => self.tables.destination.rebuild(&host.records, host.holding()),
        };
        let due = match (self.mutant, due) {
            (Some(Mutant::FoundMemoryKept), 1..) if self.first(side, due).0 == Act::Renew => self.first(side, due).1,
            _ => due,
        };
        let host = next.host_mut(side);
        let last = host.last();
        // A guest that runs and that no record speaks of is not touched.
        let stranger = side == Side::Destination && matches!(last, 0 | REFUSED) && host.running;
        let guarded = !self.is(Mutant::MovedOnUnnoticed) || is_prepared(last) || is_commit(last) || last == OFFER;
        (host.machine, host.due) = (machine, if stranger || (!host.current && guarded) { 0 } else { due });
        next
    }

    fn continued(&self, world: &World) -> World {
        let mut next = *world;
        next.superseded = world.finalised;
        let fresh = self.tables.source.fresh();
        let host = &mut next.source;
        (host.stopped, host.machine, host.due, host.running) = (false, fresh, 0, true);
        host.ran |= world.finalised;
        host.image &= self.is(Mutant::ContinuedWithImage);
        next
    }

    fn start_cold(world: &World, side: Side) -> World {
        let mut next = *world;
        let host = next.host_mut(side);
        let here = matches!(host.last(), ABORT | RECLAIM | FENCED | RUN | CLOSED);
        (host.memory, host.running, host.ran) = (Memory::Intact, true, true);
        // Where the records did not say that it runs here, it is registered anew.
        host.current &= here;
        next
    }

    fn lose_journal(world: &World, kept: u8, new_journal: bool) -> Option<World> {
        let mut next = *world;
        next.faults.losses = next.faults.losses.checked_sub(1)?;
        next.destination.stop_gateway();
        next.destination.records[usize::from(kept)..].fill(0);
        (next.position, next.forgot, next.new_journal) = (kept, true, new_journal);
        Some(next)
    }

    fn fault(world: &World, step: Step) -> Option<World> {
        let mut next = *world;
        let faults = &mut next.faults;
        match step {
            Step::GatewayDies(side) => {
                faults.gateways -= 1;
                next.host_mut(side).stop_gateway();
            }
            Step::HostDies(side) => {
                faults.hosts -= 1;
                next.host_mut(side).stop_gateway();
                next.host_mut(side).lose_memory();
            }
            Step::HostDestroyed(side) => {
                faults.losses -= 1;
                next.host_mut(side).destroy();
            }
            Step::JournalWiped => return Self::lose_journal(world, 0, true),
            Step::JournalRestored(kept) => return Self::lose_journal(world, kept, false),
            Step::OtherRecord => {
                faults.others -= 1;
                next.position += 1;
            }
            other => panic!("{other:?} is no fault"),
        }
        Some(next)
    }

    fn hand_over(&self, world: &World) -> Option<World> {
        match self.stage(Side::Destination, world.destination.machine) {
            Stage::Prepared(digest) if self.is(Mutant::HandedOverAsPrepared) => {
                let commit = bits::source(Said::Commit(digest));
                Self::turned(world, Side::Destination, self.tables.destination.on_message(world.destination.machine, commit)?)
            }
            _ => self.tell(world, Side::Destination, event::DECIDED),
        }
    }
}

impl Model for Handoffs {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let mut world = World::new(self.faults, self.tables.source.fresh(), self.tables.destination.fresh());
        world.said = 1 << bits::STRAY_COMMIT;
        vec![world]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        for side in SIDES.into_iter().filter(|side| !world.host(*side).destroyed) {
            self.gateway_steps(world, side, steps);
            if self.may_start_cold(world, side) {
                steps.push(Step::StartCold(side));
            }
            if world.faults.moves > 0 && self.may_move_on(world, side) {
                steps.push(Step::MoveOn(side));
            }
        }
        if world.source.listens() {
            self.source_steps(world, steps);
        }
        if world.destination.listens() {
            self.destination_steps(world, steps);
        }
        if self.mutant.is_some_and(|mutant| mutant.is_rogue()) {
            steps.push(Step::Rogue);
        }
        self.faults(world, steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = *world;
        match step {
            Step::Perform(side) => return self.perform(world, side),
            Step::Fail { side, done, told } => {
                next.faults.disks -= 1;
                return self.fail(&next, side, done, told);
            }
            Step::Refuse { side, told } => return self.fail(world, side, false, told),
            Step::Deny(side) => {
                next.host_mut(side).due = 0;
                return self.tell(&next, side, event::DENIED);
            }
            Step::Pause => next.source.running = false,
            Step::GoOn => next.source.running = true,
            Step::Finalise(digest) => {
                next.finalised = true;
                next.source.ran = false;
                return self.tell(&next, Side::Source, event::FINAL + digest - 1);
            }
            Step::Complete(digest) => {
                next.destination.memory = Memory::Intact;
                return self.tell(&next, Side::Destination, event::FINAL + digest - 1);
            }
            Step::Hear(bit) => return self.hear(world, bit),
            Step::Reconnect(side) if side == Side::Destination && self.is_unknown(&world.destination) => return None,
            Step::Reconnect(side) => return self.tell(world, side, event::RECONNECTED),
            Step::GiveUp(side) => return self.tell(world, side, event::GIVE_UP),
            Step::Start(side) => return Some(self.start(world, side)),
            Step::Continue => return Some(self.continued(world)),
            Step::Decide(SourceDecision::Reclaim) => return self.tell(world, Side::Source, event::DECIDED),
            Step::Decide(SourceDecision::Restart) => return self.tell(world, Side::Source, event::DECIDED_RESTART),
            Step::Decide(SourceDecision::Release) => return self.tell(world, Side::Source, event::DECIDED_RELEASE),
            Step::HandOver => return self.hand_over(world),
            Step::PowerOff => next.destination.destroy(),
            Step::StartCold(side) => return Some(Self::start_cold(world, side)),
            Step::MoveOn(side) => {
                next.faults.moves -= 1;
                (next.host_mut(side).running, next.host_mut(side).current, next.elsewhere) = (false, false, true);
            }
            Step::Rogue => return self.mutant.and_then(|mutant| mutant.rogue(self, world)),
            fault => return Self::fault(world, fault),
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        crate::promises::always()
    }
}
