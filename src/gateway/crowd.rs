//! What each peer may take up: sessions at once, and sessions in a time. Every session costs entries of the audit log, so
//! that this also bounds how fast a peer can fill the disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::limits;
use crate::types::SpiffeId;

/// A configured peer, or everybody else together.
pub(super) type Who = Option<SpiffeId>;

/// Everybody who comes to this gateway.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    loads: Mutex<BTreeMap<Who, Load>>,
}

#[derive(Debug)]
struct Load {
    sessions: usize,
    /// Sessions that may come now, in parts of one.
    allowance: f64,
    since: Instant,
    turned_away: u64,
}

/// Room for one session; dropping it makes room for another.
#[derive(Debug)]
pub(super) struct Seat {
    crowd: Arc<Crowd>,
    who: Who,
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(load) = self.crowd.lock().get_mut(&self.who) {
            load.sessions = load.sessions.saturating_sub(1);
        }
    }
}

impl Crowd {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Who, Load>> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more attempt is served and recorded by itself; if not, it is counted.
    pub(super) fn attempt(&self, who: &Who, now: Instant) -> bool {
        let mut loads = self.lock();
        let full = Load { sessions: 0, allowance: f64::from(limits::SESSIONS_BURST), since: now, turned_away: 0 };
        let load = loads.entry(who.clone()).or_insert(full);
        let earned = now.saturating_duration_since(load.since).as_secs_f64() * f64::from(limits::SESSIONS_PER_SECOND);
        load.allowance = (load.allowance + earned).min(f64::from(limits::SESSIONS_BURST));
        load.since = now;
        let served = load.allowance >= 1.0;
        if served {
            load.allowance -= 1.0;
        } else {
            load.turned_away += 1;
        }
        served
    }

    /// A place for a session, if the peer has not too many.
    pub(super) fn sit(self: &Arc<Self>, who: &Who, now: Instant) -> Option<Seat> {
        if !self.attempt(who, now) {
            return None;
        }
        let mut loads = self.lock();
        let load = loads.get_mut(who)?;
        if load.sessions >= limits::SESSIONS_PER_PEER_MAX {
            load.turned_away += 1;
            return None;
        }
        load.sessions += 1;
        Some(Seat { crowd: Arc::clone(self), who: who.clone() })
    }

    /// How many of each were turned away since this was last asked.
    pub(super) fn turned_away(&self) -> Vec<(Who, u64)> {
        let mut loads = self.lock();
        let turned = loads.iter_mut().map(|(who, load)| (who.clone(), std::mem::take(&mut load.turned_away)));
        turned.filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn peer(name: &str) -> Who {
        Some(format!("spiffe://dc1/gateway/{name}").parse().unwrap())
    }

    #[test]
    fn a_peer_that_takes_all_its_room_takes_none_of_another_s() {
        let (crowd, now) = (Arc::new(Crowd::default()), Instant::now());
        let seats: Vec<_> = std::iter::from_fn(|| crowd.sit(&peer("a"), now)).collect();
        assert_eq!(seats.len(), limits::SESSIONS_PER_PEER_MAX);
        assert!(crowd.sit(&peer("b"), now).is_some());
        assert_eq!(crowd.turned_away(), [(peer("a"), 1)]);
        assert_eq!(crowd.turned_away(), []);
        drop(seats);
        assert!(crowd.sit(&peer("a"), now).is_some());
    }

    #[test]
    fn attempts_are_served_in_a_burst_and_then_at_a_rate() {
        let (crowd, now) = (Crowd::default(), Instant::now());
        let served = (0..10_000).filter(|_| crowd.attempt(&None, now)).count();
        assert_eq!(served, limits::SESSIONS_BURST as usize);
        assert_eq!(crowd.turned_away(), [(None, 10_000 - u64::from(limits::SESSIONS_BURST))]);
        let later = now + Duration::from_secs(10);
        let served = (0..10_000).filter(|_| crowd.attempt(&None, later)).count();
        assert_eq!(served, 10 * limits::SESSIONS_PER_SECOND as usize);
        assert!(crowd.attempt(&peer("a"), later));
    }
}
