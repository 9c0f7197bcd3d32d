//! Bandwidth limits: one that the lanes of a migration share, and one that all departures of a gateway share.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::engine::sharing::{BURST, Member, Next, Sharing, Wish};

/// A token bucket: at most `rate` bytes a second, with bursts of a twentieth of a second. Both limits hold where there are two.
#[derive(Debug)]
pub(super) struct Limiter {
    /// Bytes a second; 0 is no limit.
    rate: AtomicU64,
    /// When the bytes given out so far will have been sent at that rate.
    free_at: Mutex<Option<Instant>>,
    /// Bytes that were sent and not waited for.
    owed: AtomicUsize,
    share: Option<Share>,
}

impl Limiter {
    pub(super) fn new(bytes_per_second: Option<u64>, share: Option<Share>) -> Self {
        Self { rate: AtomicU64::new(bytes_per_second.unwrap_or(0)), free_at: Mutex::new(None), owed: AtomicUsize::new(0), share }
    }

    /// In its final phase a migration goes before others that are not.
    pub(super) fn set_final(&self, is_final: bool) {
        if let Some(share) = &self.share {
            share.total.lock().sharing.set_final(share.member, is_final);
            share.total.changed.notify_one();
        }
    }

    pub(super) fn set(&self, bytes_per_second: Option<u64>) {
        self.rate.store(bytes_per_second.unwrap_or(0), Ordering::Relaxed);
    }

    /// How long to wait before sending `bytes`, which then count as sent.
    fn book(&self, bytes: usize, now: Instant) -> Duration {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return Duration::ZERO;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        // Time that passed unused is worth a burst, not more.
        let start = free_at.map_or(now, |at| at.max(now.checked_sub(BURST).unwrap_or(now)));
        *free_at = Some(start + cost);
        start.saturating_duration_since(now)
    }

    /// Counts bytes that are sent at once: whoever acquires some next waits for these too.
    pub(super) fn owe(&self, bytes: usize) {
        self.owed.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) async fn acquire(&self, bytes: usize) {
        let bytes = bytes + self.owed.swap(0, Ordering::Relaxed);
        let wait = self.book(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        if let Some(share) = &self.share {
            share.acquire(bytes).await;
        }
    }
}

/// A bandwidth limit for all departures of a gateway together.
#[derive(Debug)]
pub struct TotalBandwidth {
    given: Mutex<Given>,
    /// Told when who comes next, or when, may have changed.
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Given {
    sharing: Sharing,
    waiting: BTreeMap<Wish, oneshot::Sender<()>>,
}

/// A migration's part of it; given back when dropped.
#[derive(Debug)]
pub struct Share {
    total: Arc<TotalBandwidth>,
    member: Member,
}

impl TotalBandwidth {
    /// A limit in bytes a second. The task that gives it out ends with it.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Arc<Self> {
        let changed = Arc::new(Notify::new());
        let given = Given { sharing: Sharing::new(bytes_per_second), waiting: BTreeMap::new() };
        let total = Arc::new(Self { given: Mutex::new(given), changed: Arc::clone(&changed) });
        tokio::spawn(give_out(Arc::downgrade(&total), changed));
        total
    }

    /// A part for one more migration.
    #[must_use]
    pub fn share(self: &Arc<Self>) -> Share {
        let member = self.lock().sharing.join();
        Share { total: Arc::clone(self), member }
    }

    fn lock(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for TotalBandwidth {
    fn drop(&mut self) {
        self.changed.notify_one();
    }
}

impl Given {
    /// Lets go whoever may; says when the next one may.
    fn give(&mut self, now: Instant) -> Option<Instant> {
        loop {
            match self.sharing.next(now) {
                // One that left at this moment does not listen any more.
                Next::Send(wish) => drop(self.waiting.remove(&wish).map(|told| told.send(()))),
                Next::At(at) => return Some(at),
                Next::Nothing => return None,
            }
        }
    }
}

async fn give_out(total: Weak<TotalBandwidth>, changed: Arc<Notify>) {
    while let Some(total) = total.upgrade() {
        let next = total.lock().give(Instant::now());
        drop(total);
        match next {
            Some(at) => drop(tokio::time::timeout_at(at.into(), changed.notified()).await),
            None => changed.notified().await,
        }
    }
}

impl Share {
    async fn acquire(&self, bytes: usize) {
        let (told, may) = oneshot::channel();
        let wish = {
            let mut given = self.total.lock();
            let wish = given.sharing.want(self.member, bytes);
            given.waiting.insert(wish, told);
            given.give(Instant::now());
            if !given.waiting.contains_key(&wish) {
                return;
            }
            wish
        };
        self.total.changed.notify_one();
        let _waiting = Waiting { share: self, wish };
        // Without anybody who gives out, the gateway is at its end.
        let _ = may.await;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.total.lock().sharing.leave(self.member);
        self.total.changed.notify_one();
    }
}

/// A lane that ends while it waits wants nothing any more.
struct Waiting<'a> {
    share: &'a Share,
    wish: Wish,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut given = self.share.total.lock();
        given.sharing.forget(self.share.member, self.wish);
        given.waiting.remove(&self.wish);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spread_over_time_at_the_rate() {
        let limiter = Limiter::new(Some(1_000_000), None);
        let start = Instant::now();
        let mut now = start;
        for _ in 0..100 {
            now += limiter.book(100_000, now);
        }
        let seconds = (now - start).as_secs_f64();
        assert!((9.5..=10.0).contains(&seconds), "{seconds}");
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let limiter = Limiter::new(Some(1_000_000), None);
        let start = Instant::now();
        limiter.book(1, start);
        let later = start + Duration::from_secs(100);
        assert_eq!(limiter.book(1_000_000, later), Duration::ZERO);
        assert!(limiter.book(1, later) >= Duration::from_millis(900));
    }

    #[test]
    fn no_limit_never_waits_and_a_limit_can_be_set_later() {
        let limiter = Limiter::new(None, None);
        let now = Instant::now();
        assert_eq!(limiter.book(usize::MAX / 2, now), Duration::ZERO);
        limiter.set(Some(1000));
        limiter.book(1000, now);
        assert!(limiter.book(1, now) > Duration::from_millis(900));
    }

    #[tokio::test]
    async fn a_total_limit_holds_for_all_and_a_lane_that_ended_holds_up_nobody() {
        let total = TotalBandwidth::new(1_000_000);
        let (one, two) = (Limiter::new(None, Some(total.share())), Limiter::new(None, Some(total.share())));
        one.acquire(500_000).await;
        // It waits behind what was sent, and ends.
        assert!(tokio::time::timeout(Duration::ZERO, one.acquire(1_000_000_000)).await.is_err());
        assert_eq!(total.lock().waiting.len(), 0);
        let _still = one;
        assert!(matches!(total.lock().sharing.next(Instant::now()), Next::Nothing));
        two.set_final(true);
        two.acquire(1_000_000).await;
    }
}
