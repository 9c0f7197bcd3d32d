//! Buffers of frames, used again once QUIC has had them acknowledged, or the hypervisor has them: fresh ones would be mapped, cleared and unmapped each time.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::limits;
use crate::wire::FRAME_HEADER_BYTES;

/// Buffers of one migration's lanes.
#[derive(Debug, Clone, Default)]
pub(super) struct Frames(Arc<Mutex<Vec<Vec<u8>>>>);

/// WHY: more than that wait only on a path that is long and fast, and there a buffer is cheap beside the wait.
const IDLE_MAX: usize = 8;

impl Frames {
    /// An empty buffer with room for a frame.
    pub(super) fn take(&self) -> Vec<u8> {
        let mut frame = self.idle();
        frame.clear();
        frame
    }

    /// A buffer of so many bytes, to be overwritten: they are what was there before.
    pub(super) fn take_filled(&self, bytes: usize) -> Vec<u8> {
        let mut frame = self.idle();
        // Only what is longer than before is cleared.
        frame.resize(bytes, 0);
        frame
    }

    fn idle(&self) -> Vec<u8> {
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(|| Vec::with_capacity(FRAME_HEADER_BYTES + limits::FRAME_BODY_BYTES_MAX))
    }

    pub(super) fn give_back(&self, frame: Vec<u8>) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(frame);
        }
    }

    /// The frame, which comes back by itself when nobody needs it any more.
    pub(super) fn lend(&self, frame: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { frame, frames: self.clone() })
    }
}

struct Lent {
    frame: Vec<u8>,
    frames: Frames,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.frame
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.frames.give_back(std::mem::take(&mut self.frame));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_empty_when_its_frame_is_done_with() {
        let frames = Frames::default();
        let mut frame = frames.take();
        frame.extend([1, 2, 3]);
        let lent = frames.lend(frame);
        assert_eq!(&lent[..], [1, 2, 3]);
        let part = lent.slice(1..);
        drop(lent);
        let idle = || frames.0.lock().unwrap().len();
        assert_eq!(idle(), 0, "a part of it is still needed");
        drop(part);
        assert_eq!(idle(), 1);
        let again = frames.take();
        assert!(again.is_empty() && again.capacity() >= limits::FRAME_BODY_BYTES_MAX);
        drop(frames.lend(again));
        assert_eq!(frames.take_filled(5).len(), 5);
    }
}
