//! Frames and control messages to bytes and back; the only place that knows the byte layout.
//!
//! *Owns:* the byte layout, specified in `PROTOCOL.md`. *Never:* I/O, async, guest addresses as
//! pointers, allocation of a length that a peer named and nobody bounded.
//! *Read first:* `PROTOCOL.md`, then `control.rs` and `frame.rs`.

mod code;
mod control;

pub use code::ErrorClass;
pub use control::{
    Accept, AuditHead, Compression, CompressionScope, Durability, Failure, Feature, FinalDigest, Handoff, HandoffMessage, Hello, Join,
    LaneTotals, Message, Offer, RoundApplied, RoundEnd, SignedHandoff, StateChunk, StreamTerms,
};
