//! Lanes of one session share a path, and the slowest of them decides when a round of pages ends. So they tell each other
//! their rates, and each goes for the mean.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::limits;
use crate::types::LaneIndex;

/// The rates of a session's lanes, in bytes per second; zero for a lane that is not there or has too little to send.
#[derive(Debug, Default)]
pub(in crate::transport) struct Group([AtomicU64; limits::LANES_MAX as usize]);

impl Group {
    pub(in crate::transport) fn join(self: &Arc<Self>, lane: LaneIndex) -> Member {
        Member { group: Arc::clone(self), lane: lane.0.into() }
    }
}

/// One lane of it, until this is dropped.
#[derive(Debug)]
pub(in crate::transport) struct Member {
    group: Arc<Group>,
    lane: usize,
}

impl Member {
    pub(super) fn tell(&self, rate: u64) {
        if let Some(slot) = self.group.0.get(self.lane) {
            slot.store(rate, Ordering::Relaxed);
        }
    }

    /// The mean of all lanes, but near enough to `own` that a lane whose path is another one does no harm there.
    pub(super) fn fair(&self, own: u64) -> u64 {
        let rates = self.group.0.iter().map(|slot| slot.load(Ordering::Relaxed)).filter(|rate| *rate > 0);
        let (sum, count) = rates.fold((0_u64, 0_u64), |(sum, count), rate| (sum.saturating_add(rate), count + 1));
        let mean = sum.checked_div(count).unwrap_or(own);
        mean.clamp(own / 5 * 4, own.saturating_add(own / 2))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.tell(0);
    }
}
