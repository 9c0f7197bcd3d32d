//! What migrations to one peer that run at the same time find out together of the path to it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::engine::processors::Busy;
use crate::memory::{Adaptation, FrameSent};
use crate::transport::LinkStats;
use crate::types::SpiffeId;

/// A path, as the lanes of all migrations on it see it.
#[derive(Debug)]
pub struct CommonPath {
    /// Bytes of frames that lanes have handed over.
    sent: AtomicU64,
    /// The shortest round trip, microseconds.
    round_trip: AtomicU64,
    /// What the lane that has learned last makes of it.
    learned: Mutex<Option<Adaptation>>,
    busy: Mutex<Option<Busy>>,
}

impl Default for CommonPath {
    fn default() -> Self {
        Self { sent: AtomicU64::new(0), round_trip: AtomicU64::new(u64::MAX), learned: Mutex::default(), busy: Mutex::default() }
    }
}

impl CommonPath {
    pub(super) fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn sent_bytes(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// The shortest round trip until now: where processors are short, a lane measures for how long it has waited for one.
    pub(super) fn round_trip(&self, stats: &LinkStats) -> Duration {
        let micros = u64::try_from(stats.rtt.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.round_trip.fetch_min(micros, Ordering::Relaxed).min(micros))
    }

    /// For a new lane, which goes on from where the others are.
    pub(super) fn adaptation(&self, stats: &LinkStats) -> Adaptation {
        let round_trip = self.round_trip(stats);
        let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner).clone();
        learned.map_or_else(|| Adaptation::new(round_trip, self.sent_bytes()), |other| other.begun_anew(self.sent_bytes()))
    }

    /// Has a lane learn from a frame that it has sent, of which it knows all but what the path is like.
    pub(super) fn adapt(&self, lane: &mut Adaptation, frame: FrameSent, stats: &LinkStats) {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().lately();
        let (path, round_trip, all_sent) = (stats.path_rate(), self.round_trip(stats), self.sent_bytes());
        if lane.sent(&FrameSent { path, round_trip, all_sent, busy, ..frame }) {
            *self.learned.lock().unwrap_or_else(PoisonError::into_inner) = Some(lane.clone());
        }
    }
}

/// The paths to all peers. What is known of one is forgotten when nobody uses it: it may be another the next time.
#[derive(Debug, Default)]
pub struct CommonPaths(Mutex<BTreeMap<SpiffeId, Weak<CommonPath>>>);

impl CommonPaths {
    /// The path to this peer, for a migration as long as it runs.
    #[must_use]
    pub fn to(&self, peer: &SpiffeId) -> Arc<CommonPath> {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = paths.get(peer).and_then(Weak::upgrade) {
            return path;
        }
        paths.retain(|_, path| path.strong_count() > 0);
        let path = Arc::default();
        paths.insert(peer.clone(), Arc::downgrade(&path));
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Effort;

    fn stats(rtt: Duration) -> LinkStats {
        LinkStats { rtt, ..LinkStats::default() }
    }

    #[test]
    fn a_path_is_shared_while_somebody_uses_it_and_forgotten_afterwards() {
        let paths = CommonPaths::default();
        let [one, two] = ["spiffe://a.test/gateway/one", "spiffe://a.test/gateway/two"].map(|peer| peer.parse::<SpiffeId>().unwrap());
        let first = paths.to(&one);
        first.sent(7);
        assert_eq!(paths.to(&one).sent_bytes(), 7);
        assert_eq!(paths.to(&two).sent_bytes(), 0);
        drop(first);
        assert_eq!(paths.to(&one).sent_bytes(), 0);
        assert_eq!(paths.0.lock().unwrap().len(), 1, "nobody uses the other");
    }

    #[test]
    fn the_shortest_round_trip_counts() {
        let path = CommonPath::default();
        let trips = [9, 3, 40].map(Duration::from_millis);
        assert_eq!(trips.map(|rtt| path.round_trip(&stats(rtt))), [9, 3, 3].map(Duration::from_millis));
        assert_eq!(path.adaptation(&stats(Duration::from_millis(50))).effort(), Effort::None, "a short path");
    }

    #[test]
    fn a_new_lane_goes_on_where_others_are() {
        let path = CommonPath::default();
        let mut lane = path.adaptation(&stats(Duration::from_micros(100)));
        assert_eq!(lane.effort(), Effort::None);
        lane.probed(1 << 18, 1 << 16, Duration::from_micros(300));
        while lane.effort() == Effort::None {
            // 10 MB/s.
            let frame = FrameSent {
                packing: Duration::from_micros(50),
                waiting: Duration::from_millis(50),
                content: 1 << 19,
                wire: 1 << 19,
                ..FrameSent::default()
            };
            path.adapt(&mut lane, frame, &stats(Duration::from_micros(100)));
        }
        assert_eq!(path.adaptation(&stats(Duration::from_micros(100))).effort(), lane.effort());
    }
}
