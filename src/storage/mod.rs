//! What of a VM lies on disk while it moves: the final image of a paused VM, and the disks that move with it.
//!
//! *Owns:* the file format of an image, its checks, and when it is durable; NBD as bytes (`nbd`); new files for disks (`lay`).
//! *Never:* a hypervisor, a decision about a migration, a retry of a failed fsync, a length from a file that nobody bounded.
//! *Invariants:* `whole-or-none` (under its own name an image is complete and durable, or the one before it, or not
//! there), `checked-before-ram` (no byte of an image reaches guest RAM before its stripe was checked).
//! *Read first:* [`write_image`], then `head.rs`. All calls block; run them off the async threads.
//!
//! One writer for each path at a time; the lock of the journal keeps a second gateway away. The checks find damage
//! and mistakes. They do not stop somebody who may write to the gateway's own directory, except that a caller who has
//! the digest from a signed handoff message gets exactly that device state.

#![deny(clippy::indexing_slicing)]

mod disk;
mod error;
mod head;
mod image;
mod lay;
pub mod nbd;
#[cfg(test)]
mod tests;

pub use error::ImageError;
pub use head::ImageHead;
pub use image::{read_head, remove_image, restore_image, write_image};
pub use lay::{DiskFormat, DiskPlace, LaidDisks, LayError, forget_kept, make_disk};
