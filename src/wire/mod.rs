//! Frames and control messages to bytes and back; the only place that knows the byte layout.
//!
//! *Owns:* the byte layout, specified in `PROTOCOL.md`. *Never:* I/O, async, guest addresses as
//! pointers, allocation of a length that a peer named and nobody bounded.
//! *Invariants:* `bounded-decode` (every length is checked against `limits.rs` before anything is
//! allocated or skipped), `no-slack` (bytes after the last field are refused), `one-encoding` (a
//! message has exactly one encoding, so that a signature over it means one thing), `bounded-run` (a
//! run names at least one page and at most `FRAME_PAGES_MAX`).
//! *Read first:* `PROTOCOL.md`, then `control.rs` and `frame.rs`.

#![deny(clippy::indexing_slicing)]

mod code;
mod codec;
mod control;
mod disk;
mod error;
mod frame;
mod negotiate;
mod page;
mod reader;

#[cfg(test)]
mod tests;

#[doc = include_str!("PROTOCOL.md")]
pub mod protocol {}

pub use code::ErrorClass;
pub use codec::{CONTROL_HEADER_BYTES, JOIN_BYTES, decode_control_header};
pub use control::{
    Accept, AuditAnswer, AuditHead, Compression, CompressionScope, DiskApplied, DiskDigests, DiskEnd, DiskHeld, Durability, Failure,
    Feature, FinalDigest, Handoff, HandoffMessage, Hello, Join, LaneStanding, LaneTotals, Message, Offer, Resume, Resumed, RoundApplied,
    RoundEnd, SignedHandoff, StateChunk, StreamApplied, StreamBack, StreamBackApplied, StreamEnd, StreamResumed, StreamTerms,
};
pub use disk::{DiskChange, DiskChunk};
pub use error::WireError;
pub use frame::{FRAME_HEADER_BYTES, FrameHeader, FrameKind, StreamChunk, decode_round_mark, put_round_mark};
pub use negotiate::{DISK_FEATURE, Negotiated, POST_COPY_FEATURE, STREAM_FEATURE, URGENT_FEATURE, VERSION_MAX, VERSION_MIN, negotiate};
pub use page::{After, Batch, Codec, PagesFrame, Record, Records, Run, afters, padded_bytes};
