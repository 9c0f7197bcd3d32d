//! Evidence: what was decided and done, in a log that shows tampering.
//!
//! *Owns:* the log's directory. `audit-<first index>.jsonl`, the segments: entries as canonical JSON lines, and behind those of each
//! commit a line with the signed checkpoint that covers all entries up to there. Everything that standard tools read is made from
//! them: `checkpoint`, the last head (C2SP tlog-checkpoint), and `tile/`, hashes and entries (C2SP tlog-tiles). `proofs/` has what peers
//! proved of their logs (C2SP tlog-proof); `reserve` is 1 MiB for the day the disk is full.
//!
//! *Never:* decides anything; drops an entry silently; records guest bytes, keys or page hashes.
//!
//! ```text
//! record ─┐                      one leader at a time
//! record ─┼─> queue ─> tree ─> entries and checkpoint: one write, one fsync ─> Receipt ┄> `checkpoint`, tiles
//! record ─┘
//! ```
//!
//! *Invariants.*
//! INVARIANT(receipt-is-durable): a [`Receipt`] exists only after its entry and a checkpoint that covers it survive a crash.
//! INVARIANT(signed-prefix): what a checkpoint covers is never changed; what lies behind the last one was never acknowledged, is at
//! most one commit, and is set aside with a `recovered` entry when the log is opened again, never signed unseen. This takes a file
//! system that keeps of a write a beginning, as all do that journal the length with the data.
//! INVARIANT(failed-stays-failed): after a failed fsync nobody knows what is on disk, so nothing is recorded any more.
//! INVARIANT(heads-grow): a peer's head is kept and cosigned only if it is shown to extend the last one that was kept.
//!
//! What a log cannot show by itself is that it was cut back, or written anew with the stolen key. Peers show it: they keep its heads
//! ([`AuditLog::keep_peer_head`]), and any head kept elsewhere does ([`VerifyOptions::checkpoint`]).
//!
//! *Read first:* `entry.rs` (a line), `tree.rs` (hashes and proofs), `note.rs` (signatures), `walk.rs` (a log, read), `commit.rs` and
//! `log.rs` (the writer), then `peers.rs` and `verify.rs`.

mod commit;
mod disk;
mod entry;
mod error;
mod export;
mod files;
mod keys;
mod log;
mod note;
mod open;
mod peers;
mod proof;
mod prune;
mod read;
mod segment;
mod signatures;
mod tile;
mod tree;
mod verify;
mod walk;
mod witness;

#[cfg(test)]
mod tests;

pub use entry::{Entry, Event, Outcome, Receipt, StoredEntry, canonical_line};
pub use error::AuditError;
pub use export::{ExportFormat, export};
pub use log::AuditLog;
pub use note::{Checkpoint, Signer, is_signed_by_logs};
pub use peers::{Announcement, Answer};
pub use proof::Proof;
pub use read::{Entries, Filter, origin, prove, read};
pub use verify::{Verdict, VerifyOptions, VerifyReport, verify};
