//! The source of one migration, from the accepted offer to the end.

use crate::migration::handoff::{HandoffAction, OfferRecord, SourceHandoff, SourceRecord, SourceStep};
use crate::migration::{Convergence, Decision, Goal, Refusal, RoundMeasure, Verdict};
use crate::types::Round;
use crate::wire::{Durability, ErrorClass, FinalDigest, Handoff};

/// The source of one migration.
#[derive(Debug)]
pub struct Source {
    state: State,
    convergence: Convergence,
    lanes: u16,
    /// Whether a session with the destination stands.
    connected: bool,
}

#[derive(Debug)]
enum State {
    /// The offer is with the destination; nothing is journaled.
    AwaitAccept,
    /// A round is on the lanes, the guest runs.
    Precopy(Round, SourceHandoff),
    /// vCPUs are being stopped.
    Pausing(Round, SourceHandoff),
    /// The guest is paused; the last pages and the state are on their way.
    StopCopy(Round, SourceHandoff),
    /// The handoff decides; this was the last round.
    HandingOff(Round, SourceHandoff),
    /// Ended before anything was journaled: the guest never noticed.
    Declined,
}

/// What happens to a source.
#[derive(Debug, Clone)]
pub enum SourceEvent {
    /// The destination accepts.
    Accepted {
        /// What is journaled before anything else is done.
        offer: Box<OfferRecord>,
        /// Lanes granted.
        lanes: u16,
    },
    /// A round is in the destination's RAM; the dirty log was harvested after it.
    RoundApplied(RoundMeasure),
    /// Every vCPU stands still.
    Paused,
    /// The last pages, the state and FINAL's digest are done.
    Finalised(FinalDigest),
    /// Something for the handoff.
    Handoff(SourceStep),
    /// Give up if that is still possible.
    GiveUp(ErrorClass),
    /// The operator changed what is asked.
    SetGoal(Goal),
    /// The session or a lane is gone, and nobody meant it.
    LinkLost,
    /// A new session stands.
    Resumed(Standing),
}

/// What a destination is still at when a session stands again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Nothing was accepted yet.
    Unknown,
    /// It takes pages; what it has of the round in flight is known, and the rest is owed again.
    Receiving,
    /// It has everything, and the handoff decides.
    Deciding,
}

/// What a source does; performed strictly in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceAction {
    /// Offer the VM.
    Offer,
    /// Record writes, open this many lanes, and owe every page.
    Begin {
        /// Lanes granted.
        lanes: u16,
    },
    /// Send what is owed, then harvest and report the round.
    SendRound(Round),
    /// Take this share of vCPU time away, in percent.
    Throttle(u8),
    /// Stop every vCPU.
    Pause,
    /// Harvest a last time; send what is owed and the state; digest.
    SendLast(Round),
    /// The attempt cannot succeed; the caller reports it and feeds `GiveUp`.
    NotConverging(Verdict),
    /// Look for the destination until it answers, and feed `Resumed`; or `GiveUp` when that takes too long.
    Reconnect,
    /// The switch did not begin: the guest goes on here while the link is down.
    GoOn,
    /// Send again what is owed of the paused guest, its state and FINAL's digest.
    SendLastAgain(Round),
    /// Part of the handoff.
    Handoff(HandoffAction<SourceRecord>),
}

impl Source {
    /// An offer is about to be made.
    #[must_use]
    pub fn new(goal: Goal) -> Self {
        Self { state: State::AwaitAccept, convergence: Convergence::new(goal), lanes: 0, connected: true }
    }

    /// As a journal with nothing behind OFFER leaves it, once the guest goes on: in `round`, without a session. Feed
    /// [`SourceEvent::Resumed`] when one stands.
    #[must_use]
    pub fn after_restart(goal: Goal, durability: Durability, lanes: u16, round: Round) -> Self {
        let state = State::Precopy(round, SourceHandoff::new(durability));
        Self { state, convergence: Convergence::new(goal), lanes, connected: false }
    }

    /// The state by name, for logs and people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.state.name()
    }

    /// Rates and the expected pause.
    #[must_use]
    pub fn convergence(&self) -> &Convergence {
        &self.convergence
    }

    /// Whether only the destination's word can end it: after COMMIT.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        matches!(&self.state, State::HandingOff(_, handoff) if handoff.is_committed())
    }

    /// One step.
    ///
    /// # Errors
    /// [`Refusal`] when the event has no place in this state; the state is then unchanged.
    pub fn step(&mut self, event: SourceEvent) -> Result<Vec<SourceAction>, Refusal> {
        let state = std::mem::replace(&mut self.state, State::Declined);
        let (next, result) = self.turn(state, event);
        self.state = next;
        result
    }

    fn turn(&mut self, state: State, event: SourceEvent) -> (State, Result<Vec<SourceAction>, Refusal>) {
        match (state, event) {
            (state, SourceEvent::SetGoal(goal)) => {
                self.convergence.set_goal(goal);
                (state, Ok(vec![]))
            }
            (State::AwaitAccept, SourceEvent::Accepted { offer, lanes }) => {
                self.lanes = lanes;
                let handoff = SourceHandoff::new(offer.durability);
                let journal = SourceAction::Handoff(HandoffAction::Journal(SourceRecord::Offer(offer)));
                let actions = vec![journal, SourceAction::Begin { lanes }, SourceAction::SendRound(Round(1))];
                (State::Precopy(Round(1), handoff), Ok(actions))
            }
            (State::AwaitAccept, SourceEvent::GiveUp(_)) => (State::Declined, Ok(vec![])),
            (State::Precopy(round, handoff), SourceEvent::RoundApplied(measure)) => self.after_round(round, handoff, &measure),
            (State::Pausing(round, handoff), SourceEvent::Paused) => {
                let round = Round(round.0 + 1);
                (State::StopCopy(round, handoff), Ok(vec![SourceAction::SendLast(round)]))
            }
            (State::StopCopy(round, handoff), SourceEvent::Finalised(digest)) => {
                Self::handoff(round, handoff, &SourceStep::Finalised { digest, lanes: self.lanes })
            }
            // FINAL is said anew for what is sent anew.
            (State::HandingOff(round, handoff), SourceEvent::Finalised(digest)) => {
                Self::handoff(round, handoff, &SourceStep::Finalised { digest, lanes: self.lanes })
            }
            (
                State::Precopy(round, handoff)
                | State::Pausing(round, handoff)
                | State::StopCopy(round, handoff)
                | State::HandingOff(round, handoff),
                SourceEvent::GiveUp(class),
            ) => Self::handoff(round, handoff, &SourceStep::GiveUp(class)),
            // Before FINAL the destination has only one thing to say: that it refuses.
            (
                State::Precopy(round, handoff) | State::Pausing(round, handoff) | State::StopCopy(round, handoff),
                SourceEvent::Handoff(step @ (SourceStep::Received { step: Handoff::Refuse { .. }, .. } | SourceStep::Failed)),
            ) => Self::handoff(round, handoff, &step),
            (State::HandingOff(round, handoff), SourceEvent::Handoff(step)) => Self::handoff(round, handoff, &step),
            (state, SourceEvent::LinkLost) => self.link_lost(state),
            (state, SourceEvent::Resumed(standing)) => self.resumed(state, standing),
            (state, event) => {
                let refusal = Refusal { state: state.name(), event: event.name(), expected: state.expects() };
                (state, Err(refusal))
            }
        }
    }

    fn after_round(&mut self, round: Round, handoff: SourceHandoff, measure: &RoundMeasure) -> (State, Result<Vec<SourceAction>, Refusal>) {
        let next = Round(round.0 + 1);
        match self.convergence.decide(measure) {
            Decision::Round => (State::Precopy(next, handoff), Ok(vec![SourceAction::SendRound(next)])),
            Decision::Throttle(percent) => {
                (State::Precopy(next, handoff), Ok(vec![SourceAction::Throttle(percent), SourceAction::SendRound(next)]))
            }
            Decision::Stop => (State::Pausing(round, handoff), Ok(vec![SourceAction::Pause])),
            Decision::GiveUp(verdict) => (State::Precopy(round, handoff), Ok(vec![SourceAction::NotConverging(verdict)])),
        }
    }

    fn handoff(round: Round, mut handoff: SourceHandoff, step: &SourceStep) -> (State, Result<Vec<SourceAction>, Refusal>) {
        let result = handoff.step(step).map(|actions| actions.into_iter().map(SourceAction::Handoff).collect());
        (State::HandingOff(round, handoff), result)
    }

    /// An outage is waited out wherever it comes. A guest that was paused for a switch that has not begun goes on meanwhile.
    fn link_lost(&mut self, state: State) -> (State, Result<Vec<SourceAction>, Refusal>) {
        let known = !std::mem::replace(&mut self.connected, false);
        match state {
            state @ State::Declined => (state, Ok(vec![])),
            state if known => (state, Ok(vec![])),
            State::Pausing(round, handoff) | State::StopCopy(round, handoff) => {
                (State::Precopy(round, handoff), Ok(vec![SourceAction::GoOn, SourceAction::Reconnect]))
            }
            state => (state, Ok(vec![SourceAction::Reconnect])),
        }
    }

    /// The guest of a handoff stays paused, so what is sent again is what FINAL was said of.
    fn resumed(&mut self, state: State, standing: Standing) -> (State, Result<Vec<SourceAction>, Refusal>) {
        self.connected = true;
        match (state, standing) {
            (State::AwaitAccept, Standing::Unknown) => (State::AwaitAccept, Ok(vec![SourceAction::Offer])),
            (State::Precopy(round, handoff), Standing::Receiving) => {
                let next = Round(round.0 + 1);
                (State::Precopy(next, handoff), Ok(vec![SourceAction::SendRound(next)]))
            }
            (State::HandingOff(round, handoff), Standing::Receiving) if handoff.awaits_prepared() => {
                let next = Round(round.0 + 1);
                (State::HandingOff(next, handoff), Ok(vec![SourceAction::SendLastAgain(next)]))
            }
            (State::HandingOff(round, handoff), Standing::Deciding) => Self::handoff(round, handoff, &SourceStep::Reconnected),
            (state, _) => {
                let refusal = Refusal { state: state.name(), event: "resumed", expected: "a destination that is where it was" };
                (state, Err(refusal))
            }
        }
    }
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::AwaitAccept => "await-accept",
            Self::Precopy(..) => "precopy",
            Self::Pausing(..) => "pausing",
            Self::StopCopy(..) => "stop-copy",
            Self::HandingOff(_, handoff) => handoff.name(),
            Self::Declined => "declined",
        }
    }

    fn expects(&self) -> &'static str {
        match self {
            Self::AwaitAccept => "ACCEPT",
            Self::Precopy(..) => "the end of the round",
            Self::Pausing(..) => "the pause of every vCPU",
            Self::StopCopy(..) => "the end of stop-and-copy",
            Self::HandingOff(..) => "a step of the handoff",
            Self::Declined => "nothing: the migration has ended",
        }
    }
}

impl SourceEvent {
    /// The event by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Accepted { .. } => "accepted",
            Self::RoundApplied(_) => "round-applied",
            Self::Paused => "paused",
            Self::Finalised(_) => "finalised",
            Self::Handoff(step) => step.name(),
            Self::GiveUp(_) => "give-up",
            Self::SetGoal(_) => "set-goal",
            Self::LinkLost => "link-lost",
            Self::Resumed(_) => "resumed",
        }
    }
}
