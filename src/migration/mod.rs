//! The decisions of a migration, as pure machines: events in, actions out.
//!
//! *Owns:* when a round ends, when the guest is paused, what is journaled before what is said and
//! done, and what a journal means after a crash. *Never:* time, files, sockets, memory contents.
//!
//! *Invariants:* `single-runner` (a source that journaled COMMIT never runs the guest again unless
//! the destination's REFUSE came from the journal that was offered it; a destination runs it only
//! after COMMIT), `image-once` (an image is gone for good before its guest runs, so that nobody resumes it when the guest has
//! run past it), `journal-wire-effect` (a record is durable before the message that tells it and
//! before the effect that it permits: actions are performed strictly in order and a failed journal
//! action cuts off those behind it).
//! *Read first:* `handoff.rs`, then `source.rs`, `destination.rs`, `convergence.rs`; `stream.rs` for hypervisors that send by themselves.
//! `transitions.txt` holds every state against every event, as the tests found them.

mod convergence;
mod destination;
mod handoff;
mod source;
mod stream;
#[cfg(test)]
mod transitions;

pub use convergence::{Convergence, Decision, Goal, RoundMeasure, Verdict};
pub use destination::{Destination, DestinationAction, DestinationEvent};
#[cfg(feature = "failpoints")]
pub(crate) use handoff::handoff_name;
pub use handoff::{
    DestinationHandoff, DestinationRecord, DestinationState, DestinationStep, HandoffAction, Holding, OfferRecord, Outcome, PreparedRecord,
    SourceDecision, SourceHandoff, SourceRecord, SourceState, SourceStep,
};
pub use source::{Source, SourceAction, SourceEvent, Standing};
pub use stream::{
    StreamDestination, StreamDestinationAction, StreamDestinationEvent, StreamSource, StreamSourceAction, StreamSourceEvent, split_is_due,
};

/// An event that a machine does not take in its state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unexpected {event} while {state}: expected {expected}")]
pub struct Refusal {
    /// The state, by name.
    pub state: &'static str,
    /// The event, by name.
    pub event: &'static str,
    /// What would have been taken.
    pub expected: &'static str,
}
