//! The source of one migration, from the accepted offer to the end.

use crate::migration::handoff::{HandoffAction, OfferRecord, SourceHandoff, SourceRecord, SourceStep};
use crate::migration::{Convergence, Decision, Goal, Refusal, RoundMeasure, Verdict};
use crate::types::Round;
use crate::wire::{ErrorClass, FinalDigest, Handoff};

/// The source of one migration.
#[derive(Debug)]
pub struct Source {
    state: State,
    convergence: Convergence,
    lanes: u16,
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
    StopCopy(SourceHandoff),
    /// The handoff decides.
    HandingOff(SourceHandoff),
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
}

/// What a source does; performed strictly in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceAction {
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
    /// Part of the handoff.
    Handoff(HandoffAction<SourceRecord>),
}

impl Source {
    /// An offer is about to be made.
    #[must_use]
    pub fn new(goal: Goal) -> Self {
        Self { state: State::AwaitAccept, convergence: Convergence::new(goal), lanes: 0 }
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
        matches!(&self.state, State::HandingOff(handoff) if handoff.is_committed())
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
                let journal = SourceAction::Handoff(HandoffAction::Journal(SourceRecord::Offer(offer)));
                let actions = vec![journal, SourceAction::Begin { lanes }, SourceAction::SendRound(Round(1))];
                (State::Precopy(Round(1), SourceHandoff::Offered), Ok(actions))
            }
            (State::AwaitAccept, SourceEvent::GiveUp(_)) => (State::Declined, Ok(vec![])),
            (State::Precopy(round, handoff), SourceEvent::RoundApplied(measure)) => self.after_round(round, handoff, &measure),
            (State::Pausing(round, handoff), SourceEvent::Paused) => {
                let round = Round(round.0 + 1);
                (State::StopCopy(handoff), Ok(vec![SourceAction::SendLast(round)]))
            }
            (State::StopCopy(handoff), SourceEvent::Finalised(digest)) => {
                Self::handoff(handoff, &SourceStep::Finalised { digest, lanes: self.lanes })
            }
            (State::Precopy(_, handoff) | State::Pausing(_, handoff) | State::StopCopy(handoff), SourceEvent::GiveUp(class)) => {
                Self::handoff(handoff, &SourceStep::GiveUp(class))
            }
            (State::HandingOff(handoff), SourceEvent::GiveUp(class)) => Self::handoff(handoff, &SourceStep::GiveUp(class)),
            // Before FINAL the destination has only one thing to say: that it refuses.
            (
                State::Precopy(_, handoff) | State::Pausing(_, handoff) | State::StopCopy(handoff),
                SourceEvent::Handoff(step @ SourceStep::Received { step: Handoff::Refuse { .. }, .. }),
            ) => Self::handoff(handoff, &step),
            (State::HandingOff(handoff), SourceEvent::Handoff(step)) => Self::handoff(handoff, &step),
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

    fn handoff(mut handoff: SourceHandoff, step: &SourceStep) -> (State, Result<Vec<SourceAction>, Refusal>) {
        let result = handoff.step(step).map(|actions| actions.into_iter().map(SourceAction::Handoff).collect());
        (State::HandingOff(handoff), result)
    }
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::AwaitAccept => "await-accept",
            Self::Precopy(..) => "precopy",
            Self::Pausing(..) => "pausing",
            Self::StopCopy(..) => "stop-copy",
            Self::HandingOff(handoff) => handoff.name(),
            Self::Declined => "declined",
        }
    }

    fn expects(&self) -> &'static str {
        match self {
            Self::AwaitAccept => "ACCEPT",
            Self::Precopy(..) => "the end of the round",
            Self::Pausing(..) => "the pause of every vCPU",
            Self::StopCopy(..) => "the end of stop-and-copy",
            Self::HandingOff(_) => "a step of the handoff",
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
        }
    }
}
