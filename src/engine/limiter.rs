//! A bandwidth limit shared by the lanes of a migration.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A token bucket: at most `rate` bytes a second, with bursts of a twentieth of a second.
#[derive(Debug)]
pub(super) struct Limiter {
    /// Bytes a second; 0 is no limit.
    rate: AtomicU64,
    /// When the bytes given out so far will have been sent at that rate.
    free_at: Mutex<Option<Instant>>,
}

const BURST: Duration = Duration::from_millis(50);

impl Limiter {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { rate: AtomicU64::new(bytes_per_second.unwrap_or(0)), free_at: Mutex::new(None) }
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
        let mut free_at = self.free_at.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Time that passed unused is worth a burst, not more.
        let start = free_at.map_or(now, |at| at.max(now.checked_sub(BURST).unwrap_or(now)));
        *free_at = Some(start + cost);
        start.saturating_duration_since(now)
    }

    pub(super) async fn acquire(&self, bytes: usize) {
        let wait = self.book(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spread_over_time_at_the_rate() {
        let limiter = Limiter::new(Some(1_000_000));
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
        let limiter = Limiter::new(Some(1_000_000));
        let start = Instant::now();
        limiter.book(1, start);
        let later = start + Duration::from_secs(100);
        assert_eq!(limiter.book(1_000_000, later), Duration::ZERO);
        assert!(limiter.book(1, later) >= Duration::from_millis(900));
    }

    #[test]
    fn no_limit_never_waits_and_a_limit_can_be_set_later() {
        let limiter = Limiter::new(None);
        let now = Instant::now();
        assert_eq!(limiter.book(usize::MAX / 2, now), Duration::ZERO);
        limiter.set(Some(1000));
        limiter.book(1000, now);
        assert!(limiter.book(1, now) > Duration::from_millis(900));
    }
}
