//! What a VMM implements to be attached to.

use std::fs::File;

use crate::hypervisor::{GuestStatus, Machine};
use crate::memory::PageSet;

/// Why a VMM does not do what a gateway asks, in words for people. Made from any error by `?`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(String);

impl Refusal {
    /// A refusal with these words. No guest memory or state in them.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }

    /// The words.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.0
    }
}

impl<E: std::error::Error> From<E> for Refusal {
    fn from(error: E) -> Self {
        let mut reason = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        Self(reason)
    }
}

/// What a VMM provides to be attached to. The server checks order (`harvest` only while tracking,
/// `restore-state` only into a prepared twin, ...) before it calls, and never calls two methods at once.
pub trait AttachedGuest: Send {
    /// What the guest is made of. Asked of a running guest and of a prepared twin.
    ///
    /// # Errors
    /// The VMM cannot describe it.
    fn machine(&self) -> Result<Machine, Refusal>;
    /// The guest's memory file, as [`memory_file`](super::memory_file) makes it.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    fn memory(&self) -> Result<File, Refusal>;
    /// From now on every written page is recorded.
    ///
    /// # Errors
    /// The VMM cannot track.
    fn start_tracking(&mut self) -> Result<(), Refusal>;
    /// Pages written since the last harvest; the record starts anew.
    ///
    /// # Errors
    /// The record is lost: the gateway takes every page for dirty.
    fn harvest(&mut self) -> Result<PageSet, Refusal>;
    /// Recording ends.
    ///
    /// # Errors
    /// The VMM cannot say that it did.
    fn stop_tracking(&mut self) -> Result<(), Refusal>;
    /// Takes `percent` (0 to 99) of vCPU time away from the guest.
    ///
    /// # Errors
    /// The VMM cannot throttle.
    fn throttle(&mut self, percent: u8) -> Result<(), Refusal>;
    /// Stops every vCPU between two instructions. Idempotent.
    ///
    /// # Errors
    /// A vCPU does not stop; all of them run on.
    fn pause(&mut self) -> Result<(), Refusal>;
    /// Lets vCPUs go on. Idempotent. The first time after `restore_state` it raises the disruption counter before any vCPU
    /// runs; at no other time does it change the generation.
    ///
    /// # Errors
    /// A vCPU cannot go on.
    fn resume(&mut self) -> Result<(), Refusal>;
    /// Gives the paused guest a new generation id and raises its generation counter ([`Generation::renewed`]); the guest can
    /// read both before it executes anything. Pages that this writes are dirty.
    ///
    /// [`Generation::renewed`]: crate::hypervisor::Generation::renewed
    ///
    /// # Errors
    /// The VMM cannot: its gateway will not resume the guest.
    fn renew(&mut self) -> Result<(), Refusal>;
    /// All vCPU and device state of the paused guest, and its generation; saving twice gives the same bytes.
    ///
    /// # Errors
    /// A part cannot be read.
    fn save_state(&mut self) -> Result<Vec<u8>, Refusal>;
    /// Builds an empty twin of `machine` and returns its memory file.
    ///
    /// # Errors
    /// One line for each thing this host lacks; nothing was built.
    fn prepare(&mut self, machine: &Machine) -> Result<File, Vec<String>>;
    /// Checks all of `state`, then applies it. The guest is [`RunState::Paused`](crate::hypervisor::RunState::Paused) from then on.
    ///
    /// # Errors
    /// The state is malformed or does not fit; nothing was applied.
    fn restore_state(&mut self, state: &[u8]) -> Result<(), Refusal>;
    /// How the guest is. [`RunState::Incoming`](crate::hypervisor::RunState::Incoming) until state was restored.
    fn status(&mut self) -> GuestStatus;
    /// Ends the guest and frees its memory; [`serve`](super::serve) returns after the answer is sent.
    fn quit(&mut self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_tells_the_whole_chain_of_causes() {
        let error = super::super::wire::WireError::Io(std::io::Error::other("why"));
        assert_eq!(Refusal::from(error).reason(), "the connection failed: why");
    }
}
