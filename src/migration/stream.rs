//! A migration whose hypervisor sends a stream of its own: it decides when its guest is paused, and the same handoff who owns it.
//!
//! Nothing of a stream can be taken back: a hypervisor that has sent a byte goes on behind it, so an outage only delays, and a
//! guest that its hypervisor has stopped goes on where it is by ending the attempt. Disks that move too are mirrored before the stream
//! begins, and settled when the guest stands still. Where only they are to be copied, that is all, and the guest stays: an ABORT ends it.
//! With post-copy a guest is split: the same handoff is about all of it but pages, and a
//! source that has given it keeps those until the destination lacks none.

#[cfg(test)]
mod tests;

use std::time::Duration;

use crate::migration::handoff::{DestinationHandoff, DestinationRecord, DestinationStep, HandoffAction, OfferRecord, SourceHandoff};
use crate::migration::handoff::{SourceRecord, SourceStep};
use crate::migration::{Refusal, Standing};
use crate::types::Mode;
use crate::wire::{ErrorClass, FinalDigest, Handoff};

/// The source of one stream.
#[derive(Debug)]
pub struct StreamSource {
    state: SourceState,
    lanes: u16,
    /// Whether a session with the destination stands.
    connected: bool,
    /// Whether disks move too.
    disks: bool,
    /// Whether nothing else does.
    disks_only: bool,
    /// Whether the destination was sent a guest that lacks pages, and lacks them still.
    lacking: bool,
}

#[derive(Debug)]
enum SourceState {
    /// The offer is with the destination; nothing is journaled.
    AwaitAccept,
    /// Disks are copied, the guest runs.
    Mirroring(SourceHandoff),
    /// The hypervisor sends, the guest runs.
    Flowing(SourceHandoff),
    /// The guest stands still, unless it stays; what its disks owe is on its way.
    Settling(SourceHandoff),
    /// The guest stands still; the rest of it is on its way.
    Switching(SourceHandoff),
    /// The handoff decides.
    HandingOff(SourceHandoff),
    /// The guest runs at the destination, as this step says, and lacks pages that are here.
    Serving(SourceHandoff, SourceStep),
    /// Ended before anything was journaled: the guest never noticed.
    Declined,
}

/// What happens to the source of a stream.
#[derive(Debug, Clone)]
pub enum StreamSourceEvent {
    /// The destination accepts.
    Accepted {
        /// What is journaled before anything else is done.
        offer: Box<OfferRecord>,
        /// Lanes granted.
        lanes: u16,
    },
    /// Disks are equal at both ends, and are kept so.
    Mirrored,
    /// The hypervisor has paused its guest and waits.
    Stopped,
    /// Disks are equal at both ends, and nothing changes them any more.
    Settled,
    /// The hypervisor has sent all of its guest, which does not run by itself any more.
    Finalised(FinalDigest),
    /// The hypervisor has sent all of its guest but pages, and the guest does not run by itself any more.
    Split(FinalDigest),
    /// The destination lacks no page.
    Emptied,
    /// Something for the handoff.
    Handoff(SourceStep),
    /// Give up if that is still possible.
    GiveUp(ErrorClass),
    /// The session or a lane is gone, and nobody meant it.
    LinkLost,
    /// A new session stands.
    Resumed(Standing),
}

/// What the source of a stream does; performed strictly in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamSourceAction {
    /// Offer the VM.
    Offer,
    /// Open this many lanes where they are not, and let the hypervisor send.
    Begin {
        /// Lanes granted.
        lanes: u16,
    },
    /// Open this many lanes, let the hypervisor copy its disks, and feed `Mirrored`.
    Mirror {
        /// Lanes granted.
        lanes: u16,
    },
    /// End the copying of disks, and feed `Settled`.
    Settle,
    /// Let the hypervisor send the rest of its paused guest.
    GoOn,
    /// Look for the destination until it answers, and feed `Resumed`; or `GiveUp` when that takes too long.
    Reconnect,
    /// Part of the handoff.
    Handoff(HandoffAction<SourceRecord>),
}

type SourceTurn = (SourceState, Result<Vec<StreamSourceAction>, Refusal>);

impl Default for StreamSource {
    fn default() -> Self {
        Self { state: SourceState::AwaitAccept, lanes: 0, connected: true, disks: false, disks_only: false, lacking: false }
    }
}

impl StreamSource {
    /// The source of one stream, and of disks.
    #[must_use]
    pub fn with_disks() -> Self {
        Self { disks: true, ..Self::default() }
    }

    /// The source of disks, whose guest stays.
    #[must_use]
    pub fn disks_only() -> Self {
        Self { disks_only: true, ..Self::with_disks() }
    }

    /// The state by name, for logs and people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.state.name()
    }

    /// Whether only the destination's word can end it: after COMMIT.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        match &self.state {
            SourceState::HandingOff(handoff) => handoff.is_committed(),
            SourceState::Serving(..) => true,
            _ => false,
        }
    }

    /// Whether the guest runs at the destination and lacks pages that are here.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        matches!(self.state, SourceState::Serving(..))
    }

    /// One step.
    ///
    /// # Errors
    /// [`Refusal`] when the event has no place in this state; the state is then unchanged.
    pub fn step(&mut self, event: StreamSourceEvent) -> Result<Vec<StreamSourceAction>, Refusal> {
        let state = std::mem::replace(&mut self.state, SourceState::Declined);
        let (next, result) = self.turn(state, event);
        self.state = next;
        result
    }

    fn turn(&mut self, state: SourceState, event: StreamSourceEvent) -> SourceTurn {
        use {SourceState as S, StreamSourceEvent as E};
        match (state, event) {
            (S::AwaitAccept, E::Accepted { offer, lanes }) => {
                self.lanes = lanes;
                let handoff = SourceHandoff::new(offer.durability);
                let journal = StreamSourceAction::Handoff(HandoffAction::Journal(SourceRecord::Offer(offer)));
                if self.disks {
                    return (S::Mirroring(handoff), Ok(vec![journal, StreamSourceAction::Mirror { lanes }]));
                }
                (S::Flowing(handoff), Ok(vec![journal, StreamSourceAction::Begin { lanes }]))
            }
            (S::Mirroring(handoff), E::Mirrored) if self.disks_only => (S::Settling(handoff), Ok(vec![StreamSourceAction::Settle])),
            // As somebody who asks to stop would have it: what came is kept there.
            (S::Settling(handoff), E::Settled) if self.disks_only => Self::handoff(handoff, &SourceStep::GiveUp(ErrorClass::Cancelled)),
            (S::Mirroring(handoff), E::Mirrored) => (S::Flowing(handoff), Ok(vec![StreamSourceAction::Begin { lanes: self.lanes }])),
            (S::AwaitAccept, E::GiveUp(_)) => (S::Declined, Ok(vec![])),
            (S::Flowing(handoff), E::Stopped) if self.disks => (S::Settling(handoff), Ok(vec![StreamSourceAction::Settle])),
            (S::Settling(handoff), E::Settled) => (S::Switching(handoff), Ok(vec![StreamSourceAction::GoOn])),
            (S::Flowing(handoff), E::Stopped) => (S::Switching(handoff), Ok(vec![StreamSourceAction::GoOn])),
            (S::Switching(handoff), E::Split(digest)) => {
                self.lacking = true;
                Self::handoff(handoff, &SourceStep::Finalised { digest, lanes: self.lanes })
            }
            (S::Switching(handoff), E::Finalised(digest)) => Self::handoff(handoff, &SourceStep::Finalised { digest, lanes: self.lanes }),
            (
                S::Mirroring(handoff) | S::Flowing(handoff) | S::Settling(handoff) | S::Switching(handoff) | S::HandingOff(handoff),
                E::GiveUp(class),
            ) => Self::handoff(handoff, &SourceStep::GiveUp(class)),
            // Before FINAL the destination has only one thing to say: that it refuses.
            (
                S::Mirroring(handoff) | S::Flowing(handoff) | S::Settling(handoff) | S::Switching(handoff),
                E::Handoff(step @ (SourceStep::Received { step: Handoff::Refuse { .. }, .. } | SourceStep::Failed)),
            ) => Self::handoff(handoff, &step),
            // INVARIANT(served-first): nothing ends here, and nothing is destroyed, before the guest has all that it needs.
            (S::HandingOff(handoff), E::Handoff(step)) if self.lacking && handoff.is_committed() && is_running(&step) => {
                (S::Serving(handoff, step), Ok(vec![]))
            }
            (S::HandingOff(handoff), E::Handoff(step)) => Self::handoff(handoff, &step),
            (S::Serving(handoff, step), E::Emptied) => Self::handoff(handoff, &step),
            (state @ S::HandingOff(_), E::Emptied) if self.lacking => {
                self.lacking = false;
                (state, Ok(vec![]))
            }
            // Whose the guest is was decided.
            (state @ S::Serving(..), E::Handoff(_) | E::GiveUp(_)) => (state, Ok(vec![])),
            (state, E::LinkLost) => {
                let known = !std::mem::replace(&mut self.connected, false);
                let waits = known || matches!(state, S::Declined);
                (state, Ok(if waits { vec![] } else { vec![StreamSourceAction::Reconnect] }))
            }
            (state, E::Resumed(standing)) => self.resumed(state, standing),
            (state, event) => {
                let refusal = Refusal { state: state.name(), event: event.name(), expected: state.expects() };
                (state, Err(refusal))
            }
        }
    }

    fn handoff(mut handoff: SourceHandoff, step: &SourceStep) -> SourceTurn {
        let result = handoff.step(step).map(|actions| actions.into_iter().map(StreamSourceAction::Handoff).collect());
        (SourceState::HandingOff(handoff), result)
    }

    /// What had not arrived of the stream goes out again below this machine; FINAL is said again here.
    fn resumed(&mut self, state: SourceState, standing: Standing) -> SourceTurn {
        use SourceState as S;
        self.connected = true;
        match (state, standing) {
            (S::AwaitAccept, Standing::Unknown) => (S::AwaitAccept, Ok(vec![StreamSourceAction::Offer])),
            (state @ (S::Mirroring(_) | S::Flowing(_) | S::Settling(_) | S::Switching(_)), Standing::Receiving) => (state, Ok(vec![])),
            (S::HandingOff(handoff), Standing::Receiving) if handoff.awaits_prepared() => Self::handoff(handoff, &SourceStep::Reconnected),
            (S::HandingOff(handoff), Standing::Deciding) => Self::handoff(handoff, &SourceStep::Reconnected),
            (state @ S::Serving(..), Standing::Deciding) => (state, Ok(vec![])),
            (state, _) => {
                let refusal = Refusal { state: state.name(), event: "resumed", expected: "a destination that is where it was" };
                (state, Err(refusal))
            }
        }
    }
}

/// RUNNING of the destination that was given the guest.
fn is_running(step: &SourceStep) -> bool {
    matches!(step, SourceStep::Received { step: Handoff::Running, incarnation_same: true, .. })
}

/// Whether a guest that runs is split now: where that is wanted at once, and where passes have not brought the end closer, or half of the time is over.
#[must_use]
pub fn split_is_due(mode: Mode, passes: u32, elapsed: Duration, timeout: Option<Duration>) -> bool {
    let late = timeout.is_some_and(|timeout| elapsed > timeout / 2);
    match mode {
        Mode::Precopy => false,
        Mode::Postcopy => true,
        Mode::Hybrid => passes > HYBRID_PASSES || late,
    }
}

/// WHY: the first sends everything, the second what changed meanwhile; what that leaves a third changes hardly.
const HYBRID_PASSES: u32 = 2;

impl SourceState {
    fn name(&self) -> &'static str {
        match self {
            Self::AwaitAccept => "await-accept",
            Self::Mirroring(_) => "mirroring",
            Self::Flowing(_) => "flowing",
            Self::Settling(_) => "settling",
            Self::Switching(_) => "switching",
            Self::HandingOff(handoff) => handoff.name(),
            Self::Serving(..) => "serving",
            Self::Declined => "declined",
        }
    }

    fn expects(&self) -> &'static str {
        match self {
            Self::AwaitAccept => "ACCEPT",
            Self::Mirroring(_) => "disks that are equal",
            Self::Flowing(_) => "the pause of the guest",
            Self::Settling(_) => "disks that change no more",
            Self::Switching(_) => "the end of the stream",
            Self::HandingOff(_) => "a step of the handoff",
            Self::Serving(..) => "a destination that lacks nothing",
            Self::Declined => "nothing: the migration has ended",
        }
    }
}

impl StreamSourceEvent {
    /// The event by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Accepted { .. } => "accepted",
            Self::Mirrored => "mirrored",
            Self::Stopped => "stopped",
            Self::Settled => "settled",
            Self::Finalised(_) => "finalised",
            Self::Split(_) => "split",
            Self::Emptied => "emptied",
            Self::Handoff(step) => step.name(),
            Self::GiveUp(_) => "give-up",
            Self::LinkLost => "link-lost",
            Self::Resumed(_) => "resumed",
        }
    }
}

/// The destination of one stream.
#[derive(Debug)]
pub struct StreamDestination {
    state: DestinationState,
}

#[derive(Debug)]
enum DestinationState {
    /// The stream comes.
    Receiving,
    /// Disks come, and nothing else will.
    Copying,
    /// All of it came, and FINAL; the hypervisor loads it.
    Loading,
    /// The handoff decides.
    HandingOff(DestinationHandoff),
}

/// What happens to the destination of a stream.
#[derive(Debug, Clone)]
pub enum StreamDestinationEvent {
    /// All of the stream is with the hypervisor, and FINAL says what it was.
    Final(FinalDigest),
    /// The source is back in a new session.
    Resumed,
    /// Something for the handoff.
    Handoff(DestinationStep),
    /// Give up if that is still possible.
    GiveUp(ErrorClass),
}

/// What the destination of a stream does; performed strictly in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamDestinationAction {
    /// Wait until the guest is loaded and paused, compare the stream with this digest, and feed `TwinComplete` or `GiveUp`.
    Load(FinalDigest),
    /// Part of the handoff.
    Handoff(HandoffAction<DestinationRecord>),
}

type DestinationTurn = (DestinationState, Result<Vec<StreamDestinationAction>, Refusal>);

impl Default for StreamDestination {
    fn default() -> Self {
        Self { state: DestinationState::Receiving }
    }
}

impl StreamDestination {
    /// The state by name, for logs and people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.state.name()
    }

    /// The destination of disks, whose guest stays at the source. `INVARIANT(disks-alone)`
    #[must_use]
    pub fn disks_only() -> Self {
        Self { state: DestinationState::Copying }
    }

    /// Whether more of the stream, or of disks, is taken.
    #[must_use]
    pub fn is_receiving(&self) -> bool {
        matches!(self.state, DestinationState::Receiving | DestinationState::Copying)
    }

    /// Whether only the source's word can end it: after PREPARED.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        matches!(&self.state, DestinationState::HandingOff(handoff) if handoff.is_prepared())
    }

    /// Whether RUN is journaled and DONE is awaited.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.name() == "running"
    }

    /// One step.
    ///
    /// # Errors
    /// [`Refusal`] when the event has no place in this state; the state is then unchanged.
    pub fn step(&mut self, event: StreamDestinationEvent) -> Result<Vec<StreamDestinationAction>, Refusal> {
        let state = std::mem::replace(&mut self.state, DestinationState::Loading);
        let (next, result) = Self::turn(state, event);
        self.state = next;
        result
    }

    fn turn(state: DestinationState, event: StreamDestinationEvent) -> DestinationTurn {
        use {DestinationState as S, StreamDestinationEvent as E};
        match (state, event) {
            (S::Receiving, E::Final(digest)) => (S::Loading, Ok(vec![StreamDestinationAction::Load(digest)])),
            (S::Loading, E::Handoff(step @ DestinationStep::TwinComplete(_))) => Self::handoff(DestinationHandoff::default(), &step),
            (S::Receiving | S::Copying | S::Loading, E::GiveUp(class)) => {
                Self::handoff(DestinationHandoff::default(), &DestinationStep::GiveUp(class))
            }
            (S::Receiving | S::Copying | S::Loading, E::Handoff(step @ DestinationStep::Received(Handoff::Abort { .. }))) => {
                Self::handoff(DestinationHandoff::default(), &step)
            }
            (state @ (S::Receiving | S::Copying | S::Loading), E::Resumed) => (state, Ok(vec![])),
            (S::HandingOff(handoff), E::Resumed) => Self::handoff(handoff, &DestinationStep::Reconnected),
            (S::HandingOff(handoff), E::GiveUp(class)) => Self::handoff(handoff, &DestinationStep::GiveUp(class)),
            (S::HandingOff(handoff), E::Handoff(step)) => Self::handoff(handoff, &step),
            (state, event) => {
                let refusal = Refusal { state: state.name(), event: event.name(), expected: state.expects() };
                (state, Err(refusal))
            }
        }
    }

    fn handoff(mut handoff: DestinationHandoff, step: &DestinationStep) -> DestinationTurn {
        let result = handoff.step(step).map(|actions| actions.into_iter().map(StreamDestinationAction::Handoff).collect());
        (DestinationState::HandingOff(handoff), result)
    }
}

impl DestinationState {
    fn name(&self) -> &'static str {
        match self {
            Self::Receiving => "receiving",
            Self::Copying => "copying",
            Self::Loading => "loading",
            Self::HandingOff(handoff) => handoff.name(),
        }
    }

    fn expects(&self) -> &'static str {
        match self {
            Self::Receiving => "the end of the stream, or ABORT",
            Self::Copying => "disks, and then ABORT",
            Self::Loading => "the end of loading, or ABORT",
            Self::HandingOff(_) => "a step of the handoff",
        }
    }
}

impl StreamDestinationEvent {
    /// The event by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Final(_) => "FINAL",
            Self::Resumed => "resumed",
            Self::Handoff(step) => step.name(),
            Self::GiveUp(_) => "give-up",
        }
    }
}
