//! A hypervisor's own stream, understood and made smaller: from its bytes to parcels, and from parcels to the same bytes.
//!
//! *Owns:* what of a stream is framing and what is pages, what is refused in it, and the parcels that lanes carry instead.
//! *Never:* I/O, async, a byte of the stream that is changed: what comes out is what went in.
//!
//! ```text
//! several channels ─> Gather ─> stream
//! stream ─> Walk ─> Condenser ─> parcels ═══> Expander ─> Walk ─> stream
//!                      Past                      Past
//! what is asked for <─ BackWalk <──────────── BackWalk <─ what the other hypervisor writes
//! pages that are waited for ─> UrgentWalk ═══> UrgentWalk ─> Splice, with the rest of the stream ─> stream
//! ```
//!
//! *Invariants:* `one-past` (both ends remember the same pages at the same place of the stream, because the parcels alone
//! decide what is remembered), `walked-first` (no byte leaves an end before that end has walked over it), `past-bound` (what is remembered has a
//! fixed size, which a peer cannot name beyond its limit), `whole-tail` (device sections leave together, once all of them are there
//! and are those that the stream itself lists).
//! *Read first:* `walk.rs`, `parcel.rs`, `past.rs`, `condenser.rs`, `expander.rs`, `tail.rs`, `back.rs`, `gather.rs`, `splice.rs`.

mod back;
mod condenser;
mod digest;
mod expander;
mod gather;
mod look;
mod parcel;
mod past;
mod sections;
mod splice;
mod tail;
mod walk;

#[cfg(test)]
mod tests;

pub use back::{AgainWalk, BackWalk, FOLLOWED_BYTES_MAX, Follow};
pub use condenser::{Condenser, PAST_KEY_BYTES, Split};
pub use digest::StreamDigest;
pub use expander::Expander;
pub use gather::Gather;
pub use parcel::Parcel;
pub use splice::{Splice, URGENT_END, UrgentWalk};
pub use walk::{Expected, Grammar, RamBlock};

use crate::wire::ErrorClass;

/// A stream, or what stands for one, that is not what it has to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at} of the hypervisor's stream: expected {expected}, got {got}")]
pub struct Unsound {
    /// Where in the stream, or in its device sections.
    pub at: u64,
    /// What belongs there.
    pub expected: &'static str,
    /// What is there, printable.
    pub got: String,
}

impl Unsound {
    /// Whose fault it is, where the stream came from a peer.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        ErrorClass::PeerMisbehaved
    }
}
