//! What a migration measures while it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::engine::CommonPath;
use crate::memory::PageCounts;
use crate::wire::Handoff;

/// Counters that the lanes advance and the progress display reads.
#[derive(Debug, Default)]
pub struct Meter {
    pages: AtomicU64,
    frame_bytes: AtomicU64,
    path: Arc<CommonPath>,
}

impl Meter {
    pub(super) fn on(path: Arc<CommonPath>) -> Self {
        Self { path, ..Self::default() }
    }

    pub(super) fn path(&self) -> &CommonPath {
        &self.path
    }

    pub(super) fn frame(&self, pages: u64, bytes: u64) {
        self.pages.fetch_add(pages, Ordering::Relaxed);
        self.frame_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.path.sent(bytes);
    }

    /// Pages sent.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Bytes of frames sent, without what QUIC and UDP add.
    #[must_use]
    pub fn frame_bytes(&self) -> u64 {
        self.frame_bytes.load(Ordering::Relaxed)
    }
}

/// The figures of a finished migration.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Passes over dirty pages, the last one included.
    pub rounds: u32,
    /// Pages by how they were sent.
    pub pages: PageCounts,
    /// Bytes that the source sent on all lanes, UDP payload.
    pub wire_bytes: u64,
    /// Most that tables of equal pages, of earlier versions and of codecs took at the source, bytes.
    pub table_bytes: u64,
    /// Time that lanes spent to make frames of pages, all of them together.
    pub encode: Duration,
    /// From before the pause until the destination said RUNNING, which is taken to have travelled half of a round trip.
    pub downtime: Option<Duration>,
    /// Where the downtime went, in order.
    pub breakdown: Vec<(&'static str, Duration)>,
    /// How often the link was lost and stood again.
    pub reconnects: u32,
    /// How long the link was away, all outages together.
    pub stalled: Duration,
    /// Bytes of frames that were sent again because an outage took them.
    pub resent_bytes: u64,
    /// Why some of a hypervisor's own stream went as it is, if it did.
    pub opaque: Option<&'static str>,
    /// Whether memory and state were compared and equal.
    pub verified: bool,
    /// What came behind the switch, if the guest was split.
    pub split: Option<SplitFigures>,
    /// What disks did.
    pub disks: DiskFigures,
    /// The destination's last audit head.
    pub peer_audit_head: Option<String>,
}

/// What a guest that was split got behind the switch.
#[derive(Debug, Clone, Copy, Default)]
pub struct SplitFigures {
    /// From RUNNING until it lacked nothing.
    pub took: Duration,
    /// Pages that it has waited for.
    pub faults: u64,
}

/// What moved of disks.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiskFigures {
    /// Whether they were all that was to be copied, and are there.
    pub only: bool,
    /// How many.
    pub count: usize,
    /// How long they are, all together.
    pub bytes: u64,
    /// Ranges that were written, zeroed or discarded at the destination.
    pub changed_bytes: u64,
    /// What was there already and was not sent.
    pub held_bytes: u64,
    /// What it took of the pause to compare them; nothing when they were not.
    pub verify: Option<Duration>,
}

/// Splits a span of time into named parts.
#[derive(Debug)]
pub(super) struct Stopwatch {
    start: Instant,
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
    /// The guest runs; what comes behind is not of the span.
    over: bool,
}

impl Stopwatch {
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, laps: Vec::new(), over: false }
    }

    /// Everything since the last lap was spent on `what`.
    pub(super) fn lap(&mut self, what: &'static str) {
        self.lap_until(what, Instant::now());
    }

    /// The peer's answer was heard now, with a round trip of `rtt`. What counts of RUNNING is when it was said, half of that earlier:
    /// the guest runs since then.
    pub(super) fn heard(&mut self, step: &Handoff, rtt: Duration) {
        let now = Instant::now();
        match step {
            Handoff::Prepared { .. } => self.lap_until("destination", now),
            Handoff::Running => {
                self.lap_until("network", now.checked_sub(rtt / 2).unwrap_or(now).max(self.last));
                self.over = true;
            }
            _ => self.lap_until("network", now),
        }
    }

    fn lap_until(&mut self, what: &'static str, now: Instant) {
        if self.over {
            return;
        }
        let spent = now - self.last;
        self.last = now;
        match self.laps.iter_mut().find(|(name, _)| *name == what) {
            Some((_, sum)) => *sum += spent,
            None => self.laps.push((what, spent)),
        }
    }

    pub(super) fn total(&self) -> Duration {
        self.last - self.start
    }

    pub(super) fn laps(&self) -> &[(&'static str, Duration)] {
        &self.laps
    }
}

/// So many bytes in so many seconds, as a rate.
pub(super) fn per_second(bytes: u64, seconds: f64) -> u64 {
    let micros = (seconds * 1e6).max(1.0);
    // Both are far below 2^53; the quotient of two non-negative numbers fits.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a display value; saturates")]
    let rate = (bytes as f64 * 1e6 / micros) as u64;
    rate
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ErrorClass;

    #[test]
    fn the_way_of_running_does_not_count_as_pause() {
        let at = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
        let watch = || Stopwatch { start: at, last: at, laps: Vec::new(), over: false };
        let mut long = watch();
        long.heard(&Handoff::Running, Duration::from_secs(4));
        assert!((3..5).contains(&long.total().as_secs()), "{:?}", long.total());
        assert_eq!(long.laps(), [("network", long.total())]);
        // Neither does what the source writes down afterwards, which would take the way along.
        let running = long.total();
        long.lap("journal");
        long.heard(&Handoff::Running, Duration::from_secs(4));
        assert_eq!((long.total(), long.laps().len()), (running, 1));

        // A round trip that was measured wrong does not make what is over undone.
        let mut wrong = watch();
        wrong.heard(&Handoff::Running, Duration::from_secs(100));
        assert_eq!(wrong.total(), Duration::ZERO);

        let mut refused = watch();
        refused.heard(&Handoff::Refuse { class: ErrorClass::Denied }, Duration::from_secs(4));
        assert!(refused.total() >= Duration::from_secs(5));
    }
}
