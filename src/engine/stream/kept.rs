//! What was read of a hypervisor and is kept until the other hypervisor has it.

use std::collections::VecDeque;

use bytes::Bytes;

/// A part of what was read.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) bytes: Bytes,
    /// Pages in it as they are.
    pub(super) pages: u64,
}

/// Pieces on their way, in order.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pieces: VecDeque<Piece>,
    /// Of these pieces so many were sent.
    sent: usize,
    read: u64,
    applied: u64,
}

impl Kept {
    pub(super) fn put(&mut self, bytes: Bytes, pages: u64) {
        let offset = self.read;
        self.read += bytes.len() as u64;
        self.pieces.push_back(Piece { offset, bytes, pages });
    }

    /// The next piece to send.
    pub(super) fn next(&mut self) -> Option<Piece> {
        let piece = self.pieces.get(self.sent).cloned();
        self.sent += usize::from(piece.is_some());
        piece
    }

    /// Whether there is another piece to send.
    pub(super) fn has_next(&self) -> bool {
        self.sent < self.pieces.len()
    }

    /// The other hypervisor has so much. False when that cannot be.
    #[must_use]
    pub(super) fn applied(&mut self, bytes: u64) -> bool {
        if bytes < self.applied || bytes > self.read {
            return false;
        }
        // A piece is kept until all of it is there.
        while self.pieces.front().is_some_and(|piece| piece.offset + piece.bytes.len() as u64 <= bytes) {
            self.pieces.pop_front();
            self.sent = self.sent.saturating_sub(1);
        }
        self.applied = bytes;
        true
    }

    /// Everything that is not applied is to be sent again. How many bytes that is of what was sent before.
    pub(super) fn send_again(&mut self) -> u64 {
        let again = self.pieces.iter().take(self.sent).map(|piece| piece.bytes.len() as u64).sum();
        self.sent = 0;
        again
    }

    pub(super) fn read_bytes(&self) -> u64 {
        self.read
    }

    pub(super) fn applied_bytes(&self) -> u64 {
        self.applied
    }

    /// Bytes that were read and are not applied.
    pub(super) fn under_way(&self) -> u64 {
        self.read - self.applied
    }
}
