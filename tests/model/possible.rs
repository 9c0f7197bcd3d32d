//! What can happen next.

use sealane::migration::SourceDecision;
use sealane::types::Side;

use crate::machines::{ABORT, Act, CLOSED, DONE, FENCED, HANDED_OVER, OFFER, REFUSED, RUN, STRANGE_DIGEST, Said, Stage, bits, is_commit};
use crate::mutants::Mutant;
use crate::steps::{Handoffs, SIDES, Step};
use crate::world::{Faults, Memory, World};

impl Handoffs {
    pub fn gateway_steps(&self, world: &World, side: Side, steps: &mut Vec<Step>) {
        let host = world.host(side);
        if host.machine == 0 {
            steps.push(Step::Start(side));
            if side == Side::Source && self.may_continue(world) {
                steps.push(Step::Continue);
            }
            return;
        }
        if host.due == 0 {
            // Only a start opens the journal again.
            steps.extend(host.stopped.then_some(Step::Start(side)));
            steps.extend([Step::Reconnect(side), Step::GiveUp(side)]);
            return;
        }
        let (act, _) = self.first(side, host.due);
        let dead = host.stopped && matches!(act, Act::Journal(_));
        if !dead {
            steps.push(Step::Perform(side));
        }
        if act == Act::AskCommit {
            steps.push(Step::Deny(side));
        }
        if dead {
            steps.extend([true, false].map(|told| Step::Refuse { side, told }));
        } else if world.faults.disks > 0 && matches!(act, Act::Journal(_) | Act::Keep | Act::Forget | Act::Restore) {
            let done = if act == Act::Restore { &[false][..] } else { &[false, true] };
            steps.extend(done.iter().flat_map(|done| [true, false].map(|told| Step::Fail { side, done: *done, told })));
        }
    }

    pub fn source_steps(&self, world: &World, steps: &mut Vec<Step>) {
        let host = &world.source;
        let stage = self.stage(Side::Source, host.machine);
        match stage {
            Stage::Offered if host.running => steps.push(Step::Pause),
            // A guest that went on has another final state.
            Stage::Offered => steps.extend([Step::GoOn, Step::Finalise(if world.superseded { 2 } else { 1 })]),
            Stage::AwaitPrepared(1) => steps.push(Step::Finalise(2)),
            _ => {}
        }
        if stage == Stage::Committed {
            let decisions = [SourceDecision::Reclaim, SourceDecision::Restart, SourceDecision::Release];
            steps.extend(decisions.into_iter().filter(|decision| self.is_true(world, *decision)).map(Step::Decide));
            if world.forgot && !world.destination.destroyed && !world.elsewhere {
                steps.push(Step::PowerOff);
            }
        }
        steps.extend((bits::DESTINATION..64).filter(|bit| world.has_heard_of(*bit)).map(Step::Hear));
    }

    /// A gateway that starts may go on with the attempt instead of ending it (`gateway::resumption`). There are two final states
    /// to tell apart here, so not behind the second.
    fn may_continue(&self, world: &World) -> bool {
        let host = &world.source;
        let offered = host.last() == OFFER || (self.is(Mutant::ContinuedAfterCommit) && is_commit(host.last()));
        let second = world.superseded || world.has_heard_of(bits::source(Said::Final(2)));
        offered && host.memory == Memory::Intact && host.current && !second
    }

    /// Operators have evidence for what they say.
    fn is_true(&self, world: &World, decision: SourceDecision) -> bool {
        let other = &world.destination;
        match decision {
            SourceDecision::Reclaim => {
                let off = other.destroyed || self.is(Mutant::FencedWithoutEvidence);
                off && (!other.ran || self.is(Mutant::NeverRanUnchecked)) && !world.elsewhere
            }
            SourceDecision::Restart => other.destroyed && !world.elsewhere,
            SourceDecision::Release => other.running || world.elsewhere,
        }
    }

    pub fn destination_steps(&self, world: &World, steps: &mut Vec<Step>) {
        let host = &world.destination;
        for bit in (0..bits::DESTINATION).filter(|bit| world.has_heard_of(*bit)) {
            match (self.stage(Side::Destination, host.machine), bits::word(bit)) {
                (Stage::Receiving, Some(Said::Final(digest))) => steps.push(Step::Complete(digest)),
                // It is bound to another attempt (`Evidence::check`).
                (_, Some(Said::Commit(STRANGE_DIGEST))) if !self.is(Mutant::StrayCommitTaken) => {}
                _ => steps.push(Step::Hear(bit)),
            }
        }
        if world.source.destroyed && !world.elsewhere {
            steps.push(Step::HandOver);
        }
    }

    /// Whose VM it is when nothing of it is left but its disks, by what is on disk and what is known to be destroyed.
    pub fn may_start_cold(&self, world: &World, side: Side) -> bool {
        let (own, other) = match side {
            Side::Source => (&world.source, &world.destination),
            Side::Destination => (&world.destination, &world.source),
        };
        let ended = own.listens() && matches!(self.stage(side, own.machine), Stage::Refused | Stage::Ended);
        if !ended || own.memory != Memory::None || world.elsewhere {
            return false;
        }
        let last = own.last();
        match side {
            Side::Source => (ABORT..=FENCED + 1).contains(&last) || (last == DONE && other.destroyed),
            Side::Destination => {
                let unpromised = last == 0 || last == REFUSED;
                matches!(last, RUN | CLOSED | HANDED_OVER)
                    || (unpromised && other.destroyed)
                    || (unpromised && world.forgot && other.last() == DONE)
            }
        }
    }

    /// The VM runs here and no handoff is open here.
    pub fn may_move_on(&self, world: &World, side: Side) -> bool {
        let host = world.host(side);
        if !host.listens() || !host.running || host.stopped || world.elsewhere {
            return false;
        }
        let unknown = side == Side::Destination && self.is_unknown(host);
        !unknown && !matches!(self.stage(side, host.machine), Stage::Offered | Stage::AwaitPrepared(_) | Stage::AwaitPermit(_))
    }

    pub fn faults(&self, world: &World, steps: &mut Vec<Step>) {
        let Faults { gateways, hosts, losses, others, .. } = world.faults;
        for side in SIDES.into_iter().filter(|side| !world.host(*side).destroyed) {
            let host = world.host(side);
            if gateways > 0 && host.machine != 0 {
                steps.push(Step::GatewayDies(side));
            }
            if hosts > 0 && (host.machine != 0 || host.memory != Memory::None) {
                steps.push(Step::HostDies(side));
            }
            if losses > 0 && world.is_whole() {
                steps.push(Step::HostDestroyed(side));
            }
        }
        let records = world.destination.records.iter().take_while(|record| **record != 0).count();
        if losses > 0 && world.is_whole() && records > 0 {
            steps.push(Step::JournalWiped);
            steps.push(Step::JournalRestored(0));
            if self.young_copies && records > 1 {
                steps.push(Step::JournalRestored(1));
            }
        }
        if others > 0 && !world.destination.destroyed {
            steps.push(Step::OtherRecord);
        }
    }
}
