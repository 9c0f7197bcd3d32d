//! Evidence: what was decided and done, in a log that shows tampering.
//!
//! *Owns:* the log's directory: entries as canonical JSON lines, each naming the hash of the one before, in segments
//! `audit-<first index>.jsonl`; `checkpoint`, the signed head; `reserve`, 1 MiB for the day the disk is full.
//!
//! *Never:* decides anything; drops an entry silently; records guest bytes, keys or page hashes.
//!
//! ```text
//! record ─┐                      one leader at a time
//! record ─┼─> queue ─> chain ─> segment, fsync ─> checkpoint, fsync, rename, fsync ─> Receipt
//! record ─┘
//! ```
//!
//! *Invariants.*
//! INVARIANT(receipt-is-durable): a [`Receipt`] exists only after its entry and a checkpoint that covers it survive a crash.
//! INVARIANT(signed-prefix): what the checkpoint covers is never changed; what lies behind it was never acknowledged, is at
//! most one commit, and is set aside with a `recovered` entry when the log is opened again, never signed unseen.
//! INVARIANT(failed-stays-failed): after a failed fsync nobody knows what is on disk, so nothing is recorded any more.
//! INVARIANT(heads-grow): a peer's head of which we hold a copy is never followed by a smaller or a different one.
//!
//! What the chain alone cannot show is a log cut back together with its checkpoint; a checkpoint that somebody else
//! kept shows it ([`AuditLog::note_peer_head`], [`VerifyOptions::checkpoint`]).
//!
//! *Read first:* `entry.rs` (a line), `chain.rs` (the hash), `log.rs` (the writer), then `verify.rs`.

mod chain;
mod commit;
mod disk;
mod entry;
mod error;
mod heads;
mod log;
mod note;
mod open;
mod peers;
mod segment;
mod verify;
mod walk;

#[cfg(test)]
mod tests;

pub use entry::{Entry, Event, Outcome, Receipt, StoredEntry};
pub use error::AuditError;
pub use heads::verify_peer_heads;
pub use log::AuditLog;
pub use note::{Checkpoint, Signer};
pub use verify::{Entries, Filter, Verdict, VerifyOptions, VerifyReport, read, verify};
