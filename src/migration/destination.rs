//! The destination of one migration, from the accepted offer to the end.

use crate::migration::Refusal;
use crate::migration::handoff::{DestinationHandoff, DestinationRecord, DestinationStep, HandoffAction};
use crate::types::Round;
use crate::wire::{ErrorClass, FinalDigest, Handoff};

/// The destination of one migration.
#[derive(Debug)]
pub struct Destination {
    state: State,
}

#[derive(Debug)]
enum State {
    /// Pages of this round are arriving.
    Receiving(Round),
    /// The last round is in RAM; the rest of the state and FINAL are awaited. A source that lost its link may have let its
    /// guest go on; then this was not the last round.
    AwaitFinal(Round),
    /// FINAL came; the twin is being restored and compared.
    Comparing,
    /// The handoff decides.
    HandingOff(DestinationHandoff),
}

/// What happens to a destination.
#[derive(Debug, Clone)]
pub enum DestinationEvent {
    /// The source says that a round is complete, and every lane agrees.
    RoundComplete {
        /// The round.
        round: Round,
        /// Whether the guest was paused before its pages were read.
        last: bool,
    },
    /// FINAL came.
    Final(FinalDigest),
    /// The source is back in a new session, and this was its last round in flight. What was not applied of it comes again.
    Resumed {
        /// The round.
        round: Round,
    },
    /// Something for the handoff.
    Handoff(DestinationStep),
    /// Give up if that is still possible.
    GiveUp(ErrorClass),
}

/// What a destination does; performed strictly in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationAction {
    /// Say that a round is in guest RAM.
    ConfirmRound(Round),
    /// Restore the state, compare with this digest, and feed `TwinComplete` or `GiveUp`.
    Compare(FinalDigest),
    /// Part of the handoff.
    Handoff(HandoffAction<DestinationRecord>),
}

impl Default for Destination {
    fn default() -> Self {
        Self { state: State::Receiving(Round(1)) }
    }
}

impl Destination {
    /// A destination whose gateway was started anew while pages came; the source was at `round`, which is over.
    #[must_use]
    pub fn after_restart(round: Round) -> Self {
        Self { state: State::Receiving(Round(round.0.saturating_add(1))) }
    }

    /// The state by name, for logs and people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.state.name()
    }

    /// Whether nothing of the VM has come yet.
    #[must_use]
    pub fn has_nothing(&self) -> bool {
        matches!(self.state, State::Receiving(Round(1)))
    }

    /// Whether pages are still taken.
    #[must_use]
    pub fn is_receiving(&self) -> bool {
        matches!(self.state, State::Receiving(_) | State::AwaitFinal(_))
    }

    /// Whether only the source's word can end it: after PREPARED.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        matches!(&self.state, State::HandingOff(handoff) if handoff.is_prepared())
    }

    /// One step.
    ///
    /// # Errors
    /// [`Refusal`] when the event has no place in this state; the state is then unchanged.
    pub fn step(&mut self, event: DestinationEvent) -> Result<Vec<DestinationAction>, Refusal> {
        let state = std::mem::replace(&mut self.state, State::Comparing);
        let (next, result) = Self::turn(state, event);
        self.state = next;
        result
    }

    fn turn(state: State, event: DestinationEvent) -> (State, Result<Vec<DestinationAction>, Refusal>) {
        match (state, event) {
            (State::Receiving(expected), DestinationEvent::RoundComplete { round, last }) if round == expected => {
                let next = if last { State::AwaitFinal(round) } else { State::Receiving(Round(round.0 + 1)) };
                (next, Ok(vec![DestinationAction::ConfirmRound(round)]))
            }
            (State::AwaitFinal(_), DestinationEvent::Final(digest)) => (State::Comparing, Ok(vec![DestinationAction::Compare(digest)])),
            (State::Comparing, DestinationEvent::Handoff(step @ DestinationStep::TwinComplete(_))) => {
                Self::handoff(DestinationHandoff::default(), &step)
            }
            (State::Receiving(_) | State::AwaitFinal(_) | State::Comparing, DestinationEvent::GiveUp(class)) => {
                Self::handoff(DestinationHandoff::default(), &DestinationStep::GiveUp(class))
            }
            (
                State::Receiving(_) | State::AwaitFinal(_) | State::Comparing,
                DestinationEvent::Handoff(step @ DestinationStep::Received(Handoff::Abort { .. })),
            ) => Self::handoff(DestinationHandoff::default(), &step),
            // The round in flight is over, whatever came of it; its confirmation may be what was lost.
            (State::Receiving(expected), DestinationEvent::Resumed { round })
                if round == expected || round.0.checked_add(1) == Some(expected.0) =>
            {
                (State::Receiving(Round(round.0.saturating_add(1))), Ok(vec![]))
            }
            (State::AwaitFinal(last), DestinationEvent::Resumed { round }) if round == last => {
                (State::Receiving(Round(round.0.saturating_add(1))), Ok(vec![]))
            }
            (State::Comparing, DestinationEvent::Resumed { .. }) => (State::Comparing, Ok(vec![])),
            (State::HandingOff(handoff), DestinationEvent::Resumed { .. }) => Self::handoff(handoff, &DestinationStep::Reconnected),
            (State::HandingOff(handoff), DestinationEvent::GiveUp(class)) => Self::handoff(handoff, &DestinationStep::GiveUp(class)),
            (State::HandingOff(handoff), DestinationEvent::Handoff(step)) => Self::handoff(handoff, &step),
            (state, event) => {
                let refusal = Refusal { state: state.name(), event: event.name(), expected: state.expects() };
                (state, Err(refusal))
            }
        }
    }

    fn handoff(mut handoff: DestinationHandoff, step: &DestinationStep) -> (State, Result<Vec<DestinationAction>, Refusal>) {
        let result = handoff.step(step).map(|actions| actions.into_iter().map(DestinationAction::Handoff).collect());
        (State::HandingOff(handoff), result)
    }
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Receiving(_) => "receiving",
            Self::AwaitFinal(_) => "await-final",
            Self::Comparing => "comparing",
            Self::HandingOff(handoff) => handoff.name(),
        }
    }

    fn expects(&self) -> &'static str {
        match self {
            Self::Receiving(_) => "the end of this round, or ABORT",
            Self::AwaitFinal(_) => "FINAL or ABORT",
            Self::Comparing => "the end of the comparison",
            Self::HandingOff(_) => "a step of the handoff",
        }
    }
}

impl DestinationEvent {
    /// The event by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::RoundComplete { .. } => "round-complete",
            Self::Final(_) => "FINAL",
            Self::Resumed { .. } => "resumed",
            Self::Handoff(step) => step.name(),
            Self::GiveUp(_) => "give-up",
        }
    }
}
