//! A migration whose hypervisor sends a stream of its own: it decides when its guest is paused, and the same handoff who owns it.
//!
//! Nothing of a stream can be taken back: a hypervisor that has sent a byte goes on behind it, so an outage only delays, and a
//! guest that its hypervisor has stopped goes on where it is by ending the attempt. Disks that move too are mirrored before the stream
//! begins, and settled when the guest stands still. Where only they are to be copied, that is all, and the guest stays: an ABORT ends it.

use crate::migration::handoff::{DestinationHandoff, DestinationRecord, DestinationStep, HandoffAction, OfferRecord, SourceHandoff};
use crate::migration::handoff::{SourceRecord, SourceStep};
use crate::migration::{Refusal, Standing};
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
        Self { state: SourceState::AwaitAccept, lanes: 0, connected: true, disks: false, disks_only: false }
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
        matches!(&self.state, SourceState::HandingOff(handoff) if handoff.is_committed())
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
            (S::HandingOff(handoff), E::Handoff(step)) => Self::handoff(handoff, &step),
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
            (state, _) => {
                let refusal = Refusal { state: state.name(), event: "resumed", expected: "a destination that is where it was" };
                (state, Err(refusal))
            }
        }
    }
}

impl SourceState {
    fn name(&self) -> &'static str {
        match self {
            Self::AwaitAccept => "await-accept",
            Self::Mirroring(_) => "mirroring",
            Self::Flowing(_) => "flowing",
            Self::Settling(_) => "settling",
            Self::Switching(_) => "switching",
            Self::HandingOff(handoff) => handoff.name(),
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

#[cfg(test)]
mod tests {
    use super::super::transitions::{offer, prepared};
    use super::*;

    const DIGEST: FinalDigest = FinalDigest { state: [1; 32], lanes: [2; 32], memory: 3 };

    fn received(step: Handoff, position: u64) -> StreamSourceEvent {
        StreamSourceEvent::Handoff(SourceStep::Received { step, incarnation_same: true, position })
    }

    fn flowing() -> StreamSource {
        let mut source = StreamSource::default();
        let actions = source.step(StreamSourceEvent::Accepted { offer: offer(), lanes: 2 }).unwrap();
        assert!(matches!(
            actions.as_slice(),
            [StreamSourceAction::Handoff(HandoffAction::Journal(SourceRecord::Offer(_))), StreamSourceAction::Begin { lanes: 2 }]
        ));
        source
    }

    fn said_final() -> StreamSource {
        let mut source = flowing();
        assert_eq!(source.step(StreamSourceEvent::Stopped).unwrap(), [StreamSourceAction::GoOn]);
        let actions = source.step(StreamSourceEvent::Finalised(DIGEST)).unwrap();
        assert_eq!(actions, [StreamSourceAction::Handoff(HandoffAction::Send(Handoff::Final { digest: DIGEST, lanes: 2 }))]);
        source
    }

    fn mirroring() -> StreamSource {
        let mut source = StreamSource::with_disks();
        let actions = source.step(StreamSourceEvent::Accepted { offer: offer(), lanes: 2 }).unwrap();
        assert!(matches!(
            actions.as_slice(),
            [StreamSourceAction::Handoff(HandoffAction::Journal(SourceRecord::Offer(_))), StreamSourceAction::Mirror { lanes: 2 }]
        ));
        source
    }

    fn settling() -> StreamSource {
        let mut source = mirroring();
        assert_eq!(source.step(StreamSourceEvent::Mirrored).unwrap(), [StreamSourceAction::Begin { lanes: 2 }]);
        assert_eq!(source.step(StreamSourceEvent::Stopped).unwrap(), [StreamSourceAction::Settle]);
        source
    }

    fn names(actions: &[StreamSourceAction]) -> String {
        format!("{actions:?}")
    }

    #[test]
    fn a_source_goes_through_the_same_handoff() {
        let mut source = said_final();
        let ask = source.step(received(Handoff::Prepared { digest: DIGEST }, 7)).unwrap();
        assert_eq!(ask, [StreamSourceAction::Handoff(HandoffAction::AskCommit)]);
        let commit = source.step(StreamSourceEvent::Handoff(SourceStep::CommitPermitted)).unwrap();
        assert!(names(&commit).contains("Journal(Commit") && source.is_committed());
        assert!(source.step(StreamSourceEvent::GiveUp(ErrorClass::Cancelled)).unwrap().is_empty(), "COMMIT is not taken back");
        let done = names(&source.step(received(Handoff::Running, 8)).unwrap());
        assert!(done.contains("Journal(Done)") && done.contains("Destroy"), "{done}");
    }

    #[test]
    fn nothing_is_final_before_the_hypervisor_has_stopped_its_guest() {
        let mut source = flowing();
        assert!(source.step(StreamSourceEvent::Finalised(DIGEST)).is_err());
        assert!(source.step(received(Handoff::Prepared { digest: DIGEST }, 7)).is_err());
        assert_eq!(source.name(), "flowing");
    }

    #[test]
    fn the_stream_waits_for_the_disks_and_its_end_too() {
        let mut source = mirroring();
        for early in [StreamSourceEvent::Stopped, StreamSourceEvent::Settled, StreamSourceEvent::Finalised(DIGEST)] {
            assert!(source.step(early).is_err());
        }
        let mut source = settling();
        for early in [StreamSourceEvent::Mirrored, StreamSourceEvent::Stopped, StreamSourceEvent::Finalised(DIGEST)] {
            assert!(source.step(early).is_err());
        }
        assert_eq!(source.step(StreamSourceEvent::Settled).unwrap(), [StreamSourceAction::GoOn]);
        // Without disks nothing is awaited of them.
        let mut source = flowing();
        assert!(source.step(StreamSourceEvent::Mirrored).is_err() && source.step(StreamSourceEvent::Settled).is_err());
    }

    #[test]
    fn disks_alone_are_mirrored_and_settled_and_then_the_guest_stays() {
        let alone = || {
            let mut source = StreamSource::disks_only();
            source.step(StreamSourceEvent::Accepted { offer: offer(), lanes: 2 }).unwrap();
            source
        };
        let mut source = alone();
        assert!(source.step(StreamSourceEvent::Stopped).is_err() && source.step(StreamSourceEvent::Settled).is_err());
        assert_eq!(source.step(StreamSourceEvent::Mirrored).unwrap(), [StreamSourceAction::Settle]);
        for early in [StreamSourceEvent::Stopped, StreamSourceEvent::Finalised(DIGEST), received(Handoff::Prepared { digest: DIGEST }, 7)] {
            assert!(source.step(early).is_err());
        }
        let actions = names(&source.step(StreamSourceEvent::Settled).unwrap());
        assert!(actions.contains("Journal(Abort") && actions.contains("Resume") && !actions.contains("Begin"), "{actions}");
        assert_eq!(source.name(), "aborted");
        let actions = names(&alone().step(StreamSourceEvent::GiveUp(ErrorClass::Local)).unwrap());
        assert!(actions.contains("Journal(Abort"), "{actions}");
    }

    #[test]
    fn before_commit_whatever_goes_wrong_wakes_the_guest() {
        let ways: [fn() -> StreamSource; 4] = [flowing, said_final, mirroring, settling];
        for way in ways {
            for event in [
                StreamSourceEvent::GiveUp(ErrorClass::Local),
                received(Handoff::Refuse { class: ErrorClass::Local }, 7),
                StreamSourceEvent::Handoff(SourceStep::Failed),
            ] {
                let mut source = way();
                let actions = names(&source.step(event).unwrap());
                assert!(actions.contains("Journal(Abort") && actions.contains("Resume"), "{actions}");
                assert_eq!(source.name(), "aborted");
            }
        }
    }

    #[test]
    fn an_outage_only_delays() {
        for (mut source, again) in [(flowing(), ""), (mirroring(), ""), (settling(), ""), (said_final(), "Send(Final")] {
            let name = source.name();
            assert_eq!(source.step(StreamSourceEvent::LinkLost).unwrap(), [StreamSourceAction::Reconnect]);
            assert!(source.step(StreamSourceEvent::LinkLost).unwrap().is_empty());
            assert!(names(&source.step(StreamSourceEvent::Resumed(Standing::Receiving)).unwrap()).contains(again));
            assert_eq!(source.name(), name);
        }
        let mut source = StreamSource::default();
        source.step(StreamSourceEvent::LinkLost).unwrap();
        assert_eq!(source.step(StreamSourceEvent::Resumed(Standing::Unknown)).unwrap(), [StreamSourceAction::Offer]);
        assert!(flowing().step(StreamSourceEvent::Resumed(Standing::Deciding)).is_err());
    }

    #[test]
    fn a_guest_that_stops_in_an_outage_is_sent_on_all_the_same() {
        let mut source = flowing();
        source.step(StreamSourceEvent::LinkLost).unwrap();
        assert_eq!(source.step(StreamSourceEvent::Stopped).unwrap(), [StreamSourceAction::GoOn]);
        assert_eq!(source.step(StreamSourceEvent::Resumed(Standing::Receiving)).unwrap(), []);
    }

    #[test]
    fn a_destination_promises_what_it_has_loaded() {
        let mut destination = StreamDestination::default();
        let early = StreamDestinationEvent::Handoff(DestinationStep::TwinComplete(prepared()));
        assert!(destination.step(early.clone()).is_err() && destination.is_receiving());
        assert_eq!(destination.step(StreamDestinationEvent::Final(DIGEST)).unwrap(), [StreamDestinationAction::Load(DIGEST)]);
        assert!(destination.step(StreamDestinationEvent::Final(DIGEST)).is_err());
        assert_eq!(destination.step(early).unwrap(), [StreamDestinationAction::Handoff(HandoffAction::AskCommit)]);
        destination.step(StreamDestinationEvent::Handoff(DestinationStep::CommitPermitted)).unwrap();
        assert!(destination.is_prepared());
        let actions = format!("{:?}", destination.step(StreamDestinationEvent::Resumed).unwrap());
        assert!(actions.contains("Send(Prepared"), "{actions}");
        let commit = DestinationStep::Received(Handoff::Commit { digest: DIGEST });
        let actions = format!("{:?}", destination.step(StreamDestinationEvent::Handoff(commit)).unwrap());
        assert!(actions.contains("Journal(Run), Handoff") || actions.contains("Journal(Run)"), "{actions}");
        assert!(destination.is_running());
    }

    // SPEC: PROTOCOL.md#must-disks-alone
    #[test]
    fn a_destination_of_disks_alone_takes_no_guest() {
        let digest = DIGEST;
        for guest in [
            StreamDestinationEvent::Final(digest),
            StreamDestinationEvent::Handoff(DestinationStep::Received(Handoff::Final { digest, lanes: 1 })),
            StreamDestinationEvent::Handoff(DestinationStep::TwinComplete(prepared())),
            StreamDestinationEvent::Handoff(DestinationStep::CommitPermitted),
            StreamDestinationEvent::Handoff(DestinationStep::Received(Handoff::Commit { digest })),
        ] {
            let mut destination = StreamDestination::disks_only();
            assert!(destination.step(guest).is_err() && destination.is_receiving());
            assert_eq!(destination.step(StreamDestinationEvent::Resumed).unwrap(), []);
            let abort = DestinationStep::Received(Handoff::Abort { class: ErrorClass::Cancelled });
            let actions = format!("{:?}", destination.step(StreamDestinationEvent::Handoff(abort)).unwrap());
            assert!(actions.contains("Journal(Refused)") && actions.contains("Destroy"), "{actions}");
        }
    }

    #[test]
    fn a_destination_that_has_promised_nothing_can_always_refuse() {
        for events in [vec![], vec![StreamDestinationEvent::Final(DIGEST)]] {
            for last in [
                StreamDestinationEvent::GiveUp(ErrorClass::Local),
                StreamDestinationEvent::Handoff(DestinationStep::Received(Handoff::Abort { class: ErrorClass::Cancelled })),
            ] {
                let mut destination = StreamDestination::default();
                events.iter().for_each(|event: &StreamDestinationEvent| drop(destination.step(event.clone()).unwrap()));
                let actions = format!("{:?}", destination.step(last).unwrap());
                assert!(actions.contains("Journal(Refused)") && actions.contains("Destroy"), "{actions}");
            }
        }
    }
}
