//! Memory of lanes: what waits to be acknowledged at the sending end, and what came out of order at the receiving end.
//!
//! Windows are limits, and both ends fill them in time: a sender whatever the path is, a receiver when a packet is lost. So
//! all lanes of a gateway in one direction share one amount, and a sender takes no more of it than its path needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::limits;

/// The lanes of one direction.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    lanes: AtomicU64,
}

impl Buffers {
    /// Takes part until the place is dropped.
    pub(super) fn join(self: &Arc<Self>) -> Place {
        self.lanes.fetch_add(1, Ordering::Relaxed);
        Place(Arc::clone(self))
    }
}

/// One lane's part.
#[derive(Debug)]
pub(super) struct Place(Arc<Buffers>);

impl Place {
    /// What the lane may buffer now: its part, and at most `most`.
    pub(super) fn share(&self, most: u32) -> u32 {
        let part = limits::LANE_BUFFERS_BYTES / self.0.lanes.load(Ordering::Relaxed).max(1);
        u32::try_from(part).unwrap_or(u32::MAX).max(limits::LANE_BUFFER_BYTES_MIN).min(most)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.lanes.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a sender needs in its buffer to keep `in_flight` bytes on the way: those, and something to send next. More would only
/// grow old there, and pages are written again meanwhile.
pub(super) fn send_window(in_flight: u64, share: u32) -> u32 {
    let wanted = in_flight.saturating_add(in_flight / 4).saturating_add(NEXT_BYTES);
    u32::try_from(wanted).unwrap_or(u32::MAX).min(share)
}

/// Two or three frames.
const NEXT_BYTES: u64 = 512 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_share_one_amount_and_give_it_back() {
        let buffers = Arc::<Buffers>::default();
        let first = buffers.join();
        assert_eq!(first.share(32 << 20), 32 << 20);
        let others: Vec<_> = (0..199).map(|_| buffers.join()).collect();
        let all = u64::from(first.share(32 << 20)) * 200;
        assert!(all <= limits::LANE_BUFFERS_BYTES, "{all}");
        drop(others);
        assert_eq!(first.share(32 << 20), 32 << 20);
        assert_eq!(first.share(1 << 20), 1 << 20);
    }

    #[test]
    fn a_sender_buffers_little_on_a_slow_path_and_enough_on_a_fast_one() {
        assert!(send_window(64 * 1024, 32 << 20) < 1 << 20);
        // 1 Gbit/s and 150 ms.
        assert!(send_window(18_750_000, 32 << 20) > 20_000_000);
        assert_eq!(send_window(u64::MAX, 4 << 20), 4 << 20);
    }
}
